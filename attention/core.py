"""Attention as an argument: every mechanism takes `attend(q, k, v)` on [rows, heads, tokens, dim]."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q kᵀ / √dim) v for q [rows, heads, Q, dim], k and v [rows, heads, K, dim]."""
    return scaled_dot_product_attention(q, k, v)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[rows, tokens, heads·dim] -> [rows, heads, tokens, dim], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[rows, heads, tokens, dim] -> [rows, tokens, heads·dim]."""
    return x.transpose(1, 2).flatten(2)
