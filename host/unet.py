"""U-Nets built of SpatialTransformer blocks: SD1.5, SD2, SDXL, SVD and their relatives.

attn1 and attn2 calls look alike at the override, so chained attn1/attn2 patches leave a mark just before each. The
temporal blocks of a video U-Net report the same block as the spatial ones; the order within a block tells them apart.
"""

import math
from collections import Counter
from itertools import zip_longest
from typing import NamedTuple

import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample
from torch import Tensor

from .layout import Layer, Layout


class UNetFamily:
    """Attention layers of one U-Net, in execution order, and the marks that find them."""

    picture_only = True  # its self-attention holds the picture's tokens and nothing else

    def __init__(self, diffusion_model):
        self.model_class = type(diffusion_model).__name__
        self.modules = dict(_attention_layers(diffusion_model))
        self.layers, self.cross_layers, self.time_layers = (
            tuple(layer for layer in self.modules if layer.kind == kind) for kind in ("self", "cross", "time")
        )
        self.kinds = {layer.kind for layer in self.modules}
        self.norms = [module for module in diffusion_model.modules() if isinstance(module, torch.nn.GroupNorm)]
        self.downsamples = [any(isinstance(m, Downsample) for m in block) for block in diffusion_model.input_blocks]
        self.by_block = {(layer.kind, layer.path, layer.block, layer.depth): layer for layer in self.modules}

    def sizes(self, latent_shape: tuple[int, ...]) -> dict[Layer, int]:
        """Numbers (tokens x channels) that one row of each layer's input holds, for latents [rows, channels, h, w]."""
        return {
            layer: self._tokens(layer, latent_shape[-2:]) * self.modules[layer].to_k.in_features
            for layer in self.layers
        }

    def cell_unit(self) -> int:
        """Latent cells that a part of the picture must be a multiple of to begin and end between tokens in every layer."""
        return 2 ** max(self._halvings(layer) for layer in (*self.layers, *self.cross_layers))

    def _tokens(self, layer: Layer, size: tuple[int, int]) -> int:
        return math.prod(math.ceil(side / 2 ** self._halvings(layer)) for side in size)

    def _halvings(self, layer: Layer) -> int:
        halved = self.downsamples[: layer.block + 1] if layer.path == "input" else self.downsamples
        if layer.path == "output":
            halved = self.downsamples[: len(self.downsamples) - layer.block]
        return sum(halved)

    def add_patches(self, model) -> None:
        model.set_model_attn1_patch(mark_self)
        model.set_model_attn2_patch(mark_cross)
        model.set_model_attn2_output_patch(add_after)

    def locate(self, call, args: tuple, kwargs: dict) -> Layout | None:
        mark, call.mark = call.mark, None
        if mark is None:
            return None
        if args[0].shape[:2] != mark.shape:
            raise RuntimeError(
                f"Storyweft: {mark.layer} attends over {tuple(args[0].shape[:2])} (rows, tokens) where the picture has "
                f"{mark.shape}; HyperTile, ToMe and the like regroup tokens and cannot be combined with it."
            )
        kind, (height, width) = mark.layer.kind, mark.grid
        frames = mark.shape[1] if kind == "time" else 1
        text = slice(0, args[1].shape[1]) if kind == "cross" else None
        return Layout(call.entries, call.items, mark.layer, (frames, height, width), slice(0, mark.shape[1]), text)

    def close(self, call) -> None:
        if call.mark is not None:
            call.bypass()

    def inputs(self, call) -> Tensor:
        """Inputs of the layer's key and value projections, [rows, tokens, channels], as its attn1 patch saw them."""
        return call.inputs

    def project(self, layer: Layer, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, n, heads·dim] of layer inputs or prompts [rows, n, channels], by the layer's own weights."""
        attention = self.modules[layer]
        return attention.to_k(tokens), attention.to_v(tokens)


class Mark(NamedTuple):
    """An attention about to run; shape is (rows, tokens) of its queries, grid (height, width) of the picture there."""

    layer: Layer
    shape: tuple[int, int]
    grid: tuple[int, int]


def _attention_layers(diffusion_model):
    blocks = [("input", index, block) for index, block in enumerate(diffusion_model.input_blocks)]
    blocks += [("middle", 0, diffusion_model.middle_block)] if diffusion_model.middle_block is not None else []
    blocks += [("output", index, block) for index, block in enumerate(diffusion_model.output_blocks)]
    ordinal: Counter = Counter()
    for path, index, block in blocks:
        for module in block:
            if isinstance(module, SpatialTransformer):
                times = module.time_stack if isinstance(module, SpatialVideoTransformer) else ()
                for depth, (spatial, time) in enumerate(zip_longest(module.transformer_blocks, times)):
                    found = {"self": None if spatial.disable_self_attn else spatial.attn1, "cross": spatial.attn2}
                    found["time"] = None if time is None or time.disable_self_attn else time.attn1
                    for kind, attention in found.items():
                        if attention is not None:
                            yield Layer(path, index, depth, ordinal[kind], kind), attention
                            ordinal[kind] += 1


def mark_self(n: Tensor, context: Tensor, value: Tensor, extra: dict):
    """attn1 patch that changes nothing: says which attention of this call comes next."""
    call = extra.get("storyweft")
    if call is None:
        return n, context, value
    _mark(call, n, extra, ("self", "time"))
    call.inputs = context
    return n, context, value


def mark_cross(n: Tensor, context: Tensor, value: Tensor, extra: dict):
    """The same as attn2 patch."""
    call = extra.get("storyweft")
    if call is not None:
        _mark(call, n, extra, ("cross", None))
        call.queries = n
    return n, context, value


def add_after(n: Tensor, extra: dict) -> Tensor:
    """attn2 output patch: adds what a rule left for after the output projection."""
    call = extra.get("storyweft")
    if call is None or call.after is None:
        return n
    after, call.after = call.after, None
    return n + after


def _mark(call, n: Tensor, extra: dict, kinds: tuple[str, str | None]) -> None:
    """Within a block the spatial transformer comes first and, in video U-Nets, the temporal one second."""
    if call.mark is not None:
        call.bypass()
    place = (*extra["block"], extra["block_index"])
    visit = call.count[kinds, place]
    call.count[kinds, place] += 1
    layer = call.run.family.by_block.get((kinds[min(visit, 1)], *place))
    if layer is None or layer.kind not in call.kinds:
        return
    rows, _, height, width = extra["activations_shape"]
    shape = (rows, height * width)
    if layer.kind == "time":
        shape = (len(call.entries) * height * width, rows // len(call.entries))
    if n.shape[:2] != shape:
        raise RuntimeError(
            f"Storyweft: {layer} receives {tuple(n.shape[:2])} (rows, tokens) where the picture has {shape}; "
            "HyperTile, ToMe and the like regroup tokens and cannot be combined with a Storyweft block."
        )
    call.mark = Mark(layer, shape, (height, width))
