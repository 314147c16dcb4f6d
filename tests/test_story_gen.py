"""StoryGen without a host: the image attention against its formula, noise levels, branches, checks of tensors."""

import pytest
import torch
from storyweft.attention.core import attend
from storyweft.attention.story_gen import image_attention, join
from storyweft.models.story_gen import ENDINGS, ImageAttention, sites, split
from storyweft.sampling.story_gen import ALONE, AUTO, MULTI, branches, reference_timesteps, without_repetition


def module(channels=12, inner=8):
    torch.manual_seed(0)
    made = ImageAttention(channels, inner)
    torch.nn.init.normal_(made.norm4.weight, 1.0, 0.3)
    return made


def formula(made, h, image, heads):
    """Row by row and head by head."""
    rows, inner = [], made.attn3.to_q.weight.shape[0]
    for one, seen in zip(h, image, strict=True):
        q, k, v = made.attn3.to_q(made.norm4(one)), made.attn3.to_k(seen), made.attn3.to_v(seen)
        found = []
        for head in range(heads):
            part = slice(head * inner // heads, (head + 1) * inner // heads)
            weights = (q[:, part] @ k[:, part].T * (inner // heads) ** -0.5).softmax(-1)
            found.append(weights @ v[:, part])
        rows.append(made.attn3.to_out[0](torch.cat(found, -1)))
    return torch.stack(rows)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_rows_of_several_branches_read_the_features_of_their_picture(heads):
    made, generator = module(), torch.Generator().manual_seed(1)
    h = torch.randn(6, 5, 12, generator=generator)  # three branches of two pictures
    image = torch.randn(2, 7, 12, generator=generator)
    got = image_attention(made.attn3, made.norm4, h, image, heads, attend)
    assert torch.allclose(got, formula(made, h, image.repeat(3, 1, 1), heads), atol=1e-6)


def test_keys_are_made_once_for_all_branches():
    made, seen = module(), []
    made.attn3.to_k.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape))
    image_attention(made.attn3, made.norm4, torch.zeros(6, 5, 12), torch.zeros(2, 7, 12), 2, attend)
    assert seen == [(2, 7, 12)]


def test_the_residual_counts_twice_and_strength_scales_branch_and_residual_together():
    h, text, image = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(join(h, text, image, 0.0), text)
    assert torch.allclose(h + join(h, text, image, 1.0), 2 * h + text + image)
    assert torch.allclose(join(h, text, image, 0.3), text + 0.3 * h + 0.3 * image)
    assert torch.allclose(join(h, text, image, 0.3, twice=False), text + 0.3 * image)


def test_noise_of_references_tells_their_order_in_stage_auto_regressive():
    assert reference_timesteps(976, 3, AUTO) == [291, 194, 97]
    assert reference_timesteps(976, 3, MULTI) == [97, 97, 97]
    assert reference_timesteps(9, 3, AUTO) == [0, 0, 0]
    assert reference_timesteps(976, 3, ALONE) == []
    assert reference_timesteps(976, 11, AUTO)[:2] == [999, 970]


def test_repeated_pairs_are_cut_to_what_the_softmax_needs():
    assert without_repetition(["a", "b", "a", "b"]) == ["a", "b"]
    assert without_repetition(["a", "a", "a"]) == ["a"]
    assert without_repetition(["a", "b", "a"]) == ["a", "a", "b"]
    assert without_repetition([]) == []


def test_branches_of_weight_zero_are_left_out():
    assert branches(7, 3.5) == ("u", "v", "a")
    assert branches(7, 0) == ("u", "v", "a")
    assert branches(7, 1) == ("v", "a")
    assert branches(7, 7) == ("u", "a")
    assert branches(1, 3.5) == branches(0.5, 1) == ("a",)


def test_a_state_dict_is_split_and_checked_by_site():
    state = {f"mid.{ending}": value for ending, value in module(12, 12).state_dict().items()}
    base, own = split({**state, "conv_in.weight": torch.zeros(1), "mid.attn1.to_q.weight": torch.zeros(1)})
    assert sorted(base) == ["conv_in.weight", "mid.attn1.to_q.weight"]
    assert set(own) == {"mid."} and set(own["mid."]) == set(ENDINGS)
    assert set(sites(own, {"mid.": (12, 4)}, "file")["mid."]) == set(ENDINGS)
    for ending in ENDINGS:
        lost = {"mid.": {name: value for name, value in own["mid."].items() if name != ending}}
        with pytest.raises(ValueError, match=f"file: 1 of StoryGen's 7 tensors are missing .mid.{ending}"):
            sites(lost, {"mid.": (12, 4)}, "file")
    with pytest.raises(ValueError, match="it is no StoryGen file"):
        sites({}, {"mid.": (12, 4)}, "file")
    with pytest.raises(ValueError, match=r"attn3.to_q.weight is \(12, 12\) and the U-Net needs \(12, 16\)"):
        sites(own, {"mid.": (16, 4)}, "file")
