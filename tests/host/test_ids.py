"""Node ids, help pages, translations, tooltips and workflows agree."""

import asyncio
import json

import pytest
from comfy_api.latest import io
from loading import ROOT
from storyweft.nodes import StoryweftExtension

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
