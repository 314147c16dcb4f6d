"""A StoryGen story made panel after panel, each saved at once."""

import logging

import comfy.sample
import comfy.samplers
from comfy_api.latest import io

from ..host import families
from ..host import story_gen_references as pictures
from ..host import story_gen_weights as weights
from ..host.panel_store import PanelStore
from ..host.queueing import ABSENT, refusal
from ..host.story_gen import TRAINED, check_family
from ..host.story_gen_story import Settings, StoryGenStory

NODE_ID = "StoryweftStoryGenStory"
AS_TRAINED, STANDARD = "as trained", "standard"
References = io.Custom("STORYWEFT_REFERENCES")
StoryType = io.Custom("STORYWEFT_STORY")


def texts_of(prompts: str, story) -> list[str]:
    """The prompts of a story's panels, or one a line. ValueError when there is none or both are given."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if story is not None and lines:
        raise ValueError(f"{NODE_ID}: prompts has {len(lines)} lines and story is connected too; give one of them.")
    found = lines if story is None else [panel.prompt for panel in story.panels]
    if not found:
        raise ValueError(f"{NODE_ID}: prompts is empty; write one prompt a line, or connect a story.")
    return found


class StoryGenStoryNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=NODE_ID,
            display_name="StoryGen Story",
            category="Storyweft/Story",
            description="Draws a whole story with StoryGen: the first panel from its prompt, every other from its prompt and the newest "
            "panels before it. Each is saved as soon as it is done; memory does not grow with the story.",
            search_aliases=["intelligent grimm", "storygen", "visual storytelling", "story loop", "auto-regressive"],
            inputs=[
                io.Model.Input("model", tooltip="From Load StoryGen U-Net or Add StoryGen Weights."),
                io.Clip.Input("clip", tooltip="Text encoder of the model."),
                io.Vae.Input("vae", tooltip="VAE of the model; panels go through it to become references."),
                io.String.Input("prompts", default="", multiline=True, tooltip="One panel a line; also its caption as a reference."),
                io.String.Input("negative", default="", tooltip="What no panel should show. Authors: empty."),
                io.Latent.Input("latent_image", tooltip="One empty latent, which gives the size. StoryGen: 512 x 512."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the noise; panel i gets the i-th draw. Authors draw several and keep the best.",
                ),
                io.Int.Input("steps", default=40, min=1, max=1000, tooltip="Denoising steps of each panel. Authors: 40."),
                io.Int.Input(
                    "window",
                    default=3,
                    min=0,
                    max=8,
                    tooltip="How many previous panels each reads, the newest ones; training had 1 to 3. 0: portraits alone.",
                ),
                io.Float.Input(
                    "text_scale",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance by the prompt. Authors: 7. Up to 1 turns all guidance off.",
                ),
                io.Float.Input(
                    "image_scale",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance by the previous panels. Authors: 3.5. 1 leaves the grey branch out.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Weight of the image branch as a whole. 1 as published, 0 is exactly the model without references.",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="ddim", tooltip="Sampler. Authors: ddim."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="ddim_uniform",
                    tooltip="Noise schedule. Authors: ddim_uniform.",
                ),
                StoryType.Input("story", optional=True, tooltip="From Story Script, instead of prompts."),
                References.Input(
                    "portraits", optional=True, tooltip="References that every panel reads as the oldest; the first by them alone."
                ),
                io.Combo.Input(
                    "reference_range",
                    options=[AS_TRAINED, STANDARD],
                    default=AS_TRAINED,
                    advanced=True,
                    optional=True,
                    tooltip="Pixel range of references at the VAE; see StoryGen Guider.",
                ),
                io.Boolean.Input(
                    "keep_panels",
                    default=True,
                    advanced=True,
                    optional=True,
                    tooltip="Store each finished panel in output/storyweft/panels and take it from there next time.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent", tooltip="All panels in story order."),
                io.String.Output("report", tooltip="What each panel read, the memory it took, and what was kept."),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompts=None, story=ABSENT) -> bool | str:
        return refusal(cls, (texts_of,), prompts=prompts, story=story)

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        prompts,
        negative,
        latent_image,
        seed,
        steps,
        window,
        text_scale,
        image_scale,
        strength,
        sampler_name,
        scheduler,
        story=None,
        portraits=(),
        reference_range=AS_TRAINED,
        keep_panels=True,
    ) -> io.NodeOutput:
        for name, value in (("text_scale", text_scale), ("image_scale", image_scale), ("strength", strength)):
            if not 0 <= value <= 100:
                raise ValueError(f"{NODE_ID}: {name} is {value}; give a number from 0 to 100.")
        texts = texts_of(prompts, story)
        own = weights.weights_of(model, NODE_ID)
        check_family(families.find(model, NODE_ID), NODE_ID)
        samples = comfy.sample.fix_empty_latent_channels(
            model,
            latent_image["samples"],
            latent_image.get("downscale_ratio_spacial"),
            latent_image.get("downscale_ratio_temporal"),
        )
        if len(samples) != 1:
            raise ValueError(f"{NODE_ID}: latent_image holds {len(samples)} latents; give one, which gives the size of all panels.")
        if window + len(portraits) > TRAINED:
            logging.warning(
                "%s: panels read up to %d references; the weights were trained with up to %d.", NODE_ID, window + len(portraits), TRAINED
            )
        encoded = {text: pictures.encode_caption(clip, text, NODE_ID) for text in (*texts, negative)}
        span = own.pixel_range if reference_range == AS_TRAINED else pictures.STANDARD
        settings = Settings(
            seed, steps, text_scale, image_scale, strength, sampler_name, scheduler, window, span
        )
        latents, report = StoryGenStory(
            NODE_ID,
            model,
            vae,
            own,
            [(text, encoded[text]) for text in texts],
            [encoded[negative]],
            tuple(portraits),
            samples,
            settings,
            PanelStore() if keep_panels else None,
        ).draw()
        return io.NodeOutput({"samples": latents}, report)


NODES = [StoryGenStoryNode]
