"""Draws the panels of a story one after the other, keeping each as it is done."""

import comfy.samplers
import torch
from comfy_api.latest import io

from ..host.panel_store import PanelStore
from ..host.queueing import refusal
from ..host.story_sampling import MODES, Settings, StorySampler

Character = io.Custom("STORYWEFT_CHARACTER")
NODE_ID = "StoryweftStorySampler"
CHARACTER = 1  # place of that output


def seeds_of(panel_seeds: str) -> tuple[tuple[int, int], ...]:
    """Lines "panel: seed" (panels count from 1) as (panel from 0, seed) pairs. Raises ValueError naming the line."""
    pairs = {}
    for line in panel_seeds.splitlines():
        if not line.strip():
            continue
        panel, _, seed = line.partition(":")
        what = f"{NODE_ID}: panel_seeds has the line '{line.strip()[:80]}'"
        if not (panel.strip().isdecimal() and seed.strip().isdecimal() and int(panel) >= 1):
            raise ValueError(f"{what}; write it as 'panel: seed', such as '3: 1234'.")
        if int(seed) >= 2**64:
            raise ValueError(f"{what}; seeds end at {2**64 - 1}.")
        if int(panel) - 1 in pairs:
            raise ValueError(f"{what}, and another line for panel {int(panel)}; keep one of them.")
        pairs[int(panel) - 1] = int(seed)
    return tuple(pairs.items())


def check_denoise(denoise: float) -> None:
    if not 0 < denoise <= 1:
        raise ValueError(f"{NODE_ID}: denoise is {denoise}; give a number above 0 and at most 1.")


def is_read(hidden, output: int) -> bool:
    """Whether an output of the running node is connected; False outside a graph."""
    if hidden is None or hidden.dynprompt is None:
        return False
    nodes = map(hidden.dynprompt.get_node, hidden.dynprompt.all_node_ids())
    return any([hidden.unique_id, output] == link for node in nodes for link in node["inputs"].values())


class StorySamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=NODE_ID,
            display_name="Story Sampler",
            category="Storyweft/Story",
            description="Draws the id panels of every character together, then each other panel against them, in bounded "
            "memory for any length of story. Finished panels are kept and not drawn again.",
            inputs=[
                io.Model.Input("model", tooltip="Model with a Consistent Self-Attention block."),
                io.Conditioning.Input("positive", tooltip="From Panel Conditioning: one row for each panel."),
                io.Conditioning.Input("negative", tooltip="What no panel should show; one prompt for all."),
                io.Latent.Input(
                    "latent_image", tooltip="One latent that gives the picture size, or one for each panel."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the noise; panel i gets the i-th draw, so that one panel can be redone alone.",
                ),
                io.Int.Input(
                    "steps",
                    default=30,
                    min=1,
                    max=10000,
                    tooltip="Denoising steps. The authors use 50; fewer than 20 is weak.",
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance scale. The authors use 5.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="ddim",
                    tooltip="Sampler. Ancestral and SDE samplers draw noise for a whole batch, so that panels then "
                    "depend on how they are grouped.",
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="normal", tooltip="Noise schedule."
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the schedule that is run; below 1 starts from latent_image.",
                ),
                io.Combo.Input(
                    "memory",
                    options=list(MODES),
                    default="auto",
                    tooltip="bank: keep the characters' tokens in RAM (fast). recompute: draw id panels along with every "
                    "later one (constant memory, slower). together: one batch. auto: bank if it fits.",
                ),
                io.Int.Input(
                    "panels_at_once",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Panels drawn in one batch after the id panels. More is faster and takes more memory.",
                ),
                io.String.Input(
                    "panel_seeds",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Redo single panels: one 'panel: seed' a line. All other panels stay as they are.",
                ),
                io.Boolean.Input(
                    "keep_panels",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Store each finished panel in output/storyweft/panels and take it from there next time.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent", tooltip="All panels in story order."),
                Character.Output(
                    "character", tooltip="The characters with their banks (none in the modes recompute and together)."
                ),
                io.String.Output("report", tooltip="Memory estimate and what was drawn or kept."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, denoise=None, panel_seeds="") -> bool | str:
        return refusal(cls, (check_denoise, seeds_of), denoise=denoise, panel_seeds=panel_seeds)

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
        memory,
        panels_at_once=1,
        panel_seeds="",
        keep_panels=True,
    ) -> io.NodeOutput:
        if not 0 <= cfg <= 100:
            raise ValueError(f"{NODE_ID}: cfg is {cfg}; give a number from 0 to 100.")
        check_denoise(denoise)
        settings = Settings(
            seed, steps, cfg, sampler_name, scheduler, denoise, memory, panels_at_once, seeds_of(panel_seeds)
        )
        store = PanelStore() if keep_panels else None
        samples, characters, report = StorySampler(
            NODE_ID, model, positive, negative, latent_image, settings, store, is_read(cls.hidden, CHARACTER)
        ).draw()
        latent = {
            key: value
            for key, value in latent_image.items()
            if key not in ("downscale_ratio_spacial", "downscale_ratio_temporal")
        }
        return io.NodeOutput(latent | {"samples": samples.to(torch.float32)}, tuple(characters.values()), report)


NODES = [StorySamplerNode]
