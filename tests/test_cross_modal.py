"""Random-shift multi-modal attention: the invariants of the paper's block against a loop over frames with index lists."""

import random

import pytest
import torch
from storyweft.attention.cross_modal import RandomShifts, cross_modal_attention, listed_shifts, rolled_windows
from storyweft.models.joint_unet import CrossModalBlock, JointUNet, configuration

HEADS = 2


def tokens(batch, count, channels=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, count, channels, generator=generator, dtype=torch.float64) for _ in range(3))


def attention(q, k, v):
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def by_loop(video, audio, frames, window, shift):
    """The authors' form: frame after frame, its keys by index."""
    places, total = video[0].shape[1] // frames, audio[0].shape[1]
    samples = total // frames
    of_audio, of_video = torch.zeros_like(video[0]), torch.zeros_like(audio[0])
    for i in range(frames):
        own = slice(i * places, (i + 1) * places)
        keys = [(i * samples + shift * samples + j) % total for j in range(window * samples)]
        of_audio[:, own] = attention(video[0][:, own], audio[1][:, keys], audio[2][:, keys])
        own = slice(i * samples, total if i == frames - 1 else (i + 1) * samples)
        keys = [(i * places + shift * places + j) % (frames * places) for j in range(window * places)]
        of_video[:, own] = attention(audio[0][:, own], video[1][:, keys], video[2][:, keys])
    return of_audio, of_video


CASES = [
    (frames, window, shift, total)
    for frames, total in ((4, 20), (5, 23), (3, 3), (4, 7), (6, 17))
    for window in {1, 2, frames - 1, frames}
    for shift in {0, (frames - window) // 2, frames - window}
]


@pytest.mark.parametrize(("frames", "window", "shift", "total"), CASES)
@pytest.mark.parametrize("batch", [1, 2])
def test_windows_see_what_the_authors_loop_sees(batch, frames, window, shift, total):
    video, audio = tokens(batch, frames * 6), tokens(batch, total, seed=1)
    got = cross_modal_attention(video, audio, frames, window, shift, HEADS)
    for mine, theirs in zip(got, by_loop(video, audio, frames, window, shift), strict=True):
        assert (mine - theirs).abs().max() < 1e-12


def test_a_shift_is_a_roll_of_the_keys():
    video, audio = tokens(2, 5 * 4), tokens(2, 5 * 3, seed=1)
    got = cross_modal_attention(video, audio, 5, 2, 3, HEADS)
    rolled = [(q, k.roll(-3 * n, 1), v.roll(-3 * n, 1)) for (q, k, v), n in ((video, 4), (audio, 3))]
    of_audio = cross_modal_attention(video, rolled[1], 5, 2, 0, HEADS)[0]
    of_video = cross_modal_attention(rolled[0], audio, 5, 2, 0, HEADS)[1]
    assert torch.equal(got[0], of_audio) and torch.equal(got[1], of_video)


def test_a_window_of_all_frames_is_full_attention():
    video, audio = tokens(1, 4 * 6), tokens(1, 4 * 5, seed=1)
    got = cross_modal_attention(video, audio, 4, 4, 0, HEADS)
    assert (got[0] - attention(video[0], *audio[1:])).abs().max() < 1e-12
    assert (got[1] - attention(audio[0], *video[1:])).abs().max() < 1e-12


def test_windows_go_round_at_the_end():
    shown = rolled_windows(torch.arange(12.0).view(1, 12, 1), 4, 3, 2, 0)[..., 0]
    assert shown[3].tolist() == [9, 10, 11, 0, 1, 2]
    assert rolled_windows(torch.arange(14.0).view(1, 14, 1), 4, 3, 2, 1)[3, :, 0].tolist() == [12, 13, 0, 1, 2, 3]


def test_no_index_table_and_few_kernels_whatever_the_number_of_frames():
    """Launches must not grow with the frames, and nothing but the results of attention is kept."""

    def launches(frames):
        block = CrossModalBlock(32, 16, 1)
        video, audio = torch.randn(1, 32, frames, 4, 4), torch.randn(1, 32, frames * 8)
        with torch.profiler.profile() as profile, torch.no_grad():
            block(video, audio)
        names = [event.name for event in profile.events()]
        assert not [name for name in names if name in ("aten::arange", "aten::index", "aten::gather", "aten::remainder")]
        return len(names)

    assert launches(4) == launches(16)
    assert not list(CrossModalBlock(32, 16, 1).buffers())


@pytest.fixture()
def block():
    torch.manual_seed(0)
    return CrossModalBlock(32, 16, 2).double()


def halves(batch=2, frames=5, samples=7):
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(batch, 32, frames, 3, 2, generator=generator, dtype=torch.float64)
    return video, torch.randn(batch, 32, frames * samples, generator=generator, dtype=torch.float64)


def test_zero_projections_are_the_identity(block):
    for layer in (block.video_proj_out.video_conv, block.audio_proj_out.audio_conv):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    video, audio = halves()
    out = block(video, audio, lambda *_: 2)
    assert torch.equal(out[0], video) and torch.equal(out[1], audio)


@torch.no_grad()
def test_only_segments_inside_the_window_matter(block):
    """Segments 3 and 4 change places, which the norm does not notice: frame i sees segments i + 1 and i + 2."""
    video, audio = halves()
    mixed = torch.cat([audio[..., :21], audio[..., 28:35], audio[..., 21:28]], -1)
    before, after = (block(video, sound, lambda *_: 1)[0] for sound in (audio, mixed))
    changed = (before - after).abs().amax((0, 1, 3, 4))
    assert changed[[0, 2, 4]].max() < 1e-12 < 1e-3 < changed[[1, 3]].min()


@torch.no_grad()
def test_clips_of_a_batch_do_not_know_each_other(block):
    video, audio = halves()
    together = block(video, audio, lambda *_: 3)
    alone = block(video[1:], audio[1:], lambda *_: 3)
    assert (together[0][1:] - alone[0]).abs().max() < 1e-12 and (together[1][1:] - alone[1]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("frames", "window", "shift", "total", "says"),
    [(4, 5, 0, 16, "window of 5"), (4, 0, 0, 16, "window of 0"), (4, 2, 3, 16, "shift 3"), (4, 2, -1, 16, "shift -1"),
     (4, 1, 0, 3, "fewer than the clip's 4 frames")],
)  # fmt: skip
def test_what_cannot_be_looked_at_is_refused(frames, window, shift, total, says):
    with pytest.raises(ValueError, match=says):
        cross_modal_attention(tokens(1, frames * 2), tokens(1, total), frames, window, shift, HEADS)


def test_shifts_come_from_a_generator_of_their_own():
    state = random.getstate()
    one, other = RandomShifts("7 999"), RandomShifts("7 999")
    drawn = [one(16, 4) for _ in range(400)]
    assert drawn == [other(16, 4) for _ in range(400)] and set(drawn) == set(range(13))
    assert random.getstate() == state
    assert [RandomShifts("8 999")(16, 4) for _ in range(5)] != drawn[:5]
    assert RandomShifts("7")(8, 8) == 0
    assert [listed_shifts([3, 1])(4, 1), RandomShifts(0)(1, 1)] == [3, 0]


def small(**changed):
    torch.manual_seed(1)
    options = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "cross_attention_resolutions": (1, 2),
               "windows": (1, 2), "video_attention_resolutions": (2,), "head_channels": 16}  # fmt: skip
    return JointUNet(**(options | changed))


def test_the_published_network_has_the_published_parameters():
    with torch.device("meta"):
        network = JointUNet()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert len(shapes) == 1046 and sum(value.numel() for value in network.parameters()) == 133_675_524
    assert shapes["output_blocks.2.2.audio_in_layers.2.audio_conv.weight"] == (512, 512, 3)
    assert shapes["middle_blocks.0.audio_attention_block.norm.GroupNorm.weight"] == (512,)
    dilations = [module.dilation[0] for name, module in network.named_modules() if name.endswith("in_layers.2.audio_conv")]
    assert dilations == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1, 2, 4, 4, 2, 1, 512, 256, 256, 128, 64, 32, 32, 16, 8, 4, 4, 2, 1]


def test_weights_in_published_shapes_load_strictly():
    network = small()
    published = {}
    for key, value in network.state_dict().items():
        if key.endswith("video_conv_temporal.weight"):
            value = value.squeeze(-1)
        elif key.endswith(("qkv.weight", "attention_block.proj_out.weight")):
            value = value.unsqueeze(-1)
        published[key] = value.clone()
    other = small(middle_cross=True)
    other.start_quiet()
    other.load_state_dict(published)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "changed",
    [{}, {"middle_cross": False}, {"channel_mult": (1, 2, 3), "audio_attention_resolutions": (4,)},
     {"num_res_blocks": 2, "cross_attention_resolutions": (2,), "windows": (3,)}, {"channel_mult": (1,), "windows": (1,),
      "cross_attention_resolutions": (1,), "video_attention_resolutions": ()}],
)  # fmt: skip
def test_the_configuration_is_read_from_the_keys(changed):
    network = small(**changed)
    found = configuration(network.state_dict())
    assert all(found[name] == value for name, value in changed.items() if name != "windows")
    again = JointUNet(**found, windows=network.windows.values(), head_channels=16)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


@torch.no_grad()
def test_shifts_are_asked_for_once_a_block_and_change_the_result():
    network, asked = small().train(False), []
    video, audio, t = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 1, 32), torch.tensor([5])

    def shifts(frames, window):
        asked.append((frames, window))
        return 0

    plain = network(video, audio, t, shifts)
    assert asked == [(4, 1), (4, 2), (4, 4), (4, 2), (4, 2), (4, 1), (4, 1)]
    given = network(video, audio, t, [0] * 7)
    other = network(video, audio, t, [0, 2, 0, 0, 0, 0, 0])
    assert torch.equal(plain[0], given[0]) and (plain[0] - other[0]).abs().max() > 1e-6


def test_a_quiet_start_predicts_nothing_and_still_learns():
    network = small()
    network.start_quiet()
    video, audio = network(torch.randn(1, 3, 4, 4, 4), torch.randn(1, 1, 32), torch.tensor([5]))
    assert not video.any() and not audio.any()
    (video - 1).square().sum().backward()
    assert network.video_out[-1].video_conv.weight.grad.any()


@pytest.mark.parametrize(
    ("video", "audio", "says"),
    [((4, 5, 4), 32, "multiples of 2"), ((4, 4, 4), 30, "multiple of 4"), ((4, 4, 4), 12, "too few for 4 frames"),
     ((1, 4, 4), 32, "do not fit into a clip of 1")],
)  # fmt: skip
def test_sizes_the_network_cannot_take_are_refused(video, audio, says):
    with pytest.raises(ValueError, match=says):
        small()(torch.zeros(1, 3, *video), torch.zeros(1, 1, audio), torch.tensor([1]))


def test_half_precision_keeps_norms_and_time_in_single():
    network = small(dtype=torch.bfloat16)
    kinds = {name: value.dtype for name, value in network.named_parameters()}
    assert all((kind == torch.float32) == ("GroupNorm" in name or "emb" in name) for name, kind in kinds.items())
    with torch.no_grad():
        video = network(torch.randn(1, 3, 4, 4, 4).bfloat16(), torch.randn(1, 1, 32).bfloat16(), torch.tensor([9]))[0]
    assert video.dtype == torch.bfloat16 and video.isfinite().all()
