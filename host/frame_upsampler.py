"""MM-Diffusion's frame upsampler as a ComfyUI MODEL: latents are pixels [frames, 3, H, W], the small frames a condition."""

import math
from functools import partial
from pathlib import Path

import comfy.conds
import comfy.model_base
import comfy.model_management
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from ..models.frame_upsampler import FrameUpsampler, upsampler_configuration
from .joint_av import DTYPES, PixelConfig, clip_clean, patched, read_file

LOADER, CONDITION, IMAGES = "StoryweftFrameUpsamplerLoader", "StoryweftUpscaleFrames", "StoryweftFramesToImages"
KEY = "storyweft_frame_upsampler"
SMALL = "storyweft_small_frames"  # conditioning entry: frames [F, 3, h, w] in [-1, 1]
FACTOR = 4
FRAMES_AT_ONCE = 4
FEATURES = 16  # tensors of the widest features that are alive at once (13 counted in float16), for the memory estimate


class FrameConfig(PixelConfig):
    def __init__(self, unet_config: dict):
        super().__init__(unet_config)
        self.latent_format.latent_dimensions = 2


class FrameDenoiser(FrameUpsampler):
    """The network behind core's call; frames do not know each other, so a few at a time are drawn."""

    def __init__(self, dtype=None, **kwargs):
        super().__init__(dtype=dtype, **kwargs)
        self.dtype = dtype

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self.predict, self, wrappers)
        return executor.execute(x, timestep, context, control, options, **kwargs)

    def predict(self, x, timestep, context, control, transformer_options, small=None, **_):
        """The noise; the three channels of variance that the network also predicts are not used."""
        parts = zip(*(part.split(FRAMES_AT_ONCE) for part in (x, small, timestep)), strict=True)
        return torch.cat([super(FrameDenoiser, self).forward(*part)[:, :3] for part in parts])


class FrameUpsamplerModel(comfy.model_base.BaseModel):
    """Epsilon prediction of large frames beside the small ones."""

    def __init__(self, model_config, device=None):
        super().__init__(model_config, comfy.model_base.ModelType.EPS, device, FrameDenoiser)

    def extra_conds(self, **kwargs):
        return {"small": comfy.conds.CONDRegular(kwargs[SMALL])}

    def memory_required(self, input_shape, cond_shapes=None):
        size = comfy.model_management.dtype_size(self.get_dtype_inference())
        pixels = min(input_shape[0], FRAMES_AT_ONCE) * math.prod(input_shape[2:])
        return pixels * self.diffusion_model.model_channels * FEATURES * size


def check_run(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    """Outer wrapper of a run: refuses what the network cannot take before sampling starts."""
    guider = executor.class_obj
    shape, factor = tuple(latent_image.shape), 2 ** (guider.model_patcher.model.diffusion_model.levels - 1)
    if len(kwargs.get("latent_shapes") or [shape]) != 1 or len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"{LOADER}: latent_image {shape} must be frames of 3 channels, [frames, 3, H, W]: use {CONDITION}")
    if shape[2] % factor or shape[3] % factor:
        raise ValueError(f"{LOADER}: latent_image: height and width must be multiples of {factor}, not {shape[2:]}")
    if not latent_image.isfinite().all():
        raise ValueError(f"{LOADER}: latent_image holds numbers that are not finite (NaN or infinity)")
    cfg = getattr(guider, "cfg", 1.0)
    if cfg != 1:
        raise ValueError(f"{LOADER}: cfg {cfg:g} must be 1: a frame upsampler has no prompt to be guided by")
    for entry in guider.conds.get("positive", []) or [{}]:
        if SMALL not in entry:
            raise ValueError(f"{LOADER}: positive holds no frames to enlarge: connect {CONDITION}")
        if len(entry[SMALL]) != shape[0]:
            raise ValueError(f"{LOADER}: positive holds {len(entry[SMALL])} frames, latent_image {shape[0]}")
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def load_frame_upsampler(path: str, dtype: str = "default", disable_dynamic: bool = False):
    """The upsampler in a file; ValueError for OpenAI's class-conditional one and for anything that does not fit."""
    with torch.inference_mode(False):
        weights, name = read_file(path), Path(path).name
        try:
            config = FrameConfig(upsampler_configuration(weights))
        except ValueError as error:
            raise ValueError(f"{LOADER}: {name}: {error}") from error
        patcher = patched(config, partial(FrameUpsamplerModel, config), weights, name, DTYPES[dtype], disable_dynamic)
        patcher.set_model_sampler_post_cfg_function(clip_clean)
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, check_run)
        patcher.cached_patcher_init = (load_frame_upsampler, (path, dtype))
        return patcher


def prepare(images: torch.Tensor, factor: int, same_noise: bool) -> tuple[list, dict]:
    """Conditioning that holds IMAGE [F, h, w, 3], and an empty latent [F, 3, h * factor, w * factor]."""
    if images.shape[-1] != 3:
        raise ValueError(f"{CONDITION}: images have {images.shape[-1]} channels, the upsampler takes 3")
    frames, height, width, _ = images.shape
    conditioning = [[torch.zeros(1, 1, 1), {SMALL: images.movedim(-1, 1) * 2 - 1}]]
    latent = {"samples": torch.zeros(frames, 3, height * factor, width * factor)}
    return conditioning, latent | ({"batch_index": [0] * frames} if same_noise else {})


def images_of(latent: dict) -> torch.Tensor:
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or samples.ndim != 4 or samples.shape[1] != 3:
        raise ValueError(f"{IMAGES}: latent {tuple(samples.shape)} must be frames of 3 channels, [frames, 3, H, W]")
    return ((samples.movedim(1, -1) + 1) / 2).clamp(0, 1)
