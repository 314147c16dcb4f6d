"""The nodes of the Semantic Motion Predictor: what they hand on, and bad input in one sentence before sampling."""

import math

import folder_paths
import pytest
import tiny
import torch
from safetensors.torch import save_file
from storyweft.host import motion
from storyweft.host.demo import WEIGHTS, load_vae
from storyweft.host.image_adapter import LoadedAdapter
from storyweft.models.motion_predictor import MotionPredictor, metadata_of
from storyweft.nodes.motion import KeyframeLatent, LoadMotionPredictor, SemanticMotionPredictor
from test_apa_nodes import network, vision
from test_motion_host import projecting, unet_adapter


@pytest.fixture(scope="module")
def clip_vision():
    return vision()


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def pictures(count=2, size=32, seed=0):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def executed(sd15, clip_vision, first=None, frames=4, **more):
    inputs = {"image_adapter": unet_adapter(sd15)} | more
    positive, negative = tiny.conditioning("sd15", 1, 1), tiny.conditioning("sd15", 1, 2)
    first = pictures() if first is None else first
    return SemanticMotionPredictor.execute(sd15, positive, negative, clip_vision, first, frames, **inputs).result


def test_one_embedding_a_frame_comes_out_to_be_looked_at(sd15, clip_vision):
    _, _, _, seen, frames = executed(sd15, clip_vision, pictures(3))
    assert frames == 7 and seen.image_embeds.shape == (7, 24)
    keys = clip_vision.encode_image(pictures(3))["image_embeds"]
    assert torch.equal(seen.image_embeds[[0, 3, 6]], keys)
    torch.testing.assert_close(seen.image_embeds[1], keys[0] * 2 / 3 + keys[1] / 3)


def test_last_stands_after_first(sd15, clip_vision):
    both = executed(sd15, clip_vision)[3].image_embeds
    apart = executed(sd15, clip_vision, pictures()[:1], last=pictures()[1:])[3].image_embeds
    torch.testing.assert_close(both, apart)


def test_a_trained_predictor_changes_frames_between_and_its_ends_only_when_free(sd15, clip_vision):
    plain = executed(sd15, clip_vision)[3].image_embeds
    with_it = {"motion_predictor": projecting(16)}
    found = executed(sd15, clip_vision, **with_it)[3].image_embeds
    free = executed(sd15, clip_vision, ends="free", **with_it)[3].image_embeds
    assert torch.equal(found[[0, -1]], plain[[0, -1]]) and (found[1:-1] - plain[1:-1]).abs().min() > 0
    assert (free[[0, -1]] - plain[[0, -1]]).abs().max() > 1e-3


def test_pictures_that_look_the_same_are_said_and_sampled(sd15, clip_vision, caplog):
    caplog.set_level("INFO")
    found = executed(sd15, clip_vision, pictures(1).repeat(2, 1, 1, 1))[3].image_embeds
    assert "pictures 0 and 1 look the same" in caplog.text
    torch.testing.assert_close(found, found[:1].expand(4, -1))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "motion_predictor", ([str(tmp_path)], set()))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def predictor():
    made = MotionPredictor(24, 16, 2, 8, 2)
    tiny.fill(made, 4)
    return made


def test_a_file_is_loaded_with_the_adapter_that_was_trained_with_it(folder, sd15, clip_vision):
    made, beside = predictor(), network(sd15).state_dict()
    tensors = {key: value.half().contiguous() for key, value in (made.state_dict() | beside).items()}
    save_file(tensors, folder / "both.safetensors", metadata_of(made, motion.encoder_name(clip_vision), False))
    found = LoadMotionPredictor.execute("both.safetensors").result[0]
    assert not found.pinned and found.network.heads == 2
    assert found.network(torch.zeros(3, 24), torch.linspace(0, 1, 3)).dtype == torch.float32  # half is only its storage
    model, *_ = executed(sd15, clip_vision, motion_predictor=found, image_adapter=None)
    (rule,) = model.model_options["transformer_options"]["storyweft_rules"]
    assert isinstance(rule, motion.AdapterRows) and rule.adapter is found.adapter


@pytest.mark.parametrize(
    "metadata, keep, words",
    [
        ({"format": "another.format"}, True, "format another.format"),
        ({}, False, "no motion predictor"),
    ],
)
def test_other_files_are_refused_by_name(folder, metadata, keep, words):
    tensors = predictor().state_dict() if keep else {"some.weight": torch.zeros(2)}
    save_file(tensors, folder / "odd.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"StoryweftLoadMotionPredictor: odd\.safetensors.*{words}"):
        LoadMotionPredictor.execute("odd.safetensors")


def test_a_predictor_of_another_encoder_is_refused(sd15, clip_vision):
    other = projecting(16)
    other.metadata = {"encoder": "clip-1280x32-1024"}
    with pytest.raises(
        ValueError, match="tiny was trained on embeddings of clip-1280x32-1024 and clip_vision is clip-32x3-24"
    ):
        executed(sd15, clip_vision, motion_predictor=other)
    with pytest.raises(ValueError, match="predicts embeddings 24 wide and clip_vision gives 30"):
        executed(sd15, vision(projection_dim=30), motion_predictor=projecting(16), image_adapter=None)


class Broken:
    """An encoder that gives what it is told."""

    config = {"hidden_size": 32, "num_hidden_layers": 3, "projection_dim": 24}
    model_type = "dinov2"

    def __init__(self, found):
        self.found = found

    def encode_image(self, pictures):
        return {"image_embeds": self.found}


def test_bad_embeddings_stop_before_sampling(sd15):
    bad = torch.zeros(2, 24)
    bad[1, 3] = math.nan
    with pytest.raises(ValueError, match="embedding of picture 1 is not finite"):
        executed(sd15, Broken(bad))
    with pytest.raises(ValueError, match="clip_vision is a dinov2, which has no pooled embedding"):
        executed(sd15, Broken(None))
    with pytest.raises(ValueError, match="clip_vision is a dinov2, which has no pooled embedding"):
        executed(sd15, Broken(torch.zeros(2, 16, 24)))


def test_a_damaged_predictor_is_named(sd15, clip_vision):
    damaged = projecting(16)
    damaged.network.out_proj.bias[0] = math.inf
    with pytest.raises(ValueError, match="tiny predicts numbers that are not finite"):
        executed(sd15, clip_vision, motion_predictor=damaged)


def test_an_adapter_of_hidden_features_is_refused(sd15, clip_vision):
    plus = LoadedAdapter("plus", network(sd15, "plus").requires_grad_(False))
    with pytest.raises(ValueError, match="plus reads hidden features of CLIP vision and was given pooled"):
        executed(sd15, clip_vision, image_adapter=plus)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"first": pictures(1)}, "first holds 1 picture.* and last none"),
        ({"frames": 1}, "frames_per_transition is 1"),
        ({"strength": math.nan}, "strength is nan"),
        ({"first": pictures(1), "last": pictures(1, 40)}, "first is 32 x 32 and last 40 x 40"),
    ],
)
def test_bad_input_is_named(sd15, clip_vision, more, words):
    with pytest.raises(ValueError, match=f"StoryweftSemanticMotionPredictor: {words}"):
        executed(sd15, clip_vision, **more)


@pytest.fixture(scope="module")
def vae():
    return load_vae(str(WEIGHTS))


def test_keyframe_latent_holds_the_pictures_and_blends_between(vae):
    three = pictures(3, 64)
    latent = KeyframeLatent.execute(vae, three, 4).result[0]
    keys, found, mask = vae.encode(three), latent["samples"], latent["noise_mask"]
    assert found.shape == (7, 4, 8, 8) and mask.shape == (7, 1, 8, 8)
    assert torch.equal(found[[0, 3, 6]], keys)
    torch.testing.assert_close(found[4], keys[1] * 2 / 3 + keys[2] / 3)
    assert mask.flatten(1).amax(1).tolist() == [0, 1, 1, 0, 1, 1, 0] == mask.flatten(1).amin(1).tolist()
    assert "noise_mask" not in KeyframeLatent.execute(vae, three, 4, keep_pictures=False).result[0]


def test_held_pictures_come_out_of_the_sampler_as_they_went_in(sd15):
    latent = {"samples": torch.randn(4, 4, *tiny.SIZE), "noise_mask": torch.ones(4, 1, *tiny.SIZE)}
    latent["noise_mask"][[0, 3]] = 0
    positive, negative = tiny.conditioning("sd15", 1, 1), tiny.conditioning("sd15", 1, 2)
    model, *_ = executed(sd15, vision())
    out = tiny.sample(model, positive, negative, latent["samples"], noise_mask=latent["noise_mask"])
    torch.testing.assert_close(out[[0, 3]], latent["samples"][[0, 3]], rtol=0, atol=1e-5)


class VideoVae:
    def encode(self, pictures):
        return torch.zeros(1, 16, 2, 8, 8)


def test_keyframe_latent_refuses_what_it_cannot_place(vae):
    with pytest.raises(ValueError, match="StoryweftKeyframeLatent: first holds 1 picture and last none"):
        KeyframeLatent.execute(vae, pictures(1, 64), 4)
    with pytest.raises(ValueError, match="StoryweftKeyframeLatent: frames_per_transition is 1"):
        KeyframeLatent.execute(vae, pictures(2, 64), 1)
    with pytest.raises(ValueError, match="StoryweftKeyframeLatent: vae makes latents of shape .1, 16, 2, 8, 8."):
        KeyframeLatent.execute(VideoVae(), pictures(2, 64), 4)
