"""Consistent Self-Attention: pictures of one batch also look at a random half of each other's tokens.

StoryDiffusion, arXiv 2405.01434, equations 1 to 3, in the gathered form of the authors' low-memory demo: the keys of
a panel are the sampled tokens of the panels it reads and all of its own tokens, each exactly once (joined.py). No mask
of (tokens of all panels)² is built. The sliding window of the paper's pseudo code is here too, with own tokens counted
once as equation 2 says (the printed pseudo code counts sampled own tokens twice).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .core import Attend
from .joined import Piece, joined_attention


@dataclass(frozen=True)
class ConsistentOptions:
    """Numbers of the published low-memory demo; probabilities are those of sharing in one layer at one step."""

    rate: float = 0.5  # share of a panel's tokens that the others see
    share_early: float = 0.7  # probability that a layer shares, steps < late_from
    share_late: float = 0.9  # the same from step late_from on
    late_from: int = 20
    first_step: int = 1  # steps before it never share
    window: int = 0  # panels per sliding window, 0 = every panel sees every other
    seed: int = 0


def _generator(*words: int | str) -> torch.Generator:
    digest = hashlib.sha256(repr(words).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_tokens(options: ConsistentOptions, evaluation: tuple[int, int], grid: tuple[int, ...], panel: int) -> Tensor:
    """Which tokens of a panel the others may see: Bernoulli(rate) per token, bool [tokens].

    `evaluation` is (step, how many evaluations that step has had); one draw serves every layer of a token grid,
    every head and every guidance chunk. Drawn on the CPU in float32 from the seed alone.
    """
    tokens = 1
    for side in grid:
        tokens *= side
    generator = _generator(options.seed, "tokens", *evaluation, *grid, panel)
    return torch.rand(tokens, generator=generator, dtype=torch.float32) < options.rate


def share_layers(options: ConsistentOptions, evaluation: tuple[int, int], layers: int) -> list[bool]:
    """For each of `layers` layers, in execution order, whether it shares at this evaluation."""
    step = evaluation[0]
    if step < options.first_step or options.rate == 0:
        return [False] * layers
    probability = options.share_early if step < options.late_from else options.share_late
    draw = torch.rand(layers, generator=_generator(options.seed, "share", *evaluation), dtype=torch.float32)
    return (draw < probability).tolist()


def sampled_tokens(k: Tensor, v: Tensor, draw: Sequence[Tensor]) -> list[Piece]:
    """The drawn tokens of each row as pieces: k, v [rows, heads, tokens, dim], draw bool [tokens] a row."""
    return [Piece(k[row], v[row], mask.nonzero().flatten().to(k.device), row) for row, mask in enumerate(draw)]


def window_attention(q: Tensor, k: Tensor, v: Tensor, draws: Tensor, attend: Attend) -> Tensor:
    """Consistent Self-Attention in a window sliding over the rows by one; a row's output is the mean over its windows.

    q, k, v [rows, heads, tokens, dim]; draws bool [rows - W + 1, W, tokens], the sampled tokens of each window of W
    rows. Pseudo code of arXiv 2405.01434 with own tokens counted once.
    """
    width = draws.shape[1]
    total = torch.zeros_like(q)
    count = [0] * len(q)
    for start, draw in enumerate(draws):
        rows = slice(start, start + width)
        pieces = sampled_tokens(k[rows], v[rows], draw)
        seen = [pieces[:row] + pieces[row + 1 :] for row in range(width)]
        total[rows] += joined_attention(q[rows], k[rows], v[rows], seen, attend)
        for row in range(start, start + width):
            count[row] += 1
    return total / torch.tensor(count, dtype=q.dtype, device=q.device)[:, None, None, None]
