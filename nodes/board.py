"""Storyboards that a model draws as one picture (StoryImager, arXiv 2404.05979, the part that needs no training)."""

import logging

import torch
from comfy_api.latest import io

from ..host import families, override
from ..host import frame_story as rules
from ..host.board import Board, encode_board, encode_frames
from ..host.frame_story import KNOWN, PATHS, FrameStoryRule
from ..host.queueing import ABSENT, refusal
from ..host.rule import check_span, fraction, step_range
from ..story.board import MAX_FRAMES, ORDERS, BoardShape, captions_of, frames_of, task_of
from ..story.script import Story

BoardType = io.Custom("STORYWEFT_BOARD")
StoryType = io.Custom("STORYWEFT_STORY")
CATEGORY = "Storyweft/Story"
BOARD, BLOCK, FRAMES = "StoryweftBoard", "StoryweftFrameStoryCrossAttention", "StoryweftBoardFrames"
REFUSE, LEAVE_EMPTY, STRETCH = "refuse", "leave empty", "stretch"

CAPTIONS = """a fox in the forest by day
a fox on the beach at sunset
a fox in the snow by day
a fox in the city at night"""


class StoryBoard(io.ComfyNode):
    """Lays out a story as one latent with a mask, and its captions as one conditioning."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=BOARD,
            display_name="Board",
            category=CATEGORY,
            description="A whole story as one picture of rows x columns frames: latent, mask of what is to be drawn, and "
            "captions. Frames that have a picture stay as they are; all others are drawn to fit them.",
            search_aliases=["storyimager", "storyboard latent", "image grid", "replace panel", "story continuation"],
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoder of the model that draws the board."),
                io.String.Input(
                    "captions", multiline=True, default=CAPTIONS, dynamic_prompts=False,
                    tooltip="What each frame shows, one a line in story order. Empty: the prompts of the connected story.",
                ),
                io.Int.Input("rows", default=2, min=1, max=8, tooltip="Rows of frames on the board."),
                io.Int.Input("columns", default=2, min=1, max=8, tooltip="Columns of frames on the board."),
                io.Int.Input(
                    "frame_width", default=512, min=16, max=4096, step=8,
                    tooltip="Width of one frame in pixels; a multiple of 64 for SD1.5, 32 for SDXL, 16 for Flux.",
                ),
                io.Int.Input(
                    "frame_height", default=512, min=16, max=4096, step=8,
                    tooltip="Height of one frame in pixels; a multiple of 64 for SD1.5, 32 for SDXL, 16 for Flux.",
                ),
                io.Combo.Input(
                    "order", options=list(ORDERS), default=ORDERS[0],
                    tooltip="How the story runs over the board. The paper's drawings go column by column.",
                ),
                StoryType.Input("story", optional=True, tooltip="From Story Script: its prompts, if captions is empty."),
                io.Vae.Input("vae", optional=True, tooltip="Picture encoder; needed for known_images."),
                io.Image.Input(
                    "known_images", optional=True, tooltip="Pictures that frames already have, in the order of known_frames."
                ),
                io.Latent.Input(
                    "known_latents", optional=True,
                    tooltip="Latents of these pictures, such as Board Frames gives; without them known_images are encoded.",
                ),
                io.String.Input(
                    "known_frames", default="", optional=True,
                    tooltip="Frames that these pictures belong to, numbered from 1, such as '1, 3-4'. Empty: the first ones.",
                ),
                io.String.Input(
                    "draw_frames", default="", optional=True,
                    tooltip="Frames to draw, such as '3'. Empty: those without a picture. A frame that has one is replaced.",
                ),
                io.Int.Input("boards", default=1, min=1, max=64, optional=True, tooltip="Boards drawn in one batch."),
                io.Combo.Input(
                    "missing_captions", options=[REFUSE, LEAVE_EMPTY], default=REFUSE, optional=True, advanced=True,
                    tooltip="What to do when there are fewer captions than frames: stop, or draw these without a caption.",
                ),
                io.Combo.Input(
                    "other_sizes", options=[REFUSE, STRETCH], default=REFUSE, optional=True, advanced=True,
                    tooltip="What to do with known images of another size than the frames: stop, or stretch them.",
                ),
                io.Latent.Input(
                    "empty_frame", optional=True, advanced=True,
                    tooltip="One empty frame as the model wants it, for models whose latents are not 8 times smaller than "
                    "the picture or hold several pictures in time; sets the frame size.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent", tooltip="The board for the sampler, with a mask of what is to be drawn."),
                io.Conditioning.Output(
                    "conditioning", tooltip="All captions one after the other; Frame-Story Cross Attention keeps them apart."
                ),
                BoardType.Output("board", tooltip="Layout, captions and known frames, for Board Frames."),
                io.String.Output("report", tooltip="The task, and what is kept, drawn or replaced."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, captions=None, rows=None, columns=None, story=ABSENT, known_images=ABSENT, known_latents=ABSENT,
        known_frames="", draw_frames="", boards=1, missing_captions=REFUSE,
    ) -> bool | str:  # fmt: skip
        if captions and captions.strip():
            story = ABSENT  # typed captions go before it
        return refusal(
            cls, (_lines, _choices, _known), captions=captions, rows=rows, columns=columns, story=story,
            known_images=known_images, known_latents=known_latents, known_frames=known_frames, draw_frames=draw_frames,
            boards=boards, missing_captions=missing_captions,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip, captions, rows, columns, frame_width, frame_height, order, story=None, vae=None, known_images=None,
        known_latents=None, known_frames="", draw_frames="", boards=1, missing_captions=REFUSE, other_sizes=REFUSE,
        empty_frame=None,
    ) -> io.NodeOutput:  # fmt: skip
        if clip is None:
            raise ValueError(f"{BOARD}: clip is empty, the checkpoint has no text encoder; add a CLIP loader node.")
        shape = BoardShape(rows, columns, order)
        if not 1 <= shape.frames <= MAX_FRAMES:
            raise ValueError(f"{BOARD}: {rows} x {columns} is {shape.frames} frames; a board holds 1 to {MAX_FRAMES}.")
        lines = _lines(captions, story, rows, columns, boards, missing_captions)
        pictures, latents, targets = _known(rows, columns, known_images, known_latents, known_frames, draw_frames)
        factor = _factor(vae, empty_frame)
        size = _pixels(frame_width, frame_height, factor, empty_frame)
        pictures = {frame: _fitted(frame, picture, size, other_sizes) for frame, picture in pictures.items()}
        if latents is None and pictures:
            if vae is None:
                raise ValueError(f"{BOARD}: known_images needs the vae; connect it, or give known_latents.")
            encoded = encode_frames(vae, torch.stack(list(pictures.values())))
            latents = dict(zip(pictures, encoded, strict=True))
        empty, more = _empty(size, factor, vae, empty_frame, latents or {})
        board = Board(shape, tuple(empty.shape[-2:]), lines, targets, latents or {}, pictures)
        _check_latents(board, empty)
        latent = {"samples": board.latent(empty, boards), "noise_mask": board.mask()[None], **more}
        if not board.known:
            del latent["noise_mask"]
        return io.NodeOutput(latent, encode_board(clip, board, BOARD), board, _report(board))


def _choices(known_frames, draw_frames, rows, columns) -> None:
    _numbers("known_frames", known_frames, rows * columns)
    _numbers("draw_frames", draw_frames, rows * columns)


def _lines(captions: str, story, rows: int, columns: int, boards: int, missing_captions: str) -> tuple[str, ...]:
    if story is not None and not isinstance(story, Story):
        raise ValueError(f"{BOARD}: story is {type(story).__name__}; connect the story output of Story Script.")
    source = "captions"
    if story is not None and not captions.strip():
        source, captions = "story", "\n".join(panel.prompt for panel in story.panels)
    try:
        return captions_of(captions, rows * columns, boards, missing_captions == LEAVE_EMPTY)
    except ValueError as error:
        raise ValueError(f"{BOARD}: {source} {error}.") from error


def _numbers(name: str, text: str, frames: int) -> tuple[int, ...]:
    try:
        return frames_of(text, frames)
    except ValueError as error:
        raise ValueError(f"{BOARD}: {name}: {error}.") from error


def _known(rows: int, columns: int, known_images, known_latents, known_frames: str, draw_frames: str):
    """Pictures and latents (None if not given) by frame, and which frames are targets."""
    frames, images, latents = rows * columns, known_images, known_latents and known_latents["samples"]
    counts = {name: len(x) for name, x in (("known_images", images), ("known_latents", latents)) if x is not None}
    count = max(counts.values(), default=0)
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{BOARD}: known_images holds {counts['known_images']} pictures and known_latents {counts['known_latents']}; "
            "give as many of both."
        )
    chosen = _numbers("known_frames", known_frames, frames) or tuple(range(count))
    if len(chosen) != count or count > frames:
        raise ValueError(
            f"{BOARD}: {' and '.join(counts) or 'known_images'} holds {count} pictures for {len(chosen)} known frames of a "
            f"board of {frames}; known_frames is '{known_frames[:40]}'."
        )
    drawn = _numbers("draw_frames", draw_frames, frames)
    targets = tuple((frame in drawn) if drawn else frame not in chosen for frame in range(frames))
    bare = [str(frame + 1) for frame, target in enumerate(targets) if not target and frame not in chosen]
    if bare:
        raise ValueError(
            f"{BOARD}: draw_frames is '{draw_frames[:40]}' and frame {', '.join(bare)} has no picture to keep; give its picture "
            "or draw it."
        )
    pictures = {} if images is None else {frame: images[i, ..., :3] for i, frame in enumerate(chosen)}
    kept = None if latents is None else {frame: latents[i] for i, frame in enumerate(chosen)}
    return pictures, kept, targets


def _fitted(frame: int, picture: torch.Tensor, size: tuple[int, int], other_sizes: str) -> torch.Tensor:
    """[height, width, 3] of the frame's size; other sizes are stretched or refused, never cut."""
    if picture.shape[-1] == 1:
        picture = picture.expand(-1, -1, 3)
    if tuple(picture.shape[:2]) == size:
        return picture
    if other_sizes == REFUSE:
        raise ValueError(
            f"{BOARD}: the picture of frame {frame + 1} is {picture.shape[1]} x {picture.shape[0]} pixels and frames are "
            f"{size[1]} x {size[0]}; resize it, or set other_sizes to {STRETCH}."
        )
    return torch.nn.functional.interpolate(
        picture.movedim(-1, 0)[None], size, mode="bilinear", antialias=True, align_corners=False
    )[0].movedim(0, -1).clamp(0, 1)  # fmt: skip


def _factor(vae, empty_frame) -> int:
    """Pixels per latent cell."""
    if vae is not None:
        return vae.spacial_compression_encode()
    return (empty_frame or {}).get("downscale_ratio_spacial") or 8


def _pixels(width: int, height: int, factor: int, empty_frame) -> tuple[int, int]:
    """(height, width) of a frame in pixels."""
    if empty_frame is not None:
        return tuple(side * factor for side in empty_frame["samples"].shape[-2:])
    if width % factor or height % factor:
        near = " or ".join(f"{_near(width, factor, up)} x {_near(height, factor, up)}" for up in (False, True))
        raise ValueError(f"{BOARD}: a frame of {width} x {height} pixels is no multiple of {factor}; use {near}.")
    return height, width


def _empty(size: tuple[int, int], factor: int, vae, empty_frame, latents: dict) -> tuple[torch.Tensor, dict]:
    """An empty frame [channels, ..., h, w] and what the host wants to know of empty latents."""
    if empty_frame is not None:
        more = {key: value for key, value in empty_frame.items() if key.startswith("downscale_ratio")}
        return torch.zeros_like(empty_frame["samples"][0]), {} if latents else more
    cell = (size[0] // factor, size[1] // factor)
    if latents:
        some = next(iter(latents.values()))
        return some.new_zeros(*some.shape[:-2], *cell), {}
    return torch.zeros(4 if vae is None else vae.latent_channels, *cell), {"downscale_ratio_spacial": factor}


def _near(size: int, unit: int, up: bool) -> int:
    return max(unit, (size + unit - 1 if up else size) // unit * unit)


def _check_latents(board: Board, empty: torch.Tensor) -> None:
    for frame, latent in board.latents.items():
        if latent.shape != empty.shape:
            raise ValueError(
                f"{BOARD}: the latent of frame {frame + 1} is {tuple(latent.shape)} and frames are {tuple(empty.shape)} "
                "(channels, height, width); frames of one board have one size."
            )


def _report(board: Board) -> str:
    replaced = [str(frame + 1) for frame in sorted(board.latents) if board.targets[frame]]
    if not any(board.targets):
        lines = ["nothing to draw: every frame is known; the board comes back as it is"]
        logging.warning("%s: every frame has a picture, so there is nothing to draw.", BOARD)
    else:
        lines = [f"task: {task_of(board.targets, board.latents)}"]
    shape = board.shape
    lines.append(f"{shape.rows} x {shape.columns} frames, {shape.order}, {board.cell[1]} x {board.cell[0]} latent cells each")
    lines += [f"frame {', '.join(replaced)} has a picture that is replaced"] if replaced else []
    for frame in range(shape.frames):
        state = "draw" if board.targets[frame] else "keep"
        lines.append(f"{frame + 1} ({state}): {board.captions[frame] or '(no caption)'}")
    return "\n".join(lines)


class FrameStoryCrossAttention(io.ComfyNode):
    """Every frame of a board reads its own caption, and the board the story."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=BLOCK,
            display_name="Frame-Story Cross Attention",
            category=CATEGORY,
            description="Each frame of a board looks at its own caption, and by a chosen weight at the whole story, while "
            "self-attention ties all frames together. Needs no training (StoryImager).",
            search_aliases=["storyimager", "regional prompt", "attention couple", "prompt per panel", "fs-cam"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="SD1.5, SD2, SDXL, Flux, Chroma, SD3, Qwen-Image, Z-Image, Wan or LTXV model."
                ),
                io.Conditioning.Input("conditioning", tooltip="The positive conditioning of Board."),
                io.Float.Input(
                    "blend", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Weight of the whole story against the frame's own caption: 0 only its own, 1 only the story. "
                    "Must be 0 on models that read text and picture in one sequence (Flux, SD3, Qwen-Image...).",
                ),
                io.Combo.Input(
                    "known_frames", options=list(KNOWN), default=KNOWN[0],
                    tooltip="How the model sees frames that are kept: with as much noise as the rest (what published models were "
                    "trained for), or without noise as in the paper (their looks may carry over better).",
                ),
                io.Conditioning.Input(
                    "summary", optional=True,
                    tooltip="One prompt that tells the story, for the story branch; without it all captions are the story.",
                ),
                io.Combo.Input(
                    "layers", options=list(PATHS), default="all", optional=True, advanced=True,
                    tooltip="Where frames read their own captions; elsewhere every frame reads the whole story.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.001, optional=True, advanced=True,
                    tooltip="Part of the noise schedule at which frames begin to read their own captions; 0 is the start.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.001, optional=True, advanced=True,
                    tooltip="Part of the noise schedule after which every frame reads the whole story; 1 is the end.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model in which captions stay with their frames."),
                io.Conditioning.Output("conditioning", tooltip="The positive conditioning for the sampler."),
            ],
        )

    @classmethod
    def validate_inputs(cls, start_percent=0.0, end_percent=1.0) -> bool | str:
        return refusal(cls, (check_span,), start_percent=start_percent, end_percent=end_percent)

    @classmethod
    def execute(
        cls, model, conditioning, blend, known_frames, summary=None, layers="all", start_percent=0.0, end_percent=1.0
    ) -> io.NodeOutput:
        fraction(BLOCK, "blend", blend)
        sigma_range = step_range(model, BLOCK, start_percent, end_percent)
        family = families.find(model, BLOCK)
        if not conditioning:
            raise ValueError(f"{BLOCK}: conditioning is empty; connect the conditioning of StoryweftBoard.")
        prepared = rules.prepare(family, conditioning, summary, BLOCK)
        rules.check_family(family, model, prepared, blend, BLOCK)
        rule = FrameStoryRule(family, blend, layers, sigma_range, known_frames == "clean")
        return io.NodeOutput(override.register(model, rule), prepared)


class BoardFrames(io.ComfyNode):
    """Cuts a finished board into its frames."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=FRAMES,
            display_name="Board Frames",
            category=CATEGORY,
            description="Cuts a drawn board into its frames in story order. Frames that were known come back exactly: the same "
            "latents and the very pixels that were given.",
            search_aliases=["split grid", "storyimager", "storyboard frames", "cut panels"],
            inputs=[
                io.Latent.Input("samples", tooltip="The board as the sampler gave it."),
                BoardType.Input("board", tooltip="From Board."),
                io.Vae.Input("vae", tooltip="Picture decoder of the model."),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The frames in story order, board after board."),
                io.Latent.Output("latent", tooltip="Their latents in the same order."),
            ],
        )

    @classmethod
    def execute(cls, samples, board, vae) -> io.NodeOutput:
        if not isinstance(board, Board):
            raise ValueError(f"{FRAMES}: board is {type(board).__name__}; connect the board output of StoryweftBoard.")
        latents = samples["samples"]
        if tuple(latents.shape[-2:]) != board.size:
            raise ValueError(
                f"{FRAMES}: samples are {tuple(latents.shape[-2:])} latent cells and the board is {board.size} (height, width); "
                "connect the latent that was sampled from this board."
            )
        frames = board.frames(latents)
        images = vae.decode(frames)
        if images.ndim == 5:
            images = images.flatten(0, 1)
        given = set(board.known) & set(board.pictures)
        if given and len(images) != len(frames):
            logging.warning(
                "%s: the VAE makes %d pictures of %d frames, so the given pictures of known frames are not put back.",
                FRAMES,
                len(images),
                len(frames),
            )
            given = set()
        for frame in given:
            images[frame :: board.shape.frames] = board.pictures[frame].to(images)
        return io.NodeOutput(images, {"samples": frames})


NODES = [StoryBoard, FrameStoryCrossAttention, BoardFrames]
