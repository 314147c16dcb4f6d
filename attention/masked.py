"""Masked attention by labels: a query sees the keys of its own label, evaluated as dense attentions of smaller size.

PEEKABOO (arXiv 2312.07509, equations 2 to 5) masks self, temporal and cross attention so that foreground sees
foreground and the rest sees the rest. All three are one relation, equality of labels, so the tokens are put in groups and
each group attends by itself: no mask and no (tokens x tokens) matrix is built, and every attention kernel serves.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .core import Attend

Divide = Callable[[Sequence["Constraint"], int, torch.device], list["Part"]]  # `partition`, or one that remembers

ANY = -1  # as a query's label: sees every key; as a key's label: every query sees it
NOBODY = -2  # key label that no labelled query may see
GATHERED = 8 * 2**20  # bytes of tokens that one attention on a CPU gathers, as far as one row of a part allows
ON_DEVICE = 16  # times as many elsewhere: a GPU wants few and large kernels


@dataclass(frozen=True)
class Constraint:
    """Labels of queries [rows or 1, Q] and keys [rows or 1, K], int64 on the CPU.

    A query sees the keys that bear its label or ANY. `name` says what the labels are, so that calls with equal labels can
    share index lists; None for labels used once.
    """

    query: Tensor
    key: Tensor
    name: Hashable = None


@dataclass(frozen=True)
class Part:
    """One dense attention: `rows` [m], the `queries` [m, n] and `keys` [m, l] of each row.

    Index lists that all rows share are [1, n]; None means all tokens in order.
    """

    rows: Tensor
    queries: Tensor | None
    keys: Tensor | None

    def pieces(self, q: Tensor, k: Tensor) -> list["Part"]:
        """Parts of fewer rows, whose tokens stay in a cache while they are gathered, attend and are put back."""
        if self.queries is None:
            return [self]
        tokens = 2 * self.queries.shape[1] + 2 * (k.shape[2] if self.keys is None else self.keys.shape[1])
        limit = GATHERED if q.device.type == "cpu" else ON_DEVICE * GATHERED
        step = max(1, limit // (tokens * q.shape[1] * q.shape[3] * q.element_size()))
        indices = (self.rows, self.queries, self.keys)
        cut = zip(*((None,) * len(self.rows) if x is None else x.split(step) for x in indices), strict=False)
        return [Part(*piece) for piece in cut]

    def to(self, device) -> "Part":
        return Part(*(None if x is None else x.to(device) for x in (self.rows, self.queries, self.keys)))


def visible_keys(labels: Sequence[int], keys: Sequence[Tensor]) -> Tensor:
    """Which keys a query with one label per constraint sees, bool [K]; keys holds one [K] label tensor per constraint.

    A constraint that would leave the query without any key is passed over: an empty set means unmasked.
    """
    seen = torch.ones(len(keys[0]), dtype=torch.bool)
    for label, key in zip(labels, keys, strict=True):
        if label != ANY:
            narrowed = seen & ((key == label) | (key == ANY))
            if narrowed.any():
                seen = narrowed
    return seen


def partition(constraints: Sequence[Constraint], rows: int, device: torch.device) -> list[Part]:
    """Dense attentions that together obey every constraint for `rows` rows, on `device`; rows of one pattern share them."""
    query = torch.stack([c.query.expand(rows, -1) for c in constraints], 1)  # [rows, constraints, Q]
    key = torch.stack([c.key.expand(rows, -1) for c in constraints], 1)
    patterns, member = torch.cat([query, key], 2).flatten(1).unique(dim=0, return_inverse=True)
    sized: dict[tuple[int, int], list[Part]] = {}
    for number, pattern in enumerate(patterns):
        labels, keys = pattern.view(len(constraints), -1).split([query.shape[2], key.shape[2]], 1)
        of_pattern = (member == number).nonzero().flatten()
        groups, group = labels.unique(dim=1, return_inverse=True)
        merged: dict[bytes, list[Tensor]] = {}  # label groups that see the same keys attend together
        for index, words in enumerate(groups.T.tolist()):
            seen = visible_keys(words, list(keys))
            merged.setdefault(seen.numpy().tobytes(), [seen]).append((group == index).nonzero().flatten())
        for seen, *members in merged.values():
            queries, visible = torch.cat(members).sort().values, seen.nonzero().flatten()
            sized.setdefault((len(queries), len(visible)), []).append(Part(of_pattern, queries[None], visible[None]))
    parts = []
    for (queries, keys), alike in sized.items():
        rows_, q, k = (part := alike[0]).rows, part.queries, part.keys
        if len(alike) > 1:
            rows_, order = torch.cat([part.rows for part in alike]).sort()  # a part of all rows has them in order
            q, k = (
                torch.cat([getattr(part, name).expand(len(part.rows), -1) for part in alike])[order]
                for name in ("queries", "keys")
            )
        whole = queries == query.shape[2], keys == key.shape[2]
        parts.append(Part(rows_, None if whole[0] else q, None if whole[1] else k).to(device))
    return parts


def _take(x: Tensor, part: Part, index: Tensor | None) -> Tensor:
    """Tokens `index` of x [rows, heads, tokens, dim] for the part's rows."""
    if index is None:
        return x if len(part.rows) == len(x) else x[part.rows]
    if len(index) == 1 and len(part.rows) == len(x):
        return x.index_select(2, index[0])
    flat = x.transpose(1, 2)  # hosts hand over tokens before heads, so this is contiguous as a rule
    places = (part.rows[:, None] * x.shape[2] + index).flatten()
    taken = flat.reshape(-1, *flat.shape[2:]).index_select(0, places)  # several times faster than x[places] on a CPU
    return taken.view(len(part.rows), -1, *flat.shape[2:]).transpose(1, 2)


def _take_bias(bias: Tensor | None, part: Part) -> Tensor | None:
    if bias is None:
        return None
    bias, rows = bias[part.rows], len(part.rows)
    if part.queries is not None and bias.shape[2] > 1:
        bias = bias.gather(2, part.queries[:, None, :, None].expand(rows, bias.shape[1], -1, bias.shape[3]))
    if part.keys is not None:
        bias = bias.gather(3, part.keys[:, None, None].expand(rows, *bias.shape[1:3], -1))
    return bias


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[Part],
    attend: Attend,
    bias: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Attention of q [rows, heads, Q, dim] over k, v [rows, heads, K, dim] in the parts of a partition (same device).

    bias [rows, heads or 1, Q or 1, K] is added to the logits that remain. Returns [rows, heads, Q, dim]; `into`, laid out as
    [rows, Q, heads, dim] in memory, may be filled with it instead of a new tensor.
    """
    if len(parts) == 1 and parts[0].queries is None and parts[0].keys is None:
        return attend(q, k, v, bias)
    out = q.new_empty(len(q), q.shape[2], q.shape[1], v.shape[3]) if into is None else into.transpose(1, 2)
    for part in (piece for whole in parts for piece in whole.pieces(q, k)):
        found = attend(
            _take(q, part, part.queries), _take(k, part, part.keys), _take(v, part, part.keys), _take_bias(bias, part)
        ).transpose(1, 2)
        if part.queries is None:
            out[part.rows] = found
        elif len(part.queries) == 1 and len(part.rows) == len(q):
            out[:, part.queries[0]] = found
        else:
            out.view(-1, *out.shape[2:])[part.rows[:, None] * q.shape[2] + part.queries] = found
    return out.transpose(1, 2)
