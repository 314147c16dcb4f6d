"""StyleAligned's arithmetic: AdaIN, shared group norms, the choice of layers, inversion."""

import math

import pytest
import torch
from storyweft.attention.core import attend
from storyweft.attention.joined import Piece, joined_attention
from storyweft.attention.style import StyleOptions, adain, plain_layers, shared_group_norm
from storyweft.sampling.inversion import inversion_step, invert, replay_index
from torch.nn.functional import group_norm


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_adain_gives_every_row_the_moments_of_its_own_reference():
    x = noise(6, 2, 30, 5) * torch.arange(1, 7).view(6, 1, 1, 1) + torch.arange(6).view(6, 1, 1, 1)
    out = adain(x, 3)
    for first in (0, 3):
        assert torch.equal(out[first], x[first])
        for row in (first + 1, first + 2):
            torch.testing.assert_close(out[row].mean(1), x[first].mean(1))
            torch.testing.assert_close(out[row].std(1), x[first].std(1), rtol=1e-4, atol=0)
    own = (x[4] - x[4].mean(1, keepdim=True)) / (x[4].var(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(
        out[4], own * (x[3].var(1, keepdim=True) + 1e-5).sqrt() + x[3].mean(1, keepdim=True), rtol=1e-12, atol=1e-12
    )


def test_adain_leaves_its_input_alone_and_survives_a_single_token():
    x = noise(4, 2, 1, 5)
    before = x.clone()
    assert torch.isfinite(adain(x, 2)).all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(6, 8, 6, 5), (4, 12, 7), (4, 8, 2, 3, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_shared_group_norm_is_the_norm_of_picture_and_reference_side_by_side(shape, affine):
    size, groups = (3 if shape[0] == 6 else 2), 4
    x = noise(*shape) * 3 + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight, bias = (noise(shape[1], seed=1), noise(shape[1], seed=2)) if affine else (None, None)
    out = shared_group_norm(x, groups, weight, bias, 1e-5, size)
    first = x[::size].repeat_interleave(size, 0)
    joined = group_norm(torch.cat([x, first], 2), groups, weight, bias, 1e-5)[:, :, : shape[2]]
    torch.testing.assert_close(out, joined, rtol=1e-9, atol=1e-9)
    assert torch.equal(out[::size], group_norm(x, groups, weight, bias, 1e-5)[::size])


def test_shared_group_norm_in_half_precision_stays_near():
    x = noise(4, 8, 16, 16, dtype=torch.float32) * 2 + 20
    want = shared_group_norm(x.half().double(), 4, None, None, 1e-5, 2)
    got = shared_group_norm(x.half(), 4, None, None, 1e-5, 2)
    assert got.dtype == torch.float16
    assert (got.double() - want).abs().max() < 0.02


def test_layers_that_stay_plain():
    assert plain_layers(4, 0.0) == [False] * 4
    assert plain_layers(4, 1.0) == [True] * 4
    assert plain_layers(6, 0.5) == [True, False] * 3
    assert sum(plain_layers(70, 0.4)) == 35  # the authors' whole-numbered period overshoots
    assert plain_layers(70, 0.6) == [not plain for plain in plain_layers(70, 0.4)]


@pytest.mark.parametrize("level", [0.01, 0.09])
def test_less_than_one_layer_is_rounded_to_one(level):
    assert plain_layers(11, level) == [True] + [False] * 10
    assert plain_layers(11, 1 - level) == [False] + [True] * 10


def test_options_that_leave_attention_alone():
    nothing = {"share_attention": False, "adain_queries": False, "adain_keys": False}
    assert StyleOptions().touches_attention
    assert not StyleOptions(only_self_level=1.0).touches_attention
    assert not StyleOptions(**nothing).touches_attention
    assert StyleOptions(**nothing, adain_values=True).touches_attention
    assert StyleOptions(**nothing, full_attention_share=True).touches_attention


def test_shift_ln_2_is_the_reference_counted_twice():
    q, k, v = (noise(3, 4, 10, 8, seed=seed) for seed in range(3))
    once = [[], [], [Piece(k[0], v[0], None, 0, math.log(2))]]
    twice = [[], [], [Piece(k[0], v[0], None, 0), Piece(k[0], v[0], None, 0)]]
    out = [joined_attention(q, k, v, seen, attend) for seen in (once, twice)]
    torch.testing.assert_close(out[0], out[1])


def gaussian(x, sigma):
    """The exact clean estimate for unit normal pictures."""
    return x / (1 + sigma**2)


def test_the_first_step_of_inversion_is_the_identity():
    z = noise(1, 4, 3, 3)
    assert torch.equal(inversion_step(gaussian, z, 0.03, 0.03), z)
    trajectory = invert(gaussian, z, [3.0, 1.0, 0.03, 0.0], sigma_min=0.03)
    assert torch.equal(trajectory[3], z)
    assert torch.equal(trajectory[2], z)
    assert len(trajectory) == 4


def test_inversion_is_the_published_step_with_noise_predicted_at_the_destination():
    asked = []

    def denoise(x, sigma):
        asked.append((x, sigma))
        return x - sigma * torch.tanh(x)  # e = tanh(x)

    z, source, target = noise(1, 4, 3, 3), 0.5, 2.0
    a, b = (1 / (1 + sigma**2) for sigma in (source, target))
    e = torch.tanh(z * math.sqrt(1 + target**2))  # the network sees z itself, at the destination's time
    want = math.sqrt(b) * (z - math.sqrt(1 - a) * e) / math.sqrt(a) + math.sqrt(1 - b) * e
    torch.testing.assert_close(inversion_step(denoise, z, source, target), want)
    assert [sigma for _, sigma in asked] == [target]


@pytest.mark.parametrize("data", [1.0, 0.5])
def test_an_inverted_picture_is_drawn_again(data):
    """Euler from the noise found ends at the picture: noise at the source or destination differs in O(step) only."""
    sigmas = [*torch.logspace(1, -2, 400, dtype=torch.float64).tolist(), 0.0]

    def denoise(x, sigma):
        return x * data**2 / (data**2 + sigma**2)

    z0 = noise(1, 4, 3, 3) * data
    trajectory = invert(denoise, z0 / data, sigmas, sigmas[-2], data)
    x = trajectory[0] * math.hypot(sigmas[0], data)
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (after - sigma) * (x - denoise(x, sigma)) / sigma
    torch.testing.assert_close(x, z0, rtol=0.03, atol=0.0)


def test_replay_begins_at_the_offset_and_waits_until_the_steps_have_caught_up():
    assert [replay_index(step, 0) for step in range(4)] == [0, 1, 2, 3]
    assert [replay_index(step, 5) for step in range(9)] == [5, 6, 6, 6, 6, 6, 6, 7, 8]
