"""Image adapters in IP-Adapter's published layout (arXiv 2308.06721): a picture's embedding -> tokens -> keys and values.

Files hold `image_proj.*` and, for the i-th cross-attention layer, `ip_adapter.<2i+1>.to_k_ip` and `to_v_ip` [C_i, D]: all
attention processors are counted and the even ones are self-attention. Layers are counted down path, up path, middle last.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

HEAD = 64  # width of one head of the Resampler, in every published file
PATHS = ("input", "output", "middle")  # the order in which files number the layers
TEXT_FAMILIES = {768: "SD1.5", 1024: "SD2", 2048: "SDXL"}


class Standard(nn.Module):
    """Pooled embeddings [n, clip] -> tokens [n, tokens, width]."""

    feature = "pooled"

    def __init__(self, clip: int, width: int, tokens: int, operations=nn):
        super().__init__()
        self.clip, self.width = clip, width
        self.proj = operations.Linear(clip, tokens * width)
        self.norm = operations.LayerNorm(width)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.norm(self.proj(embedding).unflatten(-1, (-1, self.width)))


class FullFace(nn.Module):
    """Hidden states [n, tokens, clip] -> tokens [n, tokens, width], each by itself."""

    feature = "hidden"

    def __init__(self, clip: int, width: int, inner: int, operations=nn):
        super().__init__()
        self.clip, self.width = clip, width
        self.proj = nn.Sequential(
            operations.Linear(clip, inner), nn.GELU(), operations.Linear(inner, width), operations.LayerNorm(width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.proj(hidden)


class Perceiver(nn.Module):
    """Learned queries look at picture tokens and at each other; q and k are each scaled by dim^(-1/4)."""

    def __init__(self, width: int, inner: int, operations=nn):
        super().__init__()
        self.heads = inner // HEAD
        self.norm1 = operations.LayerNorm(width)
        self.norm2 = operations.LayerNorm(width)
        self.to_q = operations.Linear(width, inner, bias=False)
        self.to_kv = operations.Linear(width, 2 * inner, bias=False)
        self.to_out = operations.Linear(inner, width, bias=False)

    def forward(self, seen: Tensor, queries: Tensor) -> Tensor:
        seen, queries = self.norm1(seen), self.norm2(queries)
        k, v = self.to_kv(torch.cat([seen, queries], 1)).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (self.heads, HEAD)).transpose(1, 2) for x in (self.to_q(queries), k, v))
        scale = HEAD**-0.25
        weights = ((q * scale) @ (k * scale).transpose(-1, -2)).float().softmax(-1).to(v.dtype)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Hidden states [n, any, clip] -> tokens [n, queries, width]."""

    feature = "hidden"

    def __init__(
        self, clip: int, width: int, queries: int, dim: int, inner: int, layers: int, feed: int, operations=nn
    ):
        super().__init__()
        self.clip, self.width = clip, width
        self.latents = nn.Parameter(torch.empty(1, queries, dim))
        self.proj_in = operations.Linear(clip, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Perceiver(dim, inner, operations),
                    nn.Sequential(
                        operations.LayerNorm(dim),
                        operations.Linear(dim, feed, bias=False),
                        nn.GELU(),
                        operations.Linear(feed, dim, bias=False),
                    ),
                ]
            )
            for _ in range(layers)
        )
        self.proj_out = operations.Linear(dim, width)
        self.norm_out = operations.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        seen = self.proj_in(hidden)
        tokens = self.latents.to(seen).expand(len(seen), -1, -1)
        for attention, feed in self.layers:
            tokens = tokens + attention(seen, tokens)
            tokens = tokens + feed(tokens)
        return self.norm_out(self.proj_out(tokens))


class LayerProjections(nn.Module):
    """Keys and values that one cross-attention layer makes of image tokens; no bias."""

    def __init__(self, width: int, channels: int, operations=nn):
        super().__init__()
        self.to_k_ip = operations.Linear(width, channels, bias=False)
        self.to_v_ip = operations.Linear(width, channels, bias=False)


class ImageAdapter(nn.Module):
    """`image_proj` and the projections of each layer; channels[i] is the width of the i-th layer in the files' order."""

    def __init__(self, image_proj: nn.Module, channels: list[int], operations=nn):
        super().__init__()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): LayerProjections(image_proj.width, c, operations) for i, c in enumerate(channels)}
        )

    @property
    def channels(self) -> list[int]:
        return [layer.to_k_ip.weight.shape[0] for layer in self.ip_adapter.values()]

    def project(self, index: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [n, tokens, C] of the index-th layer for image tokens [n, tokens, D], in their type and place."""
        layer = self.ip_adapter[str(2 * index + 1)]
        return tuple(
            nn.functional.linear(tokens, linear.weight.to(tokens)) for linear in (layer.to_k_ip, layer.to_v_ip)
        )


def in_file_order(layers) -> list:
    """Cross-attention layers, given in execution order, as adapter files number them: the middle block comes last."""
    return [layer for path in PATHS for layer in layers if layer.path == path]


def flatten(state: Mapping) -> dict[str, Tensor]:
    """One flat state dict of the three published forms: flat, nested, nested with the trainer's name of the layers."""
    flat = {}
    for key, value in state.items():
        name = "ip_adapter" if key == "adapter_modules" else key
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": tensor for inner, tensor in value.items()}
        else:
            flat[key.replace("adapter_modules.", "ip_adapter.", 1)] = value
    return flat


def build(state: Mapping, source: str, operations=nn) -> ImageAdapter:
    """The adapter of a file's state dict, loaded strictly. `source` names the file in messages.

    Raises ValueError for FaceID and LoRA files, files of another kind, and missing or left-over tensors.
    """
    tensors = flatten(state)
    foreign = [key for key in tensors if "lora" in key.lower() or "faceid" in key.lower()]
    if foreign or "image_proj.proj.0.weight" in tensors and "image_proj.proj.3.weight" not in tensors:
        example = (foreign or ["image_proj.norm.weight"])[0]
        raise ValueError(
            f"{source} is a FaceID adapter (it holds {example}): it needs face embeddings and a LoRA, which this node does "
            "not make; take a standard, plus or full-face adapter."
        )
    if "ip_adapter.1.to_k_ip.weight" not in tensors or not any(key.startswith("image_proj.") for key in tensors):
        raise ValueError(
            f"{source} is no image adapter: it lacks ip_adapter.1.to_k_ip.weight or image_proj (first tensors: "
            f"{', '.join(list(tensors)[:3])})."
        )
    count = sum(key.endswith(".to_k_ip.weight") for key in tensors)
    expected = [f"ip_adapter.{2 * i + 1}.to_k_ip.weight" for i in range(count)]
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise ValueError(f"{source}: its layers are not numbered 1, 3, 5...: {missing[0]} is missing.")
    width = tensors[expected[0]].shape[1]
    adapter = ImageAdapter(
        _image_proj(tensors, width, operations), [tensors[key].shape[0] for key in expected], operations
    )
    own = adapter.state_dict()
    for key in own.keys() | tensors.keys():
        if key not in own or key not in tensors:
            raise ValueError(f"{source}: the tensor {key} is {'missing' if key in own else 'not known'}.")
        if own[key].shape != tensors[key].shape:
            raise ValueError(f"{source}: the tensor {key} is {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}.")
    adapter.load_state_dict(tensors, assign=True)
    return adapter.requires_grad_(False)


def _image_proj(tensors: dict[str, Tensor], width: int, operations) -> nn.Module:
    """The module that the keys under image_proj belong to, with its sizes from their shapes."""
    shapes = {key.removeprefix("image_proj."): value.shape for key, value in tensors.items()}
    if "latents" in shapes:
        layers = len({key.split(".")[1] for key in shapes if key.startswith("layers.")})
        _, queries, dim = shapes["latents"]
        inner, feed = shapes["layers.0.0.to_q.weight"][0], shapes["layers.0.1.1.weight"][0]
        return Resampler(shapes["proj_in.weight"][1], width, queries, dim, inner, layers, feed, operations)
    if "proj.3.weight" in shapes:
        return FullFace(shapes["proj.0.weight"][1], width, shapes["proj.0.weight"][0], operations)
    rows, clip = shapes["proj.weight"]
    return Standard(clip, width, math.ceil(rows / width), operations)
