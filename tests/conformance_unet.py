"""The recorded tiny U-Net in ComfyUI's own class, and the authors' 24-step DDIM run through guider and seam."""

import json
from types import SimpleNamespace
from typing import NamedTuple

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP
from conformance_consistent import read
from storyweft.attention.consistent import ConsistentOptions
from storyweft.host import bank, override
from storyweft.host.consistent import ConsistentRule


class TinyUNet(NamedTuple):
    patcher: object
    missing: list


def tiny_unet(path, alphas_cumprod=None, dtype=torch.float32) -> TinyUNet:
    """ComfyUI's UNetModel with the recorded weights, behind an epsilon model of the recorded noise schedule."""
    weights, meta = read(path)
    recorded = {"num_heads": -1, "adm_in_channels": None} | json.loads(meta["config"])
    config = comfy.supported_models.SD15(recorded)
    config.unet_config |= recorded  # the class sets SD1.5's own head count
    config.set_inference_dtype(dtype, None)
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS)
    missing, unexpected = model.diffusion_model.load_state_dict(
        {k: v.to(dtype) for k, v in weights.items()}, strict=False
    )
    if alphas_cumprod is not None:
        model.model_sampling.set_sigmas(((1 - alphas_cumprod) / alphas_cumprod) ** 0.5)
    model.diffusion_model.train(False)
    device = comfy.model_management.get_torch_device()
    return TinyUNet(comfy.model_patcher.CoreModelPatcher(model, device, device), [*missing, *unexpected])


class Fed:
    """The recorded decisions and draws in place of drawn ones."""

    def __init__(self, data: dict):
        self.table = data["share"].bool().tolist()
        self.small, self.large = data["sample_s"].bool(), data["sample_l"].bool()

    def share(self, evaluation, layers):
        return self.table[evaluation[0]][:layers]

    def tokens(self, evaluation, grid, panel):
        size = grid[0] * grid[1] * grid[2]
        return next(draw for draw in (self.small, self.large) if draw.shape[2] == size)[evaluation[0], panel]


class Forced:
    """A sampler that starts every DDIM step from the recorded latents; keeps raw predictions and the next latents.

    The recorded latents go into the U-Net as they are (a diffusion-model wrapper), since a round trip through sigma
    space costs more digits than the tolerance allows.
    """

    def __init__(self, data: dict, states):
        self.alphas, self.timesteps, self.states = data["alphas_cumprod"], data["timesteps"].tolist(), states
        self.guidance = data["guidance"]
        self.gap = self.timesteps[0] - self.timesteps[1]
        self.halves: dict[int, torch.Tensor] = {}
        self.eps: list = []
        self.next: list = []

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        for step, t in enumerate(self.timesteps):
            self.state = self.states[step]
            guider(noise, sigmas[step].expand(len(noise)), **extra_args)
            cond, uncond = self.halves[0], self.halves[1]
            self.eps.append(torch.cat([uncond, cond]))
            eps = uncond + self.guidance * (cond - uncond)
            alpha, before = self.alphas[t], self.alphas[t - self.gap if t >= self.gap else 0]
            clean = (self.state - (1 - alpha).sqrt() * eps) / alpha.sqrt()
            self.next.append(before.sqrt() * clean + (1 - before).sqrt() * eps)
        return noise

    def network(self, executor, x, t, context, y, control, transformer_options, **kwargs):
        chunks = transformer_options["cond_or_uncond"]
        out = executor(self.state.repeat(len(chunks), 1, 1, 1), t, context, y, control, transformer_options, **kwargs)
        self.halves |= dict(zip(chunks, out.chunk(len(chunks)), strict=True))
        return out


def forced_run(patcher, rule, data: dict, states, rows, story=None):
    patcher = override.register(patcher, rule) if rule is not None else patcher.clone()
    sampler = Forced(data, states)
    patcher.add_wrapper(WrappersMP.DIFFUSION_MODEL, sampler.network)
    marks = {} if story is None else {"storyweft_panels": tuple(rows), "storyweft_story": story}
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[data["ctx_cond"][rows], marks]], [[data["ctx_uncond"], {}]])
    guider.set_cfg(data["guidance"])
    sigmas = torch.cat([patcher.get_model_object("model_sampling").sigmas[data["timesteps"]], torch.zeros(1)])
    guider.sample(torch.ones_like(states[0]), torch.zeros_like(states[0]), sampler, sigmas, disable_pbar=True)
    return torch.stack(sampler.next), sampler.eps


def consistent_run(path, weights, report) -> None:
    data, meta = read(path)
    data["guidance"] = float(meta["guidance"])
    frames = int(meta["N"])
    patcher = tiny_unet(weights, data["alphas_cumprod"]).patcher
    recorder = bank.Recorder()
    rule = ConsistentRule(
        ConsistentOptions(first_step=int(meta["first_shared_step"])), "output path", recorder=recorder, draws=Fed(data)
    )
    ids = list(range(frames))

    def relative(name, got, want):
        scale = want.flatten(1).abs().amax(1).view(-1, *[1] * (want.ndim - 1))
        report.close(path.name, f"{name} (relative)", got / scale, want / scale, 1e-5)

    latents, eps = forced_run(patcher, rule, data, data["x_write"], ids)
    relative("x_write", latents, data["x_write"][1:])
    report.close(path.name, "eps_write_first4", torch.stack(eps[:4]), data["eps_write_first4"], 3e-5)
    report.close(path.name, "eps_write_last2", torch.stack(eps[-2:]), data["eps_write_last2"], 3e-5)

    sigmas = ((1 - data["alphas_cumprod"]) / data["alphas_cumprod"]).sqrt()[data["timesteps"]].tolist() + [0.0]
    character = bank.Character(
        "",
        "",
        rule.options,
        rule.layers,
        tuple(sigmas),
        tuple(data["x_init"].shape[2:]),
        "UNetModel",
        "",
        frames,
        recorder.tensors(""),
    )
    first = [character.tensors[f"1.0.{min(layer_ordinals(character))}.{role}.0"] for role in ("negative", "positive")]
    report.close(path.name, "bank_step1_layer0", torch.stack(first), data["bank_step1_layer0"], 3e-5)

    reader = ConsistentRule(rule.options, rule.layers, characters=[character], draws=rule.draws)
    latents, eps = forced_run(patcher, reader, data, data["x_read"], [frames])
    relative("x_read", latents, data["x_read"][1:])
    report.close(path.name, "eps_read", torch.stack(eps), data["eps_read"], 3e-5)

    nobody = SimpleNamespace(panels={frames + 1: SimpleNamespace(characters=())}, id_panels={})
    latents, eps = forced_run(patcher, reader, data, data["x_nc"], [frames + 1], nobody)
    relative("x_nc", latents, data["x_nc"][1:])
    report.close(path.name, "eps_nc_last", eps[-1], data["eps_nc_last"], 3e-5)
    plain, _ = forced_run(patcher, None, data, data["x_nc"], [frames + 1])
    report.close(path.name, "x_nc against no block", latents, plain, 0)
    report.apart(path.name, "x_write_plain_final", data["x_write"][-1], data["x_write_plain_final"], 1.0)


def layer_ordinals(character) -> set[int]:
    return {int(key.split(".")[2]) for key in character.tensors if key.startswith("1.0.")}
