"""Node ids, help pages, translations, tooltips and workflows agree."""

import asyncio
import json
import sys

import pytest
from comfy_api.latest import io
from loading import ROOT
from storyweft.nodes import StoryweftExtension

sys.path.insert(0, str(ROOT / "tools"))
import workflow_sources  # noqa: E402

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NODES = asyncio.run(StoryweftExtension().get_node_list())
SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}


def test_ids_that_were_released_stay():
    assert set(SCHEMAS) >= {
        "StoryweftDemoLoader",
        "StoryweftDemoVideoLoader",
        "StoryweftScript",
        "StoryweftPanelConditioning",
        "StoryweftConsistentSelfAttention",
        "StoryweftStoryboard",
        "StoryweftStorySampler",
        "StoryweftRecallCharacter",
        "StoryweftSaveCharacter",
        "StoryweftLoadCharacter",
        "StoryweftStyleAligned",
        "StoryweftStyleReference",
        "StoryweftBoard",
        "StoryweftBoardFrames",
        "StoryweftFrameStoryCrossAttention",
        "StoryweftMaskedAttention",
        "StoryweftBoxTrack",
        "StoryweftBoxPlanPrompt",
        "StoryweftBoxPlanner",
        "StoryweftAdaptivePromptAlignment",
        "StoryweftLoadImageAdapter",
        "StoryweftSubject",
        "StoryweftDemoSubject",
        "StoryweftSemanticMotionPredictor",
        "StoryweftLoadMotionPredictor",
        "StoryweftKeyframeLatent",
        "StoryweftJointAVLoader",
        "StoryweftDemoJointAVLoader",
        "StoryweftJointAVSettings",
        "StoryweftNoPrompt",
        "StoryweftRandomShiftAVSampler",
        "StoryweftEmptyJointLatent",
        "StoryweftEncodeJointLatent",
        "StoryweftDecodeJointLatent",
        "StoryweftJointTimeMask",
        "StoryweftDDPMSampler",
        "StoryweftDPMSolverSampler",
        "StoryweftRespacedSigmas",
        "StoryweftFrameUpsamplerLoader",
        "StoryweftUpscaleFrames",
        "StoryweftFramesToImages",
        "StoryweftStoryGenLoader",
        "StoryweftStoryGenWeights",
        "StoryweftStoryGenReferences",
        "StoryweftStoryGenGuider",
        "StoryweftStoryGenStory",
        "StoryweftReferenceAttention",
        "StoryweftAudioCaption",
        "StoryweftTypedCaption",
        "StoryweftSentenceAttention",
        "StoryweftSpectrogram",
        "StoryweftDemoSound",
        "StoryweftAudioCaptionEmbedding",
        "StoryweftWordAttention",
        "StoryweftLoadSoundJudge",
        "StoryweftSoundOptimise",
        "StoryweftLoadJointEncoder",
        "StoryweftJointEncode",
        "StoryweftEmbeddingMix",
        "StoryweftEmbeddingToVision",
        "StoryweftLoadPromptMapping",
        "StoryweftApplyPromptMapping",
        "StoryweftTrainedBoard",
        "StoryweftLoadTrainedBoard",
        "StoryweftLoadMagDiff",
        "StoryweftHighFidelityAlignment",
    }


@pytest.mark.parametrize("node_id", SCHEMAS)
def test_every_node_builds_is_named_and_explains_its_inputs(node_id):
    schema = SCHEMAS[node_id]
    assert node_id.startswith("Storyweft")
    assert schema.category.startswith("Storyweft/")
    assert schema.description
    for entry in [*schema.inputs, *schema.outputs]:
        assert entry.tooltip, f"{node_id}.{entry.id} has no tooltip"
        if isinstance(entry, io.Float.Input):
            assert entry.step, f"{node_id}.{entry.id} has no step"


@pytest.mark.parametrize("node_id", SCHEMAS)
def test_every_node_has_a_help_page_in_both_languages(node_id):
    assert (ROOT / "web" / "docs" / f"{node_id}.md").read_text().startswith("# ")
    assert (ROOT / "web" / "docs" / node_id / "ko.md").read_text().startswith("# ")


def test_every_help_page_belongs_to_a_node():
    assert {page.stem for page in (ROOT / "web" / "docs").glob("*.md")} == set(SCHEMAS)


@pytest.mark.parametrize("language", ["en", "ko"])
def test_translations_name_every_node_input_and_output(language):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text())
    assert set(texts) == set(SCHEMAS)
    for node_id, schema in SCHEMAS.items():
        assert set(texts[node_id].get("inputs", {})) == {entry.id for entry in schema.inputs}, node_id
        assert set(texts[node_id]["outputs"]) == {str(index) for index in range(len(schema.outputs))}, node_id


def test_english_texts_are_those_of_the_schemas():
    texts = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text())
    for node_id, schema in SCHEMAS.items():
        assert (texts[node_id]["display_name"], texts[node_id]["description"]) == (schema.display_name, schema.description)
        told = {name: part["tooltip"] for name, part in texts[node_id].get("inputs", {}).items()}
        assert told == {part.id: part.tooltip for part in schema.inputs}
        told = {number: part["tooltip"] for number, part in texts[node_id]["outputs"].items()}
        assert told == {str(number): part.tooltip for number, part in enumerate(schema.outputs)}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_what_its_source_says(path):
    """Else somebody changed workflow_sources and did not run tools/make_workflows.py."""
    graph, note = workflow_sources.WORKFLOWS[path.stem]()
    api = json.loads((ROOT / "workflows" / "api" / path.name).read_text())
    assert {number: (node["class_type"], node["inputs"]) for number, node in api.items()} == {
        number: (node["class_type"], node["inputs"]) for number, node in graph.items()
    }
    page = json.loads(path.read_text())["nodes"]
    assert [node["widgets_values"][0] for node in page if node["type"] == "MarkdownNote"] == [note]
    for number, node in graph.items():
        shown = next(one for one in page if str(one["id"]) == number)
        values = [value for value in node["inputs"].values() if not isinstance(value, list)]
        assert [value for value in values if value not in shown.get("widgets_values", [])] == [], node["class_type"]


def test_every_source_has_a_workflow():
    assert {path.stem for path in WORKFLOWS} == set(workflow_sources.WORKFLOWS)


def test_every_node_is_shown_by_a_workflow_in_both_formats():
    shown = {
        node["type"] for path in (ROOT / "workflows").glob("*.json") for node in json.loads(path.read_text())["nodes"]
    }
    queued = {
        node["class_type"]
        for path in (ROOT / "workflows" / "api").glob("*.json")
        for node in json.loads(path.read_text()).values()
    }
    assert set(SCHEMAS) <= shown
    assert set(SCHEMAS) <= queued
