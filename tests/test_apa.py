"""Adaptive prompts alignment at one layer, published adapter layouts, subject cut-outs: the laws of the paper's formula."""

import json

import pytest
import torch
from loading import GOLDEN
from storyweft.attention.apa import image_branch, scale_text
from storyweft.attention.branches import Branch, attend_branches
from storyweft.attention.core import attend
from storyweft.models import ip_adapter, magdiff

LAYOUTS = json.loads((GOLDEN / "magdiff" / "ip_adapter_layouts.json").read_text())
SHAPE = (3, 4, 20, 8)  # rows, heads, queries, dim


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q = rand(*SHAPE)
TEXT = [rand(3, 4, 77, 8, seed=seed) for seed in (1, 2)]
IMAGE = [rand(3, 4, 5, 8, seed=seed) for seed in (3, 4)]


def aligned(alpha_text, alpha_image, text=TEXT, image=IMAGE, mask=None):
    words = [Branch(slice(0, 3), *text)]
    scale_text(words, alpha_text)
    return attend_branches(Q, [*words, image_branch(slice(0, 3), *image, alpha_image, mask)], attend)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_the_formula_and_its_neutral_setting():
    words, picture = attend(Q, *TEXT), attend(Q, *IMAGE)
    assert torch.equal(aligned(1.0, 0.0), words)
    assert torch.equal(aligned(0.0, 0.0), torch.zeros_like(Q))
    for alphas in ((1.0, 1.5), (0.3, 0.7), (-0.5, 2.0)):
        assert relative(aligned(*alphas), alphas[0] * words + alphas[1] * picture) < 1e-12


def test_it_is_linear_in_the_two_alphas():
    whole = aligned(0.3, 0.7)
    assert relative(0.3 * aligned(1.0, 0.0) + 0.7 * aligned(0.0, 1.0), whole) < 1e-12


def test_order_and_repetition_of_tokens_change_nothing():
    """A split at a fixed row would send repeated text rows into the image branch."""
    whole = aligned(0.8, 0.6)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(5))
    assert relative(aligned(0.8, 0.6, image=[x[:, :, order] for x in IMAGE]), whole) < 1e-12
    assert relative(aligned(0.8, 0.6, image=[x.repeat(1, 1, 3, 1) for x in IMAGE]), whole) < 1e-12
    assert relative(aligned(0.8, 0.6, text=[x.repeat(1, 1, 2, 1) for x in TEXT]), whole) < 1e-12


def test_tokens_equal_to_the_text_add_up():
    assert relative(aligned(0.8, 0.6, image=TEXT), 1.4 * attend(Q, *TEXT)) < 1e-12


def test_a_mask_multiplies_the_picture_and_leaves_the_text():
    mask = torch.zeros(1, 20, dtype=torch.float64)
    mask[:, 10:] = 0.5
    out = aligned(1.0, 1.0, mask=mask)
    assert torch.equal(out[:, :, :10], attend(Q, *TEXT)[:, :, :10])
    assert relative(out[:, :, 10:], aligned(1.0, 0.5)[:, :, 10:]) < 1e-12


def test_branches_over_some_rows_and_over_all_add_up():
    words, picture = attend(Q, *TEXT), attend(Q, *IMAGE)
    rows = [Branch(slice(i, i + 1), *(x[i : i + 1] for x in TEXT), weight=i) for i in range(3)]
    whole = image_branch(slice(0, 3), *IMAGE, 0.5)
    expected = torch.stack([i * words[i] for i in range(3)]) + 0.5 * picture
    assert relative(attend_branches(Q, [*rows, whole], attend), expected) < 1e-12
    assert relative(attend_branches(Q, [whole, *rows], attend), expected) < 1e-12
    assert torch.equal(attend_branches(Q, rows[:1], attend), torch.zeros_like(Q))


def published(name):
    """A file's tensors without their numbers."""
    keys = LAYOUTS["files"][name]["keys"]
    return {key: torch.empty(shape, dtype=torch.float16, device="meta") for key, shape in keys.items()}


@pytest.mark.parametrize("name", LAYOUTS["files"])
def test_published_files_load_strictly(name):
    state = published(name)
    adapter = ip_adapter.build(state, name)
    expected = (
        ip_adapter.Resampler if "plus" in name else ip_adapter.FullFace if "face" in name else ip_adapter.Standard
    )
    assert type(adapter.image_proj) is expected
    assert adapter.channels == LAYOUTS["channels_of_index"]["sdxl" if "sdxl" in name else "sd15"]
    assert set(adapter.state_dict()) == set(state)
    assert adapter.image_proj.clip == (
        1024 if expected is ip_adapter.Standard and "vit-G" not in name and name != "ip-adapter_sdxl" else 1280
    )
    if expected is ip_adapter.Resampler:
        assert adapter.image_proj.layers[0][0].heads * 64 == state["image_proj.layers.0.0.to_q.weight"].shape[0]


def test_nested_files_and_training_checkpoints_are_the_same_files():
    flat = published("ip-adapter_sd15")
    parts = {
        name: {k.split(".", 1)[1]: v for k, v in flat.items() if k.startswith(name)}
        for name in ("image_proj", "ip_adapter")
    }
    assert ip_adapter.flatten(parts).keys() == flat.keys()
    renamed = {"image_proj": parts["image_proj"], "adapter_modules": parts["ip_adapter"]}
    assert ip_adapter.flatten(renamed).keys() == flat.keys()
    ip_adapter.build(renamed, "checkpoint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ip_adapter.1.to_q_lora.down.weight": (4, 320)},
            "FaceID adapter .it holds ip_adapter.1.to_q_lora.down.weight",
        ),
        ({"image_proj.other": (3,)}, "the tensor image_proj.other is not known"),
        ({"image_proj.norm.bias": None}, "the tensor image_proj.norm.bias is missing"),
        ({"ip_adapter.3.to_v_ip.weight": (320, 700)}, r"ip_adapter.3.to_v_ip.weight is \(320, 700\), not \(320, 768\)"),
        (
            {"ip_adapter.5.to_k_ip.weight": None},
            "not numbered 1, 3, 5...: ip_adapter.5.to_k_ip.weight is missing",
        ),
        ({"ip_adapter.1.to_k_ip.weight": None}, "is no image adapter: it lacks ip_adapter.1.to_k_ip.weight"),
    ],
)
def test_files_that_are_something_else_are_refused_by_name(change, message):
    state = published("ip-adapter_sd15")
    for key, shape in change.items():
        if shape is None:
            del state[key]
        else:
            state[key] = torch.empty(shape, device="meta")
    with pytest.raises(ValueError, match=message):
        ip_adapter.build(state, "file")


def test_the_resampler_follows_its_tokens_and_not_their_order():
    torch.manual_seed(0)
    net = ip_adapter.Resampler(10, 6, 4, 8, 128, 2, 16)
    torch.nn.init.normal_(net.latents)
    hidden = torch.randn(2, 9, 10)
    out = net(hidden)
    assert out.shape == (2, 4, 6)
    torch.testing.assert_close(net(hidden.flip(1)), out, atol=1e-5, rtol=1e-4)
    assert (net(hidden * 1.5) - out).abs().max() > 1e-3


def test_cut_out_keeps_what_the_mask_does_not_leave_black():
    picture, mask = torch.rand(1, 3, 4, 4), torch.zeros(1, 4, 4)
    mask[:, 1:3, 1:3] = 1 / 255
    hard = magdiff.cut_out(picture, mask, 0.5)
    assert torch.equal(hard[..., 1:3, 1:3], picture[..., 1:3, 1:3])
    assert (hard[..., 0, :] == 0.5).all()
    assert (magdiff.cut_out(picture, mask, 0.5, soft=True) - 0.5).abs().max() < 0.01


def test_the_square_around_the_subject_reaches_over_the_edge():
    mask, picture = torch.zeros(1, 10, 16), torch.rand(1, 3, 10, 16)
    mask[:, 2:8, 12:16] = 1
    box = magdiff.subject_box(mask, 0.0)
    assert box == (11, 2, 6)
    cut = magdiff.square(picture, box, 0.5)
    assert cut.shape == (1, 3, 6, 6)
    assert torch.equal(cut[..., :5], picture[..., 2:8, 11:16])
    assert (cut[..., 5] == 0.5).all()
    assert magdiff.subject_box(mask, 0.5)[2] == 12


def test_pyramid_and_wider_input_start_at_the_base_model():
    latents = [torch.randn(1, 4, side, side) for side in (12, 10, 8)]
    assert torch.equal(magdiff.LatentPyramid().start()(latents), latents[-1])
    weight, noise, subject = torch.randn(6, 4, 3, 3), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    wide = torch.nn.functional.conv2d(torch.cat([noise, subject], 1), magdiff.widened(weight, 4), padding=1)
    torch.testing.assert_close(wide, torch.nn.functional.conv2d(noise, weight, padding=1), atol=1e-5, rtol=1e-5)
