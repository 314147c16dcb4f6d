"""The demo loader: core's own nodes work on its outputs, and a damaged file is named."""

import shutil

import numpy as np
import pytest
import torch
from storyweft.host import demo
from storyweft.training import storybook

import nodes


@pytest.fixture(scope="module")
def loaded():
    return demo.load_demo()


@pytest.fixture(scope="module")
def pages():
    drawn = [storybook.sample(np.random.default_rng((77, index)), "one") for index in range(8)]
    return torch.from_numpy(np.stack([page.image for page in drawn])) / 255, drawn


def test_text_to_image_runs_through_core_nodes(loaded):
    model, clip, vae, _ = loaded
    (positive,) = nodes.CLIPTextEncode().encode(clip, "a (fox:1.3) in the forest at night")
    (negative,) = nodes.CLIPTextEncode().encode(clip, "")
    (latent,) = nodes.EmptyLatentImage().generate(128, 128, 2)
    with torch.inference_mode():
        (sampled,) = nodes.KSampler().sample(model, 3, 2, 4.0, "euler", "normal", positive, negative, latent)
        (images,) = nodes.VAEDecode().decode(vae, sampled)
    assert images.shape == (2, 128, 128, 3) and images.isfinite().all()
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01


def test_autoencoder_round_trip_is_close(loaded, pages):
    images, _ = pages
    vae = loaded[2]
    back = vae.decode(vae.encode(images))
    assert -10 * (back - images).square().mean().log10() > 18


def test_latents_have_unit_scale(loaded, pages):
    model, _, vae, _ = loaded
    latents = model.get_model_object("latent_format").process_in(vae.encode(pages[0]))
    assert latents.shape == (8, 4, 16, 16)
    assert 0.8 < latents.std() < 1.2


def test_unknown_words_share_one_embedding(loaded):
    clip = loaded[1]
    table = clip.cond_stage_model.clip_l.transformer.text_model.embeddings.token_embedding.weight
    one, other = (clip.tokenize(word)["l"][0][1][0] for word in ("zeppelin", "marmalade"))
    assert one != other and torch.equal(table[one], table[other])
    fox = clip.tokenize("fox")["l"][0][1][0]
    assert not torch.equal(table[one], table[fox])


def test_image_encoder_ranks_the_right_caption_first(loaded, pages):
    """Cosine of image and text embedding: the own caption wins over those of the other pages most of the time."""
    _, clip, _, vision = loaded
    images, drawn = pages
    seen = vision.encode_image(images)["image_embeds"]
    project = clip.cond_stage_model.clip_l.transformer.text_projection
    read = torch.cat(
        [project(clip.encode_from_tokens(clip.tokenize(page.caption), return_pooled=True)[1]) for page in drawn]
    )
    scores = torch.nn.functional.normalize(seen, dim=1) @ torch.nn.functional.normalize(read, dim=1).T
    assert (scores.argmax(1) == torch.arange(len(drawn))).float().mean() >= 0.6


def test_reload_factory_gives_the_same_model(loaded):
    model = loaded[0]
    factory, arguments = model.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("harm, word", [("gone", "missing"), ("short", "truncated"), ("pointer", "Git LFS")])
def test_damaged_file_is_named(tmp_path, harm, word):
    shutil.copytree(demo.WEIGHTS, tmp_path / "weights")
    path = tmp_path / "weights" / "autoencoder.safetensors"
    data = path.read_bytes()
    path.unlink()
    if harm != "gone":
        path.write_bytes(data[:-100] if harm == "short" else b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(RuntimeError, match=rf"StoryweftDemoLoader.*autoencoder\.safetensors.*{word}"):
        demo.load_demo(tmp_path / "weights")
