"""What the rules of a model make of one attention call before it is computed once."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..attention.branches import Branch, attend_branches
from ..attention.joined import Piece, joined_attention
from ..attention.masked import Constraint, Part, partition


class Divisions:
    """Index lists of named constraints, kept for one run: labels do not change from step to step."""

    def __init__(self):
        self._kept: dict = {}

    def __call__(self, constraints, rows: int, device: torch.device) -> list[Part]:
        names = tuple(constraint.name for constraint in constraints)
        if None in names:
            return partition(constraints, rows, device)
        key = (names, rows, device)
        if key not in self._kept:
            self._kept[key] = partition(constraints, rows, device)
        return self._kept[key]


class SelfPlan:
    """A self-attention or time-attention call: q, k, v [rows, heads, tokens, dim], to be exchanged, never written into.

    seen[row] gets Pieces of other rows; constraints narrow what tokens see; `compute(q, k, v, attend)` replaces the whole
    calculation.
    """

    def __init__(self, layout, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None):
        self.layout = layout
        self.q, self.k, self.v, self.bias = q, k, v, bias
        self.seen: list[list[Piece]] = [[] for _ in range(len(q))]
        self.constraints: list[Constraint] = []
        self.compute: Callable | None = None

    def run(self, attend, divisions: Divisions) -> Tensor:
        q, k, v, image = self.q, self.k, self.v, self.layout.image
        if self.compute is not None:
            return self.compute(q, k, v, attend)
        tokens = q.shape[2]
        if not any(self.seen) or (image.start, image.stop) == (0, tokens):
            return joined_attention(q, k, v, self.seen, attend, self.bias, self.constraints, divisions)
        out = torch.empty_like(q)
        rest = torch.ones(tokens, dtype=torch.bool)
        rest[image] = False
        nothing: list[list[Piece]] = [[] for _ in self.seen]
        for index, seen, part in ((~rest, self.seen, "picture"), (rest, nothing, "rest")):  # only the picture looks at others
            bias, on = self.bias, index.to(q.device)
            if bias is not None and bias.shape[2] > 1:
                bias = bias[:, :, on]
            constraints = [Constraint(c.query[:, index], c.key, c.name and (c.name, part)) for c in self.constraints]
            out[:, :, on] = joined_attention(q[:, :, on], k, v, seen, attend, bias, constraints, divisions)
        return out


class CrossPlan:
    """A cross-attention call: q [rows, heads, tokens, dim] and the branches that answer it.

    `text` holds the branches over the prompt, at first one per guidance chunk (text[chunk] is a list); `extra` those over
    anything else.
    """

    def __init__(self, layout, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None):
        self.layout = layout
        self.q, self.k, self.v, self.bias = q, k, v, bias
        self.text: list[list[Branch]] = []
        for chunk in range(len(layout.entries)):
            rows = layout.chunk_rows(chunk)
            part = slice(rows.start, rows.stop)
            self.text.append([Branch(part, k[part], v[part], bias=None if bias is None else bias[part])])
        self.extra: list[Branch] = []

    def run(self, attend, divisions: Divisions) -> Tensor:
        weights = self._weights()
        if weights is not None and not any(torch.is_tensor(weight) for weight in weights) and len(set(weights)) == 1:
            branches = [Branch(slice(0, len(self.q)), self.k, self.v, weights[0], bias=self.bias)]  # one call for all
        else:
            branches = [branch for chunk in self.text for branch in chunk]
        return attend_branches(self.q, [*branches, *self.extra], attend, divisions)

    def _weights(self) -> list[float | Tensor] | None:
        """The weight of each chunk's text, None when a rule changed more of it than that."""
        whole = [x for x in (self.k, self.v, self.bias) if x is not None]
        for branches in self.text:
            if len(branches) != 1 or branches[0].constraints or branches[0].q is not None or branches[0].told is not None:
                return None
            own = [x for x in (branches[0].k, branches[0].v, branches[0].bias) if x is not None]
            parts = [x[branches[0].rows] for x in whole]
            if [(x.data_ptr(), x.shape) for x in own] != [(x.data_ptr(), x.shape) for x in parts]:
                return None
        return [branches[0].weight for branches in self.text]

    def run_replaced(self, text: Tensor, attend, divisions: Divisions) -> Tensor | None:
        """The same around `text` [rows, heads, tokens, dim], what another pack's patch made of the prompt.

        None when a rule changed more of the text branches than one weight per chunk, which such a patch cannot take.
        """
        weights = self._weights()
        if weights is None:
            return None
        out = text.clone()
        for chunk, weight in enumerate(weights):
            if torch.is_tensor(weight) or weight != 1:
                rows = self.layout.chunk_rows(chunk)
                out[rows.start : rows.stop] *= weight
        return out + attend_branches(self.q, self.extra, attend, divisions) if self.extra else out
