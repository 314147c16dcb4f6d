"""Schedules, solver and guidance of MM-Diffusion in closed form, and what its loaders do to frames and sound."""

import pytest
import torch
from storyweft.models.frame_upsampler import FrameUpsampler, upsampler_configuration
from storyweft.models.joint_media import fitted_audio, frame_places, letterbox
from storyweft.sampling.cross_guidance import Known, guided_step
from storyweft.sampling.ddpm import ddpm_step, levels, posterior
from storyweft.sampling.dpm_solver import dpm_solver_fast, macro_step, parts
from storyweft.sampling.schedule import dpm_grid, linear_betas, solver_orders, solver_times, spaced_times

ALPHAS = linear_betas().neg().add(1).cumprod(0)


def test_the_solver_asks_at_the_authors_twenty_times():
    grid, asked = dpm_grid(20, ALPHAS), []
    list(dpm_solver_fast(lambda x, lam: asked.append(lam) or x, torch.zeros(1), grid.lambdas, grid.orders))
    times = solver_times(torch.stack(asked), ALPHAS).tolist()
    assert times == [999, 949, 898, 843, 784, 721, 652, 576, 492, 399, 302, 211, 138, 85, 51, 30, 16, 8, 3, 1]


@pytest.mark.parametrize("count", range(1, 12))
def test_orders_use_every_evaluation(count):
    orders = solver_orders(count)
    assert sum(orders) == count and max(orders) <= 3 and orders == sorted(orders, reverse=True)


@pytest.mark.parametrize(("order", "gain"), [(1, 3.5), (2, 7), (3, 14)])
def test_a_macro_step_has_its_order(order, gain):
    """Noise of x0 ~ N(0, 1/4), for which the exact flow is known; half the step, 2^(order + 1) times smaller error."""

    def noise(x, lam):
        signal, sigma = parts(lam)
        return sigma * x / (signal**2 / 4 + sigma**2)

    def error(h):
        start = torch.tensor(-0.4, dtype=torch.float64)
        spread = [(s**2 / 4 + n**2).sqrt() for s, n in (parts(start), parts(start + h))]
        x = torch.tensor([0.7], dtype=torch.float64)
        return float((macro_step(noise, x, start, start + h, order) - x * spread[1] / spread[0]).abs())

    assert error(0.2) / error(0.1) > gain


@pytest.mark.parametrize("respacing", ["", "ddim", "25.5", "0", "ddim0", "10,,5", "600,10", "ddim600"])
def test_respacings_that_mean_nothing_are_refused(respacing):
    with pytest.raises(ValueError, match="respacing"):
        spaced_times(1000, respacing)


def test_respacings():
    assert spaced_times(1000, "ddim25") == list(range(0, 1000, 40))
    assert spaced_times(1000, "5") == [0, 250, 500, 749, 999]
    assert spaced_times(10, "2, 1") == [0, 4, 5]
    assert spaced_times(4, "4") == [0, 1, 2, 3]


def test_an_ancestral_step_keeps_the_spread_of_the_noise():
    """With perfect estimates of x0 = 0 the state stays normal with variance 1 - a under the small variance."""
    alpha, after = ALPHAS[700], ALPHAS[600]
    step = posterior(alpha, after)
    spread = step.here**2 * (1 - alpha) + step.variance
    assert abs(float(spread - (1 - after))) < 1e-12 and step.large > step.variance
    x = torch.ones(1)
    assert torch.equal(ddpm_step(x, x, ALPHAS[0], ALPHAS.new_tensor(1.0), torch.full((1,), 9.0)), x)
    assert abs(float(levels(torch.tensor([0.0, 1.0]))[1]) - 0.5) < 1e-12


def bent(x, drawn=None):
    """A smooth estimate of x0 in which every element depends on all of its clip."""
    return 0.6 * x + 0.3 * torch.tanh(x.mean(1, keepdim=True) + 0.1 * x.roll(1, 1) ** 2)


def clip(batch=2, size=7, known=3):
    generator = torch.Generator().manual_seed(11)
    draw = lambda: torch.randn(batch, size, generator=generator, dtype=torch.float64)  # noqa: E731
    drawn = torch.ones(batch, size, dtype=torch.float64)
    drawn[:, :known] = 0
    return Known(draw() / 3, draw(), drawn), draw(), draw()


ALPHA, AFTER = ALPHAS[500], ALPHAS[400]


def test_the_gradient_is_that_of_finite_differences():
    known, x, z = clip()
    _, gradient = guided_step(bent, known, x, ALPHA, AFTER, z, 1.0)

    def loss(x):
        moved = ddpm_step(known.put_into(x, ALPHA), bent(known.put_into(x, ALPHA)), ALPHA, AFTER, z)
        return (((moved - known.at(AFTER)) * (1 - known.drawn)) ** 2).sum()

    for place in ((0, 4), (1, 6), (1, 1)):
        step = torch.zeros_like(x)
        step[place] = 1e-6
        wanted = (loss(x + step) - loss(x - step)) / 2e-6
        assert abs(float(gradient[place] - wanted)) < 1e-5 * max(1, abs(float(wanted)))
    assert not gradient[:, :3].any() and gradient[:, 3:].abs().min() > 1e-6


def test_a_guided_step_moves_by_strength_and_level_and_zero_is_replacement():
    known, x, z = clip()
    plain = guided_step(bent, known, x, ALPHA, AFTER, z)
    moved, gradient = guided_step(bent, known, x, ALPHA, AFTER, z, 5.0)
    assert plain.gradient is None
    assert (plain.x - 5 * ALPHA.sqrt() * gradient - moved)[:, 3:].abs().max() < 1e-12
    last = guided_step(bent, known, x, ALPHA, ALPHAS.new_tensor(1.0), z, 5.0)
    assert torch.equal(last.x, guided_step(bent, known, x, ALPHA, ALPHAS.new_tensor(1.0), z).x)


def test_guidance_lowers_its_own_loss():
    known, x, z = clip()

    def loss(x):
        moved = ddpm_step(known.put_into(x, ALPHA), bent(known.put_into(x, ALPHA)), ALPHA, AFTER, z)
        return float((((moved - known.at(AFTER)) * (1 - known.drawn)) ** 2).sum())

    _, gradient = guided_step(bent, known, x, ALPHA, AFTER, z, 1.0)
    assert loss(x - 0.1 * gradient) < loss(x)


def test_strength_does_not_depend_on_the_batch():
    known, x, z = clip(batch=3)
    together = guided_step(bent, known, x, ALPHA, AFTER, z, 4.0).x
    one = Known(*(part[1:2] for part in known))
    alone = guided_step(bent, one, x[1:2], ALPHA, AFTER, z[1:2], 4.0).x
    assert (together[1:2] - alone).abs().max() < 1e-12


def test_guidance_works_inside_inference_mode():
    with torch.inference_mode():
        known, x, z = clip()
        moved = guided_step(bent, known, x, ALPHA, AFTER, z, 2.0)
    assert moved.gradient.any()


def upsampler(**changed):
    torch.manual_seed(2)
    options = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,)}
    return FrameUpsampler(**(options | changed))


@torch.no_grad()
def test_frames_are_enlarged_one_by_one():
    network = upsampler().train(False)
    x, small, t = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 2, 2), torch.tensor([10, 10, 10])
    together = network(x, small, t)
    assert together.shape == (3, 6, 8, 8)
    assert (together[1:2] - network(x[1:2], small[1:2], t[:1])).abs().max() < 1e-5
    assert (network(x, small.roll(1, 0), t) - together).abs().max() > 1e-4


def test_the_published_upsampler_has_the_published_parameters():
    with torch.device("meta"):
        network = FrameUpsampler()
    assert len(network.state_dict()) == 566 and sum(value.numel() for value in network.parameters()) == 311_027_910
    assert upsampler_configuration(network.state_dict())["attention_resolutions"] == (8, 16, 32)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"label_emb.weight": torch.zeros(1)}, "class-conditional"), ({"out.2.weight": torch.zeros(3, 32, 3, 3)}, "6 channels"),
     ({"middle_block.1.qkv.weight": None}, "middle_block.1.qkv.weight is missing")],
)  # fmt: skip
def test_other_upsamplers_are_refused(change, says):
    weights = upsampler().state_dict() | change
    with pytest.raises(ValueError, match=says):
        upsampler_configuration({key: value for key, value in weights.items() if value is not None})


def test_letterbox_puts_bars_above_below_and_keeps_colours():
    frames = torch.full((2, 9, 16, 3), 200, dtype=torch.uint8)
    shown = letterbox(frames, 16, 16)
    assert shown.shape == (2, 3, 16, 16) and shown.dtype == torch.float32
    assert (shown[:, :, :3] == -1).all() and (shown[:, :, 12:] == -1).all()
    assert ((shown[:, :, 3:12] + 1) * 127.5 - 200).abs().max() < 1e-4
    assert (letterbox(frames.transpose(1, 2), 16, 16)[..., :3] == -1).all()
    sharp = torch.randint(0, 256, (1, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert letterbox(sharp, 16, 16).std() > letterbox(sharp, 16, 16, antialias=True).std()


def test_frames_are_those_seen_at_their_times_and_the_last_one_stays():
    assert frame_places(48, 30.0, 4, 10.0).tolist() == [0, 3, 6, 9]
    assert frame_places(48, 24.0, 4, 10.0, 0.5).tolist() == [12, 14, 16, 19]
    assert frame_places(3, 10.0, 5, 10.0).tolist() == [0, 1, 2, 2, 2]


def test_sound_is_the_left_channel_cut_or_filled_with_silence():
    stereo = torch.stack([torch.linspace(-2, 2, 10), torch.ones(10)])[None]
    assert fitted_audio(stereo, 4).tolist() == [[[-1.0, -1.0, pytest.approx(-1.0, abs=0.2), pytest.approx(-0.667, abs=0.01)]]]
    assert fitted_audio(stereo, 14)[0, 0, 10:].tolist() == [0.0] * 4
