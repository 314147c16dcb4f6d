"""The Semantic Motion Predictor without a host: where it starts, what it keeps, chains of keyframes, files."""

import json

import pytest
import torch
from loading import GOLDEN
from storyweft.attention.branches import Branch, attend_branches
from storyweft.attention.core import attend
from storyweft.attention.masked import ANY, Constraint
from storyweft.attention.motion import append_rows, frame_branch
from storyweft.models.ip_adapter import Standard
from storyweft.models.motion_predictor import (
    MotionPredictor,
    build,
    film,
    interpolate,
    metadata_of,
    time_embedding,
)
from storyweft.story import transitions

TABLES = json.loads((GOLDEN / "semantic_motion_predictor" / "index_tables.json").read_text())


def predictor(dim=12, seed=0):
    torch.manual_seed(seed)
    return MotionPredictor(dim, 16, 3, 8, 2).requires_grad_(False)


@pytest.fixture
def ends():
    return torch.randn(2, 12, generator=torch.Generator().manual_seed(5))


def test_zero_output_projection_is_the_interpolation_bit_for_bit(ends):
    u = torch.linspace(0, 1, 9)
    assert torch.equal(predictor().reset().between(*ends, u, False), interpolate(*ends, u))


def test_pinned_ends_are_the_keyframes_bit_for_bit(ends):
    found = predictor().between(*ends, torch.linspace(0, 1, 7), True)
    assert torch.equal(found[[0, -1]], ends)
    free = predictor().between(*ends, torch.linspace(0, 1, 7), False)
    assert (free[[0, -1]] - ends).abs().min(1).values.max() > 0
    assert (found[3] - interpolate(*ends, torch.tensor([0.5]))[0]).abs().max() > 1e-3


def test_positions_follow_relative_time_not_the_number_of_frames():
    short, long = (time_embedding(torch.linspace(0, 1, n), 32) for n in (8, 15))
    assert torch.equal(short, long[::2])
    assert not torch.allclose(short[1], long[1])


def test_interpolation_reversed_is_the_interpolation_of_swapped_ends(ends):
    u = torch.linspace(0, 1, 9)
    torch.testing.assert_close(interpolate(*ends, u).flip(0), interpolate(*ends.flip(0), u), rtol=0, atol=1e-6)


def test_frames_of_the_transition_see_each_other(ends):
    """The transformer is no map of single frames: another last picture changes what is predicted for the second frame."""
    u = torch.linspace(0, 1, 5)
    change = predictor().between(ends[0], ends[1] + 3, u, False) - interpolate(ends[0], ends[1] + 3, u)
    assert (change - (predictor().between(*ends, u, False) - interpolate(*ends, u)))[0].abs().max() > 1e-4


def test_chains_share_keyframes_and_are_written_once():
    for case in TABLES["chains"]:
        keyframes, length = case["keyframes"], case["frames_per_transition"]
        assert transitions.total_frames(keyframes, length) == case["total"]
        assert transitions.keyframe_positions(keyframes, length) == case["keyframe_positions"]
        found = transitions.places(keyframes, length)
        assert [segment for segment, _ in found] == [segment for segment, _ in case["segment_and_u"]]
        assert [u for _, u in found] == pytest.approx([u for _, u in case["segment_and_u"]])


def test_latent_frames_of_a_causal_vae():
    for total, groups in TABLES["wan_latent_to_pixel_frames"].items():
        assert [list(group) for group in transitions.latent_frames(int(total))] == groups


def test_nearest_lengths_give_films_a_vae_can_hold():
    assert transitions.nearest_lengths(2, 16) == [13, 17]
    assert transitions.nearest_lengths(4, 16) == [13, 17]
    assert transitions.nearest_lengths(3, 16) == [15, 17]
    assert transitions.held(81) and not transitions.held(80)


def test_a_film_joins_at_its_keyframes():
    keyframes = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    found = film(predictor(), keyframes, transitions.places(4, 6))
    assert len(found) == 16
    assert torch.equal(found[transitions.keyframe_positions(4, 6)], keyframes)
    single = film(predictor(), keyframes[1:3], transitions.places(2, 6))
    torch.testing.assert_close(found[5:11], single)
    free = film(
        predictor(), keyframes, transitions.places(4, 6), pinned=False
    )  # the shared frame is the later transition's
    torch.testing.assert_close(free[5], film(predictor(), keyframes[1:3], transitions.places(2, 6), pinned=False)[0])


def test_files_keep_sizes_and_the_trained_projection():
    made = predictor()
    made.context_proj = Standard(12, 10, 3).requires_grad_(False)
    state = {key: value.clone() for key, value in made.state_dict().items()}
    again = build(state, metadata_of(made, "clip", True), "file")
    keys, u = torch.randn(5, 12), torch.linspace(0, 1, 5)
    assert torch.equal(again(keys, u), made(keys, u))
    assert torch.equal(again.context_proj(keys), made.context_proj(keys))
    assert again.context_proj(keys).shape == (5, 3, 10)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"in_proj.weight": None}, "no motion predictor"),
        ({"norm_out.bias": None}, "norm_out.bias is missing"),
        ({"extra.weight": torch.zeros(2)}, "extra.weight is not known"),
        ({"blocks.1.ff.3.weight": torch.zeros(4, 4)}, "blocks.1.ff.3.weight is"),
    ],
)
def test_wrong_files_are_named(change, word):
    state = {key: value for key, value in (predictor().state_dict() | change).items() if value is not None}
    with pytest.raises(ValueError, match=rf"some file.*{word}"):
        build(state, {"heads": "3"}, "some file")


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="24 wide, which 5 heads do not divide"):
        build(predictor().state_dict(), {"heads": "5"}, "some file")


def pairs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(2)]


def test_appended_rows_are_one_softmax_whatever_text_is_masked():
    """Against a softmax written out: two words hidden from half of the queries, the frame's rows seen by all."""
    q = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(9))
    (k, v), (more_k, more_v) = pairs(2, 1, 5, 8), pairs(2, 1, 3, 8, seed=1)
    hidden = Constraint(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 1, 1]]), "words")
    branch = Branch(slice(0, 2), k, v, 1.0, [hidden], torch.zeros(2, 1, 1, 5))
    append_rows(branch, more_k, more_v)
    found = attend_branches(q, [branch], attend)
    logits = q @ torch.cat([k, more_k], 2).transpose(-1, -2) / 8**0.5
    logits[:, :, :2, 2:5], logits[:, :, 2:, :2] = -torch.inf, -torch.inf
    torch.testing.assert_close(found, logits.softmax(-1) @ torch.cat([v, more_v], 2), rtol=1e-5, atol=1e-6)


def test_a_query_sees_the_rows_of_its_own_frame_only():
    """Two frames of two tokens in one sequence, after a reference token that gets nothing."""
    query = torch.tensor([ANY, 0, 0, 1, 1])
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(9))
    k, v = pairs(1, 2, 6, 8)
    found = attend_branches(q, [frame_branch(k, v, torch.tensor([0, 0, 0, 1, 1, 1]), query, 0.5, None)], attend)
    expected = torch.zeros_like(found)
    for frame, tokens, rows in ((0, slice(1, 3), slice(0, 3)), (1, slice(3, 5), slice(3, 6))):
        assert frame in query[tokens]
        expected[:, :, tokens] = 0.5 * attend(q[:, :, tokens], k[:, :, rows], v[:, :, rows])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
