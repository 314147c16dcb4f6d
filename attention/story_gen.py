"""StoryGen's image attention (arXiv 2306.00973, as the authors' code has it): beside the text attention, on the same input.

h = residual after self-attention, a2 = text attention, a3 = attn3(norm4(h), features of the references).
"""

from torch import Tensor

from .core import Attend, merge_heads, split_heads


def image_attention(attention, norm, h: Tensor, image: Tensor, heads: int, attend: Attend) -> Tensor:
    """attn3(norm4(h), image) for h [m·n, Q, C] and image [n, K, C], which is not normalised; row r reads image r mod n.

    `attention` has to_q, to_k, to_v and to_out. Keys and values are made once for the m groups of rows.
    """
    groups = len(h) // len(image)
    q = attention.to_q(norm(h)).unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
    q, k, v = (split_heads(x, heads) for x in (q, attention.to_k(image), attention.to_v(image)))
    out = merge_heads(attend(q, k, v, None)).unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    return attention.to_out(out)


def join(h: Tensor, text: Tensor, image: Tensor, strength: float, twice: bool = True) -> Tensor:
    """What is to be added to h: a2 + strength (h + a3), whose h the released weights were trained with; a2 + strength a3
    for weights trained without (`twice` False)."""
    return text + strength * ((h + image) if twice else image)
