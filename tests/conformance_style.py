"""Runners for golden/style_aligned: one layer, the U-Net with every option, inversion of a picture and style transfer.

The U-Net runs in float64: its random weights blow rounding up so far that the float32 recordings are already up to 2.6e-5
from the exact value, most of the tolerance.
"""

import json
import math
from types import SimpleNamespace

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from conformance_consistent import Layer, read, unet
from conformance_unet import tiny_unet
from storyweft.attention.core import attend
from storyweft.attention.style import StyleOptions, adain, plain_layers, shared_group_norm
from storyweft.host import families, override
from storyweft.host.layout import Layer as Place
from storyweft.host.layout import Layout
from storyweft.host.plan import SelfPlan
from storyweft.host.style import ReferenceRule, StyleReference, StyleRule
from storyweft.sampling.inversion import inversion_step, replay_index


def options(case: dict) -> StyleOptions:
    """The options of one case; sharing layer norms is an exact no-op and has none."""
    return StyleOptions(**{key: value for key, value in case.items() if key != "share_layer_norm"})


def plan_of(q, k, v, size: int, case: dict) -> SelfPlan:
    """What the rule makes of one attention call on [chunks x size, heads, tokens, dim]."""
    place = Place("output", 0, 0, 0)
    layout = Layout(tuple(range(len(q) // size)), tuple(range(size)), place, (1, 1, q.shape[2]), slice(0, q.shape[2]))
    rule = StyleRule(options(case))
    run = SimpleNamespace(family=SimpleNamespace(picture_only=True), acted={rule: 0})
    plan = SelfPlan(layout, q, k, v, None)
    rule.plan(run, None, layout, plan)
    return plan


def style_attn(path, report) -> None:
    data, meta = read(path)
    heads, size = int(meta["heads"]), int(meta["B"])
    layer = Layer(data, heads)
    q, k = (layer.project(data["x"], weight) for weight in (layer.q, layer.k))
    report.close(path.name, "q", q, data["q"], 1e-5)
    report.close(path.name, "k", k, data["k"], 1e-5)
    report.close(path.name, "q_adain", adain(q, size), data["q_adain"], 1e-5)
    scaled = plan_of(q, k, k, size, {"adain_queries": False, "adain_keys": False, "shared_score_scale": 0.5})
    joined = [torch.cat([own, seen[0].k if seen else own], 1) for own, seen in zip(scaled.k, scaled.seen, strict=True)]
    report.close(path.name, "k_cat_scale_half", torch.stack(joined), data["k_cat_scale_half"], 1e-5)
    plain = layer(data["x"], lambda q, k, v: attend(q, k, v))
    report.close(path.name, "out.plain", plain, data["out.plain"], 1e-5)
    for name, case in json.loads(meta["cases"]).items():
        got = layer(data["x"], lambda q, k, v, case=case: plan_of(q, k, v, size, case).run(attend, None))
        report.close(path.name, f"out.{name}", got, data[f"out.{name}"], 1e-5)
        if not case.get("full_attention_share"):
            report.close(path.name, f"out.{name} reference", got[::size], plain[::size], 3e-6)
    norm = data["gn_x"], int(meta["groups"]), data["gn_w"], data["gn_b"], 1e-5
    report.close(path.name, "gn_shared", shared_group_norm(*norm, size), data["gn_shared"], 1e-5)
    report.close(path.name, "gn_plain", shared_group_norm(*norm, 1), data["gn_plain"], 1e-5)
    report.close(path.name, "ln_shared is ln_plain", data["ln_shared"], data["ln_plain"], 0)
    for name in sorted(key for key in data if key.startswith("only_self.")):
        _, count, level = name.split(".", 2)
        got = torch.tensor(plain_layers(int(count), float(level)), dtype=torch.uint8)
        report.close(path.name, name, got, data[name], 0)


class Given(comfy.samplers.Sampler):
    """A sampler that calls `walk(self, denoise)`; keeps the raw predictions [uncond ..., cond ...] of every call.

    `state`, when set, goes into the network as it is, since a round trip through sigma space costs digits.
    """

    def __init__(self, walk):
        self.walk = walk
        self.eps: list = []
        self.inputs: list = []
        self.state = None

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        self.walk(self, lambda x, sigma: guider(x, sigmas.new_full((len(x),), sigma), **extra_args))
        return noise

    def network(self, executor, x, t, context, y, control, transformer_options, **kwargs):
        chunks = transformer_options["cond_or_uncond"]
        if self.state is not None:
            x = self.state.to(x.dtype).repeat(len(chunks), 1, 1, 1)
        out = executor(x, t, context, y, control, transformer_options, **kwargs)
        halves = dict(zip(chunks, out.chunk(len(chunks)), strict=True))
        self.inputs.append(x[: len(x) // len(chunks)])
        self.eps.append(torch.cat([halves[1], halves[0]]))
        return out


def guided(patcher, rules, data: dict, rows, sigmas, guidance: float, walk) -> Given:
    """Runs `walk` inside the guider of a model with `rules`, for the pictures `rows`."""
    for rule in rules:
        patcher = override.register(patcher, rule)
    patcher = patcher.clone()
    sampler = Given(walk)
    patcher.add_wrapper(WrappersMP.DIFFUSION_MODEL, sampler.network)
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[data["ctx_cond"][rows], {}]], [[data["ctx_uncond"], {}]])
    guider.set_cfg(guidance)
    start = torch.ones(len(rows), *data["x"].shape[1:])
    guider.sample(start, torch.zeros_like(start), sampler, torch.tensor([*sigmas, 0.0]), disable_pbar=True)
    return sampler


def unet_style(path, report) -> None:
    data, meta = read(path)
    alphas = data["inv_alphas_cumprod"].double()
    levels = ((1 - alphas) / alphas).sqrt().tolist()
    weights = path.with_name(path.name.split("_", 1)[0] + "_unet.safetensors")
    patcher = tiny_unet(weights, data["inv_alphas_cumprod"], torch.float64).patcher
    rows, sigma = list(range(int(meta["B"]))), levels[int(data["t"])]

    def once(sampler, denoise):
        sampler.state = data["x"]
        denoise(data["x"] * math.hypot(sigma, 1), sigma)

    for name, case in {"plain": None, **json.loads(meta["cases"])}.items():
        rules = [] if case is None else [StyleRule(options(case))]
        got = guided(patcher, rules, data, rows, [sigma], 1.5, once).eps[0]
        report.close(path.name, f"eps.{name}", got, data[f"eps.{name}"], 3e-5)
    layer_choice(patcher, meta, path, report)
    inversion(patcher, data, meta, levels, path, report)
    transfer(patcher, data, meta, levels, path, report)


def layer_choice(patcher, meta: dict, path, report) -> None:
    """The layers that share at only_self_level 0.5, by the place of each in the authors' order (down, up, middle)."""
    half = StyleRule(StyleOptions(only_self_level=0.5))
    family = families.find(patcher, half.node_id)
    sharing = half.start(SimpleNamespace(family=family))
    order = sorted(family.layers, key=half._diffusers_place)
    names = json.loads(meta["processor_order"])
    got = torch.tensor([layer in sharing for layer in order])
    want = torch.tensor([name in json.loads(meta["half_shared_layers"]) for name in names])
    report.close(path.name, "half_shared_layers", got, want, 0)


def inversion(patcher, data: dict, meta: dict, levels: list[float], path, report) -> None:
    """Every step from the recorded state before it; the first one must be the identity."""
    sigmas = [levels[t] for t in data["inv_timesteps"].tolist()]
    states, got = data["inv_zs"][:, None], []

    def walk(sampler, denoise):
        before = levels[0]
        for step in reversed(range(len(sigmas))):
            got.insert(0, inversion_step(denoise, states[step + 1], before, sigmas[step]))
            before = sigmas[step]

    guided(patcher, [], data, [0], sigmas, float(meta["inversion_guidance"]), walk)
    report.close(path.name, "inv_zs", torch.stack(got), states[:-1], 2e-5)
    report.close(path.name, "inv_zs first step", got[-1], data["inv_z0"], 0)


def transfer(patcher, data: dict, meta: dict, levels: list[float], path, report) -> None:
    """Every step of the set from the recorded latents; the first row comes from the replayed trajectory."""
    timesteps, offset = data["inv_timesteps"].tolist(), int(meta["transfer_offset"])
    sigmas = [levels[t] for t in timesteps]
    reference = StyleReference(data["inv_zs"], (*sigmas, 0.0), 1.0, data["inv_zs"][-1:])
    rules = [StyleRule(StyleOptions(shared_score_shift=math.log(2))), ReferenceRule(reference, offset)]
    found = []

    def walk(sampler, denoise):
        for step, sigma in enumerate(sigmas):
            after = sigmas[step + 1] if step + 1 < len(sigmas) else levels[0]
            x = data["tr_x"][step] * math.hypot(sigma, 1)
            x = torch.cat([torch.zeros_like(x[:1]), x[1:]])
            x = x + (after - sigma) * (x - denoise(x, sigma)) / sigma
            found.append(x[1:] / math.hypot(after, 1))

    rows = list(range(int(meta["B"])))
    sampler = guided(patcher, rules, data, rows, sigmas, float(meta["transfer_guidance"]), walk)
    report.close(path.name, "tr_x", torch.stack(found), data["tr_x"][1:, 1:], 2e-4)
    report.close(path.name, "tr_x reference", torch.stack(sampler.inputs)[:, 0], data["tr_x"][:-1, 0], 2e-4)
    report.close(path.name, "tr_eps", torch.stack(sampler.eps), data["tr_eps"], 2e-4)
    last = data["inv_zs"][replay_index(len(sigmas), offset)]
    report.close(path.name, "tr_x reference at the end", last, data["tr_x"][-1, 0], 2e-4)


RUNNERS = {
    ("style_aligned", "style_attn"): style_attn,
    ("style_aligned", "unet"): unet,
    ("style_aligned", "unet_style"): unet_style,
    "style_attn": style_attn,
    "unet_style": unet_style,
}
