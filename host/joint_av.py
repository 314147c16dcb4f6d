"""MM-Diffusion's joint audio-video model as a ComfyUI MODEL: latents are pixels [B, 3, F, H, W] and samples [B, 1, L].

Core packs the pair into [B, 1, N] for its samplers and gives it back to the network, because extra_conds says the shapes.
Sigmas are those of beta from 1e-4 to 0.02 ("sqrt_linear" in core's words). The model knows no prompt.
"""

import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from ..attention.cross_modal import RandomShifts, no_shift
from ..models.joint_unet import JointUNet, configuration
from .demo import WEIGHTS, read_weights

LOADER, DEMO_LOADER = "StoryweftJointAVLoader", "StoryweftDemoJointAVLoader"
KEY = "storyweft_joint_av"
SHIFT = "storyweft_shift"  # transformer option: one of SHIFTS
RANDOM, FIXED, OFF = "random", "fixed per run", "off"
SHIFTS = (RANDOM, FIXED, OFF)
UNCONDITIONAL = "storyweft_unconditional"  # mark of a conditioning that says there is no prompt
DTYPES = {"default": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FEATURES = 8  # tensors of the widest features that are alive at once (6.4 counted in float16), for the memory estimate


class Media(NamedTuple):
    """What a model was trained on: one clip of `frames` pictures, in its latents times `video_scale`, and `samples` samples."""

    frames: int = 16
    height: int = 64
    width: int = 64
    samples: int = 25600
    sample_rate: int = 16000
    fps: float = 10.0
    video_scale: float = 1.0


class PixelLatent(comfy.latent_formats.LatentFormat):
    """Pixels in [-1, 1] times `scale` as latents; previews show them as pixels."""

    latent_channels = 3
    latent_dimensions = 3
    spacial_downscale_ratio = 1

    def __init__(self, scale: float = 1.0):
        self.latent_rgb_factors = (torch.eye(3) / scale).tolist()


class PixelConfig(comfy.supported_models_base.BASE):
    """What core asks of a model's configuration; `unet_config` holds the arguments of the network."""

    unet_extra_config = {}
    sampling_settings = {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 0.02}
    latent_format = PixelLatent
    memory_usage_factor = 1.0


class JointDenoiser(JointUNet):
    """The network behind core's call: a pair of latents in, a pair of noises out."""

    def __init__(self, dtype=None, **kwargs):
        super().__init__(dtype=dtype, **kwargs)
        self.dtype = dtype

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self.predict, self, wrappers)
        return executor.execute(x, timestep, context, control, options, **kwargs)

    def predict(self, x, timestep, context, control, transformer_options, seed=0, **_):
        """The shifts depend on nothing but the seed and the time, so that no call order and no gradient changes them."""
        mode = transformer_options.get(SHIFT, RANDOM)
        moment = "" if mode == FIXED else f" {timestep.flatten()[0].item():.3f}"
        shifts = no_shift if mode == OFF else RandomShifts(f"{seed}{moment}")
        noises = super().forward(x[0], x[1], timestep, shifts)
        if not all(half.isfinite().all() for half in noises):  # dpm_adaptive would never end
            raise ValueError(f"{LOADER}: the model answers with numbers that are not finite; try another weight_dtype")
        return noises


class JointAVModel(comfy.model_base.BaseModel):
    """Epsilon prediction of both halves under one sigma."""

    def __init__(self, model_config, media: Media, device=None):
        super().__init__(model_config, comfy.model_base.ModelType.EPS, device, JointDenoiser)
        self.media = media
        self.latent_format = PixelLatent(media.video_scale)

    def extra_conds(self, **kwargs):
        shapes = kwargs.get("latent_shapes") or [kwargs["noise"].shape]
        return {
            "latent_shapes": comfy.conds.CONDConstant(shapes),
            "seed": comfy.conds.CONDConstant(kwargs.get("seed") or 0),
        }

    def memory_required(self, input_shape, cond_shapes=None):
        """Bytes of a forward pass; core's own formula counts a packed pair as if all of it were picture height."""
        size = comfy.model_management.dtype_size(self.get_dtype_inference())
        return math.prod(input_shape) * self.diffusion_model.model_channels * FEATURES * size


def clip_clean(args):
    """Post-cfg function: the clean estimate within -1 and 1, as the authors do in DDPM and DDIM."""
    return args["denoised"].clamp(-1, 1)


def with_settings(model, shift: str, clip: bool):
    """A clone of a joint MODEL with another kind of shift, clipped or not."""
    model = model.clone()
    model.model_options["transformer_options"][SHIFT] = shift
    functions = model.model_options.get("sampler_post_cfg_function", [])
    model.model_options["sampler_post_cfg_function"] = [one for one in functions if one is not clip_clean]
    if clip:
        model.set_model_sampler_post_cfg_function(clip_clean)
    return model


def check_run(
    executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None,
    latent_shapes=None,
):  # fmt: skip
    """Outer wrapper of a run on a joint model: refuses what the network cannot take before sampling starts.

    What the noise mask keeps comes back bit for bit once a run has taken all noise away; some samplers miss it by 1e-3.
    """
    guider, shapes = executor.class_obj, latent_shapes or [latent_image.shape]
    model = guider.model_patcher.model
    check_latents(shapes, latent_image, model)
    cfg = getattr(guider, "cfg", 1.0)
    if cfg != 1:
        raise ValueError(f"{LOADER}: cfg {cfg:g} must be 1: an MM-Diffusion model has no prompt to be guided by")
    positive = guider.conds.get("positive", [])
    if not positive:
        raise ValueError(f"{LOADER}: positive is empty, so the model would never be asked: connect No Prompt")
    if any(UNCONDITIONAL not in entry for entry in positive):
        logging.warning(f"{LOADER}: an MM-Diffusion model reads no prompt; the conditioning is ignored.")
    if any("control" in entry for entry in positive):
        raise ValueError(f"{LOADER}: positive carries a ControlNet, which cannot act on an MM-Diffusion model")
    if model.media.frames != shapes[0][2] or model.media.samples != shapes[1][2]:
        logging.warning(
            f"{LOADER}: the latent has {shapes[0][2]} frames and {shapes[1][2]} samples, the model was trained on "
            f"{model.media.frames} and {model.media.samples}."
        )
    to_the_end = bool(sigmas[-1] == 0)  # uni_pc changes the sigmas it is given
    run = {"callback": callback, "disable_pbar": disable_pbar, "seed": seed, "latent_shapes": latent_shapes}
    drawn = executor(noise, latent_image, sampler, sigmas, denoise_mask, **run)
    if denoise_mask is None or not to_the_end:
        return drawn
    return torch.where(denoise_mask.to(drawn.device) == 0, latent_image.to(drawn), drawn)


def check_latents(shapes, latent_image, model: JointAVModel) -> None:
    """ValueError for anything but a pair of video [B, 3, F, H, W] and audio [B, 1, L] of sizes that the network takes."""
    sizes = [tuple(shape) for shape in shapes]
    if len(sizes) != 2 or len(sizes[0]) != 5 or len(sizes[1]) != 3 or (sizes[0][1], sizes[1][1]) != (3, 1):
        raise ValueError(
            f"{LOADER}: latent_image {sizes} is not a joint latent: video [B, 3, F, H, W] first, then audio [B, 1, L]. "
            "Use Empty Joint Latent or Encode Joint Latent"
        )
    if not latent_image.isfinite().all():
        raise ValueError(f"{LOADER}: latent_image holds numbers that are not finite (NaN or infinity)")
    try:
        model.diffusion_model.check(*(torch.empty(shape, device="meta") for shape in sizes))
    except ValueError as error:
        raise ValueError(f"{LOADER}: latent_image: {error}") from error


def build(weights: dict[str, torch.Tensor], source: str, media: Media, dtype=None, disable_dynamic=False, **settings):
    """ModelPatcher of a coupled U-Net with clipped clean estimates; `settings` are JointUNet's arguments that keys lack.

    ValueError, naming `source`, if any tensor is missing, left over or of another shape.
    """
    try:
        config = PixelConfig(configuration(weights) | settings)
    except ValueError as error:
        raise ValueError(f"{LOADER}: {source}: {error}") from error
    patcher = patched(config, partial(JointAVModel, config, media), weights, source, dtype, disable_dynamic)
    patcher.set_model_sampler_post_cfg_function(clip_clean)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, check_run)
    return patcher


def patched(config: PixelConfig, make, weights: dict[str, torch.Tensor], source: str, dtype, disable_dynamic: bool):
    """A model made by make(device), with the weights strictly loaded, behind a ModelPatcher, as core's own loader does it."""
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    if dtype is None:
        held = comfy.utils.weight_dtype(weights)
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(weights),
            supported_dtypes=list(config.supported_inference_dtypes),
            weight_dtype=held,
        )
    cast = management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    try:
        model = make(device=offload)
    except ValueError as error:
        raise ValueError(f"{LOADER}: {source}: {error}") from error
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=offload)
    try:
        model.diffusion_model.load_state_dict(weights, strict=True, assign=patcher.is_dynamic())
    except RuntimeError as error:
        raise ValueError(f"{LOADER}: {source} does not fit: {str(error)[:600]}") from error
    return patcher


def read_file(path: str) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file or of a .pt file, of which nothing but tensors is read."""
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    if not weights or not all(torch.is_tensor(value) for value in weights.values()):
        raise ValueError(f"{LOADER}: {path} is not a flat table of tensors")
    return weights


def load_joint_av(path: str, settings: dict, dtype: str = "default", disable_dynamic: bool = False):
    """The published model in a file; also what core calls to build it anew without dynamic memory."""
    with torch.inference_mode(False):
        patcher = build(read_file(path), Path(path).name, Media(), DTYPES[dtype], disable_dynamic, **settings)
        patcher.cached_patcher_init = (load_joint_av, (path, settings, dtype))
        return patcher


def load_demo_joint_av(folder: str | Path = WEIGHTS, disable_dynamic: bool = False):
    """The small joint model of weights/, whose settings stand in its file."""
    with torch.inference_mode(False):
        weights, metadata = read_weights("joint_av", Path(folder), DEMO_LOADER)
        patcher = from_config(weights, json.loads(metadata["config"]), disable_dynamic)
        patcher.cached_patcher_init = (load_demo_joint_av, (str(folder),))
        return patcher


def from_config(weights: dict[str, torch.Tensor], config: dict, disable_dynamic: bool = False):
    """A model from weights and the settings that a trainer records beside them."""
    media = Media(**{name: config[name] for name in Media._fields if name in config})
    settings = {name: config[name] for name in ("windows", "head_channels", "heads", "groups") if name in config}
    return build(weights, "joint_av.safetensors", media, torch.float32, disable_dynamic, **settings)
