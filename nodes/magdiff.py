"""MagDiff's trained parts (arXiv 2311.17338): learned alphas and the subject's latents beside the noise."""

import math
import os

import folder_paths
import torch
from comfy_api.latest import io

from ..host import magdiff as rules
from ..host import override
from ..models.magdiff import GROUNDS

MagDiff = io.Custom("STORYWEFT_MAGDIFF")
ImageAdapter = io.Custom("STORYWEFT_IMAGE_ADAPTER")
CATEGORY = "Storyweft/Subject"
FOLDER = "magdiff"
DEMO = "demo alignment (comes with Storyweft)"


def _files() -> list[str]:
    return [file for file in folder_paths.get_filename_list(FOLDER) if file.lower().endswith(".safetensors")]


class LoadMagDiff(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftLoadMagDiff",
            display_name="Load MagDiff",
            category=CATEGORY,
            description="Reads what MagDiff trains: alphas of each cross-attention layer, which join the adapter they were trained "
            "with, and the high-fidelity alignment. The authors published none: python -m training.magdiff.",
            search_aliases=["magdiff loader", "learned alphas"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[DEMO, *_files()],
                    tooltip="A file of models/magdiff made for the family of your model, or the demo one.",
                ),
                ImageAdapter.Input(
                    "image_adapter",
                    optional=True,
                    tooltip="The adapter it was trained with: the demo adapter for the demo one. Not needed for files that hold one.",
                ),
            ],
            outputs=[
                MagDiff.Output("magdiff", tooltip="For High-Fidelity Alignment."),
                ImageAdapter.Output(
                    "image_adapter",
                    tooltip="With the learned alphas, which the alphas of Adaptive Prompt Alignment multiply.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, image_adapter=None):
        path = folder_paths.get_full_path(FOLDER, file)
        return os.path.getmtime(path) if path else None

    @classmethod
    def execute(cls, file, image_adapter=None) -> io.NodeOutput:
        node_id = "StoryweftLoadMagDiff"
        if file == DEMO:
            loaded = rules.load_demo()
        else:
            loaded = rules.load(folder_paths.get_full_path_or_raise(FOLDER, file), node_id)
        return io.NodeOutput(loaded, rules.with_alphas(image_adapter, loaded, node_id))


class HighFidelityAlignment(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=rules.NODE_ID,
            display_name="High-Fidelity Alignment",
            category=CATEGORY,
            description="The subject's latents, at three sizes, enter the model beside the noise (MagDiff). What is given stays in its "
            "place: a cut-out subject gets a new scene, a kept background a new subject.",
            search_aliases=["magdiff", "hfa", "keep region", "subject video"],
            inputs=[
                io.Model.Input("model", tooltip="U-Net of the family it was trained for, also for video."),
                MagDiff.Input("magdiff", tooltip="From Load MagDiff."),
                io.Vae.Input("vae", tooltip="VAE of the model."),
                io.Image.Input(
                    "image",
                    tooltip="for_vae of Subject, with crop off: the subject on its ground, in the size of the picture to be drawn. "
                    "One picture, or one for each frame.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Weight of what the subject's latents add. 0 is the plain model, bit for bit.",
                ),
                io.Combo.Input(
                    "guidance",
                    options=list(rules.GUIDANCE),
                    default="MagDiff",
                    tooltip="MagDiff: the negative sees the subject too, so CFG strengthens the text only. amplified: it sees an empty "
                    "ground, so CFG strengthens the subject.",
                ),
                io.Boolean.Input(
                    "every_frame",
                    default=False,
                    optional=True,
                    tooltip="Of a clip every frame gets the one picture, held in place. Off: the first frame gets it, as in MagDiff.",
                ),
                io.Combo.Input(
                    "ground",
                    options=list(GROUNDS),
                    default="black",
                    optional=True,
                    advanced=True,
                    tooltip="Ground of Subject, which frames without picture show.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="For Adaptive Prompt Alignment or the sampler.")],
        )

    @classmethod
    def execute(
        cls, model, magdiff, vae, image, strength, guidance, every_frame=False, ground="black"
    ) -> io.NodeOutput:
        if not math.isfinite(strength):
            raise ValueError(f"{rules.NODE_ID}: strength is {strength}; give a finite number.")
        rules.check_family(magdiff, model)
        into = model.model.process_latent_in
        empty = torch.full_like(image[:1, ..., :3], GROUNDS[ground])
        latents, blank = ([into(z) for z in rules.encode_scales(magdiff, vae, pictures)] for pictures in (image, empty))
        rule = rules.HighFidelityRule(magdiff, latents, blank, strength, guidance, every_frame)
        return io.NodeOutput(override.register(model, rule))


folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))

NODES = [LoadMagDiff, HighFidelityAlignment]
