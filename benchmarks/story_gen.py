"""StoryGen without repeated work against the authors' schedule: `python -m benchmarks.story_gen` writes docs/story_gen_speed.md.

The authors pass every reference three times a step, one after the other, whatever the stage; both run on one U-Net of
SD1.5's form with fewer channels. FLOPs are those of SD1.5 itself, counted on tensors without content.
"""

import argparse
import platform
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import pack
from .consistent import in_turn

import comfy.model_management  # isort: skip
import comfy.model_patcher  # isort: skip
import comfy.ops  # isort: skip
import comfy.samplers  # isort: skip
import comfy.supported_models  # isort: skip
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # isort: skip
from storyweft.host import override  # isort: skip
from storyweft.host import story_gen_weights as weights  # isort: skip
from storyweft.host.reference_pass import Capture, Noise, Reference  # isort: skip
from storyweft.host.story_gen import ImagePatches, ImageSites, ReferenceRule, make_guider  # isort: skip
from storyweft.models.story_gen import ImageAttention  # isort: skip
from storyweft.sampling.story_gen import AUTO, MULTI, reference_timesteps  # isort: skip

SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "legacy": False,
    "num_heads": 8,
    "num_head_channels": -1,
}
AIM = 1.3
T = 901  # timestep of the step that is timed
SCALES = (7.0, 3.5)


class Patched:
    """A U-Net with image attentions, called in the authors' order."""

    def __init__(self, network, modules: dict, sites: ImageSites):
        self.network, self.modules, self.sites = network, modules, sites

    def captured(self, rows: torch.Tensor, t: int, words: torch.Tensor) -> dict:
        capture = Capture()
        steps = torch.full((len(rows),), t, device=rows.device)
        self.network(rows, steps, context=words, transformer_options={"patches": {"middle_patch": [capture]}})
        return capture.features

    def main(self, rows: torch.Tensor, words: torch.Tensor, groups) -> torch.Tensor:
        options = {}
        ImagePatches(self.modules, self.sites, groups, 1.0).add_to(options)
        return self.network(rows, torch.full((len(rows),), T, device=rows.device), context=words, transformer_options=options)

    def authors(self, x, words, latents, steps) -> torch.Tensor:
        found = [self.captured(one.expand(3, -1, -1, -1), t, words) for one, t in zip(latents, steps, strict=True)]
        joined = {site: torch.cat([part[site] for part in found], 1) for site in found[0]}
        return self.main(x.expand(3, -1, -1, -1), words, [(slice(0, 3), joined.get)])


def flops(count: int, stage: str) -> tuple[float, float]:
    """TFLOPs of one step at 512 x 512, authors' and ours, from SD1.5's sizes."""
    network = UNetModel(**SD15, device="meta", operations=comfy.ops.disable_weight_init)
    modules, heads = {}, {}
    for site, block in weights.transformer_blocks(network).items():
        width = block.attn1.to_q.in_features
        modules[site], heads[site] = ImageAttention(width, width, device="meta"), block.attn1.dim_head
    unet = Patched(network, modules, ImageSites(dict, heads))
    x, words = torch.zeros(1, 4, 64, 64, device="meta"), torch.zeros(3, 77, 768, device="meta")
    steps = reference_timesteps(T, count, stage)
    with FlopCounterMode(display=False) as theirs:
        unet.authors(x, words, [x] * count, steps)
    with FlopCounterMode(display=False) as ours:
        real = [unet.captured(x, t, words[:1]) for t in steps]
        grey = [unet.captured(x, t, words[:1]) for t in dict.fromkeys(steps)]
        shown, blank = ({site: torch.cat([part[site] for part in parts], 1) for site in real[0]} for parts in (real, grey))
        unet.main(x.expand(3, -1, -1, -1), words, [(slice(0, 1), blank.get), (slice(1, 3), shown.get)])
    return theirs.get_total_flops() / 1e12, ours.get_total_flops() / 1e12


def small(channels: int):
    """A MODEL of SD1.5's form with random weights and image attentions beside it."""
    settings = SD15 | {"model_channels": channels}
    config = comfy.supported_models.SD15(dict(settings))
    config.unet_config |= settings
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    device = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.CoreModelPatcher(model, device, device)
    state = {}
    for name, site in weights.site_names(settings)[0].items():
        width = weights.transformer_blocks(model.diffusion_model)[site].attn1.to_q.in_features
        state |= {name + key: value for key, value in ImageAttention(width, width).state_dict().items()}
    return weights.add(patcher, state, {}, "random", "benchmark")


class Rows:
    """Counts latents that go through a U-Net."""

    def __init__(self, network):
        self.count = 0
        network.register_forward_pre_hook(self.seen)

    def seen(self, network, args):
        self.count += len(args[0])

    def of(self, form) -> int:
        before = self.count
        form()
        return self.count - before


def timed(model, count: int, stage: str, side: int, repeats: int) -> tuple[float, float, int, int]:
    """Seconds of one step, authors' and ours, and the latents each passes through the U-Net."""
    sites, network = weights.weights_of(model, "benchmark").sites, model.model.diffusion_model
    generator = torch.Generator().manual_seed(1)
    x, *latents = (torch.randn(1, 4, side, side, generator=generator) for _ in range(count + 1))
    words = torch.randn(3, 77, 768, generator=generator)
    unet, steps = Patched(network, sites.modules(network), sites), reference_timesteps(T, count, stage)
    references = tuple(Reference(one, [words[:1], {}]) for one in latents)
    rule = ReferenceRule(sites, references, Reference(x, [words[1:2], {}]), stage, Noise(0))
    guider = make_guider(override.register(model, rule), rule, [[words[2:], {}]], [[words[1:2], {}]], *SCALES)
    sigmas = model.get_model_object("model_sampling").sigmas[[T, 0]]
    sampler = comfy.samplers.sampler_object("euler")

    def theirs():
        unet.authors(x, words, latents, steps)

    def ours():
        guider.sample(x, torch.zeros_like(x), sampler, sigmas, disable_pbar=True, seed=0)

    rows = Rows(network)
    counted = rows.of(theirs), rows.of(ours)
    return *in_turn([theirs, ours], repeats, time.process_time), *counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=64, help="of the U-Net that is timed; SD1.5 has 320")
    parser.add_argument("--side", type=int, default=32, help="of its latents; 64 at 512 x 512")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Speed of StoryGen",
        "",
        f"`python -m benchmarks.story_gen`, torch {torch.__version__}, {platform.machine()}, float32, one thread: processor time of one "
        f"step, medians of {args.repeats} runs in turn, on a U-Net of SD1.5's form with {args.channels} channels at {args.side} x "
        f"{args.side}. Latents: how many go through the U-Net in that step, counted. TFLOPs: SD1.5 at 512 x 512, counted.",
        "",
        "| references | stage | authors' latents | ours | authors' s | ours s | times faster | aim | authors' TFLOPs | ours | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    model = small(args.channels)
    with torch.inference_mode():
        for count, stage, aim in ((3, MULTI, AIM), (3, AUTO, None), (1, AUTO, None)):
            theirs, ours, before, after = timed(model, count, stage, args.side, args.repeats)
            big, less = flops(count, stage)
            lines.append(
                f"| {count} | {stage} | {before} | {after} | {theirs:.2f} | {ours:.2f} | **{theirs / ours:.2f}** | {aim or ''} | "
                f"{big:.2f} | {less:.2f} | {big / less:.2f} |"
            )
            print(lines[-1], flush=True)
    (pack.ROOT / "docs" / "story_gen_speed.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
