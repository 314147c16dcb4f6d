"""Arithmetic on embeddings of one space (ImageBind, arXiv 2305.05665): sounds, pictures and texts added and blended."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

LEAST = 1e-3  # norm of a sum below which it has no direction


def add(embeddings: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of unit embeddings [n, width] times weights, negative ones allowed; not made to any norm."""
    return sum(normalize(e, dim=-1) * weight for e, weight in zip(embeddings, weights, strict=True))


def renormed(e: Tensor, norm: float) -> Tensor:
    """e [n, width] at a norm. Raises ValueError where embeddings cancel each other."""
    if (e.norm(dim=-1) < LEAST).any():
        raise ValueError(f"the weighted embeddings cancel each other (norm {float(e.norm(dim=-1).min()):.2g}).")
    return normalize(e, dim=-1) * norm


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From the direction of a (share 0) to that of b (1) along the great circle; unit norm. Linear for equal directions."""
    a, b = normalize(a, dim=-1), normalize(b, dim=-1)
    angle = (a * b).sum(-1, keepdim=True).clamp(-1, 1).arccos()
    sine = angle.sin()
    close = sine < 1e-4
    safe = torch.where(close, torch.ones_like(sine), sine)
    curved = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / safe
    return torch.where(close, (1 - share) * a + share * b, curved)


def shift(e: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Unit embeddings moved by the difference of two modalities' mean unit vectors [width]; unit norm."""
    return normalize(normalize(e, dim=-1) - source + target, dim=-1)
