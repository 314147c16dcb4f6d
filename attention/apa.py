"""Adaptive prompts alignment (MagDiff, arXiv 2311.17338): alpha_text x text branch + alpha_image x image branch.

Both branches have the layer's query and a softmax of their own; the sum goes through the layer's output projection, so its
bias is not scaled. With alpha_text 1 this is IP-Adapter (arXiv 2308.06721) with scale alpha_image.
"""

from collections.abc import Iterable

from torch import Tensor

from .branches import Branch


def image_branch(rows: slice, k: Tensor, v: Tensor, alpha: float | Tensor, mask: Tensor | None = None) -> Branch:
    """The branch over image keys and values [n, heads, K, dim] for n rows of a call, weighted alpha.

    `mask` [n or 1, Q] in 0..1 multiplies what it gives each query.
    """
    return Branch(rows, k, v, alpha if mask is None else alpha * mask[:, None, :, None])


def scale_text(branches: Iterable[Branch], alpha: float | Tensor) -> None:
    """Multiply the weights of text branches by alpha."""
    for branch in branches:
        branch.weight = branch.weight * alpha
