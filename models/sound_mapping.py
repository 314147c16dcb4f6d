"""Mapping networks from one embedding to prompt embeddings: linear, factored, 1-D convolution, transformer, gated bind.

All predict in whitened space and end with y = mean + deviation * out, per position and channel of the target; with a zero last
layer (`residual`) the output is the mean prompt exactly. The input is brought to unit root mean square.
"""

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from .bind_network import BindNetwork
from .fused_attention import FusedAttention
from .joint_embedding import shift

ARCHITECTURES = ("linear", "factored", "conv1d", "transformer", "bind")
MEMORY = 8  # tokens that the transformer makes of the embedding
SPREAD, KERNEL = 7, 5  # columns the convolution starts from, and its kernel
LEAST_DEVIATION = 1e-4


class Linear(nn.Module):
    def __init__(self, inside: int, length: int, width: int, hidden: int, operations):
        super().__init__()
        self.length = length
        self.last = operations.Linear(inside, length * width)

    def forward(self, e: Tensor) -> Tensor:
        return self.last(e).unflatten(-1, (self.length, -1))


class Factored(nn.Module):
    """One hidden vector, gated anew for each position."""

    def __init__(self, inside: int, length: int, width: int, hidden: int, operations):
        super().__init__()
        self.first = operations.Linear(inside, hidden)
        self.gates = nn.Parameter(1 + 0.5 * torch.randn(length, hidden))
        self.last = operations.Linear(hidden, width)
        self.places = nn.Parameter(torch.zeros(length, width))

    def forward(self, e: Tensor) -> Tensor:
        return self.last(gelu(self.first(e))[:, None] * self.gates.to(e)) + self.places.to(e)


class Conv1d(nn.Module):
    def __init__(self, inside: int, length: int, width: int, hidden: int, operations):
        super().__init__()
        self.length, self.hidden = length, hidden
        self.first = operations.Linear(inside, hidden * SPREAD)
        stride = math.ceil(length / SPREAD)
        self.spread = operations.ConvTranspose1d(hidden, hidden, stride, stride)
        self.middle = nn.ModuleList(operations.Conv1d(hidden, hidden, KERNEL, padding=KERNEL // 2) for _ in range(3))
        self.last = operations.Conv1d(hidden, width, 1)

    def forward(self, e: Tensor) -> Tensor:
        x = self.spread(self.first(e).unflatten(-1, (self.hidden, SPREAD)))[..., : self.length]
        for layer in self.middle:
            x = x + gelu(layer(x))
        return self.last(x).transpose(1, 2)


class Layer(nn.Module):
    """Pre-norm layer of queries: they look at each other and at the memory."""

    def __init__(self, width: int, heads: int, operations):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (operations.LayerNorm(width) for _ in range(3))
        self.own, self.cross = FusedAttention(width, heads, operations), FusedAttention(width, heads, operations)
        for attention in (self.own, self.cross):
            nn.init.normal_(attention.in_proj_weight, std=width**-0.5)
            nn.init.zeros_(attention.in_proj_bias)
        self.feed = nn.Sequential(operations.Linear(width, 4 * width), nn.GELU(), operations.Linear(4 * width, width))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        seen = self.norm1(x)
        x = x + self.own(seen, *self.own.project(seen))
        x = x + self.cross(self.norm2(x), *self.cross.project(memory))
        return x + self.feed(self.norm3(x))


class Transformer(nn.Module):
    def __init__(self, inside: int, length: int, width: int, hidden: int, operations):
        super().__init__()
        self.memory = operations.Linear(inside, MEMORY * hidden)
        self.queries = nn.Parameter(torch.randn(length, hidden) * 0.5)
        self.layers = nn.ModuleList(Layer(hidden, max(1, hidden // 64), operations) for _ in range(4))
        self.norm = operations.LayerNorm(hidden)
        self.last = operations.Linear(hidden, width)

    def forward(self, e: Tensor) -> Tensor:
        memory = self.memory(e).unflatten(-1, (MEMORY, -1))
        x = self.queries.to(e).expand(len(e), -1, -1)
        for layer in self.layers:
            x = layer(x, memory)
        return self.last(self.norm(x))


class Bind(nn.Module):
    """ImageBind-LLM's gated network, then a scale and an offset for each position."""

    def __init__(self, inside: int, length: int, width: int, hidden: int, operations):
        super().__init__()
        self.bind = BindNetwork(inside, hidden, 4 * hidden, operations)
        self.scales = nn.Parameter(0.5 * torch.randn(length, hidden))
        self.places = nn.Parameter(torch.zeros(length, hidden))
        self.last = nn.Identity() if width == hidden else operations.Linear(hidden, width)

    def forward(self, e: Tensor) -> Tensor:
        return self.last(self.bind(e) * (1 + self.scales.to(e)) + self.places.to(e))


KINDS = dict(zip(ARCHITECTURES, (Linear, Factored, Conv1d, Transformer, Bind), strict=True))


class PromptMapping(nn.Module):
    """Embeddings [n, inside] -> prompts [n, length, width] and, where `pooled` > 0, pooled vectors [n, pooled].

    config: {arch, inside, length, width, hidden, pooled, residual, target, ...}; target names the text encoder whose rows are
    predicted. Means and deviations are those of the target over the training captions; `modality_mean.<name>` [inside] are the
    mean unit embeddings of each modality.
    """

    def __init__(self, config: Mapping, operations=nn):
        super().__init__()
        self.config = dict(config)
        inside, length, width = config["inside"], config["length"], config["width"]
        self.network = KINDS[config["arch"]](inside, length, width, config["hidden"], operations)
        self.register_buffer("target_mean", torch.zeros(length, width))
        self.register_buffer("target_std", torch.ones(length, width))
        self.pooled = None
        if config.get("pooled"):
            self.pooled = operations.Linear(inside, config["pooled"])
            self.register_buffer("pooled_mean", torch.zeros(config["pooled"]))
            self.register_buffer("pooled_std", torch.ones(config["pooled"]))
        self.modality_mean = nn.Module()
        for name in config.get("modalities", ()):
            self.modality_mean.register_buffer(name, torch.zeros(inside))
        if config.get("residual"):
            if isinstance(self.network.last, nn.Identity):
                raise ValueError(f"{config['arch']} with hidden = width has no last layer that could begin at zero.")
            nn.init.zeros_(self.network.last.weight)
            nn.init.zeros_(self.network.last.bias)

    @torch.no_grad()
    def set_statistics(self, prompts: Tensor, pooled: Tensor | None = None) -> None:
        """Mean and deviation of target prompts [N, length, width]; constant channels get the least deviation."""
        self.target_mean.copy_(prompts.mean(0))
        self.target_std.copy_(prompts.std(0, correction=0).clamp(min=LEAST_DEVIATION))
        if pooled is not None:
            self.pooled_mean.copy_(pooled.mean(0))
            self.pooled_std.copy_(pooled.std(0, correction=0).clamp(min=LEAST_DEVIATION))

    @torch.no_grad()
    def set_modality(self, name: str, e: Tensor) -> None:
        """Mean unit embedding of a modality, from [N, inside]."""
        getattr(self.modality_mean, name).copy_(normalize(e, dim=-1).mean(0))

    def given(self, e: Tensor, modality: str = "") -> Tensor:
        """The input of the network: moved from the mean of its modality to that of texts where both are known."""
        e = normalize(e, dim=-1)
        means = dict(self.modality_mean.named_buffers())
        if modality in means and "text" in means and modality != "text":
            e = shift(e, means[modality].to(e), means["text"].to(e))
        return e * math.sqrt(e.shape[-1])

    def whitened(self, e: Tensor, modality: str = "") -> Tensor:
        return self.network(self.given(e, modality))

    def forward(self, e: Tensor, modality: str = "", gain: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """gain multiplies the whitened prediction, to give back the spread that a squared loss takes."""
        x = self.given(e, modality)
        y = self.target_mean.to(x) + self.target_std.to(x) * (gain * self.network(x))
        if self.pooled is None:
            return y, None
        return y, self.pooled_mean.to(x) + self.pooled_std.to(x) * self.pooled(x)


def build(state: Mapping[str, Tensor], about: Mapping[str, str] | None, source: str, operations=nn) -> PromptMapping:
    """The mapping of a file, loaded strictly. Raises ValueError for a file without configuration or statistics."""
    if not about or "config" not in about:
        raise ValueError(f"{source} is no prompt mapping: it has no configuration of one.")
    config = json.loads(about["config"])
    for key in ("target_mean", "target_std"):
        if key not in state:
            raise ValueError(f"{source} has no statistics of its target ({key} is missing); train it again.")
    if config.get("arch") not in KINDS:
        raise ValueError(f"{source}: its architecture '{config.get('arch')}' is none of {', '.join(ARCHITECTURES)}.")
    network = PromptMapping(config, operations)
    own = network.state_dict()
    for key in own.keys() | state.keys():
        if key not in own or key not in state:
            raise ValueError(f"{source}: the tensor {key} is {'missing' if key in own else 'not known'}.")
        if own[key].shape != state[key].shape:
            raise ValueError(f"{source}: the tensor {key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}.")
    network.load_state_dict(state)
    return network.train(False).requires_grad_(False)
