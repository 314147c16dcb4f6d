"""Attention as an argument: every mechanism takes `attend(q, k, v, bias)` on [rows, heads, tokens, dim]."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax(q kᵀ / √dim + bias) v for q [rows, heads, Q, dim], k and v [rows, heads, K, dim], bias of that shape."""
    return scaled_dot_product_attention(q, k, v, attn_mask=bias)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[rows, tokens, heads·dim] -> [rows, heads, tokens, dim], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[rows, heads, tokens, dim] -> [rows, tokens, heads·dim]."""
    return x.transpose(1, 2).flatten(2)
