"""A subject picture beside the text: cut-out, image adapters, adaptive prompts alignment (MagDiff, arXiv 2311.17338)."""

import logging
import math
import os
from dataclasses import replace

import folder_paths
from comfy_api.latest import io

from ..host import image_adapter as adapters
from ..host import override
from ..host.apa import AdaptivePromptRule, layer_alphas
from ..host.queueing import refusal
from ..host.rule import check_span, step_range
from ..models import magdiff

ImageAdapter = io.Custom("STORYWEFT_IMAGE_ADAPTER")
CATEGORY = "Storyweft/Subject"
FOLDER = "ipadapter"
DEMO, NONE = "demo adapter (comes with Storyweft)", "none"
ENDINGS = (".safetensors", ".bin")
PATHS = ("input", "middle", "output")


def _files() -> list[str]:
    return [file for file in folder_paths.get_filename_list(FOLDER) if file.lower().endswith(ENDINGS)]


class LoadImageAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftLoadImageAdapter",
            display_name="Load Image Adapter",
            category=CATEGORY,
            description="Reads a published IP-Adapter file (SD1.5, SDXL: standard, plus, full-face) as it is, or the demo adapter.",
            search_aliases=["ip-adapter", "ipadapter loader", "image prompt adapter"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[DEMO, *_files()],
                    tooltip="A file of models/ipadapter made for the family of your model, or the demo adapter for the demo "
                    "models. FaceID files are refused.",
                ),
                io.Combo.Input(
                    "learned_alphas",
                    options=[NONE, *_files()],
                    default=NONE,
                    optional=True,
                    advanced=True,
                    tooltip="File with learned alpha_text and alpha_image of each layer; the numbers of the alignment node "
                    "multiply them. none: 1 everywhere.",
                ),
            ],
            outputs=[ImageAdapter.Output("image_adapter", tooltip="For Adaptive Prompt Alignment.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file, learned_alphas=NONE):
        paths = [folder_paths.get_full_path(FOLDER, name) for name in (file, learned_alphas)]
        return [os.path.getmtime(path) if path else None for path in paths]

    @classmethod
    def execute(cls, file, learned_alphas=NONE) -> io.NodeOutput:
        node_id = "StoryweftLoadImageAdapter"
        if file == DEMO:
            adapter = adapters.load_demo()
        else:
            adapter = adapters.load(folder_paths.get_full_path_or_raise(FOLDER, file), node_id)
        if learned_alphas != NONE:
            path = folder_paths.get_full_path_or_raise(FOLDER, learned_alphas)
            layers = len(adapter.network.channels)
            adapter = replace(adapter, alphas=adapters.read_alphas(path, layers, node_id))
        return io.NodeOutput(adapter)


def _factor(name: str, what: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=1.0, min=-5.0, max=5.0, step=0.05, advanced=True, optional=True, tooltip=f"Factor of {what}."
    )


def _percent(name: str, default: float, what: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=default,
        min=0.0,
        max=1.0,
        step=0.001,
        advanced=True,
        optional=True,
        tooltip=f"Part of the noise schedule {what}; 0 is the start, 1 the end.",
    )


class AdaptivePromptAlignment(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftAdaptivePromptAlignment",
            display_name="Adaptive Prompt Alignment",
            category=CATEGORY,
            description="The subject of a picture joins the prompt: in every cross-attention layer the answer of the text is "
            "weighted alpha_text and that of the picture alpha_image (MagDiff). With alpha_text 1 it is IP-Adapter.",
            search_aliases=["apa", "magdiff", "ip-adapter", "image prompt", "subject"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="U-Net of the adapter's family: SD1.5, SDXL or a relative, also for video."
                ),
                ImageAdapter.Input("image_adapter", tooltip="From Load Image Adapter."),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The CLIP vision model the adapter was trained with: ViT-H for most files, ViT-bigG for "
                    "sd15_vit-G and sdxl without vit-h in its name.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="The subject, best from the Subject node: one picture, or one for each frame of the latent.",
                ),
                io.Float.Input(
                    "alpha_text",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Weight of the text's answer. 1 leaves it alone; below 1 the picture gains over the prompt. "
                    "MagDiff starts its training at 1.",
                ),
                io.Float.Input(
                    "alpha_image",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Weight of the picture's answer. 0 with alpha_text 1 is the plain model, bit for bit. IP-Adapter's "
                    "full strength is 1, MagDiff starts its training at 1.5.",
                ),
                io.Combo.Input(
                    "guidance",
                    options=list(adapters.GUIDANCE),
                    default="IP-Adapter",
                    tooltip="What the negative sees. IP-Adapter: no picture, so CFG strengthens it. IPAdapter_plus: the same, "
                    "with a black picture for plus files. MagDiff: the same picture, so CFG strengthens the text only.",
                ),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="Where the subject may appear, in the shape of the picture: one mask or one for each frame. The "
                    "text acts everywhere.",
                ),
                _percent("start_percent", 0.0, "at which it begins to act"),
                _percent("end_percent", 1.0, "after which the plain model goes on"),
                _factor("text_at_end", "alpha_text at the last step; it goes there evenly from 1 at the first"),
                _factor("image_at_end", "alpha_image at the last step; it goes there evenly from 1 at the first"),
                *(_factor(f"text_{path}", f"alpha_text in the {path} blocks of the U-Net") for path in PATHS),
                *(_factor(f"image_{path}", f"alpha_image in the {path} blocks of the U-Net") for path in PATHS),
            ],
            outputs=[io.Model.Output("model", tooltip="The model with the subject; chain nodes for several subjects.")],
        )

    @classmethod
    def validate_inputs(cls, start_percent=0.0, end_percent=1.0) -> bool | str:
        return refusal(cls, (check_span,), start_percent=start_percent, end_percent=end_percent)

    @classmethod
    def execute(
        cls,
        model,
        image_adapter,
        clip_vision,
        image,
        alpha_text,
        alpha_image,
        guidance,
        region=None,
        start_percent=0.0,
        end_percent=1.0,
        text_at_end=1.0,
        image_at_end=1.0,
        **factors,
    ) -> io.NodeOutput:
        node_id = AdaptivePromptRule.node_id
        given = {"alpha_text": alpha_text, "alpha_image": alpha_image, "text_at_end": text_at_end} | factors
        for name, value in (given | {"image_at_end": image_at_end}).items():
            if not math.isfinite(value):
                raise ValueError(f"{node_id}: {name} is {value}; give a finite number.")
        sigma_range = step_range(model, node_id, start_percent, end_percent)
        text, picture = (
            {path: alpha * factors.get(f"{name}_{path}", 1.0) for path in PATHS}
            for name, alpha in (("text", alpha_text), ("image", alpha_image))
        )
        alphas = layer_alphas(model, image_adapter, text, picture)
        tokens, blank = adapters.encode(image_adapter, clip_vision, image, guidance, node_id)
        if region is not None:
            region = region.reshape(-1, *region.shape[-2:])
        rule = AdaptivePromptRule(
            image_adapter, tokens, blank, alphas, (text_at_end, image_at_end), sigma_range, guidance, region
        )
        return io.NodeOutput(override.register(model, rule))


class Subject(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftSubject",
            display_name="Subject",
            category=CATEGORY,
            description="Cuts the subject out of a picture and puts it on plain ground (MagDiff's subject-driven alignment), once "
            "for CLIP vision and once for the VAE. With everything but the subject as mask the rest is kept instead.",
            search_aliases=["cut out", "remove background", "subject driven alignment", "sda"],
            inputs=[
                io.Image.Input("image", tooltip="Picture of the subject."),
                io.Mask.Input(
                    "mask",
                    tooltip="White where the subject is: from Remove Background, SAM3 or the mask editor. Load Image's own mask "
                    "of a transparent picture is the other way round: put Invert Mask between.",
                ),
                io.Combo.Input(
                    "ground",
                    options=list(magdiff.GROUNDS),
                    default="black",
                    tooltip="What surrounds the subject. MagDiff: black. Published IP-Adapters also do well with white or grey.",
                ),
                io.Boolean.Input(
                    "crop",
                    default=True,
                    tooltip="Cut the square around the subject, so that CLIP vision sees it large. MagDiff leaves it in place: off.",
                ),
                io.Float.Input(
                    "margin",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    optional=True,
                    tooltip="Ground kept around the subject when cropping, as a share of the subject's longer side.",
                ),
                io.Combo.Input(
                    "edge",
                    options=["soft", "hard"],
                    default="soft",
                    advanced=True,
                    optional=True,
                    tooltip="soft: grey mask values blend with the ground. hard: everything where the mask is not black is kept "
                    "whole, as MagDiff does.",
                ),
                io.Boolean.Input(
                    "resize_mask",
                    default=False,
                    advanced=True,
                    optional=True,
                    tooltip="Resize a mask of another size to the picture's. Off: another size is refused.",
                ),
                io.Int.Input(
                    "vae_size",
                    default=256,
                    min=64,
                    max=4096,
                    step=8,
                    advanced=True,
                    optional=True,
                    tooltip="Side of the picture for the VAE in pixels. MagDiff: 256.",
                ),
            ],
            outputs=[
                io.Image.Output("subject", tooltip="For CLIP vision: the subject on its ground."),
                io.Image.Output("for_vae", tooltip="For VAE Encode: short side resized to vae_size, middle square."),
            ],
        )

    @classmethod
    def execute(
        cls, image, mask, ground, crop, margin=0.05, edge="soft", resize_mask=False, vae_size=256
    ) -> io.NodeOutput:
        mask = cls._fitting(image, mask, resize_mask)
        level = magdiff.GROUNDS[ground]
        picture = magdiff.cut_out(image[..., :3].movedim(-1, 1), mask, level, edge == "soft")
        if crop:
            picture = magdiff.square(picture, magdiff.subject_box(mask, margin), level)
        small = magdiff.fit(picture, vae_size)
        return io.NodeOutput(*(x.movedim(1, -1).contiguous() for x in (picture, small)))

    @staticmethod
    def _fitting(image, mask, resize_mask: bool):
        """The mask in the picture's size; ValueError for what cannot be one."""
        node_id = "StoryweftSubject"
        size, own = tuple(image.shape[1:3]), tuple(mask.shape[-2:])
        mask = mask.reshape(-1, *own)
        if size != own and not resize_mask:
            raise ValueError(
                f"{node_id}: mask is {own[1]} x {own[0]} and image {size[1]} x {size[0]}; turn resize_mask on or give a mask of "
                "the picture's size."
            )
        if len(mask) not in (1, len(image)):
            raise ValueError(
                f"{node_id}: mask holds {len(mask)} masks and image {len(image)} pictures; give one or one each."
            )
        empty = [index for index, one in enumerate(mask) if not one.any()]
        if empty:
            raise ValueError(f"{node_id}: mask {empty[0]} is empty, so nothing of the picture would be kept.")
        if bool((mask == 1).flatten(1).all(1).any()):
            logging.warning("%s: mask is full, so nothing is cut out of the picture.", node_id)
        return mask if size == own else magdiff.resized(mask, size)


class DemoSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftDemoSubject",
            display_name="Demo Subject (Storyweft)",
            category="Storyweft/Demo",
            description="A picture-book page and the mask of its character, to try subject pictures without any file of your own.",
            search_aliases=["demo picture", "subject example"],
            inputs=[
                io.Combo.Input(
                    "subject",
                    options=adapters.demo_subjects(),
                    tooltip="Which character; each stands in a scene of its own.",
                )
            ],
            outputs=[
                io.Image.Output("image", tooltip="The page, 128 x 128."),
                io.Mask.Output("mask", tooltip="White where the character is."),
            ],
        )

    @classmethod
    def execute(cls, subject) -> io.NodeOutput:
        return io.NodeOutput(*adapters.demo_subject(subject))


folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))

NODES = [LoadImageAdapter, Subject, AdaptivePromptAlignment, DemoSubject]
