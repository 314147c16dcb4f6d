"""Cross-attention as a weighted sum of branches with one query: separate softmaxes, each over its own keys.

MagDiff's adaptive prompts alignment (arXiv 2311.17338) and IP-Adapter add an image branch to the text branch;
StoryImager (arXiv 2404.05979) blends a branch per frame with one over the whole story.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .core import Attend
from .masked import Constraint, Divide, masked_attention, partition


@dataclass
class Branch:
    """Keys and values [n, heads, K, dim] for the rows `rows` (n of them) of a call.

    weight is a number or a tensor that broadcasts with [n, heads, Q, dim]; constraints narrow what a query sees; bias
    [n, heads or 1, Q or 1, K] is added to logits.
    """

    rows: slice
    k: Tensor
    v: Tensor
    weight: float | Tensor = 1.0
    constraints: list[Constraint] = field(default_factory=list)
    bias: Tensor | None = None


def attend_branches(q: Tensor, branches: Sequence[Branch], attend: Attend, divide: Divide = partition) -> Tensor:
    """Sum over branches of weight x attention for q [rows, heads, Q, dim]. A weight of 0 leaves its branch out."""
    out, touched = None, set()
    for branch in branches:
        if not torch.is_tensor(branch.weight) and branch.weight == 0:
            continue
        rows = range(*branch.rows.indices(len(q)))
        if branch.constraints:
            parts = divide(branch.constraints, len(rows), q.device)
            found = masked_attention(q[branch.rows], branch.k, branch.v, parts, attend, branch.bias)
        else:
            found = attend(q[branch.rows], branch.k, branch.v, branch.bias)
        if torch.is_tensor(branch.weight) or branch.weight != 1:
            found = found * branch.weight
        if len(rows) == len(q):
            out = found if out is None else out + found
        else:
            if out is None:
                out = torch.zeros_like(q)
            if touched.isdisjoint(rows):
                out[branch.rows] = found
            else:
                out[branch.rows] += found
        touched.update(rows)
    return torch.zeros_like(q) if out is None else out
