"""Boxes over time: drawn, typed, taken from other nodes, or planned by a language model."""

from html import escape

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image
from server import PromptServer

from ..host.boxes import draw_boxes, fill_boxes, ground
from ..host.queueing import ABSENT, refusal
from ..story import box_sources
from ..story.box_plan import MAX_KEY_FRAMES, ask, complete_prompt, read_answer, read_boxes
from ..story.box_text import write_boxes
from ..story.boxes import INTERPOLATIONS, MAX_FRAMES, BoxError, BoxPlan, BoxTrack, make_track

BoxesType = io.Custom("STORYWEFT_BOXES")
TRACK_ID = "StoryweftBoxTrack"
ASK_ID = "StoryweftBoxPlanPrompt"
PLAN_ID = "StoryweftBoxPlanner"
MAX_SIDE = 16384
PREVIEW_PIXELS = 48_000_000  # of all frames of a preview together
SHOWN_FRAMES, SHOWN_SIDE = 16, 512  # pictures handed to the editor

EXAMPLE = "fox | 0: 0.05 0.45 0.35 0.9 | 1: 0.6 0.4 0.95 0.9\n"
EXAMPLE_ANSWER = """Reasoning: The fox runs from the left to the right.
Frame 1: [{'id': 0, 'name': 'fox', 'box': [10, 250, 160, 220]}]
Frame 2: [{'id': 0, 'name': 'fox', 'box': [170, 230, 170, 230]}]
Frame 3: [{'id': 0, 'name': 'fox', 'box': [330, 210, 180, 240]}]
Background keyword: forest
"""


def _frames(id_: str = "frames", least: int = 1, **options) -> io.Int.Input:
    return io.Int.Input(id_, default=16, min=least, max=MAX_FRAMES, step=1, **options)


def _side(id_: str) -> io.Int.Input:
    return io.Int.Input(
        id_, default=512, min=1, max=MAX_SIDE, step=1,
        tooltip=f"{id_.capitalize()} of the picture in pixels: the canvas of boxes in pixels.",
    )


def _interpolation() -> io.Combo.Input:
    return io.Combo.Input(
        "interpolation", options=list(INTERPOLATIONS), default="linear",
        tooltip="Between key frames: linear, straight with constant speed; smooth, monotone cubic, without corners.",
    )


class StoryweftBoxTrack(io.ComfyNode):
    """Per-object boxes with key frames."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=TRACK_ID,
            display_name="Box Track",
            category="Storyweft/Boxes",
            description="One box per object and frame, from key frames drawn in the node or written as text, and from "
            "detections, masks, paths and point tracks of other nodes.",
            search_aliases=["bounding box", "trajectory", "peekaboo", "bbox keyframes", "layout", "spline editor"],
            inputs=[
                io.String.Input(
                    "boxes", multiline=True, default=EXAMPLE, dynamic_prompts=False,
                    tooltip="What is drawn below, as text: JSON, or one object a line: words | time: x0 y0 x1 y1 | time: -. "
                    "Times run from 0 to 1, f8 is frame 8, corners from 0 to 1 or in pixels, - is absent. A language "
                    "model's lines 'Frame 1: [...]' are read too. Empty: boxes come from the other inputs.",
                ),
                _frames(
                    least=0, tooltip="Number of frames, 1 for a picture. 0: as many as the connected images or latent have."
                ),
                _side("width"),
                _side("height"),
                _interpolation(),
                io.Image.Input(
                    "images", optional=True,
                    tooltip="Pictures to draw the preview on: one, or one per frame. They set width and height.",
                ),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="Sets width and height (8 pixels per cell), and the frames where frames is 0.",
                ),
                io.BoundingBox.Input(
                    "bounding_boxes", optional=True, force_input=True,
                    tooltip="Core's boxes in pixels: one box or a list for all frames, or a list per frame (RT-DETR, SAM3).",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="One object: the box around each frame's mask (values from 0.5); one mask or one per frame.",
                ),
                io.Tracks.Input(
                    "tracks", optional=True, tooltip="One object: the box around all visible points, larger by source_width."
                ),
                io.String.Input(
                    "paths", optional=True, force_input=True,
                    tooltip="coord_str of KJNodes' spline editor: each path is an object's centre over time, in pixels.",
                ),
                io.String.Input(
                    "source_words", default="", optional=True, advanced=True, dynamic_prompts=False,
                    tooltip="Words of the objects of the other inputs, in this order: bounding_boxes, mask, tracks, paths; "
                    "separated by semicolons. Detections without words take their label.",
                ),
                io.Float.Input(
                    "source_width", default=0.25, min=0.0, max=2.0, step=0.01, optional=True, advanced=True,
                    tooltip="Width of the box around a path's point, or beyond tracks, as a part of the picture.",
                ),
                io.Float.Input(
                    "source_height", default=0.25, min=0.0, max=2.0, step=0.01, optional=True, advanced=True,
                    tooltip="Height of the box around a path's point, or beyond tracks, as a part of the picture.",
                ),
            ],
            outputs=[
                BoxesType.Output("track", display_name="boxes", tooltip="Boxes of all objects in all frames."),
                io.String.Output("text", display_name="text", tooltip="All boxes as JSON; this node reads it back."),
                io.Image.Output("preview", display_name="preview", tooltip="Every frame with its boxes and their ways."),
                io.Mask.Output("union", display_name="mask", tooltip="1 inside any box, per frame."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, boxes=None, frames=None, width=None, height=None, interpolation=None, images=ABSENT, latent=ABSENT,
        bounding_boxes=ABSENT, mask=ABSENT, tracks=ABSENT, paths=ABSENT,
    ) -> bool | str:  # fmt: skip
        return refusal(
            cls, (_count, _read, _track), boxes=boxes, frames=frames, width=width, height=height, interpolation=interpolation,
            images=images, latent=latent, bounding_boxes=bounding_boxes, mask=mask, tracks=tracks, paths=paths,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, boxes, frames, width, height, interpolation, images=None, latent=None, bounding_boxes=None, mask=None,
        tracks=None, paths=None, source_words="", source_width=0.25, source_height=0.25,
    ) -> io.NodeOutput:
        width, height = _size(width, height, images, latent)
        frames = _count(frames, images, latent)
        canvas = (width, height)
        plan, notes = _typed(boxes, canvas)
        taken = {item.id for item in plan.objects}
        words = [part.strip() for part in source_words.split(";")] if source_words.strip() else []
        given = list(plan.objects)
        size = (source_width, source_height)
        for name, kind, value, read in (
            ("bounding_boxes", "box", bounding_boxes, lambda: box_sources.from_bounding_boxes(bounding_boxes, frames, canvas)),
            ("mask", "mask", mask, lambda: box_sources.from_extents(_extents(mask), frames)),
            ("tracks", "track", tracks, lambda: _from_tracks(tracks, frames, size, canvas)),
            ("paths", "path", paths, lambda: box_sources.from_paths(paths, size, canvas)),
        ):
            if value is not None:
                given += box_sources.named(_told(name, read), kind, words, taken)
        if words:
            raise ValueError(f"{TRACK_ID}: source_words has no object left for {words[0]!r}; the other inputs give fewer.")
        plan = BoxPlan(tuple(given), plan.background, canvas, plan.fps)
        track = _told("boxes", make_track, plan, frames, interpolation)
        text = write_boxes(plan)
        preview = _preview(track, canvas, images)
        _say(cls, "\n".join([track.describe(), *notes]))
        shown = {"text": text, "frames": frames, "width": width, "height": height, "pictures": _shown(cls, images)}
        masks = torch.from_numpy(fill_boxes(track, canvas))
        return io.NodeOutput(track, text, preview, masks, ui={"storyweft_boxes": [shown]})


class StoryweftBoxPlanPrompt(io.ComfyNode):
    """The question to a language model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=ASK_ID,
            display_name="Box Plan Prompt",
            category="Storyweft/Boxes",
            description="Writes the question that makes a language model plan boxes for a sentence. Send it to core's "
            "Generate Text (any CLIP that can generate) or any other text node, and its answer to Box Planner.",
            search_aliases=["llm layout", "video planning", "text to boxes", "llm grounded"],
            inputs=[
                io.String.Input(
                    "scene", multiline=True, default="A fox runs through the forest from left to right.",
                    dynamic_prompts=False, tooltip="One sentence: who moves how, and where.",
                ),
                _frames(tooltip="Frames of the video."),
                _side("width"),
                _side("height"),
                io.Int.Input(
                    "key_frames", default=6, min=1, max=MAX_KEY_FRAMES, step=1,
                    tooltip="Boxes the model plans, evenly spaced over the video; those between are interpolated.",
                ),
            ],
            outputs=[io.String.Output("prompt", display_name="prompt", tooltip="For a text generation node.")],
        )

    @classmethod
    def validate_inputs(cls, scene=None, frames=None, width=None, height=None, key_frames=None) -> bool | str:
        return refusal(cls, (_question,), scene=scene, frames=frames, width=width, height=height, key_frames=key_frames)

    @classmethod
    def execute(cls, scene, frames, width, height, key_frames) -> io.NodeOutput:
        return io.NodeOutput(_question(scene, frames, width, height, key_frames))


class StoryweftBoxPlanner(io.ComfyNode):
    """A language model's answer as boxes."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PLAN_ID,
            display_name="Box Planner",
            category="Storyweft/Boxes",
            description="Reads a language model's plan (Frame 1: [{'id', 'name', 'box'}], ..., Background keyword) into "
            "boxes and reports what it mended or could not read.",
            search_aliases=["llm layout", "video planning", "text to boxes", "llm grounded"],
            inputs=[
                io.String.Input(
                    "answer", multiline=True, default=EXAMPLE_ANSWER, dynamic_prompts=False,
                    tooltip="The model's answer: connect a text generation node, or type a plan. JSON is read too.",
                ),
                io.String.Input(
                    "scene", default="A fox runs through the forest.", dynamic_prompts=False,
                    tooltip="The sentence that was planned; the prompt output adds what it does not name.",
                ),
                _frames(tooltip="Frames of the video; the plan's key frames are spread over them."),
                _side("width"),
                _side("height"),
                _interpolation(),
            ],
            outputs=[
                BoxesType.Output("track", display_name="boxes", tooltip="Boxes of all objects in all frames."),
                io.String.Output("text", display_name="text", tooltip="The plan as JSON, for Box Track's text."),
                io.String.Output(
                    "prompt", display_name="prompt",
                    tooltip="The scene, with objects it does not name and the background, for the text encoder.",
                ),
                io.String.Output("report", display_name="report", tooltip="What was read, mended and left out."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, answer=None, frames=None, width=None, height=None, interpolation=None) -> bool | str:
        return refusal(
            cls, (_answered,), answer=answer, frames=frames, width=width, height=height, interpolation=interpolation
        )

    @classmethod
    def execute(cls, answer, scene, frames, width, height, interpolation) -> io.NodeOutput:
        plan, notes, track = _answered(answer, frames, width, height, interpolation)
        report = "\n".join([track.describe(), *(notes or ["Everything was read as it stands."])])
        _say(cls, report)
        return io.NodeOutput(track, write_boxes(plan), complete_prompt(scene, plan), report, ui=ui.PreviewText(report))


def _question(scene: str, frames: int, width: int, height: int, key_frames: int) -> str:
    try:
        return ask(scene, frames, (width, height), key_frames)
    except BoxError as error:
        raise ValueError(f"{ASK_ID}: {error}") from error


def _answered(answer: str, frames: int, width: int, height: int, interpolation: str) -> tuple[BoxPlan, list[str], BoxTrack]:
    try:
        plan, notes = read_answer(answer, (width, height))
        return plan, notes, make_track(plan, frames, interpolation)
    except BoxError as error:
        raise ValueError(f"{PLAN_ID}: answer: {error}") from error


def _typed(boxes: str, canvas: tuple[int, int]) -> tuple[BoxPlan, list[str]]:
    return _told("boxes", read_boxes, boxes, canvas) if boxes.strip() else (BoxPlan(()), [])


def _read(boxes, width, height, images, latent) -> None:
    _typed(boxes, _size(width, height, images, latent))


def _track(boxes, frames, width, height, interpolation, images, latent, bounding_boxes, mask, tracks, paths) -> None:
    """Asked where no object comes from a link; what comes from literals of other inputs is read in the run."""
    if any(one is not None for one in (bounding_boxes, mask, tracks, paths)):
        return
    plan, _ = _typed(boxes, _size(width, height, images, latent))
    _told("boxes", make_track, plan, _count(frames, images, latent), interpolation)


def _told(source: str, read, *values):
    """What `read` gives; its refusal with this node and the input named."""
    try:
        return read(*values)
    except BoxError as error:
        raise ValueError(f"{TRACK_ID}: {source}: {error}") from error


def _say(cls, text: str) -> None:
    """Shows text in the node, where there is a page."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and cls.hidden is not None and cls.hidden.unique_id is not None:
        server.send_progress_text(escape(text, quote=False), cls.hidden.unique_id)


def _size(width: int, height: int, images, latent) -> tuple[int, int]:
    if images is not None:
        return images.shape[2], images.shape[1]
    if latent is not None:
        scale = latent.get("downscale_ratio_spacial", 8)
        return latent["samples"].shape[-1] * scale, latent["samples"].shape[-2] * scale
    return width, height


def _count(frames: int, images, latent) -> int:
    """Frames of the track; pictures that do not fit them are refused."""
    latents = None
    if latent is not None:
        shape = latent["samples"].shape
        latents = shape[2] if len(shape) == 5 else shape[0]
    if frames == 0:
        if images is None and latents is None:
            raise ValueError(f"{TRACK_ID}: frames is 0 and neither images nor latent is connected; write the number of frames.")
        frames = images.shape[0] if images is not None else latents
    if images is not None and images.shape[0] not in (1, frames):
        raise ValueError(
            f"{TRACK_ID}: images holds {images.shape[0]} pictures for {frames} frames; give one or {frames}, or set frames to 0."
        )
    return frames


def _extents(mask: torch.Tensor) -> list[tuple[float, float, float, float] | None]:
    """The box around the cells of at least 0.5 of every mask [frames, height, width], None for an empty one."""
    if mask.ndim not in (2, 3):
        raise ValueError(f"{TRACK_ID}: mask has the shape {list(mask.shape)}; connect masks [frames, height, width].")
    masks = mask.reshape(-1, *mask.shape[-2:]) >= 0.5
    height, width = masks.shape[-2:]
    found = []
    for one in masks:
        rows, columns = one.any(1).nonzero().flatten().tolist(), one.any(0).nonzero().flatten().tolist()
        here = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height) if rows else None
        found.append(here)
    return found


def _from_tracks(tracks: dict, frames: int, size: tuple[float, float], canvas: tuple[int, int]) -> list:
    points, visible = tracks["track_path"], tracks.get("track_visibility")
    if points.ndim != 3 or points.shape[-1] != 2:
        raise BoxError(f"track_path has the shape {list(points.shape)} instead of [frames, points, 2].")
    if visible is not None:
        visible = visible.reshape(points.shape[:2]).bool().tolist()
    return box_sources.from_tracks(points.tolist(), visible, frames, size, canvas)


def _picture(image: torch.Tensor) -> Image.Image:
    rgb = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(-1, -1, 3)
    return Image.fromarray((torch.nan_to_num(rgb.float().cpu()).clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def _preview(track: BoxTrack, canvas: tuple[int, int], images) -> torch.Tensor:
    """[frames, height, width, 3]; smaller than the canvas only where all frames together would pass PREVIEW_PIXELS."""
    scale = min(1.0, (PREVIEW_PIXELS / (track.frames * canvas[0] * canvas[1])) ** 0.5)
    size = (max(1, round(canvas[0] * scale)), max(1, round(canvas[1] * scale)))
    pictures = [ground(size)] if images is None else [_picture(image).resize(size) for image in images]
    drawn = np.empty((track.frames, size[1], size[0], 3), dtype=np.float32)
    for frame in range(track.frames):
        drawn[frame] = np.asarray(draw_boxes(track, frame, pictures[min(frame, len(pictures) - 1)]), dtype=np.float32) / 255
    return torch.from_numpy(drawn)


def _shown(cls, images) -> list[dict]:
    """Small copies of some of the pictures, evenly spaced, as files for the editor in the page."""
    if images is None:
        return []
    count = min(len(images), SHOWN_FRAMES)
    chosen = [round(place * (len(images) - 1) / max(count - 1, 1)) for place in range(count)]
    small = [_picture(images[place]) for place in chosen]
    for picture in small:
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    stack = torch.from_numpy(np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in small]))
    return [dict(saved) for saved in ui.PreviewImage(stack, cls=cls).values]


NODES = [StoryweftBoxTrack, StoryweftBoxPlanPrompt, StoryweftBoxPlanner]
