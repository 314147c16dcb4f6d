"""Consistent Self-Attention as mathematics: laws of the gathered form, its draws and its decisions."""

import pytest
import torch
from storyweft.attention.consistent import (
    ConsistentOptions,
    draw_tokens,
    sampled_tokens,
    share_layers,
    window_attention,
)
from storyweft.attention.core import attend
from storyweft.attention.joined import joined_attention
from torch.utils._python_dispatch import TorchDispatchMode


def qkv(rows=3, tokens=12, seed=0, heads=2, dim=4):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, heads, tokens, dim, generator=generator, dtype=torch.float64) for _ in range(3))


def others(k, v, draw):
    pieces = sampled_tokens(k, v, draw)
    return [pieces[:row] + pieces[row + 1 :] for row in range(len(k))]


def masked(q, k, v, draw):
    """The authors' dense form: one row of a (rows·tokens)² mask per query."""
    rows, _, tokens, _ = q.shape
    every = lambda x: x.transpose(0, 1).flatten(1, 2)[None]  # noqa: E731
    mask = torch.cat([draw.flatten()[None].repeat(tokens, 1) for _ in range(rows)]).clone()
    for row in range(rows):
        own = slice(row * tokens, (row + 1) * tokens)
        mask[own, own] = True
    out = torch.nn.functional.scaled_dot_product_attention(every(q), every(k), every(v), attn_mask=mask)
    return out[0].unflatten(1, (rows, tokens)).transpose(0, 1)


def test_gathered_form_equals_the_masked_form():
    q, k, v = qkv()
    draw = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    torch.testing.assert_close(
        joined_attention(q, k, v, others(k, v, draw), attend), masked(q, k, v, draw), atol=1e-12, rtol=0
    )


def test_seeing_nothing_is_plain_attention_bit_for_bit():
    q, k, v = qkv()
    assert torch.equal(joined_attention(q, k, v, [[], [], []], attend), attend(q, k, v))


def test_rate_one_is_dense_attention_over_all_panels():
    q, k, v = qkv()
    everything = torch.ones(3, 12, dtype=torch.bool)
    torch.testing.assert_close(
        joined_attention(q, k, v, others(k, v, everything), attend), masked(q, k, v, everything), atol=1e-12, rtol=0
    )


def test_rate_one_over_identical_panels_is_plain_attention():
    q, k, v = (x[:1].expand(3, -1, -1, -1) for x in qkv())
    everything = torch.ones(3, 12, dtype=torch.bool)
    torch.testing.assert_close(
        joined_attention(q, k, v, others(k, v, everything), attend), attend(q, k, v), atol=1e-12, rtol=0
    )


def test_permuting_panels_with_their_draws_permutes_the_result():
    q, k, v = qkv()
    draw = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.5
    order = torch.tensor([2, 0, 1])
    straight = joined_attention(q, k, v, others(k, v, draw), attend)
    permuted = joined_attention(q[order], k[order], v[order], others(k[order], v[order], draw[order]), attend)
    torch.testing.assert_close(permuted, straight[order], atol=1e-12, rtol=0)


def test_own_sampled_tokens_left_in_the_pool_would_be_seen():
    q, k, v = qkv()
    draw = torch.ones(3, 12, dtype=torch.bool)
    draw[:, ::2] = False
    doubled = [sampled_tokens(k, v, draw) for _ in range(3)]
    right = joined_attention(q, k, v, others(k, v, draw), attend)
    assert (joined_attention(q, k, v, doubled, attend) - right).abs().max() > 0.01


def test_inputs_are_not_changed():
    q, k, v = qkv()
    before = [x.clone() for x in (q, k, v)]
    draws = torch.ones(2, 2, 12, dtype=torch.bool)
    window_attention(q, k, v, draws, attend)
    joined_attention(q, k, v, others(k, v, torch.ones(3, 12, dtype=torch.bool)), attend)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_a_window_over_all_panels_is_the_whole_rule():
    q, k, v = qkv()
    draw = torch.rand(3, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    torch.testing.assert_close(
        window_attention(q, k, v, draw[None], attend),
        joined_attention(q, k, v, others(k, v, draw), attend),
        atol=1e-12,
        rtol=0,
    )


class Largest(TorchDispatchMode):
    """Element count of the largest tensor made inside."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_of_all_tokens_squared_is_made():
    rows, tokens = 8, 256
    q, k, v = (x.float() for x in qkv(rows, tokens))
    draw = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(4)) < 0.5
    with Largest() as largest:
        joined_attention(q, k, v, others(k, v, draw), lambda q, k, v, bias: torch.zeros_like(q))
    assert largest.numel < (rows * tokens) ** 2 / 100


def test_draws_depend_on_seed_evaluation_grid_and_panel_and_nothing_else():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    options = ConsistentOptions(seed=7)
    first = draw_tokens(options, (3, 0), (1, 8, 8), 2)
    torch.manual_seed(6)
    assert torch.equal(first, draw_tokens(options, (3, 0), (1, 8, 8), 2))
    torch.random.set_rng_state(state)
    draw_tokens(options, (3, 0), (1, 8, 8), 2)
    assert torch.equal(state, torch.random.get_rng_state())
    different = [
        draw_tokens(ConsistentOptions(seed=8), (3, 0), (1, 8, 8), 2),
        draw_tokens(options, (4, 0), (1, 8, 8), 2),
        draw_tokens(options, (3, 1), (1, 8, 8), 2),
        draw_tokens(options, (3, 0), (1, 8, 8), 1),
        draw_tokens(options, (3, 0), (1, 4, 16), 2),
    ]
    assert not any(torch.equal(first, other) for other in different)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 1.0])
def test_share_of_drawn_tokens_is_the_rate(rate):
    drawn = (
        torch.cat([draw_tokens(ConsistentOptions(rate=rate, seed=s), (1, 0), (1, 64, 64), 0) for s in range(8)])
        .float()
        .mean()
    )
    assert abs(drawn - rate) < 0.01


def test_layers_share_at_the_published_rates_and_never_before_the_first_step():
    rows = [share_layers(ConsistentOptions(seed=seed), (step, 0), 10) for seed in range(60) for step in (5, 30, 0)]
    rates = [sum(map(sum, rows[start::3])) / (60 * 10) for start in range(3)]
    assert rates[2] == 0
    assert abs(rates[0] - 0.7) < 0.06
    assert abs(rates[1] - 0.9) < 0.06


def test_one_rate_zero_never_shares():
    assert not any(share_layers(ConsistentOptions(rate=0, share_early=1.0), (5, 0), 10))


def test_a_bias_acts_on_own_tokens_and_leaves_seen_ones_alone():
    q, k, v = qkv()
    seen = others(k, v, torch.ones(3, 12, dtype=torch.bool))
    hidden = torch.zeros(3, 1, 1, 12, dtype=torch.float64)
    hidden[..., 6:] = -1e9
    got = joined_attention(q, k, v, seen, attend, hidden)
    keys, values = (
        torch.cat([x[0, :, :6], *(piece.tokens(piece[i]) for piece in seen[0])], 1)[None] for i, x in enumerate((k, v))
    )
    torch.testing.assert_close(got[:1], attend(q[:1], keys, values), atol=1e-12, rtol=0)
