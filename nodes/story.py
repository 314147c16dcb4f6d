"""Script and per-panel conditioning: what the user writes becomes a Story and one conditioning row per panel."""
from html import escape

from comfy_api.latest import io, ui
from server import PromptServer

from ..host.prompts import encode_panels
from ..host.queueing import refusal
from ..story.script import MAX_PANELS, ScriptError, Story, parse_script
from ..story.selection import SelectionError, select_panels

StoryType = io.Custom("STORYWEFT_STORY")
CONDITIONING_ID = "StoryweftPanelConditioning"

EXAMPLE_CHARACTERS = "[Ana] a red-haired girl in a blue coat"
EXAMPLE_PANELS = """[Ana] reads a book under a tree # Ana finds an old map in her book.
[Ana] walks through a foggy forest # She sets out at dawn.
[Ana] rows a boat on a lake # The lake is wider than it looked.
[Ana] opens a treasure chest # Home is where the treasure is."""


def story_of(characters: str, panels: str, style: str, id_panels: int) -> Story:
    try:
        return parse_script(characters, panels, style, id_panels)
    except ScriptError as error:
        raise ValueError(str(error)) from error      # the page shows the class beside the sentence


class StoryweftScript(io.ComfyNode):
    """Reads characters and panel lines into a story."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftScript",
            display_name="Story Script",
            category="Storyweft/Story",
            description="Reads a story: who is in it, one line per picture, captions. Shows what it understood.",
            search_aliases=["storydiffusion", "comic script", "consistent character", "storyboard text"],
            inputs=[
                io.String.Input(
                    "characters", multiline=True, default=EXAMPLE_CHARACTERS, dynamic_prompts=False,
                    placeholder="[Name] what the character looks like",
                    tooltip="One character a line: [Name] description. The description replaces [Name] in prompts. "
                    "Empty: all panels show one character that needs no tag.",
                ),
                io.String.Input(
                    "panels", multiline=True, default=EXAMPLE_PANELS, dynamic_prompts=False,
                    placeholder="[Name] does something # caption",
                    tooltip="One picture a line: the prompt with its [Name] tags, then # and the caption. [NC] marks a "
                    "picture without a character; // starts a comment line.",
                ),
                io.Int.Input(
                    "id_panels", default=4, min=0, max=MAX_PANELS, step=1,
                    tooltip="Number of panels that define each character's looks: the first ones that name only this "
                    "character. More hold the looks better and cost memory. 0: looks come from saved characters.",
                ),
                io.String.Input(
                    "style", default="", optional=True, advanced=True, dynamic_prompts=False,
                    tooltip="Words added after every prompt, or a template with {prompt} where the prompt goes.",
                ),
            ],
            outputs=[
                StoryType.Output("story", display_name="story", tooltip="The story for the other Storyweft nodes."),
                io.Int.Output("count", display_name="panels", tooltip="Number of panels, for the latent's batch size."),
                io.String.Output("preview", display_name="preview", tooltip="What was understood, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, characters=None, panels=None, id_panels=None, style="") -> bool | str:
        return refusal(cls, (story_of,), characters=characters, panels=panels, id_panels=id_panels, style=style)

    @classmethod
    def execute(cls, characters, panels, id_panels, style="") -> io.NodeOutput:
        story = story_of(characters, panels, style, id_panels)
        preview = story.describe()
        server = getattr(PromptServer, "instance", None)     # absent where nodes run without a page
        if server is not None and cls.hidden is not None and cls.hidden.unique_id is not None:
            server.send_progress_text(escape(preview, quote=False), cls.hidden.unique_id)   # the page reads HTML
        return io.NodeOutput(story, len(story.panels), preview, ui=ui.PreviewText(preview))


class StoryweftPanelConditioning(io.ComfyNode):
    """One conditioning row per panel."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=CONDITIONING_ID,
            display_name="Panel Conditioning",
            category="Storyweft/Story",
            description="Encodes every panel's prompt by itself into one CONDITIONING: row 1 for the first picture of "
            "the latent batch, row 2 for the second, and so on.",
            search_aliases=["prompt per image", "batch prompts", "prompt list", "per frame prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoder of the model that draws the panels."),
                StoryType.Input("story", tooltip="From Story Script."),
                io.String.Input(
                    "panels", default="all",
                    tooltip="Which panels, numbered from 1: 'all', '1-4', '5, 7-9', 'id' (those that define looks), "
                    "'id:Ana' (those of one character), 'rest' (all others). Their order is the order of the pictures.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="CONDITIONING", tooltip="A row per chosen panel."),
                io.Int.Output("count", display_name="panels", tooltip="Number of rows, for the latent's batch size."),
            ],
        )

    @classmethod
    def execute(cls, clip, story, panels) -> io.NodeOutput:
        if clip is None:
            raise ValueError(f"{CONDITIONING_ID}: clip is empty, the checkpoint has no text encoder; add a CLIP loader node.")
        if not isinstance(story, Story):
            raise ValueError(f"{CONDITIONING_ID}: story is {type(story).__name__}; connect the story output of Story Script.")
        try:
            chosen = select_panels(story, panels)
        except SelectionError as error:
            raise ValueError(f"{CONDITIONING_ID}: panels is '{panels[:60]}': {error}") from error
        conditioning = encode_panels(clip, [story.panels[index].prompt for index in chosen], CONDITIONING_ID)
        marks = {"storyweft_panels": chosen, "storyweft_story": story}
        return io.NodeOutput([[cond, {**extras, **marks}] for cond, extras in conditioning], len(chosen))


NODES = [StoryweftScript, StoryweftPanelConditioning]
