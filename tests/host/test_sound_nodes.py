"""Sound nodes on the demo models: from a sound to a picture, tuned weights, vectors, and what is refused."""

import gc
import types

import comfy.clip_vision
import pytest
import tiny
import tiny_clip
import torch
from storyweft.host import demo, joint, judges
from storyweft.host.joint import Embedding
from storyweft.models import imagebind
from storyweft.nodes import sound, sound_joint, sound_prompt
from storyweft.story.heard import typed_caption

import nodes


@pytest.fixture(scope="module")
def loaded():
    return demo.load_demo()


@pytest.fixture(scope="module")
def owl():
    return sound.DemoSound.execute("owl", 0.6, "forest", 0.3)[0]


@pytest.fixture(scope="module")
def heard(owl):
    caption = sound.AudioCaption.execute(owl, "demo")[0]
    return sound.SentenceAttention.execute(caption, "built-in word list")[0]


def test_demo_sounds_can_be_mixed_and_chained(owl):
    both = sound.DemoSound.execute("fox", 0.6, "none", 0.3, before=owl)[0]
    assert both["waveform"].shape[0] == 2 and both["waveform"].abs().max() <= 1
    assert torch.equal(both["waveform"][:1], owl["waveform"])
    with pytest.raises(ValueError, match="StoryweftDemoSound: voice is 'none' and place is 'none'"):
        sound.DemoSound.execute("none", 0.6, "none", 0.3)


def test_every_demo_voice_and_place_is_heard_as_what_it_is():
    voices, places = sound.demo_sounds.names()
    assert len(voices) == 8 and len(places) == 6
    right = []
    for index, voice in enumerate(voices):
        place = places[index % len(places)]
        caption = sound.AudioCaption.execute(sound.DemoSound.execute(voice, 0.7, place, 0.3)[0], "demo")[0][0]
        right += [voice in caption.words, place in caption.words]
    assert sum(right) >= 14


def test_captions_of_a_batch_and_of_windows(owl):
    both = sound.DemoSound.execute("robot", 0.7, "city", 0.3, before=owl)[0]
    captions, text, report, count = sound.AudioCaption.execute(both, "demo").args
    assert count == 2 and len(text.splitlines()) == 2 and "Sound 2, 1 windows" in report
    assert "owl" in text.splitlines()[0] and "robot" in text.splitlines()[1]
    long = {"waveform": torch.cat([both["waveform"][:1], both["waveform"][1:]], 2), "sample_rate": both["sample_rate"]}
    windows, text, _, count = sound.AudioCaption.execute(long, "demo", keep=sound.ALL).args
    assert count == 2 and [round(one.start, 1) for one in windows] == [0, 3.2]
    surest = sound.AudioCaption.execute(long, "demo")[0]
    assert len(surest) == 1 and surest[0].confidence == max(one.confidence for one in windows)


def test_one_sample_is_heard_and_silence_is_told():
    one = {"waveform": torch.full((1, 1, 1), 0.5), "sample_rate": 16000}
    assert sound.AudioCaption.execute(one, "demo")[3] == 1
    quiet = {"waveform": torch.randn(1, 1, 51200) * 1e-6, "sample_rate": 16000}
    assert "nearly silent" in sound.AudioCaption.execute(quiet, "demo")[2]
    with pytest.raises(ValueError, match="StoryweftAudioCaption: sound 1 of audio is all zeros"):
        sound.AudioCaption.execute({"waveform": torch.zeros(1, 1, 9), "sample_rate": 16000}, "demo")
    with pytest.raises(ValueError, match="StoryweftAudioCaption: captioner is .* and clip is not connected"):
        sound.AudioCaption.execute(one, sound.CORE)


def test_a_captioner_without_words_is_told(monkeypatch, owl):
    monkeypatch.setattr(sound.captioners.Act, "caption", lambda self, window, asked: ([], []))
    with pytest.raises(ValueError, match="StoryweftAudioCaption: the captioner has no words for sound 1 of audio"):
        sound.AudioCaption.execute(owl, "demo")


def test_a_sound_becomes_a_picture(loaded, heard):
    model, clip, vae, _ = loaded
    with torch.inference_mode():
        conditioning, same, report, count = sound_prompt.AudioCaptionEmbedding.execute(
            clip, heard, "code", restore="norm", model=model
        ).args
        assert same is model and count == 1 and "Rows of the prompt are scaled" in report
        plain = clip.encode_from_tokens_scheduled(clip.tokenize(heard[0].text))
        assert torch.equal(conditioning[0][1]["pooled_output"], plain[0][1]["pooled_output"])
        z, moved = plain[0][0], conditioning[0][0]
        assert moved.norm().item() == pytest.approx(z.norm().item(), rel=1e-5)
        ratio = (moved / z)[0].median(-1).values
        weights = sound_prompt.sound_prompt.weights_of(heard[0], "code", True, 1.0)
        torch.testing.assert_close(
            ratio[1 : len(weights) + 1] / ratio[0], torch.tensor(weights), atol=1e-4, rtol=0
        )
        off = sound_prompt.AudioCaptionEmbedding.execute(clip, heard, "code", strength=0.0)[0]
        assert torch.equal(off[0][0], z)
        negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        (drawn,) = nodes.KSampler().sample(model, 1, 2, 4.0, "ddim", "normal", conditioning, negative, latent)
        assert vae.decode(drawn["samples"]).isfinite().all()


def test_pictures_of_what_was_heard(owl, heard):
    shaded = sound_prompt.WordPicture.execute(heard, "code", width=320, font_size=20)[0]
    assert shaded.shape[0] == 1 and shaded.shape[2:] == (320, 3) and shaded.std() > 0.02
    bright = sound.Spectrogram.execute(owl, 128)[0]
    assert bright.shape[:2] == (1, 128) and bright.min() >= 0 and bright.max() <= 1
    tone = torch.sin(torch.arange(32000) * 2 * torch.pi * 500 / 16000)[None, None]
    low = sound.Spectrogram.execute({"waveform": tone, "sample_rate": 16000}, 128)[0]
    assert low[0, 64:].mean() > low[0, :64].mean()  # low notes lie below


def test_other_families_need_the_model_and_get_its_keys_weighted():
    caption = [typed_caption("a dog barks", "0.5 1 0.5", "0 1 0")]
    with pytest.raises(ValueError, match="StoryweftAudioCaptionEmbedding: .* connect the model"):
        sound_prompt.AudioCaptionEmbedding.execute(tiny_clip.z_image(), caption, "code")
    made, model, report, _ = sound_prompt.AudioCaptionEmbedding.execute(
        tiny_clip.z_image(), caption, "code", model=tiny.build("zimage")
    ).args
    marks = made[0][1][sound_prompt.sound_prompt.MARK]
    assert marks.shape[1] == made[0][0].shape[1] and (marks != 1).sum() >= 3 and "Keys are weighted" in report
    text, extras = made[0]
    positive = [[text, {key: value for key, value in extras.items() if key != "attention_mask"}]]
    with torch.inference_mode():
        got = tiny.sample(model, positive, positive, tiny.latent("zimage", 1), steps=1, cfg=1.0)
        plain = tiny.sample(tiny.build("zimage"), positive, positive, tiny.latent("zimage", 1), steps=1, cfg=1.0)
    assert not torch.allclose(got, plain, atol=1e-5)
    with pytest.raises(ValueError, match="a word weighs 0, which keys cannot"):
        silent = [typed_caption("a dog", "0 1", "0 1")]
        sound_prompt.AudioCaptionEmbedding.execute(
            tiny_clip.z_image(), silent, "code", False, model=tiny.build("zimage")
        )


@pytest.mark.parametrize(
    "caption, more, words",
    [
        (None, {}, "caption is NoneType"),
        ([], {}, "caption is list"),
        ([typed_caption("a dog")], {}, "caption 'a dog' has no noun probabilities"),
        ([typed_caption("a dog", "0.1 0.1", "0 0")], {"strength": 4.0}, "the word 'a' weighs -2"),
    ],
)
def test_captions_that_make_no_prompt_are_refused(caption, more, words):
    with pytest.raises(ValueError, match=f"StoryweftAudioCaptionEmbedding: {words}"):
        sound_prompt.AudioCaptionEmbedding.execute(tiny_clip.sd1(), caption, "code", **more)
    with pytest.raises(ValueError, match="StoryweftTypedCaption: audio attention has 3 numbers for 2 words"):
        sound.TypedCaption.execute("a dog", "1 1 1")


def test_tuning_lowers_the_loss_by_a_fifth_and_keeps_memory_flat(loaded, owl, heard, monkeypatch):
    model, clip, vae, _ = loaded
    judge = sound_prompt.LoadSoundJudge.execute("demo")[0]
    alive = []
    optimisation = sound_prompt.sound_sampling.Optimisation

    def counted(self, index, one):
        gc.collect()
        alive.append(sum(x.numel() for x in gc.get_objects() if isinstance(x, torch.Tensor)))

    monkeypatch.setattr(optimisation, "_report", counted)
    wrong = sound.SentenceAttention.execute([typed_caption("a snail in the snow by day")], "built-in word list")[0]
    with torch.inference_mode():
        found = sound_prompt.SoundOptimise.execute(
            model, clip, vae, wrong, owl, judge, 128, 128, 3, 8, 0.1, 4, 4.0, 1, "code", restore="norm", keep_prompt=0.0,
            method="ddim", scheduler="normal",
        )  # fmt: skip
    best, last, images, latents, report = found.args
    losses = [float(line.split("loss ")[1].split(" ")[0]) for line in report.splitlines()]
    assert min(losses) < 0.8 * losses[0]
    assert images.shape == (8, 128, 128, 3) and latents["samples"].shape == (8, 4, 16, 16)
    assert best[0][0].shape == last[0][0].shape == (1, 77, 96) and "pooled_output" in best[0][1]
    assert "(best)" in report.splitlines()[losses.index(min(losses))]
    steps = [after - before for before, after in zip(alive[2:], alive[3:], strict=False)]
    assert max(steps) < 4 * (3 * 128 * 128 + 77 * 96)  # a round leaves its picture and prompt, no graph
    assert not any(value.requires_grad or value.grad is not None for value in model.model.parameters())


def test_what_cannot_be_tuned_is_refused(loaded, owl, heard):
    model, clip, vae, _ = loaded
    judge = object()
    rest = (128, 128, 3, 2, 0.1, 4, 4.0)

    def tune(caption, model=model, calls=1, audio=owl):
        return sound_prompt.SoundOptimise.execute(
            model, clip, vae, caption, audio, judge, *rest, calls, "code", method="ddim"
        )

    with pytest.raises(ValueError, match="StoryweftSoundOptimise: caption holds 2 captions"):
        tune([*heard, *heard])
    with pytest.raises(ValueError, match="StoryweftSoundOptimise: gradient_calls is 9 of 4"):
        tune(heard, calls=9)
    with pytest.raises(ValueError, match="StoryweftSoundOptimise: Flux is no picture U-Net"):
        tune(heard, tiny.build("flux"))
    with pytest.raises(ValueError, match="StoryweftSoundOptimise: audio holds samples that are no numbers"):
        tune(heard, audio={"waveform": torch.full((1, 1, 9), float("nan")), "sample_rate": 16000})


# vectors


@pytest.fixture(scope="module")
def encoder():
    return sound_joint.LoadJointEncoder.execute("demo")[0]


def encode(encoder, **given):
    return sound_joint.JointEncode.execute(encoder, **given)[0]


def test_the_demo_encoders_share_one_space(encoder, owl):
    heard = encode(encoder, audio=owl)
    written = encode(encoder, text="an owl in the forest by day\n\na robot in the city at night")
    assert heard.vectors.shape == (1, 96) and written.vectors.shape == (2, 96)
    unit = torch.nn.functional.normalize
    near, far = (unit(heard.vectors, dim=-1) @ unit(written.vectors, dim=-1).T)[0]
    assert near > far + 0.2
    assert encode(encoder, image=torch.rand(2, 100, 80, 3)).vectors.shape == (2, 96)
    quiet = {"waveform": owl["waveform"] * 1e-5, "sample_rate": owl["sample_rate"]}
    assert "nearly silent" in sound_joint.JointEncode.execute(encoder, audio=quiet)[1]


def test_a_mixture_has_its_norm_and_its_ends(encoder, owl):
    heard, written = encode(encoder, audio=owl), encode(encoder, text="at night")

    def mix(first, second, weights=(1.0, 0.0), way="sum", **more):
        return sound_joint.EmbeddingMix.execute(first, weights[0], weights[1], 0.0, way, 20.0, second=second, **more)[0]

    alone = mix(heard, written)
    torch.testing.assert_close(alone.vectors, 20 * torch.nn.functional.normalize(heard.vectors, dim=-1))
    assert alone.modality == ""
    end = mix(heard, written, (0.0, 1.0), "great circle").vectors
    torch.testing.assert_close(end, 20 * torch.nn.functional.normalize(written.vectors, dim=-1), atol=1e-3, rtol=0)
    reference = comfy.clip_vision.Output()
    reference.image_embeds = torch.tensor([[3.0] + [0.0] * 95, [5.0] + [0.0] * 95])
    assert mix(heard, written, reference=reference).vectors.norm().item() == pytest.approx(4)
    with pytest.raises(ValueError, match="StoryweftEmbeddingMix: the weighted embeddings cancel each other"):
        mix(heard, heard, (0.5, -0.5))
    with pytest.raises(ValueError, match="different spaces \\(ImageBind 1024, demo 96\\)"):
        mix(heard, Embedding(torch.ones(1, 1024), "audio", "ImageBind"))
    with pytest.raises(ValueError, match="second_weight from 0 to 1"):
        mix(heard, written, (0.5, 1.5), "great circle")
    with pytest.raises(ValueError, match="second is str"):
        mix(heard, "x")


def test_what_cannot_be_encoded_is_refused(encoder, owl):
    with pytest.raises(ValueError, match="StoryweftJointEncode: audio, image and text are all empty"):
        encode(encoder, text=" \n ")
    with pytest.raises(ValueError, match="audio and image are both connected"):
        encode(encoder, audio=owl, image=torch.rand(1, 8, 8, 3))
    broken = types.SimpleNamespace(space="demo", text=lambda lines: torch.full((1, 96), float("nan")))
    with pytest.raises(ValueError, match="StoryweftJointEncode: the embedding of text holds no numbers"):
        encode(broken, text="an owl")
    with pytest.raises(ValueError, match="StoryweftLoadJointEncoder: ImageBind is CC BY-NC-SA 4.0"):
        sound_joint.LoadJointEncoder.execute("imagebind_huge.pth")


def imagebind_towers(modalities):
    size = {"width": 16, "depth": 1, "heads": 2, "out": 1024}
    sizes = {
        "audio": {**size, "tokens": 229, "patch": 16},
        "vision": {**size, "tokens": 257, "patch": 14},
        "text": {**size, "tokens": 77, "patch": 49408},
    }
    network = imagebind.ImageBind({name: sizes[name] for name in modalities})
    generator = torch.Generator().manual_seed(0)
    for value in network.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.2
    return network.train(False).requires_grad_(False)


def test_imagebind_goes_into_an_unclip_model(owl):
    encoder = joint.ImageBindEncoder(imagebind_towers(["audio"]), ("audio",), "N")
    heard = encode(encoder, audio=owl, clips=2)
    assert heard.vectors.shape == (1, 1024) and heard.space == "ImageBind"
    with pytest.raises(ValueError, match="the text tower of ImageBind was not loaded"):
        encode(encoder, text="an owl")
    vision, embeds = sound_joint.EmbeddingToVision.execute(heard).args
    assert torch.equal(vision.image_embeds, heard.vectors) and embeds.shape == (1, 1, 1024)
    positive = nodes.unCLIPConditioning().apply_adm([[torch.zeros(1, 77, 8), {}]], vision, 1.0, 0.0)[0]
    assert positive[0][1]["unclip_conditioning"][0]["clip_vision_output"] is vision
    for name in ("sd2", "sdxl"):
        with pytest.raises(ValueError, match="StoryweftEmbeddingToVision: .* takes no image embeddings of 1024"):
            sound_joint.EmbeddingToVision.execute(heard, tiny.build(name))
    with pytest.raises(ValueError, match="embedding has 768 numbers; ViT-H's have 1024"):
        sound_joint.EmbeddingToVision.execute(Embedding(torch.ones(1, 768), "audio", "ImageBind"))


def test_only_an_unclip_model_of_the_embeddings_width_takes_it():
    """unCLIP-h has 2048 numbers, of 1024 and as many for the noise level; unCLIP-l has 1536 of 768."""

    def model(takes, **parts):
        config = types.SimpleNamespace(unet_config={"adm_in_channels": takes})
        return types.SimpleNamespace(model=types.SimpleNamespace(model_config=config, **parts))

    joint.check_unclip(model(2048, noise_augmentor=None), 1024, "N")
    for wrong in (model(1536, noise_augmentor=None), model(2048), model(None)):
        with pytest.raises(ValueError, match="N: the model .* takes no image embeddings of 1024; load the unCLIP model sd21-unclip-h"):
            joint.check_unclip(wrong, 1024, "N")


def test_imagebind_judges_pictures_with_a_gradient(owl):
    with torch.inference_mode(False):
        judge = judges.ImageBindJudge(imagebind_towers(imagebind.MODALITIES))
    picture = torch.rand(1, 3, 32, 32, requires_grad=True)
    seen, _ = judge.see(picture)
    (seen * judge.audio(owl["waveform"][0, 0], owl["sample_rate"], "an owl")).sum().backward()
    assert picture.grad.abs().sum() > 0 and judge.text("an owl").shape == (1, 1024)


@pytest.fixture(scope="module")
def mapping():
    return sound_joint.LoadPromptMapping.execute("demo")[0]


def apply(mapping, embedding, way="replace text", **more):
    return sound_joint.ApplyPromptMapping.execute(mapping, embedding, way, **more)[0]


def test_a_mapped_prompt_replaces_or_follows_a_text(loaded, encoder, mapping, owl):
    clip = loaded[1]
    heard = encode(encoder, audio=owl)
    (alone, extras), *_ = apply(mapping, heard)
    assert alone.shape == (1, 77, 96) and extras == {}
    text = clip.encode_from_tokens_scheduled(clip.tokenize("an owl in the forest by day"))
    text[0][1]["attention_mask"] = torch.ones(1, 77)
    (longer, extras), *_ = apply(mapping, heard, "append to text", text=text)
    assert torch.equal(longer[:, :77], text[0][0]) and torch.equal(longer[:, 77:], alone[:, :8])
    assert torch.equal(extras["pooled_output"], text[0][1]["pooled_output"]) and "attention_mask" not in extras
    (half, _), *_ = apply(mapping, heard, text=text, strength=0.25)
    torch.testing.assert_close(half, 0.75 * text[0][0] + 0.25 * alone)
    (mean, _), *_ = apply(mapping, heard, gain=0.0)
    torch.testing.assert_close(mean[0], mapping.target_mean)
    near = torch.nn.functional.cosine_similarity(alone[0, 1:8].flatten(), text[0][0][0, 1:8].flatten(), dim=0)
    other = clip.encode_from_tokens_scheduled(clip.tokenize("a robot in the city at night"))[0][0]
    assert near > torch.nn.functional.cosine_similarity(alone[0, 1:8].flatten(), other[0, 1:8].flatten(), dim=0) + 0.1


def test_mappings_that_do_not_fit_are_refused(mapping, encoder, owl):
    heard = encode(encoder, audio=owl)
    with pytest.raises(ValueError, match="embedding is ImageBind 1024 and the mapping was trained on demo 96"):
        apply(mapping, Embedding(torch.ones(1, 1024), "audio", "ImageBind"))
    with pytest.raises(ValueError, match="way is 'append to text' and text is not connected"):
        apply(mapping, heard, "append to text")
    with pytest.raises(ValueError, match="makes rows of 96 and the text has 768"):
        apply(mapping, heard, text=[[torch.zeros(1, 77, 768), {}]])
    with pytest.raises(ValueError, match="rows is 99 and the mapping makes 77"):
        apply(mapping, heard, rows=99)
    with pytest.raises(ValueError, match="mapping is str"):
        apply("x", heard)
