"""Image adapter files, CLIP vision features and the nodes of adaptive prompts alignment under good and bad input."""

import logging
import math
import pickle

import comfy.clip_vision
import folder_paths
import pytest
import tiny
import torch
from safetensors.torch import save_file
from storyweft.host import families, image_adapter, override
from storyweft.host.demo import load_demo, read_weights
from storyweft.host.image_adapter import channels
from storyweft.metrics.facts import load_reader, read
from storyweft.models.ip_adapter import ImageAdapter, Resampler, Standard
from storyweft.nodes import apa

import nodes

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "quick_gelu",
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "projection_dim": 24,
}


def vision(**changes):
    model = comfy.clip_vision.ClipVisionModel(VISION | changes)
    tiny.fill(model.model, 3)
    return model


@pytest.fixture(scope="module")
def clip_vision():
    return vision()


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def network(patcher, kind="standard"):
    sizes, width = channels(families.find(patcher, "test"))
    torch.manual_seed(0)
    projection = Standard(24, width, 4) if kind == "standard" else Resampler(32, width, 5, 16, 64, 2, 32)
    found = ImageAdapter(projection, sizes)
    tiny.fill(found, 1)
    return found


@pytest.fixture
def files(tmp_path, monkeypatch, sd15):
    """models/ipadapter with one file of each kind."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "ipadapter", ([str(tmp_path)], set()))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for kind in ("standard", "plus"):
        state = {key: value.half().contiguous() for key, value in network(sd15, kind).state_dict().items()}
        save_file(state, tmp_path / f"{kind}.safetensors")
        parts = {
            name: {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(name)}
            for name in ("image_proj", "ip_adapter")
        }
        torch.save(parts, tmp_path / f"{kind}.bin")
    return tmp_path


def load(name, alphas=apa.NONE):
    return apa.LoadImageAdapter.execute(name, alphas).args[0]


def align(model, adapter, clip_vision, image=None, alpha_text=1.0, alpha_image=1.0, guidance="IP-Adapter", **more):
    image = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0)) if image is None else image
    return apa.AdaptivePromptAlignment.execute(
        model, adapter, clip_vision, image, alpha_text, alpha_image, guidance, **more
    ).args[0]


def rule_of(model):
    return override.rules_of(model)[0]


def draw(model):
    return tiny.sample(model, tiny.conditioning("sd15", 2, 1), tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 2))


@pytest.mark.parametrize("kind", ["standard", "plus"])
def test_a_file_drives_the_model_and_both_forms_are_the_same(files, sd15, clip_vision, kind):
    drawn = [draw(align(sd15, load(f"{kind}.{ending}"), clip_vision)) for ending in ("safetensors", "bin")]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], draw(sd15))
    assert torch.equal(draw(align(sd15, load(f"{kind}.bin"), clip_vision, alpha_image=0.0)), draw(sd15))


def test_the_node_lists_files_of_the_folder_and_no_others(files):
    (files / "notes.txt").write_text("x")
    options = apa.LoadImageAdapter.define_schema().inputs[0].options
    assert options == [apa.DEMO, "plus.bin", "plus.safetensors", "standard.bin", "standard.safetensors"]


def test_a_file_with_more_than_weights_is_not_opened(files):
    class Surprise:
        def __reduce__(self):
            return print, ("opened",)

    (files / "bad.bin").write_bytes(pickle.dumps({"image_proj": Surprise()}))
    with pytest.raises(ValueError, match="bad.bin holds more than weights and is not opened"):
        load("bad.bin")


def test_no_picture_is_zeros_for_pooled_features(files, sd15, clip_vision):
    adapter = load("standard.safetensors")
    zeros = adapter.network.image_proj(torch.zeros(1, 24))
    for guidance in image_adapter.GUIDANCE:
        rule = rule_of(align(sd15, adapter, clip_vision, guidance=guidance))
        torch.testing.assert_close(rule.blank, zeros)
        assert rule.tokens.shape == (1, 4, 16)


def test_no_picture_for_plus_files_is_the_authors_or_the_packs(files, sd15, clip_vision):
    adapter = load("plus.safetensors")
    blank = {
        guidance: rule_of(align(sd15, adapter, clip_vision, guidance=guidance)).blank
        for guidance in image_adapter.GUIDANCE
    }
    mean = clip_vision.model(pixel_values=torch.zeros(1, 3, 32, 32), intermediate_output=-2)[1]
    torch.testing.assert_close(blank["IP-Adapter"], adapter.network.image_proj(mean))
    black = clip_vision.encode_image(torch.zeros(1, 32, 32, 3))["penultimate_hidden_states"]
    torch.testing.assert_close(blank["IPAdapter_plus"], adapter.network.image_proj(black))
    assert (blank["IP-Adapter"] - blank["IPAdapter_plus"]).abs().max() > 1e-3


def test_a_clip_vision_of_another_width_is_refused_with_both_widths(files, sd15):
    other = vision(projection_dim=20)
    with pytest.raises(ValueError, match="standard.bin reads pooled CLIP features 24 wide and clip_vision gives 20"):
        align(sd15, load("standard.bin"), other)
    with pytest.raises(ValueError, match="reads hidden features of CLIP vision and was given pooled ones"):
        image_adapter.check_features(load("plus.bin"), torch.zeros(1, 32), "test")


@pytest.mark.parametrize("form", ["own", "magdiff"])
def test_learned_alphas_multiply_the_numbers_of_the_node(files, sd15, clip_vision, form):
    count = len(families.find(sd15, "test").cross_layers)
    text, image = torch.linspace(0.5, 1.5, count), torch.linspace(-1, 2, count)
    state = {"alpha_text": text, "alpha_image": image}
    if form == "magdiff":  # tiny: a block with one transformer each, two down, four up, one in the middle
        order = [f"down_blocks.{i}.attentions.0" for i in range(2)]
        order += [f"up_blocks.{i}.attentions.{j}" for i in range(2) for j in range(2)] + ["mid_block.attentions.0"]
        state = {}
        for index, place in enumerate(order):
            stem = f"unet.{place}.transformer_blocks.0.attn2"
            state[f"{stem}.text_cross_attention_scale"] = text[index : index + 1].clone()
            state[f"{stem}.image_cross_attention_scale"] = image[index : index + 1].clone()
    save_file(state, files / "alphas.safetensors")
    adapter = load("standard.bin", "alphas.safetensors")
    rule = rule_of(align(sd15, adapter, clip_vision, alpha_text=2.0, alpha_image=0.5, image_middle=0.0))
    found = torch.tensor(list(rule.alphas.values()))
    torch.testing.assert_close(found[:, 0], 2 * text)
    torch.testing.assert_close(found[:-1, 1], 0.5 * image[:-1])
    assert found[-1, 1] == 0
    assert list(rule.alphas)[-1].path == "middle"


def test_alphas_that_do_not_fit_are_refused(files):
    save_file({"alpha_text": torch.ones(3), "alpha_image": torch.ones(3)}, files / "alphas.safetensors")
    with pytest.raises(ValueError, match=r"alpha_text of alphas.safetensors has shape \(3,\); it must be \d+ finite"):
        load("standard.bin", "alphas.safetensors")
    with pytest.raises(ValueError, match="plus.safetensors holds neither alpha_text nor"):
        load("standard.bin", "plus.safetensors")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha_text": math.nan}, "alpha_text is nan; give a finite number"),
        ({"alpha_image": math.inf}, "alpha_image is inf"),
        ({"image_middle": math.nan}, "image_middle is nan"),
        ({"image_at_end": math.nan}, "image_at_end is nan"),
        ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent 0.8 lies after end_percent 0.2"),
        ({"end_percent": math.nan}, "end_percent is nan; give a number from 0 to 1"),
    ],
)
def test_numbers_that_are_none_are_refused(files, sd15, clip_vision, given, message):
    with pytest.raises(ValueError, match=f"StoryweftAdaptivePromptAlignment: {message}"):
        align(sd15, load("standard.bin"), clip_vision, **given)


def test_the_given_model_is_not_touched(files, sd15, clip_vision):
    align(sd15, load("standard.bin"), clip_vision)
    assert not override.rules_of(sd15)


def picture(height=20, width=30):
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0))


def disc(height=20, width=30):
    mask = torch.zeros(1, height, width)
    mask[:, 5:15, 10:18] = 1
    return mask


def cut(image=None, mask=None, ground="grey", crop=True, **more):
    found = apa.Subject.execute(
        picture() if image is None else image, disc() if mask is None else mask, ground, crop, **more
    )
    return found.args


def test_the_subject_stands_on_its_ground():
    whole, small = cut(crop=False, vae_size=64)
    kept = disc()[0] == 1
    assert torch.equal(whole[0][kept], picture()[0][kept])
    assert (whole[0][~kept] == 0.5).all()
    assert small.shape == (1, 64, 64, 3)
    near, _ = cut(margin=0.0)
    assert near.shape == (1, 10, 10, 3)
    assert torch.equal(near[:, :, 1:9], picture()[:, 5:15, 10:18])
    assert (near[:, :, 0] == 0.5).all()
    assert (cut(ground="black")[0][:, 0] == 0).all()


def test_soft_masks_blend_and_hard_ones_keep():
    half = disc() * 0.5
    soft, hard = (cut(mask=half, ground="black", crop=False, edge=edge)[0] for edge in ("soft", "hard"))
    torch.testing.assert_close(soft * 2, hard)


def test_masks_that_cannot_be_used(caplog):
    with pytest.raises(ValueError, match="mask 0 is empty"):
        cut(mask=torch.zeros(1, 20, 30))
    with pytest.raises(ValueError, match="mask is 15 x 10 and image 30 x 20; turn resize_mask on"):
        cut(mask=disc()[:, ::2, ::2])
    resized, _ = cut(mask=disc()[:, ::2, ::2], crop=False, resize_mask=True)
    assert resized.shape == (1, 20, 30, 3)
    with pytest.raises(ValueError, match="mask holds 2 masks and image 1 pictures"):
        cut(mask=disc().repeat(2, 1, 1))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cut(mask=torch.ones(1, 20, 30), crop=False)[0], picture())
    assert "mask is full, so nothing is cut out" in caplog.text


def test_the_demo_adapter_gives_the_demo_model_the_colour_of_a_cut_out():
    """Off, the four foxes have colours of their own; on, they have that of the picture and stay where the text says."""
    model, clip, vae, vision = load_demo()
    subject = apa.Subject.execute(*apa.DemoSubject.execute("blue fox").args, "black", True).args[0]
    encode = nodes.CLIPTextEncode().encode
    positive, negative = encode(clip, "a fox in the snow by day")[0], encode(clip, "")[0]
    reader, blue = load_reader(*read_weights("facts")), {}
    for alpha in (0.0, 1.0):
        aligned = align(model, load(apa.DEMO), vision, subject, alpha_image=alpha)
        latent = {"samples": torch.zeros(4, 4, 16, 16)}
        done = nodes.KSampler().sample(aligned, 5, 8, 4.0, "dpmpp_2m", "karras", positive, negative, latent)
        found = [reading.labels for reading in read(reader, vae.decode(done[0]["samples"]).float())]
        blue[alpha] = sum(labels["colour"] == "blue" for labels in found)
        assert all(labels["place"] == "snow" for labels in found)
    assert blue[1.0] >= 3 > blue[0.0]
