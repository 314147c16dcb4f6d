"""Weights of caption words from what was heard, and prompt embeddings scaled by them (arXiv 2309.02405).

q: the probability the captioner gave a word, its audio attention. s: the probability that the word is a noun, its sentence
attention. A word's weight is a; w holds one weight for every row of the prompt.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NOUN = 0.7  # a word is a noun above this
RULES = ("code", "paper")
RESTORED = ("mean", "norm")
LEAST = 0.05  # of the mean before, below which the mean cannot be restored


def positional(index: int) -> float:
    """P(t) of the t-th word from 0: from 0.11 towards 0.5, because captioners grow sure of themselves as they go on."""
    return 1 / (2 + math.exp(2 - 0.5 * index))


def word_weights(
    audio: Sequence[float], nouns: Sequence[float], rule: str = "code", position: bool = True
) -> list[float]:
    """Weight of every word from its audio attention and noun probability.

    "code", what the authors' program does: s + 0.1 q for nouns (s > 0.7), q for other words, and P(t). "paper", what its
    figure shows: q + P(t) + s for all.
    """
    found = []
    for index, (heard, noun) in enumerate(zip(audio, nouns, strict=True)):
        weight = heard + noun if rule == "paper" else noun + 0.1 * heard if noun > NOUN else heard
        found.append(weight + positional(index) if position else weight)
    return found


def token_weights(words: Sequence[float], owner: Sequence[int | None]) -> Tensor:
    """w [tokens], float64: the weight of the word that owns each token, 1 for tokens of nobody."""
    return torch.tensor([1.0 if word is None else words[word] for word in owner], dtype=torch.float64)


def reweight(z: Tensor, w: Tensor, restore: str = "mean") -> tuple[Tensor, bool]:
    """z' = y mean(z) / mean(y) with y = w z, for z [..., tokens, channels] and w [tokens] or [tokens, channels].

    The means are over all rows of one prompt. restore "norm" takes the norm in place of the mean; so does "mean" where mean(y)
    has nearly vanished or changed its sign, and the second result says so. Weights that are all 1 give z itself, bit for bit.
    """
    if not w.requires_grad and (w == 1).all():
        return z, False
    y = z * (w[:, None] if w.ndim == 1 else w)
    before, after = (x.mean((-2, -1), keepdim=True) for x in (z, y))
    lost = (after.abs() < LEAST * before.abs()) | (after * before <= 0)
    by_norm = lost | (restore == "norm")
    norms = z.norm(dim=(-2, -1), keepdim=True) / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    factor = torch.where(by_norm, norms, before / torch.where(by_norm, torch.ones_like(after), after))
    return y * factor, restore == "mean" and bool(lost.any())
