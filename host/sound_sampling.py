"""Direct sound optimisation on a MODEL of the host: its own guider, a sampler that gradients follow, checkpoints per call.

The weights stay frozen: gradients reach the prompt's weights alone. Node code runs in inference mode, whose tensors autograd
refuses; everything here leaves it, and weights that a loader made in it are exchanged once for equal normal ones.
"""

from dataclasses import dataclass

import comfy.conds
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.samplers
import comfy.utils
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..attention.sound import reweight
from ..sampling.multistep import calls, walk
from ..sampling.sound_optimise import Round, Terms, disagreement, optimise, spherical, views
from . import families, override
from .unet import UNetFamily

HALF_SCALE = 1024.0  # of the loss, for models that compute in float16
PREVIEW = 256
SCHEDULERS = comfy.samplers.SCHEDULER_NAMES


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn while the weights are tuned.

    last: evaluations with a gradient, None for all. augment: crops of each picture that are judged beside it.
    """

    steps: int = 40
    method: str = "plms"
    scheduler: str = "ddim_uniform"
    cfg: float = 7.5
    rounds: int = 10
    rate: float = 0.01
    last: int | None = None
    terms: Terms = Terms()
    restore: str = "mean"
    augment: int = 0


@dataclass(frozen=True)
class Outcome:
    rounds: list[Round]
    latents: Tensor  # of every round, [rounds, channels, h, w], as VAE Decode takes them
    after: Tensor  # the prompt after the last update, which no round shows
    plain: Tensor


def check(model, clip_rows: Tensor, vae, node_id: str) -> None:
    """Raise ValueError for a model, prompt or VAE that a gradient cannot follow here."""
    family = families.find(model, node_id)
    if not isinstance(family, UNetFamily) or family.time_layers:
        raise ValueError(f"{node_id}: {family.model_class} is no picture U-Net; optimisation needs SD1.5, SD2 or SDXL.")
    if override.rules_of(model):
        names = ", ".join(rule.node_id for rule in override.rules_of(model))
        raise ValueError(f"{node_id}: this MODEL carries {names}; connect the model from before it.")
    if clip_rows.shape[1] % 77:
        raise ValueError(f"{node_id}: the prompt has {clip_rows.shape[1]} rows, which is no CLIP text of 77.")
    if model.additional_models.get("multigpu"):
        raise ValueError(f"{node_id}: several GPUs share this MODEL and no gradient passes between them; use one.")
    for patcher, name in ((model, "model"), (vae.patcher, "vae")):
        if patcher.is_dynamic() and patcher.cached_patcher_init is None:
            raise ValueError(f"{node_id}: {name} streams its weights and its loader cannot load it whole; use a core loader.")


def whole(patcher):
    """A patcher whose weights lie on the device for good: streamed ones are overwritten before the backward pass."""
    return patcher.clone(disable_dynamic=True) if patcher.is_dynamic() else patcher.clone()


def normal_tensors(module: torch.nn.Module) -> None:
    """Exchange weights made in inference mode for equal ones that autograd takes; requires_grad stays as it is."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and value.is_inference():
                part._parameters[name] = torch.nn.Parameter(value.detach().clone(), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None and value.is_inference():
                part._buffers[name] = value.clone()


def plain_attention(func, *args, **kwargs):
    """Attention of torch itself: kernels of other packages may have no backward pass."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


class Optimisation(comfy.samplers.Sampler):
    """A sampler that draws the same noise again and again, while the weights of the prompt's rows are tuned."""

    def __init__(self, vae, weights: Tensor, judge, caption: str, sound: tuple[Tensor, int], settings: Settings, seed: int):
        self.settings, self.weights, self.judge, self.seed = settings, weights, judge, seed
        self.vae, self.decoder = vae, whole(vae.patcher)
        self.text, self.audio = judge.text(caption), judge.audio(*sound, caption)
        self.outcome: Outcome | None = None
        self.latents: list[Tensor] = []
        self.progress = comfy.utils.ProgressBar(settings.rounds * calls(settings.method, settings.steps))

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        model = guider.inner_model
        comfy.model_management.load_models_gpu([self.decoder], force_full_load=True)
        for module in (model.diffusion_model, self.decoder.model):
            normal_tensors(module)
        entry = guider.conds["positive"][0]
        z = entry["model_conds"]["c_crossattn"].cond.detach().float().clone()
        start = model.model_sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), self.max_denoise(guider, sigmas))

        def draw(prompt: Tensor) -> Tensor:
            def evaluate(x: Tensor, prompt: Tensor, sigma: float) -> Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                own = {**entry["model_conds"], "c_crossattn": comfy.conds.CONDCrossAttn(prompt)}
                guider.conds = {**guider.conds, "positive": [{**entry, "model_conds": own}]}
                return (x - guider(x, x.new_full((len(x),), sigma), **extra_args)) / sigma

            def noise_of(x: Tensor, sigma: float) -> Tensor:
                self.progress.update(1)
                if not torch.is_grad_enabled():
                    return evaluate(x, prompt, sigma)
                return checkpoint(evaluate, x, prompt, sigma, use_reentrant=False, preserve_rng_state=False)

            x = walk(noise_of, start, sigmas.tolist(), self.settings.method, self.settings.last)
            latent = model.process_latent_out(x)
            self.latents.append(latent.detach())
            return checkpoint(self._decode, latent, use_reentrant=False, preserve_rng_state=False)

        half = model.get_dtype_inference() == torch.float16
        rounds, w = optimise(
            z, self.weights.to(z), draw, self._judge, self.settings.terms, self.settings.rounds, self.settings.rate,
            self._report, HALF_SCALE if half else 1.0, self.settings.restore,
        )  # fmt: skip
        after, _ = reweight(z, w, self.settings.restore)
        self.outcome = Outcome(rounds, torch.cat(self.latents), after.cpu(), z.cpu())
        return self.latents[-1]

    def _decode(self, latent: Tensor) -> Tensor:
        network = self.decoder.model
        pixels = network.decode(latent.to(next(network.parameters()).dtype)).float()
        return ((pixels + 1) / 2).clamp(0, 1)

    def _judge(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        for_text, for_audio = self.judge.see(views(picture, self.settings.augment, self.seed))
        return spherical(for_text, self.text), disagreement(for_audio, self.audio, self.judge.log_scale)

    def _report(self, index: int, one: Round) -> None:
        pixels = (one.picture[0].movedim(0, -1).float().cpu().numpy() * 255).round().astype(np.uint8)
        done = (index + 1) * calls(self.settings.method, self.settings.steps)
        self.progress.update_absolute(done, self.progress.total, ("JPEG", Image.fromarray(pixels), PREVIEW))


def run(
    model, vae, positive: list, negative: list, weights: Tensor, judge, caption: str, sound, shape, noise_seed, settings
) -> Outcome:
    """Tune `weights` [tokens] of the one prompt `positive` for a latent of `shape` [1, channels, h, w]."""
    with torch.inference_mode(False), torch.enable_grad():
        patcher = whole(model)
        patcher.model_options["transformer_options"]["optimized_attention_override"] = plain_attention
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        sigmas = comfy.samplers.calculate_sigmas(
            patcher.get_model_object("model_sampling"), settings.scheduler, settings.steps
        )
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(noise_seed))
        sampler = Optimisation(vae, weights, judge, caption, sound, settings, noise_seed)
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(normal(positive), normal(negative))
        guider.set_cfg(settings.cfg)
        guider.sample(noise, torch.zeros(shape), sampler, sigmas, disable_pbar=True, seed=noise_seed)
        return sampler.outcome


def normal(conditioning: list) -> list:
    """The conditioning with every tensor made in inference mode exchanged for a copy."""

    def copied(value):
        return value.clone() if torch.is_tensor(value) and value.is_inference() else value

    return [[copied(z), {key: copied(value) for key, value in extras.items()}] for z, extras in conditioning]


def latent_shape(model, vae, width: int, height: int) -> tuple[int, int, int, int]:
    """Shape of one latent of a picture of that size."""
    channels = model.get_model_object("latent_format").latent_channels
    scale = vae.spacial_compression_encode()
    return 1, channels, height // scale, width // scale


def pictures(rounds: list[Round]) -> Tensor:
    """[rounds, height, width, 3] in [0, 1]."""
    return torch.cat([one.picture for one in rounds]).movedim(1, -1).float().cpu()
