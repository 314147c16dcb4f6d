"""Passes of a U-Net over noised references, and what their transformer blocks hold after self-attention.

A pass is an ordinary forward of the same model on a reference with its own caption, noise level and nothing else: no other
block, no ControlNet. Passes that several branches or steps need are made once.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

OTHER = 0x53746F727947656E  # turns a sampler's seed into another one


@dataclass(frozen=True, eq=False)
class Reference:
    """latent [1, C, h, w] as the VAE gives it and the entry [text, extras] of the conditioning that describes it.

    Both may have a row for each latent of the run instead, where every one has references of its own.
    """

    latent: Tensor
    caption: list


def place(extra: dict) -> tuple[str, int, int]:
    """(path, block, depth) of the transformer block that a patch is called in."""
    return *extra["block"], extra["block_index"]


class Capture:
    """middle_patch that keeps the residual after self-attention [rows, tokens, C] of every transformer block."""

    def __init__(self):
        self.features: dict[tuple, Tensor] = {}

    def __call__(self, x: Tensor, extra: dict) -> Tensor:
        self.features[place(extra)] = x
        return x


class Noise:
    """One draw for all references and steps of a run, made on the CPU; never that of a sampler with the same seed."""

    def __init__(self, seed: int):
        self.seed = seed ^ OTHER

    def __call__(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(self.seed))


class ReferencePasses:
    """Features of references at given timesteps in one run; kept until other timesteps are asked for."""

    def __init__(self, run, noise):
        self.run, self.noise = run, noise
        self._inputs: dict[Reference, tuple[Tensor, Tensor, dict]] = {}
        self._kept: dict[tuple[Reference, int], dict[tuple, Tensor]] = {}

    def timestep(self) -> int:
        """The model's timestep nearest to the present noise level."""
        return int(self.run.base.model_sampling.timestep(torch.tensor(self.run.sigma)))

    def only(self, pairs: Iterable[tuple[Reference, int]]) -> None:
        """Drop all features but those of these references at these timesteps."""
        pairs = set(pairs)
        self._kept = {pair: found for pair, found in self._kept.items() if pair in pairs}

    def ready(self, pairs: Iterable[tuple[Reference, int]], device: torch.device) -> None:
        """Have the features of references at timesteps, in as few model calls as memory allows."""
        waiting = [pair for pair in dict.fromkeys(pairs) if pair not in self._kept]
        while waiting:
            made = self._batch(waiting, device)
            self._pass(made, device)
            waiting = [pair for pair in waiting if pair not in made]

    def feature(self, pair: tuple[Reference, int], site: tuple) -> Tensor:
        """[latents, tokens, C] of a transformer block (path, block, depth)."""
        return self._kept[pair][site]

    def _batch(self, waiting: list, device: torch.device) -> list:
        """As many of the passes as can share one call: like the first in size and text, and within free memory."""
        latent, _, first = self._input(waiting[0][0], device)
        alike = [
            pair
            for pair in waiting
            if self._input(pair[0], device)[0].shape == latent.shape
            and comfy.samplers.cond_equal_size(self._input(pair[0], device)[2], first)
        ]
        base = self.run.base
        free = base.current_patcher.get_free_memory(device)
        for parts in range(1, len(alike) + 1):
            count = len(alike) // parts
            if base.memory_required([count * len(latent), *latent.shape[1:]]) * 1.5 < free:
                return alike[:count]
        return alike[:1]

    def _pass(self, pairs: list, device: torch.device) -> None:
        base, capture = self.run.base, Capture()
        inputs = [self._input(reference, device) for reference, _ in pairs]
        sigmas = base.model_sampling.sigmas[[t for _, t in pairs]].to(device)
        x = torch.cat([latent + sigma * e for (latent, e, _), sigma in zip(inputs, sigmas, strict=True)])
        items = len(x) // len(pairs)
        conds = comfy.samplers.cond_cat([given for _, _, given in inputs])
        options = {"patches": {"middle_patch": [capture]}, "cond_or_uncond": [0] * len(pairs)}
        base.apply_model(x, sigmas.repeat_interleave(items), **conds, transformer_options=options)
        for number, pair in enumerate(pairs):
            self._kept[pair] = {
                site: found[number * items : (number + 1) * items] for site, found in capture.features.items()
            }

    def _input(self, reference: Reference, device: torch.device) -> tuple[Tensor, Tensor, dict]:
        """Latents and noise [latents, C, h, w] of a reference, and what the model is told with them."""
        if reference not in self._inputs:
            base, rows = self.run.base, self.run.latent_shape[0]
            latent = base.process_latent_in(reference.latent.to(device, torch.float32)).expand(rows, -1, -1, -1)
            text, extras = reference.caption
            cond = {**extras, "cross_attn": text, "model_conds": {}}
            (cond,) = comfy.samplers.encode_model_conds(
                base.extra_conds, [cond], latent, device, "positive", latent_image=latent, denoise_mask=None, seed=None
            )
            given = {name: one.process_cond(batch_size=rows, area=None) for name, one in cond["model_conds"].items()}
            self._inputs[reference] = latent, self.noise(latent.shape).to(latent), given
        return self._inputs[reference]


def check_memory(run, needed: int, count: int, node_id: str) -> None:
    """Say what the references will take; ValueError when that is more than the device has free."""
    device = run.base.current_patcher.load_device
    free = comfy.model_management.get_free_memory(device)
    logging.info("%s: %s", node_id, memory_line(count, run.latent_shape[0], needed))
    if needed > free:
        raise ValueError(
            f"{node_id}: {memory_line(count, run.latent_shape[0], needed)}, and {free / 2**20:.0f} MiB are free; give fewer "
            "or smaller references, or a smaller batch."
        )


def memory_line(passes: int, latents: int, needed: int) -> str:
    many = f" for {latents} pictures" if latents > 1 else ""
    return f"passes over references in a step: {passes}{many}, keeping {math.ceil(needed / 2**20 * 10) / 10} MiB"
