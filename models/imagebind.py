"""ImageBind's audio, vision and text towers (arXiv 2305.05665) in the published layout; weights are CC BY-NC-SA 4.0.

`modality_preprocessors`, `modality_trunks`, `modality_heads`, `modality_postprocessors`, each with one part per modality. Any
of the three towers can be loaded alone; depth, thermal and IMU are left out.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from ..attention.core import split_heads
from .fused_attention import FusedAttention, causal

MODALITIES = ("audio", "vision", "text")
HEADS = {"audio": 12, "vision": 16, "text": 16}  # of the published towers: files do not hold the number
EPS = 1e-6
AUDIO_SIZE = (128, 204)  # the position table of 12 x 19 patches cannot be stretched
GREATEST = 100.0  # of a learned scale
WIDTH = 1024


class SelfAttention(FusedAttention):
    """`bias_k`, `bias_v`: one learned key and value more that every token sees, in the audio tower."""

    def __init__(self, width: int, heads: int, extra: bool, operations):
        super().__init__(width, heads, operations)
        if extra:
            self.bias_k, self.bias_v = (nn.Parameter(torch.empty(1, 1, width)) for _ in range(2))
        self.extra = extra

    def project(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        found = super().project(seen)
        if not self.extra:
            return found
        more = (split_heads(x.to(seen), self.heads).expand(len(seen), -1, -1, -1) for x in (self.bias_k, self.bias_v))
        return tuple(torch.cat(pair, 2) for pair in zip(found, more, strict=True))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, extra: bool, operations):
        super().__init__()
        self.attn = SelfAttention(width, heads, extra, operations)
        self.norm_1, self.norm_2 = (operations.LayerNorm(width, eps=EPS) for _ in range(2))
        self.mlp = nn.ModuleDict(
            {"fc1": operations.Linear(width, 4 * width), "fc2": operations.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        seen = self.norm_1(x)
        x = x + self.attn(seen, *self.attn.project(seen), bias)
        return x + self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm_2(x))))


class Named(nn.Module):
    """A place in the published tree of names."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Positions(nn.Module):
    def __init__(self, count: int, width: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, count, width))


class Pictures(nn.Module):
    """Pictures [n, 3, 224, 224], or clips [n, 3, 2, 224, 224], -> tokens [n, 1 + places, width], the class token first."""

    def __init__(self, width: int, places: int, patch: int, operations):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        stem = operations.Conv3d(3, width, (2, patch, patch), (2, patch, patch), bias=False)
        self.rgbt_stem = nn.Module()
        self.rgbt_stem.proj = nn.ModuleDict({"1": stem})
        self.pos_embedding_helper = Positions(places, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:  # a still picture stands for two equal frames
            x = x[:, :, None].expand(-1, -1, 2, -1, -1)
        return with_class(self, self.rgbt_stem.proj["1"](x))


class Sounds(nn.Module):
    """Normalised log-mel [n, 1, 128, 204] -> tokens [n, 1 + places, width]."""

    def __init__(self, width: int, places: int, patch: int, operations):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.rgbt_stem = Named(
            proj=operations.Conv2d(1, width, patch, 10, bias=False), norm_layer=operations.LayerNorm(width)
        )
        self.pos_embedding_helper = Positions(places, width)

    def forward(self, x: Tensor) -> Tensor:
        return with_class(self, self.rgbt_stem.proj(x), self.rgbt_stem.norm_layer)


def with_class(part, patches: Tensor, norm=None) -> Tensor:
    x = patches.flatten(2).transpose(1, 2)
    x = x if norm is None else norm(x)
    x = torch.cat([part.cls_token.to(x).expand(len(x), -1, -1), x], 1)
    return x + part.pos_embedding_helper.pos_embed.to(x)


class Texts(nn.Module):
    """Token ids [n, length] -> tokens [n, length, width]."""

    def __init__(self, width: int, length: int, vocabulary: int, operations):
        super().__init__()
        self.token_embedding = operations.Embedding(vocabulary, width)
        self.pos_embed = nn.Parameter(torch.empty(1, length, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens)
        return x + self.pos_embed.to(x)


class LearnedScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_logit_scale = nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_logit_scale.to(x).exp().clamp(max=GREATEST)


class ImageBind(nn.Module):
    """The towers whose sizes are given: sizes[modality] = {width, depth, heads, tokens, patch or vocabulary, out}."""

    def __init__(self, sizes: Mapping[str, Mapping[str, int]], operations=nn):
        super().__init__()
        for name in ("preprocessors", "trunks", "heads", "postprocessors"):
            self.add_module(f"modality_{name}", nn.ModuleDict())
        for modality, size in sizes.items():
            width, tokens = size["width"], size["tokens"]
            make, last = {
                "audio": (Sounds, size["patch"]),
                "vision": (Pictures, size["patch"]),
                "text": (Texts, size["patch"]),
            }[modality]
            self.modality_preprocessors[modality] = make(width, tokens, last, operations)
            trunk = nn.Module()
            if modality == "vision":
                trunk.pre_transformer_layer = nn.Sequential(operations.LayerNorm(width, eps=EPS))
            trunk.blocks = nn.ModuleList(
                Block(width, size["heads"], modality == "audio", operations) for _ in range(size["depth"])
            )
            self.modality_trunks[modality] = trunk
            norm = operations.LayerNorm(width, eps=EPS)
            linear = operations.Linear(width, size["out"], bias=False)
            if modality == "text":
                head = Named(proj=nn.Sequential(norm, linear))
            else:  # between them the class token is chosen
                head = nn.Sequential(OrderedDict([("0", norm), ("2", linear)]))
            self.modality_heads[modality] = head
            if modality != "vision":
                self.modality_postprocessors[modality] = nn.ModuleDict({"1": LearnedScale()})

    def tokens(self, modality: str, x: Tensor) -> Tensor:
        return self.modality_preprocessors[modality](x)

    def trunk(self, modality: str, x: Tensor) -> Tensor:
        trunk = self.modality_trunks[modality]
        x = trunk.pre_transformer_layer(x) if modality == "vision" else x
        bias = causal(x) if modality == "text" else None
        for block in trunk.blocks:
            x = block(x, bias)
        return x

    def head(self, modality: str, x: Tensor, place) -> Tensor:
        """Not normalised, [n, out]: of the class token, or of the end of each text at `place` [n]."""
        head = self.modality_heads[modality]
        return (head.proj if modality == "text" else head)(x[torch.arange(len(x), device=x.device), place])

    def raw(self, modality: str, x: Tensor) -> Tensor:
        """What comes out of the head, before its norm is taken away. Text: the end token has the greatest id."""
        place = x.argmax(-1) if modality == "text" else torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.head(modality, self.trunk(modality, self.tokens(modality, x)), place)

    def scaled(self, modality: str, raw: Tensor) -> Tensor:
        """Unit norm, times 20 for sounds and the learned scale for texts."""
        unit = normalize(raw, dim=-1)
        return unit if modality == "vision" else self.modality_postprocessors[modality]["1"](unit)

    def encode_audio(self, clips: Tensor) -> Tensor:
        """Log-mel clips [n, clips, 1, 128, 204] -> [n, out]: the mean of each clip's scaled embedding, of norm up to 20."""
        if clips.shape[-2:] != AUDIO_SIZE:
            raise ValueError(f"ImageBind hears log-mel of {AUDIO_SIZE[0]} x {AUDIO_SIZE[1]}, not {tuple(clips.shape[-2:])}.")
        if torch.equal(clips, clips[:, :1].expand_as(clips)):  # sounds below 2 s are the same clip again and again
            clips = clips[:, :1]
        found = self.scaled("audio", self.raw("audio", clips.flatten(0, 1)))
        return found.unflatten(0, clips.shape[:2]).mean(1)

    def encode_vision(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, 224, 224] -> unit [n, out]; clips [n, clips, 3, (2,) 224, 224] -> the mean of theirs, not unit."""
        if pictures.ndim == 4:
            return self.scaled("vision", self.raw("vision", pictures))
        found = self.scaled("vision", self.raw("vision", pictures.flatten(0, 1)))
        return found.unflatten(0, pictures.shape[:2]).mean(1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [n, 77] -> [n, out] of norm min(exp(scale), 100)."""
        return self.scaled("text", self.raw("text", tokens))


def build(
    state: Mapping[str, Tensor], modalities, source: str, heads: Mapping[str, int] = HEADS, operations=nn
) -> ImageBind:
    """The towers `modalities` of a published file, loaded strictly; other towers of the file are not looked at.

    Raises ValueError naming the file and what it lacks.
    """
    wanted = {key: value for key, value in state.items() if part_of(key) in modalities and not key.endswith(".mask")}
    for modality in modalities:
        key = f"modality_trunks.{modality}.blocks.0.attn.in_proj_weight"
        if key not in wanted:
            raise ValueError(f"{source} is no ImageBind model: it lacks {key} (first: {', '.join(list(state)[:3])}).")
    with torch.device("meta"):
        network = ImageBind({m: _sizes(wanted, m, heads[m], source) for m in modalities}, operations)
    own = network.state_dict()
    for key in own.keys() | wanted.keys():
        if key not in own or key not in wanted:
            raise ValueError(f"{source}: the tensor {key} is {'missing' if key in own else 'not known'}.")
        if own[key].shape != wanted[key].shape:
            raise ValueError(f"{source}: the tensor {key} is {tuple(wanted[key].shape)}, not {tuple(own[key].shape)}.")
    network.load_state_dict(wanted, assign=True)
    return network.train(False).requires_grad_(False)


def part_of(key: str) -> str:
    """The modality that a tensor's name belongs to."""
    return key.split(".")[1] if key.startswith("modality_") and "." in key else ""


def _sizes(tensors: Mapping[str, Tensor], modality: str, heads: int, source: str) -> dict[str, int]:
    before, trunk = f"modality_preprocessors.{modality}.", f"modality_trunks.{modality}.blocks."
    shape = {
        "audio": before + "rgbt_stem.proj.weight",
        "vision": before + "rgbt_stem.proj.1.weight",
        "text": before + "token_embedding.weight",
    }[modality]
    positions = before + ("pos_embed" if modality == "text" else "pos_embedding_helper.pos_embed")
    last = f"modality_heads.{modality}." + ("proj.1.weight" if modality == "text" else "2.weight")
    for key in (shape, positions, last):
        if key not in tensors:
            raise ValueError(f"{source}: the tensor {key} is missing.")
    out, width = tensors[last].shape
    return {
        "width": width,
        "depth": len({key.removeprefix(trunk).split(".")[0] for key in tensors if key.startswith(trunk)}),
        "heads": heads,
        "tokens": tensors[positions].shape[1],
        "patch": tensors[shape].shape[0 if modality == "text" else -1],
        "out": out,
    }
