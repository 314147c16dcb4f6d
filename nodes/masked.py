"""Objects placed by boxes through masked attention (PEEKABOO, arXiv 2312.07509)."""

import torch
from comfy_api.latest import io

from ..attention.labels import BoxRegions
from ..host import override
from ..host.board import MARK
from ..host.masked import LAYERS, MaskedOptions, MaskedRule
from ..host.queueing import ABSENT, refusal
from ..host.rule import fraction
from ..host.words import KEY, find_board_words, find_words

Boxes = io.Custom("STORYWEFT_BOXES")
SAMPLINGS = ("by area", "as the authors")
FRAME_RULES = ("average", "any")


class MaskedAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftMaskedAttention",
            display_name="Masked Attention",
            category="Storyweft/Boxes",
            description="Objects appear where boxes are drawn: in the first steps a box's pixels see only each other and the "
            "object's words, everything else sees only the rest. Needs no training and no weights (PEEKABOO).",
            search_aliases=["peekaboo", "boxes", "regional prompt", "layout"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD1.5, SD2, SDXL (pictures, or frames as a batch, also with AnimateDiff-Evolved), SVD, Wan, LTXV, "
                    "HunyuanVideo, CogVideoX, Mochi, Flux, Chroma, SD3, Qwen-Image, Z-Image.",
                ),
                Boxes.Input(
                    "boxes",
                    tooltip="From Box Track: objects with words and a box per frame; 1 frame holds for all. Frames are the "
                    "pictures of the batch, or the frames of a video.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Encodes prompt. Leave it out for models without text (SVD)."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="The whole prompt. The words of each object in boxes must stand in it.",
                ),
                io.Float.Input(
                    "masked_part",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling steps, from the first, that are masked; at least one step. 0 is off. The paper "
                    "uses 0.05 to 0.1; more binds stronger and costs quality. Small models need more.",
                ),
                io.Int.Input(
                    "masked_steps",
                    default=0,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="Number of masked steps; above 0 it replaces masked_part.",
                ),
                io.Boolean.Input(
                    "spatial",
                    default=True,
                    advanced=True,
                    tooltip="Mask attention within a picture, and within a whole video on transformers. Keeps quality.",
                ),
                io.Boolean.Input(
                    "temporal",
                    default=True,
                    advanced=True,
                    tooltip="Mask attention from frame to frame in video U-Nets and motion modules. Keeps the object in place.",
                ),
                io.Boolean.Input(
                    "cross",
                    default=True,
                    advanced=True,
                    tooltip="Mask attention to words: a box sees its object's words, the rest all other words. Places the object.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default="auto",
                    advanced=True,
                    tooltip="U-Net blocks that are masked. auto: all for pictures, middle and output path for videos, as published.",
                ),
                io.Combo.Input(
                    "frame_rule",
                    options=list(FRAME_RULES),
                    default="average",
                    advanced=True,
                    tooltip="Where a latent frame holds several video frames: average takes what half of them cover, any what one "
                    "of them covers (fast objects).",
                ),
                io.Combo.Input(
                    "sampling",
                    options=list(SAMPLINGS),
                    default="by area",
                    advanced=True,
                    tooltip="How boxes become tokens: covered by half or more, or sampled as in the authors' code, which loses "
                    "small boxes.",
                ),
                io.Conditioning.Input(
                    "board_conditioning",
                    optional=True,
                    tooltip="A board's, from Frame-Story Cross Attention, in place of prompt: objects' words are looked for in "
                    "every caption. Boxes lie on the whole board.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with masked attention."),
                io.Conditioning.Output(
                    "conditioning", tooltip="The prompt, or the board's captions, with the objects' words marked: connect it to positive."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt="", clip=ABSENT, board_conditioning=ABSENT) -> bool | str:
        return refusal(cls, (check_prompt,), prompt=prompt, clip=clip, board_conditioning=board_conditioning)

    @classmethod
    def execute(
        cls,
        model,
        boxes,
        clip=None,
        prompt="",
        masked_part=0.05,
        masked_steps=0,
        spatial=True,
        temporal=True,
        cross=True,
        layers="auto",
        frame_rule="average",
        sampling="by area",
        board_conditioning=None,
    ) -> io.NodeOutput:
        node_id = MaskedRule.node_id
        fraction(node_id, "masked_part", masked_part)
        if masked_steps < 0:
            raise ValueError(f"{node_id}: masked_steps is {masked_steps}; give 0 or more.")
        check_prompt(node_id, prompt, clip, board_conditioning)
        if board_conditioning is not None:
            _check_board(board_conditioning, clip, prompt, cross, node_id)
        corners = [
            [(box.x0, box.y0, box.x1, box.y1) if box else (float("nan"),) * 4 for box in thing.boxes]
            for thing in boxes.objects
        ]
        if not corners:
            raise ValueError(f"{node_id}: boxes holds no object.")
        options = MaskedOptions(
            masked_part,
            masked_steps,
            spatial,
            temporal,
            cross and (clip is not None or board_conditioning is not None),
            layers,
            frame_rule == "any",
            sampling == "as the authors",
        )
        phrases = [thing.words for thing in boxes.objects]
        conditioning = []
        if board_conditioning is not None:
            for text, extras in board_conditioning:
                marks = {KEY: _board_words(clip, extras[MARK], phrases, node_id)} if cross else {}
                conditioning.append([text, {**extras, **marks}])
        elif clip is not None:
            for text, extras in clip.encode_from_tokens_scheduled(clip.tokenize(prompt)):
                marks = {KEY: find_words(clip, prompt, phrases, text.shape[1], node_id)} if cross else {}
                conditioning.append([text, {**extras, **marks}])
        ratio = model.model.latent_format.temporal_downscale_ratio
        rule = MaskedRule(BoxRegions(torch.tensor(corners, dtype=torch.float64)), options, ratio)
        return io.NodeOutput(override.register(model, rule), conditioning)


def check_prompt(node_id: str, prompt: str, clip, board_conditioning) -> None:
    """ValueError for a prompt without a text encoder or the other way round, where no board brings captions."""
    if board_conditioning is not None:
        return
    if clip is not None and not prompt.strip():
        raise ValueError(f"{node_id}: prompt is empty; write it, or disconnect clip for a model without text.")
    if clip is None and prompt.strip():
        raise ValueError(f"{node_id}: prompt is '{prompt}' but no clip is connected to encode it.")


def _check_board(conditioning, clip, prompt: str, cross: bool, node_id: str) -> None:
    """Raises ValueError unless the words of boxes can be looked for in the captions of a board's conditioning."""
    if prompt.strip():
        raise ValueError(f"{node_id}: prompt is '{prompt}' and board_conditioning brings its own captions; empty prompt.")
    marks = [extras.get(MARK) for _, extras in conditioning]
    if not marks or None in marks:
        raise ValueError(
            f"{node_id}: board_conditioning is no board's; connect the conditioning of StoryweftFrameStoryCrossAttention."
        )
    if cross and clip is None:
        raise ValueError(f"{node_id}: clip is needed to find the objects' words in board_conditioning; connect the board's.")
    if cross and any(mark.has_summary for mark in marks):
        raise ValueError(
            f"{node_id}: board_conditioning has a summary, whose words cannot be marked; leave it out, or switch cross off."
        )


def _board_words(clip, mark, phrases: list[str], node_id: str):
    """Words of the captions of a BoardText."""
    frames = mark.board.shape.frames
    return find_board_words(clip, mark.board.captions, phrases, len(mark.labels) // frames, node_id)


NODES = [MaskedAttention]
