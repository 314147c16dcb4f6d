"""Attention whose projections lie in one tensor under torch's names, as ACT, CLIP and ImageBind publish theirs."""

import math

import torch
from torch import Tensor, nn

from ..attention.core import attend, merge_heads, split_heads


class FusedAttention(nn.Module):
    """x [n, Q, width] looks at keys and values [n, heads, K, dim], which `project` makes of what is looked at."""

    def __init__(self, width: int, heads: int, operations):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = operations.Linear(width, width)

    def _project(self, x: Tensor, first: int, count: int) -> list[Tensor]:
        width = self.in_proj_weight.shape[1]
        rows = slice(first * width, (first + count) * width)
        found = nn.functional.linear(x, self.in_proj_weight[rows].to(x), self.in_proj_bias[rows].to(x))
        return [split_heads(part, self.heads) for part in found.chunk(count, -1)]

    def project(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self._project(seen, 1, 2))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.out_proj(merge_heads(attend(self._project(x, 0, 1)[0], k, v, bias)))


def causal(x: Tensor) -> Tensor:
    """Bias [tokens, tokens] under which a token of x [n, tokens, width] sees itself and earlier ones."""
    return torch.full((x.shape[1],) * 2, -math.inf, dtype=x.dtype, device=x.device).triu(1)
