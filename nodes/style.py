"""StyleAligned image sets (arXiv 2312.02133), with a generated or a given picture as style reference."""

import math

import comfy.samplers
import torch
from comfy_api.latest import io

from ..attention.style import StyleOptions
from ..host import override
from ..host.inversion import invert_picture
from ..host.queueing import refusal
from ..host.rule import check_span, fraction, step_range
from ..host.story_sampling import rows_of
from ..host.style import ReferenceRule, StyleRule, check_family

CATEGORY = "Storyweft/Story"


class StyleAligned(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftStyleAligned",
            display_name="StyleAligned",
            category=CATEGORY,
            description="Pictures of one batch take their style from its first picture, which itself stays as it would be alone. "
            "Needs no training and no weights.",
            search_aliases=["style aligned", "shared attention", "style transfer", "consistent style", "adain"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="U-Net of SD1.5, SD2, SDXL (or SVD); Flux, Chroma, Qwen-Image as an experiment.",
                ),
                io.Float.Input(
                    "shared_score_shift",
                    default=0.0,
                    min=-10000.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Added to the scores of the reference's tokens: 0.69 (ln 2) counts each twice, negative values loosen "
                    "the tie. Authors: 0 for drawn references, 0.69 for a picture, 0 and scale 0.5 for famous pictures.",
                ),
                io.Float.Input(
                    "shared_score_scale",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Multiplies the reference's keys for the other pictures. 1 as in the paper; lower loosens the tie.",
                ),
                io.Float.Input(
                    "only_self_level",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the self-attention layers that stays plain: 0 none, 1 all. More keeps content further apart.",
                ),
                io.Boolean.Input(
                    "share_group_norm",
                    default=True,
                    tooltip="Group norms of the U-Net take their statistics over a picture and the reference together. Authors: on "
                    "for SD1.5 and SD2 and for a given picture, off for SDXL.",
                ),
                io.Boolean.Input(
                    "share_attention",
                    default=True,
                    advanced=True,
                    tooltip="Pictures also look at the reference's tokens. Off: only queries and keys are aligned.",
                ),
                io.Boolean.Input(
                    "adain_queries",
                    default=True,
                    advanced=True,
                    tooltip="Queries get mean and spread of the reference's.",
                ),
                io.Boolean.Input(
                    "adain_keys",
                    default=True,
                    advanced=True,
                    tooltip="Keys get mean and spread of the reference's.",
                ),
                io.Boolean.Input(
                    "adain_values",
                    default=False,
                    advanced=True,
                    tooltip="Values too: the strongest tie, also of colours.",
                ),
                io.Boolean.Input(
                    "full_attention_share",
                    default=False,
                    advanced=True,
                    tooltip="Every picture sees all pictures of the batch, without alignment, scale and shift; the first picture "
                    "changes too. In the paper content leaks this way.",
                ),
                io.Boolean.Input(
                    "control_first_picture",
                    default=False,
                    advanced=True,
                    tooltip="Whether ControlNets also steer the reference. Off, as the authors have it: only pictures after the "
                    "first are steered.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Part of the noise schedule at which alignment begins; 0 is the start.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Part of the noise schedule after which pictures are left alone; 1 is the end.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model that aligns the pictures of a batch with its first one.")
            ],
        )

    @classmethod
    def validate_inputs(cls, start_percent=0.0, end_percent=1.0) -> bool | str:
        return refusal(cls, (check_span,), start_percent=start_percent, end_percent=end_percent)

    @classmethod
    def execute(
        cls,
        model,
        shared_score_shift=0.0,
        shared_score_scale=1.0,
        only_self_level=0.0,
        share_group_norm=True,
        share_attention=True,
        adain_queries=True,
        adain_keys=True,
        adain_values=False,
        full_attention_share=False,
        control_first_picture=False,
        start_percent=0.0,
        end_percent=1.0,
    ) -> io.NodeOutput:
        node_id = StyleRule.node_id
        fraction(node_id, "only_self_level", only_self_level)
        sigma_range = step_range(model, node_id, start_percent, end_percent)
        if not (math.isfinite(shared_score_scale) and shared_score_scale >= 0):
            raise ValueError(f"{node_id}: shared_score_scale is {shared_score_scale}; give a number from 0 up.")
        if not math.isfinite(shared_score_shift):
            raise ValueError(f"{node_id}: shared_score_shift is {shared_score_shift}; give a finite number.")
        check_family(model, node_id)
        options = StyleOptions(
            share_attention,
            adain_queries,
            adain_keys,
            adain_values,
            full_attention_share,
            shared_score_scale,
            shared_score_shift,
            share_group_norm,
            only_self_level,
        )
        return io.NodeOutput(override.register(model, StyleRule(options, sigma_range, control_first_picture)))


def uncontrolled(conditioning: list) -> list:
    """The conditioning without ControlNets, which steer only the pictures after the first."""
    return [[text, {key: value for key, value in marks.items() if key != "control"}] for text, marks in conditioning]


class StyleReferencePicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftStyleReference",
            display_name="Style Reference Picture",
            category=CATEGORY,
            description="Makes a given picture the first one of the batch, so that StyleAligned takes the style from it: finds the "
            "noise the model would draw it from (DDIM inversion) and replays it while the others are drawn.",
            search_aliases=["ddim inversion", "style from picture", "style transfer", "reference image"],
            inputs=[
                io.Model.Input("model", tooltip="Model with or without StyleAligned before it. SD1.5, SD2, SDXL."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="From Panel Conditioning: the first row describes the picture, the others are drawn. Give the sampler "
                    "the same.",
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip="For the inversion, an empty prompt; on SDXL through ConditioningZeroOut as the authors have it.",
                ),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode."),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=2,
                    max=4096,
                    tooltip="Pictures of the set, the given one among them.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=10000,
                    tooltip="Steps of the inversion; the sampler must take as many. Costs as long as drawing one picture.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="ddim_uniform",
                    tooltip="The sampler must use the same.",
                ),
                io.Float.Input(
                    "inversion_cfg",
                    default=2.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance during the inversion. Authors: 2, and 10 for the sampler.",
                ),
                io.Int.Input(
                    "offset",
                    default=5,
                    min=0,
                    max=10000,
                    tooltip="Steps by which the picture starts cleaner than the others, so that style is there to be seen from the "
                    "first step. Authors: 5 of 50.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="For SamplerCustom: the same sigmas, instead of steps and scheduler.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model that replays the picture as the first of the batch."),
                io.Latent.Output("latent", tooltip="Empty latents of the picture's size, to sample with denoise 1."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, batch_size, steps, scheduler, inversion_cfg, offset, sigmas=None
    ) -> io.NodeOutput:
        node_id = ReferenceRule.node_id
        samples = latent["samples"]
        if samples.is_nested or samples.ndim != 4 or len(samples) != 1:
            raise ValueError(
                f"{node_id}: latent is {tuple(samples.shape)}; give one encoded picture (1, channels, height, width)."
            )
        if not (math.isfinite(inversion_cfg) and inversion_cfg >= 0):
            raise ValueError(f"{node_id}: inversion_cfg is {inversion_cfg}; give a number from 0 up.")
        sampling = model.get_model_object("model_sampling")
        if sigmas is None:
            sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
        if len(sigmas) < 2 or sigmas[-1] != 0 or not (sigmas[:-1] > sigmas[1:]).all():
            raise ValueError(
                f"{node_id}: sigmas are {[round(s, 4) for s in sigmas.tolist()[:8]]}; give falling ones that end in 0."
            )
        if offset >= len(sigmas) - 1:
            raise ValueError(f"{node_id}: offset is {offset} of {len(sigmas) - 1} steps; give fewer than the steps.")
        check_family(model, node_id)
        own = [rows_of([entry], [0], len(entry[0]))[0] for entry in uncontrolled(positive)]
        reference = invert_picture(node_id, model, own, uncontrolled(negative), samples, sigmas, inversion_cfg)
        empty = torch.zeros(batch_size, *samples.shape[1:])
        return io.NodeOutput(override.register(model, ReferenceRule(reference, offset)), {"samples": empty})


NODES = [StyleAligned, StyleReferencePicture]
