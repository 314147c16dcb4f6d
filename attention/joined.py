"""Attention over a row's own tokens and pieces of other rows, each token once, in bounded memory.

What sharing mechanisms have in common: a story's panels see drawn tokens of each other, a style set sees its reference,
a later panel sees remembered tokens. Pieces are gathered for a few heads at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .core import Attend
from .masked import ANY, ON_DEVICE, Constraint, Divide, masked_attention, partition

GATHERED = 4 * 2**20  # bytes of keys and values that one call on a CPU gathers, as far as one head allows


class Piece(NamedTuple):
    """Tokens that a row also sees: `index` of k, v [heads, tokens, dim], None for all of them.

    `source` is the row of the call whose tokens they are, None for tokens from elsewhere, which bear no labels and so are
    seen by every query. `shift` is added to their logits.
    """

    k: Tensor
    v: Tensor
    index: Tensor | None = None
    source: int | None = None
    shift: float = 0.0

    @property
    def count(self) -> int:
        return self.k.shape[1] if self.index is None else len(self.index)

    def tokens(self, x: Tensor, heads: slice = slice(None)) -> Tensor:
        """The piece's tokens [heads, count, dim] of x, its k or its v."""
        return x[heads] if self.index is None else x[heads].index_select(1, self.index)

    def labels(self, constraint: Constraint) -> Tensor:
        if self.source is None:
            return torch.full((self.count,), ANY)
        labels = constraint.key[self.source % len(constraint.key)]
        return labels if self.index is None else labels[self.index.cpu()]


def joined_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Sequence[Sequence[Piece]],
    attend: Attend,
    bias: Tensor | None = None,
    constraints: Sequence[Constraint] = (),
    divide: Divide = partition,
) -> Tensor:
    """Attention of each row of q [rows, heads, Q, dim] over its own k, v [rows, heads, K, dim] and its pieces.

    seen[row] must not hold tokens of the row itself: they would weigh double. bias [rows, heads or 1, Q or 1, K] is
    added to the logits of own tokens; constraints hold for own tokens and for pieces of the same call. A row without
    pieces gives plain (or masked) attention. Returns [rows, heads, Q, dim].
    """
    out = torch.empty_like(q)
    plain = [row for row, pieces in enumerate(seen) if not pieces]
    if plain:
        few, labelled = slice(None), constraints
        if len(plain) < len(q):
            few, labelled = plain, [Constraint(_rows(c.query, plain), _rows(c.key, plain)) for c in constraints]
        of_rows = None if bias is None else bias[few]
        if constraints:
            parts = divide(labelled, len(plain), q.device)
            out[few] = masked_attention(q[few], k[few], v[few], parts, attend, of_rows)
        else:
            out[few] = attend(q[few], k[few], v[few], of_rows)
    for row, pieces in enumerate(seen):
        if pieces:
            _one_row(out, q, k, v, row, pieces, attend, bias, constraints)
    return out


def _rows(labels: Tensor, rows: list[int]) -> Tensor:
    return labels if len(labels) == 1 else labels[rows]


def _one_row(out, q, k, v, row: int, pieces, attend: Attend, bias, constraints) -> None:
    length = k.shape[2] + sum(piece.count for piece in pieces)
    longer = _bias(k, row, pieces, bias, length)
    parts = None
    if constraints:
        labelled = [
            Constraint(
                c.query[row % len(c.query)][None],
                torch.cat([c.key[row % len(c.key)], *(piece.labels(c) for piece in pieces)])[None],
            )
            for c in constraints
        ]
        parts = partition(labelled, 1, q.device)
    limit = GATHERED if k.device.type == "cpu" else ON_DEVICE * GATHERED
    step = max(1, limit // (length * (k.shape[3] + v.shape[3]) * k.element_size()))
    for start in range(0, q.shape[1], step):
        heads = slice(start, start + step)
        keys = torch.cat([k[row, heads], *(piece.tokens(piece.k, heads) for piece in pieces)], dim=1)[None]
        values = torch.cat([v[row, heads], *(piece.tokens(piece.v, heads) for piece in pieces)], dim=1)[None]
        queries = q[row : row + 1, heads]
        mask = longer if longer is None or longer.shape[1] == 1 else longer[:, heads]
        if parts is None:
            out[row, heads] = attend(queries, keys, values, mask)[0]
        else:
            out[row, heads] = masked_attention(queries, keys, values, parts, attend, mask)[0]


def _bias(k: Tensor, row: int, pieces, bias: Tensor | None, length: int) -> Tensor | None:
    """Logit offsets [1, heads or 1, Q or 1, length] of own tokens and pieces, None when there are none."""
    if bias is None and not any(piece.shift for piece in pieces):
        return None
    own = k.new_zeros(1, 1, 1, k.shape[2]) if bias is None else bias[row : row + 1]
    shifts = [own.new_full((*own.shape[:3], piece.count), piece.shift) for piece in pieces]
    return torch.cat([own, *shifts], dim=3)
