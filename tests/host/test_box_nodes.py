"""The box nodes in ComfyUI's executor: sources, sizes, previews, refusals, and core's text generation as the planner."""

import asyncio
import json

import execution
import folder_paths
import pytest
import server
import torch
from comfy_extras.nodes_textgen import TextGenerate
from storyweft.nodes import boxes as node_file
from storyweft.nodes.boxes import EXAMPLE_ANSWER, NODES, StoryweftBoxPlanner, StoryweftBoxPlanPrompt, StoryweftBoxTrack
from storyweft.story.box_text import parse_boxes
from storyweft.story.boxes import BoxTrack

import nodes

FOX = "fox | 0: 0 0.5 0.25 1 | 1: 0.75 0.5 1 1"
TRACK = {"boxes": FOX, "frames": 5, "width": 64, "height": 32, "interpolation": "linear"}


def run_node(node, **inputs):
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).EXECUTE_NORMALIZED(**inputs)


def track(**change):
    return run_node(StoryweftBoxTrack, **(TRACK | change))


@pytest.fixture(autouse=True)
def temp(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


def test_a_track_its_text_its_preview_and_its_mask_agree():
    boxes, text, preview, mask = track().args
    assert isinstance(boxes, BoxTrack) and boxes.frames == 5
    assert track(boxes=text).args[0] == boxes and parse_boxes(text).canvas == (64, 32)
    assert preview.shape == (5, 32, 64, 3) and mask.shape == (5, 32, 64)
    for frame in range(5):
        expected = torch.zeros(32, 64)
        expected[16:, 12 * frame : 12 * frame + 16] = 1
        assert torch.equal(mask[frame], expected)
    red = torch.tensor([255, 90, 95]) / 255
    found = [(picture - red).abs().sum(-1).lt(0.02).nonzero() for picture in preview]
    assert [int(place[:, 1].max()) for place in found] == sorted(int(place[:, 1].max()) for place in found)
    assert torch.equal(preview[2][0, 0], preview[4][0, 0])


def test_pictures_set_the_size_and_frames_and_lie_under_the_boxes():
    images = torch.rand(5, 48, 96, 3)
    result = track(frames=0, images=images)
    preview = result.args[2]
    assert result.args[0].frames == 5 and preview.shape == (5, 48, 96, 3)
    for frame in range(5):
        assert torch.allclose(preview[frame][:10], images[frame][:10], atol=0.003)
    (shown,) = result.ui["storyweft_boxes"]
    assert (shown["frames"], shown["width"], shown["height"], len(shown["pictures"])) == (5, 96, 48, 5)
    assert track(images=images[:1]).args[2].shape[0] == 5


@pytest.mark.parametrize(("samples", "size", "frames"), [
    (torch.zeros(7, 4, 4, 8), (64, 32), 7), (torch.zeros(1, 16, 3, 4, 8), (64, 32), 3),
])
def test_a_latent_sets_size_and_frames(samples, size, frames):
    mask = track(frames=0, latent={"samples": samples}).args[3]
    assert mask.shape == (frames, size[1], size[0])
    assert track(frames=2, latent={"samples": samples}).args[3].shape[0] == 2


def test_all_sources_join_in_order_with_their_words():
    mask = torch.zeros(5, 16, 16)
    mask[1:, 4:8, 8:12] = 0.9
    tracks = {"track_path": torch.full((5, 3, 2), 16.0), "track_visibility": torch.ones(5, 3, dtype=torch.bool)}
    boxes = track(
        mask=mask, tracks=tracks, paths='[{"x": 8, "y": 16}, {"x": 40, "y": 16}]', source_width=0.25, source_height=0.5,
        bounding_boxes=[[{"x": 0, "y": 0, "width": 16, "height": 16, "label": "cat"}]] * 5, source_words=";a ball;;a bird",
    ).args[0]
    assert [(item.id, item.words) for item in boxes.objects] == [
        ("fox", "fox"), ("cat", "cat"), ("a ball", "a ball"), ("track", ""), ("a bird", "a bird"),
    ]
    ball, spot, bird = (item.boxes for item in boxes.objects[2:])
    assert ball[0] is None and (ball[1].x0, ball[1].y0, ball[1].x1, ball[1].y1) == (0.5, 0.25, 0.75, 0.5)
    assert spot[0].x0 == pytest.approx(0.125) and spot[0].y1 == pytest.approx(0.75)
    assert [round(box.x0, 4) for box in bird] == [0, 0.125, 0.25, 0.375, 0.5]
    assert [item.id for item in track(boxes="", mask=mask).args[0].objects] == ["mask"]


@pytest.mark.parametrize(("change", "says"), [
    ({"boxes": ""}, "boxes: there is no object"),
    ({"boxes": "fox | 0: 1 2 3"}, "boxes: line 1: '1 2 3' is no box"),
    ({"boxes": "fox | f9: 0 0 1 1"}, "boxes: object 'fox': key frame at frame 9, but the frames are 0 to 4"),
    ({"frames": 0}, "frames is 0 and neither images nor latent is connected"),
    ({"images": torch.zeros(3, 8, 8, 3)}, "images holds 3 pictures for 5 frames"),
    ({"mask": torch.zeros(3, 8, 8)}, "mask: holds 3 masks for 5 frames"),
    ({"mask": torch.zeros(5, 8, 8)}, "mask: is empty in all frames"),
    ({"mask": torch.zeros(5, 1, 8, 8)}, r"mask has the shape \[5, 1, 8, 8\]"),
    ({"bounding_boxes": []}, "bounding_boxes: holds no box"),
    ({"paths": "x"}, "paths: 'x' is no JSON list of points"),
    ({"tracks": {"track_path": torch.zeros(5, 2)}}, r"tracks: track_path has the shape \[5, 2\]"),
    ({"source_words": "a dog"}, "source_words has no object left for 'a dog'"),
])
def test_a_refusal_names_node_input_and_value(change, says):
    with pytest.raises(ValueError, match=f"^StoryweftBoxTrack: {says}"):
        track(**change)


def test_the_planner_nodes_refuse_by_name():
    size = {"frames": 16, "width": 512, "height": 512}
    with pytest.raises(ValueError, match="^StoryweftBoxPlanPrompt: 20 key frames are more than the 16 frames"):
        run_node(StoryweftBoxPlanPrompt, scene="a fox", key_frames=20, **size)
    with pytest.raises(ValueError, match="^StoryweftBoxPlanner: answer: .* begins with 'no idea'"):
        run_node(StoryweftBoxPlanner, answer="no idea", scene="", interpolation="linear", **size)


def test_long_videos_get_smaller_previews_and_whole_masks(monkeypatch):
    monkeypatch.setattr(node_file, "PREVIEW_PIXELS", 5 * 64 * 32 // 4)
    _, _, preview, mask = track().args
    assert mask.shape == (5, 32, 64) and preview.shape == (5, 16, 32, 3)


# --- in the executor, with core's text generation --------------------------------------------------------------------

class Keep:
    """Output node that keeps what it is given."""
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "keep", True, "test"
    kept: list = []

    @classmethod
    def INPUT_TYPES(cls):
        kinds = {"boxes": "STORYWEFT_BOXES", "report": "STRING", "prompt": "STRING", "preview": "IMAGE"}
        return {"optional": {name: (kind, {"forceInput": True}) for name, kind in kinds.items()}}

    def keep(self, **inputs):
        self.kept.append(inputs)
        return {}


class Recorded:
    """A text encoder that can generate: it remembers the question and gives a recorded answer."""
    answer = EXAMPLE_ANSWER
    asked: list = []

    def tokenize(self, text, **options):
        self.asked.append(text)
        return text

    def generate(self, tokens, **options):
        return [1, 2, 3]

    def decode(self, ids, **options):
        return self.answer


class RecordedLoader:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "load", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        return (Recorded(),)


class Page:
    """What the executor and the nodes need of a server."""
    client_id = last_node_id = last_prompt_id = None

    def __init__(self):
        self.sockets_metadata, self.shown = {}, []

    def send_sync(self, *event):
        pass

    def send_progress_text(self, text, node_id):
        self.shown.append((node_id, text))


def execute(monkeypatch, prompt):
    page = Page()
    for node in (*NODES, TextGenerate, Keep, RecordedLoader):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.__name__, node)
    monkeypatch.setattr(server.PromptServer, "instance", page, raising=False)
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("id", prompt, None))
    assert valid and not node_errors, (error, node_errors)
    options = {"lru": 0, "ram": 0, "ram_inactive": 0}
    executor = execution.PromptExecutor(page, cache_type=execution.CacheType.CLASSIC, cache_args=options)
    executor.execute(prompt, "id", {}, outputs)
    return executor, page


def planned(**change) -> dict:
    size = {"frames": 16, "width": 512, "height": 512}
    return {
        "1": {"class_type": "RecordedLoader", "inputs": {}},
        "2": {"class_type": "StoryweftBoxPlanPrompt", "inputs": {"scene": "A fox runs.", "key_frames": 3, **size}},
        "3": {"class_type": "TextGenerate", "inputs": {
            "clip": ["1", 0], "prompt": ["2", 0], "max_length": 512, "sampling_mode": "off"}},
        "4": {"class_type": "StoryweftBoxPlanner", "inputs": {
            "answer": ["3", 0], "scene": "A fox runs.", "interpolation": "smooth", **size, **change}},
        "5": {"class_type": "StoryweftBoxTrack", "inputs": {"boxes": ["4", 1], "interpolation": "smooth", **size}},
        "6": {"class_type": "Keep", "inputs": {"boxes": ["4", 0], "prompt": ["4", 2], "report": ["4", 3], "preview": ["5", 2]}},
    }


def test_cores_text_generation_plans_boxes(monkeypatch):
    executor, page = execute(monkeypatch, planned())
    assert executor.success, executor.status_messages[-1]
    assert "3 key frames, 512 x 512" in Recorded.asked[-1] and Recorded.asked[-1].rstrip().endswith("A fox runs.")
    kept = Keep.kept[-1]
    assert kept["boxes"].objects[0].boxes[15].x1 == pytest.approx(510 / 512)
    assert kept["prompt"] == "A fox runs., forest background" and "Everything was read" in kept["report"]
    assert kept["preview"].shape == (16, 512, 512, 3)
    assert ("4", kept["report"]) in page.shown


def test_a_poor_answer_is_mended_with_a_report_and_none_is_refused(monkeypatch):
    monkeypatch.setattr(Recorded, "answer", EXAMPLE_ANSWER.replace("[330, 210, 180, 240]", "[420, 210, 180, 240]"))
    execute(monkeypatch, planned())
    assert "leaves the picture; cut at its edge" in Keep.kept[-1]["report"]
    monkeypatch.setattr(Recorded, "answer", "As a language model <b> I cannot")
    executor, _ = execute(monkeypatch, planned())
    assert not executor.success
    assert executor.status_messages[-1][1]["exception_message"].strip() == (
        "StoryweftBoxPlanner: answer: the answer holds no line 'Frame 1: [...]'; it begins with 'As a language model <b> I cannot'."
    )


def test_the_editor_gets_the_text_and_small_pictures(monkeypatch):
    shown = track(images=torch.rand(40, 8, 1024, 3), frames=0).ui["storyweft_boxes"][0]
    assert json.loads(shown["text"])["objects"][0]["id"] == "fox"
    assert len(shown["pictures"]) == 16 and all(file["type"] == "temp" for file in shown["pictures"])
