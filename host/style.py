"""StyleAligned as rules of the host seam: the first picture of every guidance chunk is the style reference of the others.

StyleRule aligns and shares; ReferenceRule puts the inverted picture of a StyleReference in the first row.
"""

import contextlib
import functools
import logging
import math
from dataclasses import dataclass

import comfy.ops
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from ..attention.joined import Piece
from ..attention.style import StyleOptions, adain, plain_layers, shared_group_norm
from ..sampling.inversion import replay_index
from . import families
from .layout import Layer, Layout
from .rule import Rule

ORDER = ("input", "output", "middle")  # in which only_self_level counts layers


def check_family(model, node_id: str) -> None:
    """ValueError for a MODEL whose positions cannot be kept out of the alignment."""
    family = families.find(model, node_id)
    if not family.picture_only and not family.form.early:
        raise ValueError(
            f"{node_id}: {family.model_class} shows its queries and keys only after positions are turned into them, where "
            "their mean means nothing; use SD1.5, SD2, SDXL or SVD, or, as an experiment, Flux, Chroma or Qwen-Image."
        )


class StyleRule(Rule):
    """See the module; `sigma_range` (high, low) bounds the steps at which it acts.

    With `control_first` off, ControlNets leave the reference alone, as the authors have it.
    """

    node_id = "StoryweftStyleAligned"
    kinds = frozenset({"self"})
    whole_batch = True

    def __init__(self, options: StyleOptions, sigma_range=(math.inf, 0.0), control_first: bool = False):
        self.options = options
        self.sigma_range = sigma_range
        self.control_first = control_first
        self.neutral = not options.touches_attention and not options.share_group_norm

    def start(self, run) -> frozenset[Layer]:
        """Layers that share."""
        layers = sorted(run.family.layers, key=self._diffusers_place)
        plain = plain_layers(len(layers), self.options.only_self_level)
        return frozenset(layer for layer, keeps in zip(layers, plain, strict=True) if not keeps)

    @staticmethod
    def _diffusers_place(layer: Layer) -> tuple[int, int]:
        return ORDER.index(layer.path), layer.ordinal

    def begin(self, run) -> None:
        if run.latent_shape[0] < 2:
            raise ValueError(
                f"{self.node_id}: the latent holds 1 picture, which is the style reference, and nobody to follow it; set "
                "batch_size to 2 or more."
            )

    def acts(self, run) -> bool:
        high, low = self.sigma_range
        return low <= run.sigma <= high

    def wants(self, layer: Layer, run) -> bool:
        return (
            layer.kind == "self"
            and self.options.touches_attention
            and layer in run.state[self]
            and self.acts(run)
        )

    def prepare(self, run, call, options: dict) -> None:
        if call.items[0] != 0 and self.acts(run):
            raise RuntimeError(
                f"{self.node_id}: a context window shows the model pictures {', '.join(str(i + 1) for i in call.items)} without "
                "picture 1, the style reference; remove the context windows."
            )

    def control(self, run, call, control: dict) -> dict:
        return control if self.control_first else without_first(control, len(call.entries), len(call.items))

    def around(self, run, call):
        if not (self.options.share_group_norm and run.family.norms and self.acts(run)):
            return contextlib.nullcontext()
        run.acted[self] += 1
        return shared_norms(run.family.norms, len(call.entries), len(call.items))

    def align(self, run, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        options, size, image = self.options, layout.chunk_size, layout.image
        if options.full_attention_share:
            return q, k, v
        chosen = (options.adain_queries, options.adain_keys, options.adain_values)
        run.acted[self] += any(chosen)
        return tuple(
            aligned(x, size, image) if wanted else x for x, wanted in zip((q, k, v), chosen, strict=True)
        )

    def plan(self, run, call, layout: Layout, plan) -> bool:
        options, image = self.options, layout.image
        if run.family.picture_only:
            plan.q, plan.k, plan.v = self.align(run, layout, plan.q, plan.k, plan.v)
        whole = (image.start, image.stop) == (0, plan.k.shape[2])
        index = None if whole else torch.arange(image.start, image.stop, device=plan.k.device)
        for chunk in range(len(layout.entries)):
            first, *others = rows = layout.chunk_rows(chunk)
            if options.full_attention_share:
                pieces = [Piece(plan.k[row], plan.v[row], index, row) for row in rows]
                for row in rows:
                    plan.seen[row] += [piece for piece in pieces if piece.source != row]
            elif options.share_attention:
                keys = plan.k[first] if options.shared_score_scale == 1 else plan.k[first] * options.shared_score_scale
                piece = Piece(keys, plan.v[first], index, first, options.shared_score_shift)
                for row in others:
                    plan.seen[row].append(piece)
        return run.family.picture_only or options.full_attention_share or options.share_attention


def aligned(x: Tensor, size: int, image: slice) -> Tensor:
    """AdaIN on the picture's tokens of x [rows, heads, tokens, dim]; others stay."""
    if (image.start, image.stop) == (0, x.shape[2]):
        return adain(x, size)
    out = x.clone()
    out[:, :, image] = adain(x[:, :, image], size)
    return out


def without_first(control: dict, chunks: int, size: int) -> dict:
    """ControlNet residuals [rows, ...] by place, zero for the first row of each chunk of `size` rows."""

    def cleared(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        keep = torch.ones(chunks * size, *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
        keep[::size] = 0
        return x * keep

    return {place: [cleared(x) for x in tensors] for place, tensors in control.items()}


@contextlib.contextmanager
def shared_norms(modules, chunks: int, size: int):
    """While open, group norms of a network share statistics with the first row of each chunk; undone on any way out."""
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = functools.partial(_shared_norm, module, module.forward, chunks * size, size)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _shared_norm(module, own, rows: int, size: int, x: Tensor) -> Tensor:
    if len(x) != rows:  # temporal layers of a video network hold frames elsewhere
        return own(x)
    throw_exception_if_processing_interrupted()  # as the host's own norm does
    weight, bias, stream = comfy.ops.cast_bias_weight(module, x, offloadable=True)
    out = shared_group_norm(x, module.num_groups, weight, bias, module.eps, size)
    comfy.ops.uncast_bias_weight(module, weight, bias, stream)
    return out


@dataclass(frozen=True, eq=False)
class StyleReference:
    """A picture inverted to noise: `trajectory` [steps + 1, channels, h, w] from noise to picture in the network's own
    scale, made for `sigmas` (steps + 1 of them); `latent` [1, channels, h, w] is the picture as the VAE encoded it."""

    trajectory: Tensor
    sigmas: tuple[float, ...]
    sigma_data: float
    latent: Tensor


class ReferenceRule(Rule):
    """Replays an inverted picture as the first row of the batch, `offset` steps cleaner at the start."""

    node_id = "StoryweftStyleReference"
    whole_batch = True

    def __init__(self, reference: StyleReference, offset: int):
        self.reference = reference
        self.offset = offset

    def begin(self, run) -> None:
        made, asked = self.reference.sigmas, run.sigmas
        if len(made) != len(asked):
            raise ValueError(
                f"{self.node_id}: the picture was inverted with {len(made) - 1} steps and the sampler takes {len(asked) - 1}; "
                "set both the same, and denoise to 1."
            )
        for step, (one, other) in enumerate(zip(made, asked, strict=True)):
            if not math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4):
                raise ValueError(
                    f"{self.node_id}: the picture was inverted at sigma {one:.4g} and the sampler's step {step} is at "
                    f"{other:.4g}; use the same scheduler and model sampling for both."
                )
        if run.latent_shape[1:] != tuple(self.reference.latent.shape[1:]):
            raise ValueError(
                f"{self.node_id}: the latent to sample is {_size(run.latent_shape)} and the reference "
                f"{_size(self.reference.latent.shape)}; use this node's latent output."
            )
        if len(run.rules) == 1:
            logging.warning(
                "%s: no other Storyweft block on this model looks at the reference; add StoryweftStyleAligned.", self.node_id
            )

    def latents(self, run, x: Tensor) -> Tensor:
        run.acted[self] += 1
        state = self.reference.trajectory[replay_index(run.step, self.offset)].to(x)
        first = state * math.hypot(run.sigma, self.reference.sigma_data)
        return torch.cat([first[None], x[1:]])

    def result(self, run, latents: Tensor) -> Tensor:
        return torch.cat([self.reference.latent.to(latents), latents[1:]])


def _size(shape) -> str:
    return " x ".join(str(side) for side in shape[1:])
