"""Own tokens, pieces of other rows and labels together against one dense masked attention; branches against their sum."""

import pytest
import torch
from storyweft.attention import joined
from storyweft.attention.branches import Branch, attend_branches
from storyweft.attention.core import attend
from storyweft.attention.joined import Piece, joined_attention
from storyweft.attention.masked import ANY, Constraint


def qkv(rows=3, tokens=10, seed=0, heads=2, dim=4):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, heads, tokens, dim, generator=generator, dtype=torch.float64) for _ in range(3))


def labels(rows=3, tokens=10, seed=5, kinds=3):
    return torch.randint(kinds, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def dense(q, k, v, row, pieces, constraint):
    """The same over keys laid side by side, with a mask that says who sees whom."""
    keys = torch.cat([k[row], *(piece.tokens(piece.k) for piece in pieces)], 1)[None]
    values = torch.cat([v[row], *(piece.tokens(piece.v) for piece in pieces)], 1)[None]
    of_keys = torch.cat([constraint.key[row], *(piece.labels(constraint) for piece in pieces)])
    allowed = (constraint.query[row][:, None] == of_keys) | (of_keys == ANY)
    bias = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
    shifts = [torch.zeros(k.shape[2]), *(torch.full((piece.count,), piece.shift, dtype=q.dtype) for piece in pieces)]
    shift = torch.cat(shifts)
    return attend(q[row : row + 1], keys, values, (bias + shift)[None, None])[0]


@pytest.mark.parametrize("limit", [1, joined.GATHERED])
def test_pieces_and_labels_together_equal_the_dense_form(monkeypatch, limit):
    monkeypatch.setattr(joined, "GATHERED", limit)
    q, k, v = qkv()
    own = labels()
    pieces = [
        Piece(k[1], v[1], torch.tensor([0, 3, 4, 9]), 1),
        Piece(k[2], v[2], None, 2, shift=0.7),
        Piece(k[1] * 2, v[1] + 1, torch.tensor([5]), None),
    ]
    constraint = Constraint(own, own)
    got = joined_attention(q, k, v, [pieces, [], []], attend, constraints=[constraint])
    for row, seen in enumerate((pieces, [], [])):
        torch.testing.assert_close(got[row], dense(q, k, v, row, seen, constraint), atol=1e-12, rtol=0)


def test_gathering_a_few_heads_at_a_time_changes_nothing(monkeypatch):
    q, k, v = qkv(heads=5)
    seen = [[Piece(k[1], v[1], torch.tensor([2, 7]), 1)], [], [Piece(k[0], v[0], None, 0)]]
    bias = torch.randn(3, 5, 1, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = joined_attention(q, k, v, seen, attend, bias)
    monkeypatch.setattr(joined, "GATHERED", 1)
    torch.testing.assert_close(joined_attention(q, k, v, seen, attend, bias), whole, atol=1e-13, rtol=0)


def test_branches_are_separate_softmaxes_summed_by_weight():
    q, k, v = qkv()
    _, k2, v2 = qkv(rows=2, tokens=4, seed=1)
    weight = torch.rand(2, 1, 10, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    branches = [Branch(slice(0, 3), k, v, 0.5), Branch(slice(1, 3), k2, v2, weight), Branch(slice(0, 3), k, v, 0.0)]
    want = 0.5 * attend(q, k, v)
    want[1:] += weight * attend(q[1:], k2, v2)
    torch.testing.assert_close(attend_branches(q, branches, attend), want, atol=1e-12, rtol=0)


def test_one_branch_of_weight_one_is_plain_attention_bit_for_bit():
    q, k, v = qkv()
    halves = [Branch(slice(0, 1), k[:1], v[:1]), Branch(slice(1, 3), k[1:], v[1:])]
    assert torch.equal(
        attend_branches(q, halves, attend), torch.cat([attend(q[:1], k[:1], v[:1]), attend(q[1:], k[1:], v[1:])])
    )
