"""Diffusion transformers: where their self-attention is, and where the picture's tokens lie in its sequence.

Their keys already carry positions when the override sees them, so a bank stores keys and values. Text tokens are never
shared, and only picture tokens look at what others share.
"""

import math
import operator
from dataclasses import dataclass, replace

from torch import Tensor

from .layout import Layer, Layout


@dataclass(frozen=True)
class Form:
    """How one transformer is built.

    `blocks`: attributes of the network that list its blocks, in execution order, with the block_type core gives them.
    `order`: "joint" text then picture in one sequence, whatever else after them; "last" text and references, then the
    picture at the very end; "first" picture then text; "apart" picture alone, text by cross-attention; "tail" text, then
    the picture padded to a multiple of `multiple`. `width`: attribute with the size of a token. `patch`: None if the
    network states its patch size itself. `indexed`: core says block_type and block_index at each call. `early`: its attn1
    patches see q, k, v before positions are turned into them.
    """

    blocks: tuple[tuple[str, str], ...]
    order: str
    width: str
    patch: tuple[int, int, int] | None = (1, 2, 2)
    indexed: bool = True
    multiple: int = 1
    early: bool = False


STREAMS = (("double_blocks", "double"), ("single_blocks", "single"))
FORMS = {
    "Flux": Form(STREAMS, "joint", "hidden_size", early=True),
    "Chroma": Form(STREAMS, "joint", "hidden_size", early=True),
    "QwenImageTransformer2DModel": Form((("transformer_blocks", "double"),), "joint", "inner_dim", early=True),
    "MMDiT": Form((("joint_blocks", "joint"),), "joint", "hidden_size", indexed=False),
    "WanModel": Form((("blocks", "double"),), "apart", "dim"),
    "LTXVModel": Form((("transformer_blocks", "block"),), "apart", "inner_dim", (1, 1, 1), indexed=False),
    "NextDiT": Form((("layers", "double"),), "tail", "dim", multiple=32),
    "HunyuanVideo": Form(STREAMS, "last", "hidden_size", None),
    "CogVideoXTransformer3DModel": Form((("blocks", "block"),), "joint", "dim", None, indexed=False),
    "AsymmDiTJoint": Form((("blocks", "block"),), "first", "x_embedder.proj.out_channels", indexed=False),
}


def patch_size(diffusion_model) -> tuple[int, int, int]:
    """(frames, height, width) of one token as the network states it: one side, or a list of two or three."""
    stated = diffusion_model.patch_size
    if isinstance(stated, int):
        return (diffusion_model.patch_size_t or 1, stated, stated)
    return (1, *stated)[-3:]


class TransformerFamily:
    """Layers of one transformer; the first half of its blocks counts as input path, the second as output path."""

    picture_only = False
    norms = ()  # no group norms

    def __init__(self, diffusion_model, form: Form):
        self.model_class = type(diffusion_model).__name__
        self.form = form
        self.patch = form.patch or patch_size(diffusion_model)
        self.prompt_last = getattr(diffusion_model, "use_cond_type_embedding", False)  # HunyuanVideo 1.5
        self.width = operator.attrgetter(form.width)(diffusion_model)
        lists = [(kind, operator.attrgetter(name)(diffusion_model)) for name, kind in form.blocks]
        total, passed = sum(len(blocks) for _, blocks in lists), 0
        self.layers, self.cross_layers, self.time_layers, self.by_block = [], [], (), {}
        for kind, blocks in lists:
            for index, block in enumerate(blocks):
                layer = Layer("input" if passed < total // 2 else "output", index, 0, len(self.layers))
                passed += 1
                self.layers.append(layer)
                self.by_block[kind, index] = layer
                if form.order == "apart":
                    self.cross_layers.append(replace(layer, kind="cross"))
                if has_second(block):
                    self.layers.append(replace(layer, depth=1, ordinal=len(self.layers)))
        self.picture_alone = any(layer.depth for layer in self.layers)
        self.kinds = {"self", "cross"} if form.order == "apart" else {"self"}

    def sizes(self, latent_shape: tuple[int, ...]) -> dict[Layer, int]:
        """Numbers in the keys and values of one row of each layer, for latents [rows, channels, (frames,) h, w]."""
        return dict.fromkeys(self.layers, 2 * math.prod(self._grid(latent_shape)) * self.width)

    def cell_unit(self) -> int:
        """Latent cells that a part of the picture must be a multiple of to begin and end between tokens."""
        return max(self.form.patch[1:])

    def _grid(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        sides = (1, *latent_shape[2:])[-3:]
        return tuple(math.ceil(side / patch) for side, patch in zip(sides, self.patch, strict=True))

    def add_patches(self, model) -> None:
        """The override finds every layer; rules that act before positions need the patch as well."""
        if self.form.early:
            model.set_model_attn1_patch(before_positions)

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
        return Layout(call.entries, call.items, layer, grid, image, self._text(call, layer, image, tokens, keys))

    def locate_early(self, call, q: Tensor, options: dict) -> Layout | None:
        """The layout of q [rows, heads, tokens, dim] as an attn1 patch sees it, before the override does."""
        grid = self._grid(call.shape)
        image = self._image(call, q.shape[2], math.prod(grid))
        layer = self.by_block.get((options.get("block_type"), options.get("block_index")))
        if image is None or layer is None or q.shape[0] != len(call.entries) * len(call.items):
            return None
        return Layout(call.entries, call.items, layer, grid, image, slice(0, image.start))

    def _image(self, call, tokens: int, count: int) -> slice | None:
        start = 0
        if self.form.order == "joint":
            start = 0 if self.picture_alone and tokens == count else call.text.shape[1]
        elif self.form.order == "tail":
            start = tokens - math.ceil(count / self.form.multiple) * self.form.multiple
            if start <= 0:
                return None
        elif self.form.order == "last":
            start = tokens - count
        elif self.form.order == "apart" and call.kwargs.get("reference_latent") is not None:
            start = tokens - count  # Wan puts it first
        return slice(start, start + count) if start >= 0 and tokens >= start + count else None

    def _text(self, call, layer: Layer, image: slice, tokens: int, keys: int) -> slice | None:
        """Where the prompt lies among the keys."""
        order = self.form.order
        if order == "apart":
            return slice(0, keys) if layer.kind == "cross" else None
        if order == "first":
            return slice(image.stop, tokens)
        if order == "joint":
            return slice(0, image.start) if image.start else None
        if order == "tail":
            return slice(0, call.text.shape[1])
        reference, length = call.kwargs.get("ref_latent"), call.text.shape[1]
        end = image.start - (0 if reference is None else math.prod(self._grid(reference.shape)))
        return slice(end - length, end) if self.prompt_last else slice(0, length)

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


def has_second(block) -> bool:
    """Whether a block of SD3.5 has a second self-attention, over the picture alone, after the joint one."""
    return getattr(getattr(block, "x_block", None), "x_block_self_attn", False)


def before_positions(q: Tensor, k: Tensor, v: Tensor, pe=None, attn_mask=None, extra_options=None) -> dict:
    """attn1 patch of the early families: rules exchange q, k, v, the host then turns positions into them."""
    call = extra_options.get("storyweft")
    layout = None if call is None else call.run.family.locate_early(call, q, extra_options)
    if layout is None:
        return {}
    for rule in call.run.rules:
        if rule.wants(layout.layer, call.run):
            q, k, v = rule.align(call.run, layout, q, k, v)
    return {"q": q, "k": k, "v": v}
