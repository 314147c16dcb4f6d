"""A story's pictures and captions on one sheet."""
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image, ImageColor

from ..host.queueing import refusal
from ..host.sheet import LAYOUTS, POSITIONS, Style, draw_sheet
from ..story.script import Story

StoryType = io.Custom("STORYWEFT_STORY")
NODE_ID = "StoryweftStoryboard"


class StoryweftStoryboard(io.ComfyNode):
    """Puts pictures on one sheet with captions."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=NODE_ID,
            display_name="Storyboard",
            category="Storyweft/Story",
            description="Puts the pictures of a story on one sheet, with captions in any script.",
            search_aliases=["comic page", "contact sheet", "image grid with captions", "storyboard"],
            inputs=[
                io.Image.Input("images", tooltip="Pictures in story order, one size."),
                StoryType.Input("story", optional=True, tooltip="From Story Script: its captions are used."),
                io.String.Input(
                    "captions", multiline=True, default="", optional=True, dynamic_prompts=False,
                    tooltip="One caption a line, used instead of the story's; a blank line leaves a picture bare.",
                ),
                io.Combo.Input(
                    "layout", options=list(LAYOUTS), default="grid",
                    tooltip="grid: equal rows; strip: one row; comic: rows of two and three with inked frames, "
                    "pictures cut to fit.",
                ),
                io.Int.Input(
                    "columns", default=0, min=0, max=100, step=1,
                    tooltip="Pictures in a row; 0 chooses by their number. A strip with 1 runs downwards.",
                ),
                io.Combo.Input(
                    "caption_position", options=list(POSITIONS), default="below",
                    tooltip="below the picture, over its lower part (comic: in a box at the top), or none.",
                ),
                io.Int.Input(
                    "font_size", default=0, min=0, max=512, step=1,
                    tooltip="Height of the letters in pixels; 0 chooses by the picture width. Smaller where a caption "
                    "over the picture would not fit.",
                ),
                io.Int.Input("gap", default=12, min=0, max=512, step=1, tooltip="Pixels between and around pictures."),
                io.String.Input(
                    "background", default="#ffffff", tooltip="Colour of the sheet: a name such as black, or #rrggbb."
                ),
            ],
            outputs=[io.Image.Output("sheet", display_name="sheet", tooltip="One picture with all panels.")],
        )

    @classmethod
    def validate_inputs(cls, background=None) -> bool | str:
        return refusal(cls, (colour_of,), background=background)

    @classmethod
    def execute(
        cls, images, layout, columns, caption_position, font_size, gap, background, story=None, captions=""
    ) -> io.NodeOutput:
        pictures = [picture_of(image) for image in images]
        style = Style(layout, columns, caption_position, font_size, gap, colour_of(background))
        lines = captions_of(len(pictures), story, captions)
        try:
            sheet = draw_sheet(pictures, lines, style)
        except ValueError as error:
            raise ValueError(f"{NODE_ID}: {error}") from error
        return io.NodeOutput(torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255.0)[None])


def picture_of(image: torch.Tensor) -> Image.Image:
    """[height, width, 1, 3 or 4] in 0..1; values that are no numbers become black."""
    rgb = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(-1, -1, 3)
    return Image.fromarray((torch.nan_to_num(rgb.float().cpu()).clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def colour_of(background: str) -> tuple[int, int, int]:
    try:
        return ImageColor.getrgb(background.strip())[:3]
    except ValueError as error:
        raise ValueError(f"{NODE_ID}: background {background[:40]!r} is no colour; write white, black or #rrggbb.") from error


def captions_of(count: int, story: Story | None, typed: str) -> list[str]:
    """One caption per picture, from the typed lines or else from the story."""
    if count == 0:
        raise ValueError(f"{NODE_ID}: images holds no picture; connect the decoded panels.")
    if typed.strip():
        lines = typed.replace("\r\n", "\n").split("\n")
        while len(lines) > count and not lines[-1].strip():
            lines.pop()
        if len(lines) != count:
            raise ValueError(
                f"{NODE_ID}: images holds {count} pictures and captions {len(lines)} lines; write one line per picture."
            )
        return lines
    if story is None:
        return [""] * count
    if not isinstance(story, Story):
        raise ValueError(f"{NODE_ID}: story is {type(story).__name__}; connect the story output of Story Script.")
    if len(story.panels) != count:
        raise ValueError(
            f"{NODE_ID}: images holds {count} pictures and the story {len(story.panels)} panels; connect the pictures "
            "of all panels, or type captions for these."
        )
    return [panel.caption for panel in story.panels]


NODES = [StoryweftStoryboard]
