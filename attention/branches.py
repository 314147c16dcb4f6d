"""Cross-attention as a weighted sum of branches with one query: separate softmaxes, each over its own keys.

MagDiff's adaptive prompts alignment (arXiv 2311.17338) and IP-Adapter add an image branch to the text branch;
StoryImager (arXiv 2404.05979) blends a branch per frame with one over the whole story.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .core import Attend
from .masked import Constraint, Divide, masked_attention, partition


@dataclass
class Branch:
    """Keys and values [n, heads, K, dim] for the rows `rows` (n of them) of a call.

    weight is a number or a tensor that broadcasts with [n, heads, Q, dim]; constraints narrow what a query sees; bias
    [n, heads or 1, Q or 1, K] is added to logits. `q` [n, heads, Q, dim] are queries of its own instead of the call's, and
    `told` is called with what it found, before the weight.
    """

    rows: slice
    k: Tensor
    v: Tensor
    weight: float | Tensor = 1.0
    constraints: list[Constraint] = field(default_factory=list)
    bias: Tensor | None = None
    q: Tensor | None = None
    told: Callable[[Tensor], None] | None = None


def attend_branches(q: Tensor, branches: Sequence[Branch], attend: Attend, divide: Divide = partition) -> Tensor:
    """Sum over branches of weight x attention for q [rows, heads, Q, dim]. A weight of 0 leaves its branch out."""
    acting = [branch for branch in branches if torch.is_tensor(branch.weight) or branch.weight != 0]
    out = q.new_empty(len(q), q.shape[2], q.shape[1], acting[0].v.shape[3] if acting else q.shape[3]).transpose(1, 2)
    touched: set[int] = set()
    for branch in acting:
        rows = range(*branch.rows.indices(len(q)))
        fresh, part = touched.isdisjoint(rows), out[branch.rows]
        query = q[branch.rows] if branch.q is None else branch.q
        if branch.constraints:
            parts = divide(branch.constraints, len(rows), q.device)
            into = part if fresh and not torch.is_grad_enabled() else None  # a graph cannot follow it
            found = masked_attention(query, branch.k, branch.v, parts, attend, branch.bias, into)
        else:
            found = attend(query, branch.k, branch.v, branch.bias)
        if branch.told is not None:
            branch.told(found)
        if torch.is_tensor(branch.weight) or branch.weight != 1:
            found = found * branch.weight
        if not fresh:
            _clear(out, set(rows) - touched)
            part += found
        elif found.data_ptr() != part.data_ptr():
            if rows == range(len(q)) and branch is acting[-1]:
                return found
            part.copy_(found)
        touched.update(rows)
    _clear(out, set(range(len(q))) - touched)
    return out


def _clear(out: Tensor, rows: set[int]) -> None:
    if rows:
        out[sorted(rows)] = 0
