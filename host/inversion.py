"""Runs the inversion of a picture inside ComfyUI's guider, as a sampler of its own."""

import itertools

import comfy.model_sampling
import comfy.samplers
import latent_preview
import torch
from torch import Tensor

from ..sampling.inversion import invert
from . import override
from .style import StyleReference


class InversionSampler(comfy.samplers.Sampler):
    """Core sampler object that walks from a clean latent up to noise; leaves `trajectory` [steps + 1, channels, h, w]."""

    def __init__(self):
        self.trajectory: Tensor | None = None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        sampling = model_wrap.inner_model.model_sampling
        numbers = itertools.count()

        def denoise(x: Tensor, sigma: float) -> Tensor:
            out = model_wrap(x, sigmas.new_full((len(x),), sigma), **extra_args)
            if callback is not None:
                callback(next(numbers), out, x, len(sigmas) - 1)
            return out

        states = invert(denoise, latent_image, sigmas.tolist(), float(sampling.sigma_min), sampling.sigma_data)
        self.trajectory = states[:, 0].cpu()
        return latent_image


def invert_picture(
    node_id: str, model, positive: list, negative: list, latent: Tensor, sigmas: Tensor, cfg: float
) -> StyleReference:
    """The trajectory of one picture [1, channels, h, w] over falling sigmas, without any Storyweft block on the model.

    Raises ValueError for models that do not predict noise or v at sigmas (rectified flow, Cascade).
    """
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.EPS):
        raise ValueError(
            f"{node_id}: {type(model.model.diffusion_model).__name__} predicts neither noise nor v at sigmas, which DDIM "
            "inversion needs; use SD1.5, SD2 or SDXL."
        )
    plain = override.without_rules(model)
    guider = comfy.samplers.CFGGuider(plain)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    sampler = InversionSampler()
    guider.sample(
        torch.zeros_like(latent),
        latent,
        sampler,
        sigmas,
        callback=latent_preview.prepare_callback(plain, len(sigmas) - 1),
        disable_pbar=True,
        seed=0,
    )
    return StyleReference(sampler.trajectory, tuple(sigmas.tolist()), sampling.sigma_data, latent)
