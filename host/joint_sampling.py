"""Samplers of MM-Diffusion's authors for ComfyUI, and one run of a joint model with one half known.

States of core stand at x / sqrt(a) = x * sqrt(1 + sigma^2); the formulas of sampling/ at unit scale.
"""

import logging

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.k_diffusion.sampling import sample_euler, trange
from comfy.nested_tensor import NestedTensor

from ..sampling.cross_guidance import Known, guided_step
from ..sampling.ddpm import levels
from ..sampling.dpm_solver import dpm_solver_fast
from ..sampling.schedule import dpm_grid, log_snr, section_counts, solver_orders, solver_times, spaced_times
from .joint_av import UNCONDITIONAL, JointAVModel, clip_clean

SAMPLER = "StoryweftRandomShiftAVSampler"
JOINT, TO_SOUND, TO_VIDEO = "video and sound", "video to sound", "sound to video"
TASKS = (JOINT, TO_SOUND, TO_VIDEO)
REPLACEMENT, GRADIENT = "replacement", "gradient"
GUIDANCE = (REPLACEMENT, GRADIENT)
DDPM, DDIM, DPM = "ddpm", "ddim", "dpm_solver"
METHODS = (DPM, DDIM, DDPM)
HALVES = ("video", "sound")
TIMES = 1000
KEPT = 11.2  # bytes that a gradient keeps, in those of a forward pass (counted on the published model: 10.2 GB)


class FromNoise(comfy.samplers.KSAMPLER):
    """Starts from noise of full size at whatever level, as the authors do when the noisiest steps are left out."""

    def max_denoise(self, model_wrap, sigmas) -> bool:
        return True


def model_levels(model_sampling) -> torch.Tensor:
    """a of every time of a model, float64 on the CPU, from its sigmas."""
    return levels(model_sampling.sigmas.cpu())


def no_prompt() -> list:
    return [[torch.zeros(1, 1, 1), {UNCONDITIONAL: True}]]


def check_respacing(respacing: str) -> None:
    """ValueError for a text that is no respacing of any model."""
    text = respacing.strip()
    if not text.startswith("dpm"):
        section_counts(text)
    elif not text[3:].isdecimal() or not int(text[3:]):
        raise ValueError(f'respacing "{respacing}": after dpm must stand the number of evaluations')


def respaced_sigmas(model, respacing: str) -> torch.Tensor:
    """Sigmas of the authors' respacings ("ddim25", "100", "10,15,20"), 0 at the end; "dpm20" the knots of DPM-Solver.

    The knots of DPM-Solver end at the cleanest level: the authors' solver does not take the last of the noise away.
    """
    check_respacing(respacing)
    sampling = model.get_model_object("model_sampling")
    text = respacing.strip()
    if text.startswith("dpm"):
        return torch.exp(-dpm_grid(int(text[3:]), model_levels(sampling)).lambdas).float()
    times = spaced_times(len(sampling.sigmas), text)[::-1]
    return torch.cat([sampling.sigmas.cpu()[times], torch.zeros(1)])


def _masked_out(model, x, extra_args):
    """The given part of the clip put back exactly at the end of a run."""
    mask = extra_args.get("denoise_mask")
    return x if mask is None else torch.where(mask == 0, model.latent_image, x)


def sample_ddpm(model, x, sigmas, extra_args=None, callback=None, disable=None, strength=0.0):
    """The authors' ancestral sampler over any falling sigmas; with `strength` the drawn part is guided by the given one.

    Noise is drawn on the CPU from a generator of the run's seed. ValueError: strength without a given part.
    """
    extra_args = extra_args or {}
    mask = extra_args.get("denoise_mask")
    if strength and (mask is None or bool((mask > 0).all())):
        raise ValueError("StoryweftDDPMSampler: strength needs a latent of which a part is given (a noise mask)")
    generator = torch.Generator().manual_seed((extra_args.get("seed") or 0) + 1)
    alphas = levels(sigmas.cpu())
    drawn = torch.ones_like(x) if mask is None else mask
    known = Known(model.latent_image, model.noise, drawn)
    options = {"model_options": extra_args.get("model_options", {}), "seed": extra_args.get("seed")}
    state = x * alphas[0].sqrt().to(x)
    if strength:
        ready_for_gradients(model.inner_model.inner_model, x)
    for step in trange(len(sigmas) - 1, disable=disable):
        clean = []

        def estimate(now, step=step, clean=clean):
            sigma = sigmas[step].clone()
            clean.append(model.inner_model(now * (1 + sigma**2).sqrt(), sigma.expand(len(now)).clone(), **options))
            return clean[0]

        noise = torch.randn(x.shape, generator=generator).to(x)
        state = guided_step(estimate, known, state, alphas[step], alphas[step + 1], noise, strength).x
        if callback is not None:
            shown = torch.where(drawn == 0, known.clean, clean[0].detach())
            callback({"x": state, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": shown})
    return _masked_out(model, state / alphas[-1].sqrt().to(state), extra_args)


def ready_for_gradients(base: JointAVModel, x: torch.Tensor) -> None:
    """Lets gradients through the network; where they do not fit into free memory, stages are computed a second time."""
    trainable(base.diffusion_model)
    needed, free = KEPT * base.memory_required(x.shape), comfy.model_management.get_free_memory(x.device)
    base.diffusion_model.lean = needed > free
    if needed > free:
        logging.info(f"{SAMPLER}: gradients need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: computed in parts, slower.")


def trainable(network: torch.nn.Module) -> None:
    """Parameters that were made in inference mode become ordinary ones: autograd refuses to keep the others."""
    with torch.inference_mode(False):
        for module in network.modules():
            for name, value in module._parameters.items():
                if value is not None and value.is_inference():
                    module._parameters[name] = torch.nn.Parameter(value.clone(), requires_grad=False)


def without_clip(model_options: dict) -> dict:
    kept = [function for function in model_options.get("sampler_post_cfg_function", []) if function is not clip_clean]
    return {**model_options, "sampler_post_cfg_function": kept}


def sample_dpm_solver(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DPM-Solver-fast of order 3, its grid even in lambda from the first to the last noise of the sigmas.

    As many evaluations as there are steps; sigmas that end in 0 spend the last one on taking the rest of the noise away.
    The network is asked at whole times, rounded down, and its answer is not clipped, as in the authors' solver.
    """
    extra_args = dict(extra_args or {})
    extra_args["model_options"] = without_clip(extra_args.get("model_options", {}))
    sampling = model.inner_model.inner_model.model_sampling
    table, to_end = model_levels(sampling), bool(sigmas[-1] == 0)
    knots = sigmas[:-1] if to_end else sigmas
    ends = log_snr(levels(knots.cpu()))
    lambdas = torch.linspace(float(ends[0]), float(ends[-1]), len(knots), dtype=torch.float64)
    shown = {}

    def denoise(state, sigma):
        shown["denoised"] = model(state, sigma.to(state).expand(len(state)), **extra_args)
        return shown["denoised"]

    def predict(state, lam):
        sigma = sampling.sigmas[solver_times(lam, table).item()]
        state = state * (1 + sigma**2).sqrt().to(state)
        return (state - denoise(state, sigma)) / sigma.to(state)

    state, done = x * levels(knots[:1].cpu()).sqrt().to(x), 0
    orders = solver_orders(len(knots) - 1) if len(knots) > 1 else []
    steps = dpm_solver_fast(predict, state, lambdas, orders)
    for number in trange(len(orders), disable=disable):
        state = next(steps)
        done += orders[number]
        if callback is not None:
            callback({"x": state, "i": done - 1, "sigma": knots[done], "sigma_hat": knots[done], **shown})
    state = state * (1 + knots[-1] ** 2).sqrt().to(state)
    if to_end:
        state = denoise(state, knots[-1])
    return _masked_out(model, state, extra_args)


def task_latent(latent: dict, task: str) -> tuple[NestedTensor, NestedTensor | None]:
    """What is sampled from and the mask of what is drawn; ValueError when the given half is missing or both are there."""
    samples, mask = latent["samples"], latent.get("noise_mask")
    if not getattr(samples, "is_nested", False):
        raise ValueError(
            f"{SAMPLER}: latent is one tensor {tuple(samples.shape)}, not a pair of video and sound: "
            "use Empty Joint Latent or Encode Joint Latent"
        )
    halves = list(samples.unbind())
    if task == JOINT:
        return samples, mask
    given = 0 if task == TO_SOUND else 1
    if not halves[given].any():
        raise ValueError(f'{SAMPLER}: task "{task}" needs a {HALVES[given]} in latent, and that half is empty')
    masks = list(mask.unbind()) if mask is not None and mask.is_nested else [None, None]
    drawn = masks[1 - given]
    if drawn is None:
        if halves[1 - given].any():
            raise ValueError(
                f'{SAMPLER}: task "{task}", but latent holds both video and sound: encode it with keep set to '
                f'"{HALVES[given]}", or give a time mask'
            )
        drawn = torch.ones_like(halves[1 - given][:, :1])
    masks[given], masks[1 - given] = torch.zeros_like(halves[given][:, :1]), drawn
    return samples, NestedTensor(masks)


def check_guidance(task: str, method: str, guidance: str, given: bool = True) -> None:
    """ValueError for gradient guidance with a method that has no noise, or with nothing given."""
    if guidance == GRADIENT and (method != DDPM or not given):
        raise ValueError(
            f'{SAMPLER}: guidance "{GRADIENT}" needs a given half and method "{DDPM}", not method "{method}" '
            f'with task "{task}"'
        )


def run_joint(model, latent: dict, seed: int, steps: int, method: str, task: str, guidance: str, strength: float) -> dict:
    """One run of a joint model: latent with the drawn halves; what was given comes back bit for bit.

    ValueError: another model, a latent that does not fit the task, gradient guidance with a method that has no noise.
    """
    if not isinstance(model.model, JointAVModel):
        raise ValueError(f"{SAMPLER}: model is a {type(model.model).__name__}, not a joint audio-video model")
    samples, mask = task_latent(latent, task)
    check_guidance(task, method, guidance, mask is not None)
    if guidance == GRADIENT and not strength:
        logging.warning(f"{SAMPLER}: strength 0 is plain replacement.")
    if method == DPM:
        sampler, text = comfy.samplers.KSAMPLER(sample_dpm_solver), f"dpm{steps}"
    elif method == DDIM:
        even = any(len(range(0, TIMES, stride)) == steps for stride in range(1, TIMES))
        sampler, text = FromNoise(sample_euler), f"ddim{steps}" if even else str(steps)
    else:
        options = {"strength": strength if guidance == GRADIENT else 0.0}
        sampler, text = comfy.samplers.KSAMPLER(sample_ddpm, options), str(steps)
    sigmas = respaced_sigmas(model, text)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(no_prompt(), no_prompt())
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
    drawn = guider.sample(noise, samples, sampler, sigmas, mask, callback, not comfy.utils.PROGRESS_BAR_ENABLED, seed)
    halves = [half.to(before) for half, before in zip(drawn.unbind(), samples.unbind(), strict=True)]
    return {**latent, "samples": NestedTensor(halves)}
