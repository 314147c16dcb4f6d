"""Diffusion transformers: where their self-attention is, and where the picture's tokens lie in its sequence.

Their keys already carry positions when the override sees them, so a bank stores keys and values. Text tokens are never
shared, and only picture tokens look at what others share.
"""

import math
import operator
from dataclasses import dataclass, replace

from .layout import Layer, Layout


@dataclass(frozen=True)
class Form:
    """`blocks`: attributes of the network that list its blocks, in execution order, with the block_type core gives them.
    `order`: "joint" text then picture in one sequence; "apart" picture alone, text by cross-attention; "tail" picture
    last, padded to a multiple of `multiple`. `width`: attribute with the size of
    a token. `indexed`: core says block_type and block_index at each call."""

    blocks: tuple[tuple[str, str], ...]
    patch: tuple[int, int, int]
    order: str
    width: str
    indexed: bool = True
    multiple: int = 1


FORMS = {
    "Flux": Form((("double_blocks", "double"), ("single_blocks", "single")), (1, 2, 2), "joint", "hidden_size"),
    "Chroma": Form((("double_blocks", "double"), ("single_blocks", "single")), (1, 2, 2), "joint", "hidden_size"),
    "QwenImageTransformer2DModel": Form((("transformer_blocks", "double"),), (1, 2, 2), "joint", "inner_dim"),
    "MMDiT": Form((("joint_blocks", "joint"),), (1, 2, 2), "joint", "hidden_size", indexed=False),
    "WanModel": Form((("blocks", "double"),), (1, 2, 2), "apart", "dim"),
    "LTXVModel": Form((("transformer_blocks", "block"),), (1, 1, 1), "apart", "inner_dim", indexed=False),
    "NextDiT": Form((("layers", "double"),), (1, 2, 2), "tail", "dim", multiple=32),
}


class TransformerFamily:
    """Layers of one transformer; the first half of its blocks counts as input path, the second as output path."""

    picture_only = False

    def __init__(self, diffusion_model, form: Form):
        self.model_class = type(diffusion_model).__name__
        self.form = form
        self.width = operator.attrgetter(form.width)(diffusion_model)
        sizes = [(kind, len(operator.attrgetter(name)(diffusion_model))) for name, kind in form.blocks]
        total = sum(size for _, size in sizes)
        self.layers, self.cross_layers, self.time_layers, self.by_block = [], [], (), {}
        for kind, size in sizes:
            for index in range(size):
                ordinal = len(self.layers)
                layer = Layer("input" if ordinal < total // 2 else "output", index, 0, ordinal)
                self.layers.append(layer)
                self.by_block[kind, index] = layer
                if form.order == "apart":
                    self.cross_layers.append(replace(layer, kind="cross"))
        self.kinds = {"self", "cross"} if form.order == "apart" else {"self"}

    def sizes(self, latent_shape: tuple[int, ...]) -> dict[Layer, int]:
        """Numbers in the keys and values of one row of each layer, for latents [rows, channels, (frames,) h, w]."""
        return dict.fromkeys(self.layers, 2 * math.prod(self._grid(latent_shape)) * self.width)

    def cell_unit(self) -> int:
        """Latent cells that a part of the picture must be a multiple of to begin and end between tokens."""
        return max(self.form.patch[1:])

    def _grid(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        sides = (1, *latent_shape[2:])[-3:]
        return tuple(math.ceil(side / patch) for side, patch in zip(sides, self.form.patch, strict=True))

    def add_patches(self, model) -> None:
        """Nothing beyond the override is needed."""

    def close(self, call) -> None:
        """Calls are told apart as they come."""

    def inputs(self, call) -> None:
        """No layer inputs: keys and values are stored instead."""

    def locate(self, call, args: tuple, kwargs: dict) -> Layout | None:
        q, k = args[0], args[1]
        tokens = q.shape[2] if kwargs.get("skip_reshape") else q.shape[1]
        keys = k.shape[1] if k.ndim == 3 else k.shape[2]
        grid = self._grid(call.shape)
        image = self._image(call, tokens, math.prod(grid))
        if image is None or q.shape[0] != len(call.entries) * len(call.items):
            return None
        layer = self._layer(call, kwargs["transformer_options"], tokens, keys)
        if layer is None:
            return None
        text = slice(0, image.start) if self.form.order != "apart" else None
        if layer.kind == "cross":
            text = slice(0, keys)
        return Layout(call.entries, call.items, layer, grid, image, text)

    def _image(self, call, tokens: int, count: int) -> slice | None:
        if self.form.order == "joint":
            start = call.text.shape[1]
        elif self.form.order == "tail":
            start = tokens - math.ceil(count / self.form.multiple) * self.form.multiple
            if start <= 0:
                return None
        else:
            start = tokens - count if call.kwargs.get("reference_latent") is not None else 0  # Wan puts it first
        return slice(start, start + count) if tokens >= start + count else None

    def _layer(self, call, options: dict, tokens: int, keys: int) -> Layer | None:
        """The layer of a call: in a block self-attention comes first, then, on models of order "apart", the prompt."""
        apart = self.form.order == "apart"
        if tokens != keys and not (apart and keys == call.text.shape[1]):
            return None
        if self.form.indexed:
            layer = self.by_block.get((options.get("block_type"), options.get("block_index")))
            visit = call.count[layer]
            call.count[layer] += 1
        else:
            index, visit = divmod(call.count["calls"], 2 if apart else 1)
            call.count["calls"] += 1
            layer = self.layers[index] if index < len(self.layers) else None
        if layer is None or visit > apart:
            return None
        return self.cross_layers[layer.ordinal] if visit else layer
