"""U-Nets built of SpatialTransformer blocks: SD1.5, SD2, SDXL, SVD and their relatives.

attn1 and attn2 calls look alike at the override, so chained attn1/attn2 patches leave a mark just before each. The
temporal blocks of a video U-Net report the same block as the spatial ones; the order within a block tells them apart.
"""

import math
from typing import NamedTuple

from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample
from torch import Tensor

from .layout import Layer, Layout


class UNetFamily:
    """Self-attention layers of one U-Net, in execution order, and the marks that find them."""

    picture_only = True  # its self-attention holds the picture's tokens and nothing else

    def __init__(self, diffusion_model):
        self.model_class = type(diffusion_model).__name__
        self.modules = dict(_self_attention(diffusion_model))
        self.layers = tuple(self.modules)
        self.downsamples = [any(isinstance(m, Downsample) for m in block) for block in diffusion_model.input_blocks]
        self.temporal = any(isinstance(module, SpatialVideoTransformer) for module in diffusion_model.modules())
        self.by_block = {(layer.path, layer.block, layer.depth): layer for layer in self.layers}

    def sizes(self, latent_shape: tuple[int, ...]) -> dict[Layer, int]:
        """Numbers (tokens x channels) that one row of each layer's input holds, for latents [rows, channels, h, w]."""
        return {
            layer: self._tokens(layer, latent_shape[-2:]) * self.modules[layer].to_k.in_features
            for layer in self.layers
        }

    def _tokens(self, layer: Layer, size: tuple[int, int]) -> int:
        halved = self.downsamples[: layer.block + 1] if layer.path == "input" else self.downsamples
        times = sum(halved)
        if layer.path == "output":
            times = sum(self.downsamples[: len(self.downsamples) - layer.block])
        return math.prod(math.ceil(side / 2**times) for side in size)

    def add_patches(self, model) -> None:
        model.set_model_attn1_patch(mark_self)
        model.set_model_attn2_patch(mark_cross)

    def locate(self, call, args: tuple, kwargs: dict) -> Layout | None:
        mark, call.mark = call.mark, None
        if mark is None:
            return None
        if args[0].shape[:2] != mark.shape:
            raise RuntimeError(
                f"Storyweft: {mark.layer} attends over {tuple(args[0].shape[:2])} (rows, tokens) where the picture has "
                f"{mark.shape}; HyperTile, ToMe and the like regroup tokens and cannot be combined with it."
            )
        return Layout(call.entries, call.items, mark.layer, (1, *mark.grid), slice(0, mark.shape[1]))

    def close(self, call) -> None:
        if call.mark is not None:
            _bypassed(call)

    def inputs(self, call) -> Tensor:
        """Inputs of the layer's key and value projections, [rows, tokens, channels], as its attn1 patch saw them."""
        return call.inputs

    def project(self, layer: Layer, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, n, heads·dim] of layer inputs [1, n, channels], by the layer's own weights."""
        attn1 = self.modules[layer]
        return attn1.to_k(tokens), attn1.to_v(tokens)


class Mark(NamedTuple):
    """A spatial self-attention about to run."""

    layer: Layer
    shape: tuple[int, int]
    grid: tuple[int, int]


def _self_attention(diffusion_model):
    blocks = [("input", index, block) for index, block in enumerate(diffusion_model.input_blocks)]
    blocks += [("middle", 0, diffusion_model.middle_block)] if diffusion_model.middle_block is not None else []
    blocks += [("output", index, block) for index, block in enumerate(diffusion_model.output_blocks)]
    ordinal = 0
    for path, index, block in blocks:
        for module in block:
            if isinstance(module, SpatialTransformer):
                for depth, transformer in enumerate(module.transformer_blocks):
                    if not transformer.disable_self_attn:
                        yield Layer(path, index, depth, ordinal), transformer.attn1
                        ordinal += 1


def mark_self(n: Tensor, context: Tensor, value: Tensor, extra: dict):
    """attn1 patch that changes nothing: says that the next attention of this call is self-attention over the picture."""
    call = extra.get("storyweft")
    if call is None:
        return n, context, value
    if call.mark is not None:
        _bypassed(call)
    family = call.run.family
    layer = family.by_block.get((*extra["block"], extra["block_index"]))
    rows, _, height, width = extra["activations_shape"]
    visit = call.count[layer]
    call.count[layer] += 1
    if layer is None or visit > 0 and family.temporal:
        return n, context, value
    if n.shape[:2] != (rows, height * width):
        raise RuntimeError(
            f"Storyweft: {layer} receives {tuple(n.shape[:2])} (rows, tokens) where the picture has {(rows, height * width)}; "
            "HyperTile, ToMe and the like regroup tokens and cannot be combined with a Storyweft block."
        )
    call.inputs = context
    call.mark = Mark(layer, tuple(n.shape[:2]), (height, width))
    return n, context, value


def mark_cross(n: Tensor, context: Tensor, value: Tensor, extra: dict):
    """attn2 patch that changes nothing: the next attention of this call is not self-attention."""
    call = extra.get("storyweft")
    if call is not None and call.mark is not None:
        _bypassed(call)
    return n, context, value


def _bypassed(call) -> None:
    layer, call.mark = call.mark.layer, None
    owner = call.replaces.get((layer.path, layer.block, layer.depth), call.replaces.get((layer.path, layer.block)))
    call.run.bypassed[layer] = f"{owner.__module__}.{owner.__qualname__}" if owner is not None else "of an unknown pack"
