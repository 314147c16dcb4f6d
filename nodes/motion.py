"""From one story picture to the next: the Semantic Motion Predictor (StoryDiffusion, arXiv 2405.01434)."""

import math
import os

import comfy.clip_vision
import folder_paths
import torch
from comfy_api.latest import io

from ..host import motion
from ..models.motion_predictor import interpolate
from ..story import transitions

MotionPredictor = io.Custom("STORYWEFT_MOTION_PREDICTOR")
ImageAdapter = io.Custom("STORYWEFT_IMAGE_ADAPTER")
CATEGORY = "Storyweft/Motion"
FOLDER = "motion_predictor"
DEMO = "demo predictor (comes with Storyweft)"
PINS = {"as trained": None, "kept exactly": True, "free": False}


def _files() -> list[str]:
    return [file for file in folder_paths.get_filename_list(FOLDER) if file.lower().endswith(".safetensors")]


def _keyframes(first, last):
    """Pictures [n, h, w, 3] of first and, when connected, last."""
    if last is None:
        return first[..., :3]
    if last.shape[1:3] != first.shape[1:3]:
        raise ValueError(
            f"{motion.NODE_ID}: first is {first.shape[2]} x {first.shape[1]} and last {last.shape[2]} x {last.shape[1]} "
            "pixels; make them one size."
        )
    return torch.cat([first[..., :3], last[..., :3]])


class LoadMotionPredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftLoadMotionPredictor",
            display_name="Load Motion Predictor",
            category=CATEGORY,
            description="Reads a trained Semantic Motion Predictor, or the demo one. The authors published none: train one with "
            "python -m training.motion_predictor.",
            search_aliases=["semantic motion predictor", "storydiffusion video"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[DEMO, *_files()],
                    tooltip="A file of models/motion_predictor, or the demo predictor for the demo video model.",
                ),
            ],
            outputs=[MotionPredictor.Output("motion_predictor", tooltip="For Semantic Motion Predictor.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        path = folder_paths.get_full_path(FOLDER, file)
        return os.path.getmtime(path) if path else None

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        if file == DEMO:
            return io.NodeOutput(motion.load_demo())
        path = folder_paths.get_full_path_or_raise(FOLDER, file)
        return io.NodeOutput(motion.load(path, "StoryweftLoadMotionPredictor"))


class SemanticMotionPredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=motion.NODE_ID,
            display_name="Semantic Motion Predictor",
            category=CATEGORY,
            description="The clip from one picture to the next: CLIP vision describes both, a transformer predicts one embedding for "
            "every frame between them, and the video model reads it beside the prompt (StoryDiffusion). Without a trained "
            "predictor the embeddings are interpolated.",
            search_aliases=["transition", "in-between", "first and last frame", "storydiffusion video", "interpolate"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Video model: SVD, AnimateDiff or another U-Net whose batch is the clip, or Wan with an adapter.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="Prompt, or one for each picture (Panel Conditioning): each frame reads that of the nearer one. SVD: "
                    "from its own conditioning node; the picture is replaced.",
                ),
                io.Conditioning.Input("negative", tooltip="Negative prompt; it is shown no picture."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The encoder of the adapter or of SVD: ViT-H for almost all of them."
                ),
                io.Image.Input("first", tooltip="First picture, or all pictures of a story in order as one batch."),
                io.Int.Input(
                    "frames_per_transition",
                    default=8,
                    min=2,
                    max=4096,
                    tooltip="Frames from one picture to the next, both counted. AnimateDiff: 16, SVD: 14 or 25, the demo model: 8.",
                ),
                io.Image.Input("last", optional=True, tooltip="Last picture, after those of first."),
                MotionPredictor.Input(
                    "motion_predictor",
                    optional=True,
                    tooltip="Trained predictor; without it embeddings are interpolated.",
                ),
                ImageAdapter.Input(
                    "image_adapter",
                    optional=True,
                    tooltip="Image adapter of the model's family, reading pooled embeddings (ip-adapter_sd15, the demo adapter), "
                    "instead of the one trained with the predictor. SVD needs none.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    optional=True,
                    tooltip="Weight of the adapter's answer. 0 is the plain model, bit for bit. Without adapter: 1 or 0.",
                ),
                io.Combo.Input(
                    "attach",
                    options=list(motion.ATTACH),
                    default=motion.ATTACH[0],
                    optional=True,
                    advanced=True,
                    tooltip="image adapter: keys and values of its own. rows of the prompt: one softmax with the text, as the paper "
                    "writes it; needs a projection trained with the predictor. automatic: what is connected.",
                ),
                io.Combo.Input(
                    "ends",
                    options=list(PINS),
                    default="as trained",
                    optional=True,
                    advanced=True,
                    tooltip="Whether the embeddings of the given pictures stay exactly as they are, so that transitions join.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="For the sampler."),
                io.Conditioning.Output("positive", tooltip="For the sampler; changed for SVD only."),
                io.Conditioning.Output("negative", tooltip="For the sampler; changed for SVD only."),
                io.ClipVisionOutput.Output("embeddings", tooltip="One embedding for each frame."),
                io.Int.Output("frames", tooltip="Frames of the clip: the size of the latent batch."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        clip_vision,
        first,
        frames_per_transition,
        last=None,
        motion_predictor=None,
        image_adapter=None,
        strength=1.0,
        attach=motion.ATTACH[0],
        ends="as trained",
    ) -> io.NodeOutput:
        node_id = motion.NODE_ID
        if not math.isfinite(strength):
            raise ValueError(f"{node_id}: strength is {strength}; give a finite number.")
        if motion_predictor is not None:
            motion.check_encoder(motion_predictor, clip_vision, node_id)
        keyframes = motion.pooled(clip_vision, _keyframes(first, last), node_id)
        pinned = PINS[ends]
        if pinned is None:
            pinned = motion_predictor is None or motion_predictor.pinned
        found = motion.predict(motion_predictor, keyframes, frames_per_transition, pinned, node_id)
        trained = None if motion_predictor is None else motion_predictor.adapter
        adapter = image_adapter or trained
        given = motion.Attachment(
            found, len(keyframes), frames_per_transition, motion_predictor, adapter, attach, strength
        )
        model, positive, negative = motion.attach(model, positive, negative, given)
        seen = comfy.clip_vision.Output()
        seen.image_embeds = found
        seen.last_hidden_state = seen.penultimate_hidden_states = None
        return io.NodeOutput(model, positive, negative, seen, len(found))


class KeyframeLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftKeyframeLatent",
            display_name="Keyframe Latent",
            category=CATEGORY,
            description="The latent of a clip whose batch is its frames: given pictures at their places, straight blends between "
            "them, and a mask that keeps the given ones as they are.",
            search_aliases=["first and last frame", "in-between latent", "transition"],
            inputs=[
                io.Vae.Input("vae", tooltip="VAE of the video model; it encodes each picture by itself."),
                io.Image.Input("first", tooltip="First picture, or all pictures of a story in order as one batch."),
                io.Int.Input(
                    "frames_per_transition",
                    default=8,
                    min=2,
                    max=4096,
                    tooltip="As in Semantic Motion Predictor.",
                ),
                io.Image.Input("last", optional=True, tooltip="Last picture, after those of first."),
                io.Boolean.Input(
                    "keep_pictures",
                    default=True,
                    optional=True,
                    tooltip="Keep the given pictures in the clip; off: they are only where sampling starts when denoise is "
                    "below 1.",
                ),
            ],
            outputs=[io.Latent.Output("latent", tooltip="For the sampler: one row for each frame.")],
        )

    @classmethod
    def execute(cls, vae, first, frames_per_transition, last=None, keep_pictures=True) -> io.NodeOutput:
        node_id = "StoryweftKeyframeLatent"
        pictures = _keyframes(first, last)
        motion.check_film(len(pictures), frames_per_transition, node_id)
        keys = vae.encode(pictures)
        if keys.ndim != 4 or len(keys) != len(pictures):
            raise ValueError(
                f"{node_id}: vae makes latents of shape {tuple(keys.shape)} of {len(pictures)} pictures; a VAE is needed that "
                "encodes each frame by itself (SD1.5, SDXL, SVD)."
            )
        places = transitions.places(len(keys), frames_per_transition)
        u = torch.tensor([time for _, time in places])
        flat = keys.flatten(1)
        rows = [interpolate(flat[s], flat[s + 1], u[i : i + 1]) for i, (s, _) in enumerate(places)]
        latent = {"samples": torch.cat(rows).unflatten(1, keys.shape[1:])}
        if keep_pictures:
            mask = torch.ones(len(places), 1, *keys.shape[-2:])
            mask[transitions.keyframe_positions(len(keys), frames_per_transition)] = 0
            latent["noise_mask"] = mask
        return io.NodeOutput(latent)


folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))

NODES = [LoadMotionPredictor, SemanticMotionPredictor, KeyframeLatent]
