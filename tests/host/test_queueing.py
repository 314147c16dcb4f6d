"""What nodes refuse of typed values is said when a graph is queued; the same values through a link are refused in the run."""

import asyncio
import inspect
from types import SimpleNamespace

import execution
import folder_paths
import pytest
import server
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.internal import first_real_override
from storyweft.host.joint_av import JointAVModel
from storyweft.host.queueing import ABSENT
from storyweft.nodes import NODE_FILES

import nodes

PACK = {node.GET_SCHEMA().node_id: node for file in NODE_FILES for node in file.NODES}
ASKED = [name for name, node in PACK.items() if first_real_override(node, "validate_inputs")]
VALUES = {}
SOCKETS = {"images": torch.zeros(1, 8, 8, 3), "latent": {"samples": NestedTensor([torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 1, 8)])}}
CASES = [
    ("StoryweftConsistentSelfAttention", {"start_percent": 0.9, "end_percent": 0.1}, "start_percent 0.9 lies after end_percent 0.1"),
    ("StoryweftConsistentSelfAttention", {"window": 1}, "window is 1, so no picture would see another"),
    ("StoryweftStyleAligned", {"start_percent": 0.9, "end_percent": 0.1}, "start_percent 0.9 lies after end_percent 0.1"),
    ("StoryweftAdaptivePromptAlignment", {"start_percent": 0.9, "end_percent": 0.1}, "start_percent 0.9 lies after end_percent 0.1"),
    ("StoryweftFrameStoryCrossAttention", {"start_percent": 0.9, "end_percent": 0.1}, "start_percent 0.9 lies after end_percent 0.1"),
    ("StoryweftMaskedAttention", {"prompt": "a fox"}, "prompt is 'a fox' but no clip is connected"),
    ("StoryweftStorySampler", {"denoise": 0.0}, "denoise is 0.0; give a number above 0"),
    ("StoryweftStorySampler", {"panel_seeds": "three: 5"}, "panel_seeds has the line 'three: 5'"),
    ("StoryweftScript", {"panels": "[Nobody] in the forest"}, "StoryweftScript: panels, line 1"),
    ("StoryweftStoryGenStory", {"prompts": " "}, "prompts is empty; write one prompt a line, or connect a story"),
    ("StoryweftStoryboard", {"background": "no colour"}, "background 'no colour' is no colour"),
    ("StoryweftBoard", {"captions": "a fox\na bear"}, "captions holds 2 captions for 4 frames"),
    ("StoryweftBoard", {"draw_frames": "9"}, "draw_frames: '9' names no frames"),
    ("StoryweftBoard", {"known_frames": "1"}, "holds 0 pictures for 1 known frames"),
    ("StoryweftBoxTrack", {"frames": 0}, "frames is 0 and neither images nor latent is connected"),
    ("StoryweftBoxTrack", {"boxes": "fox | 0: 0.5 0.1 0.1 0.9"}, "must run from left to right"),
    ("StoryweftBoxTrack", {"boxes": ""}, "boxes: there is no object"),
    ("StoryweftBoxPlanPrompt", {"frames": 2, "key_frames": 3}, "3 key frames are more than the 2 frames"),
    ("StoryweftBoxPlanner", {"answer": "no"}, "the answer holds no line 'Frame 1"),
    ("StoryweftJointAVLoader", {"windows": "1, x"}, 'windows "1, x" must be whole numbers'),
    ("StoryweftRandomShiftAVSampler", {"guidance": "gradient", "method": "ddim"}, 'not method "ddim" with task "video and sound"'),
    ("StoryweftRespacedSigmas", {"respacing": "dpm"}, "StoryweftRespacedSigmas: respacing \"dpm\": after dpm must stand"),
    ("StoryweftRespacedSigmas", {"respacing": "few"}, 'respacing "few" is neither'),
    ("StoryweftAudioCaption", {"captioner": "language model (clip)"}, "captioner is 'language model (clip)' and clip is not"),
    ("StoryweftTypedCaption", {"caption": " "}, "StoryweftTypedCaption: the caption is empty"),
    ("StoryweftTypedCaption", {"audio_attention": "much"}, "audio_attention holds 'much', which is no number"),
    ("StoryweftDemoSound", {"loudness": 0.0, "background": 0.0}, "or both are silent; choose one"),
    ("StoryweftSoundOptimise", {"gradient_calls": 30, "steps": 20}, "gradient_calls is 30 of 21 model calls"),
    ("StoryweftLoadJointEncoder", {"encoder": "some.safetensors"}, "switch licence_read on to load it"),
    ("StoryweftJointEncode", {"text": " "}, "audio, image and text are all empty"),
    ("StoryweftEmbeddingMix", {"way": "great circle", "second_weight": 1.5}, "needs a second_weight from 0 to 1, not 1.5"),
    ("StoryweftApplyPromptMapping", {"way": "append to text"}, "way is 'append to text' and text is not connected"),
]  # fmt: skip
LABELS = [f"{name}-{'-'.join(inputs)}" for name, inputs, _ in CASES]


class Joint(JointAVModel):
    """A joint model without a network."""

    def __init__(self):
        torch.nn.Module.__init__(self)


class Given:
    """Any value through a link."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "give", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def give(self, name):
        return (VALUES.get(name, object()),)


class End:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "end", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",)}}

    def end(self, value):
        return {}


class Page:
    """What the executor needs of a server."""

    client_id = last_node_id = last_prompt_id = None
    sockets_metadata = {}

    def send_sync(self, *event):
        pass

    def send_progress_text(self, text, node_id):
        pass


@pytest.fixture(autouse=True)
def host(monkeypatch):
    for name, node in {**PACK, "Given": Given, "End": End}.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
    monkeypatch.setattr(server.PromptServer, "instance", Page(), raising=False)
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda folder: ["some.safetensors"])
    VALUES.clear()


def is_widget(one) -> bool:
    typed = getattr(one, "default", None) is not None or bool(getattr(one, "options", None))
    return typed and not getattr(one, "force_input", None)


def graph_of(name: str, typed: dict, linked: dict | None = None) -> dict:
    """A node with its defaults, the values of `typed`, and those of `linked` through links."""
    graph = {"node": {"class_type": name, "inputs": {}}, "end": {"class_type": "End", "inputs": {"value": ["node", 0]}}}
    for one in PACK[name].GET_SCHEMA().inputs:
        if one.id in typed:
            value = typed[one.id]
        elif is_widget(one) and one.id not in (linked or {}):
            value = one.default if one.default is not None else one.options[0]
        elif one.optional and one.id not in (linked or {}):
            continue
        else:
            graph[one.id] = {"class_type": "Given", "inputs": {"name": one.id}}
            value = [one.id, 0]
        graph["node"]["inputs"][one.id] = value
    return graph


def queued(graph: dict) -> tuple[list, str]:
    """Outputs that will run, and what was refused."""
    _, _, outputs, errors = asyncio.run(execution.validate_prompt("id", graph, None))
    return outputs, "\n".join(error["details"] for node in errors.values() for error in node["errors"])


@pytest.mark.parametrize("name", ASKED)
def test_defaults_pass(name):
    needed = {
        "StoryweftStoryGenStory": {"prompts": "a fox"},
        "StoryweftJointEncode": {"text": "a fox"},
        "StoryweftDemoSound": {"voice": "fox"},
    }
    assert queued(graph_of(name, needed.get(name, {}))) == (["end"], "")


def test_boxes_of_a_path_in_the_graph_itself_pass_without_typed_ones():
    assert queued(graph_of("StoryweftBoxTrack", {"boxes": "", "paths": '[{"x": 10, "y": 10}]'})) == (["end"], "")


def test_graphs_from_before_an_input_was_added_pass():
    for name, added in (("StoryweftSoundOptimise", "augment"), ("StoryweftLoadSoundJudge", "caption_judge")):
        graph = graph_of(name, {})
        del graph["node"]["inputs"][added]
        assert queued(graph) == (["end"], "")


@pytest.mark.parametrize(("name", "inputs", "sentence"), CASES, ids=LABELS)
def test_typed_values_are_refused_when_the_graph_is_queued(name, inputs, sentence):
    outputs, refused = queued(graph_of(name, inputs))
    assert outputs == []
    assert f"{name}: " in refused and sentence in refused


@pytest.mark.parametrize(("name", "inputs", "sentence"), CASES, ids=LABELS)
def test_linked_values_are_refused_in_the_run_with_the_same_sentence(name, inputs, sentence):
    graph = graph_of(name, {}, inputs)
    outputs, refused = queued(graph)
    assert (outputs, refused) == (["end"], "")
    VALUES.update(SOCKETS | ({"model": SimpleNamespace(model=Joint())} if "RandomShift" in name else {}) | inputs)
    executor = execution.PromptExecutor(
        Page(), cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0}
    )
    executor.execute(graph, "id", {}, outputs)
    assert not executor.success
    message = executor.status_messages[-1][1]["exception_message"]
    assert f"{name}: " in message and sentence in message


@pytest.mark.parametrize("name", ASKED)
def test_validate_inputs_names_inputs_with_the_defaults_of_execute(name):
    inputs = {one.id: one for one in PACK[name].GET_SCHEMA().inputs}
    asked = inspect.signature(PACK[name].validate_inputs).parameters
    executed = inspect.signature(PACK[name].execute).parameters
    for parameter in asked.values():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        one = inputs[parameter.name]
        if not is_widget(one):
            assert parameter.default is ABSENT
        elif one.optional:
            assert parameter.default == executed[one.id].default
        elif parameter.default is not None:
            assert parameter.default == one.default


BOUNDS = [(name, one) for name in ASKED for one in inspect.signature(PACK[name].validate_inputs).parameters]


@pytest.mark.parametrize(("name", "input_id"), BOUNDS)
def test_bounds_and_options_that_comfyui_no_longer_checks_are_still_refused(name, input_id):
    one = next(one for one in PACK[name].GET_SCHEMA().inputs if one.id == input_id)
    beyond = []
    if getattr(one, "options", None):
        beyond = ["none of these"]
    elif getattr(one, "min", None) is not None:
        beyond = [one.min - 1, one.max + 1, "many"]
    for value in beyond:
        outputs, refused = queued(graph_of(name, {input_id: value}))
        assert outputs == [] and input_id in refused
