"""Nodes of joint audio-video models: pictures and sound in and out, masks over time, the frame upsampler, refusals."""

import copy
import logging
from fractions import Fraction

import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_lt as core_av
import folder_paths
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import InputImpl, Types
from storyweft.host import frame_upsampler
from storyweft.models.frame_upsampler import FrameUpsampler
from storyweft.nodes import joint_av as basic
from storyweft.nodes import joint_av_media as media
from storyweft.nodes import joint_av_parts as parts
from tiny_joint import tiny_joint, tiny_weights

import nodes


@pytest.fixture(scope="module")
def model():
    return tiny_joint()


def call(node, *args, **kwargs):
    with torch.inference_mode():
        return node.execute(*args, **kwargs).result


def halves(latent):
    return latent["samples"].unbind()


def picture(frames=4, height=8, width=8, seed=0):
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


def tone(seconds=0.4, rate=200, channels=1):
    wave = torch.sin(torch.arange(round(seconds * rate)) / rate * 40) * 0.5
    return {"waveform": torch.stack([wave * (number + 1) for number in range(channels)])[None], "sample_rate": rate}


def video(frames, fps=10, audio=None):
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, audio=audio, frame_rate=Fraction(fps)))


def test_pictures_and_sound_come_back(model):
    frames, audio = picture(), tone()
    (latent,) = call(media.EncodeJointLatent, model, "both", images=frames, audio=audio, fps=10.0)
    assert [tuple(half.shape) for half in halves(latent)] == [(1, 3, 4, 8, 8), (1, 1, 80)]
    images, sound, videos, fps = call(media.DecodeJointLatent, latent, 0.0, 200)
    assert (images - frames).abs().max() < 1 / 254 and fps == 10.0
    assert torch.equal(sound["waveform"], audio["waveform"]) and sound["sample_rate"] == 200
    parts = videos[0].get_components()
    assert torch.equal(parts.images, images) and parts.frame_rate == 10 and parts.audio["waveform"].shape == (1, 1, 80)


def test_pictures_of_a_scaled_model_are_small_in_its_latents_and_whole_again_afterwards(model):
    scaled = model.clone()
    scaled.model = copy.copy(model.model)
    scaled.model.media = model.model.media._replace(video_scale=0.25)
    frames, audio = picture(), tone()
    (whole,) = call(media.EncodeJointLatent, model, "both", images=frames, audio=audio, fps=10.0)
    (small,) = call(media.EncodeJointLatent, scaled, "both", images=frames, audio=audio, fps=10.0)
    assert torch.equal(halves(small)[0] * 4, halves(whole)[0]) and torch.equal(halves(small)[1], halves(whole)[1])
    (masked,) = call(media.JointTimeMask, small, "both", 0.2, 0.0)
    assert torch.equal(call(media.DecodeJointLatent, masked)[0], call(media.DecodeJointLatent, whole)[0])
    assert call(media.EmptyJointLatent, scaled, 1)[0]["video_scale"] == 0.25


def test_a_video_is_cut_at_its_start_in_the_models_rates(model):
    frames = torch.linspace(0, 1, 60).view(60, 1, 1, 1).expand(60, 8, 8, 3).contiguous()
    left = torch.linspace(-1, 1, 1600)
    stereo = {"waveform": torch.stack([left, torch.ones(1600)])[None], "sample_rate": 800}
    (latent,) = call(media.EncodeJointLatent, model, "both", video=video(frames, 30, stereo), start=0.5, batch_size=3)
    shown, heard = halves(latent)
    assert len(shown) == len(heard) == 3 and torch.equal(shown[0], shown[2])
    got = ((shown[0, 0, :, 0, 0] + 1) / 2 * 59).round().tolist()
    assert got == [15, 18, 21, 24]
    wanted = left[400 : 400 + 320 : 4]
    assert (heard[0, 0, 8:-8] - wanted[8:-8]).abs().max() < 0.02 and heard.shape[-1] == 80


def test_only_what_is_kept_is_encoded_and_short_sources_end_in_silence(model):
    (latent,) = call(media.EncodeJointLatent, model, "video", video=video(picture(2), 10, tone()))
    assert halves(latent)[0].any() and not halves(latent)[1].any()
    assert torch.equal(halves(latent)[0][:, :, 1], halves(latent)[0][:, :, 3])
    (latent,) = call(media.EncodeJointLatent, model, "sound", audio=tone(0.1))
    assert not halves(latent)[0].any() and halves(latent)[1][..., :20].any() and not halves(latent)[1][..., 20:].any()


def test_every_clip_of_a_batch_becomes_a_video(model):
    (empty,) = call(media.EmptyJointLatent, model, 3)
    samples = NestedTensor([half + number for number, half in enumerate(halves(empty))])
    samples.tensors[1] = samples.tensors[1] * torch.tensor([0.5, 1.0, 4.0]).view(3, 1, 1)
    images, sound, videos, _ = call(media.DecodeJointLatent, {**empty, "samples": samples}, 0.0, 200)
    assert images.shape == (12, 8, 8, 3) and len(videos) == 3
    assert [one.get_components().audio["waveform"].max().item() for one in videos] == [0.5, 1.0, 1.0]
    assert sound["waveform"].shape == (3, 1, 80)


def test_a_rate_that_files_cannot_hold_is_raised(model, tmp_path):
    (latent,) = call(media.EncodeJointLatent, model, "both", images=picture(4, 64, 64), audio=tone())
    latent["samples"].tensors[0] = latent["samples"].tensors[0].repeat_interleave(8, -1).repeat_interleave(8, -2)
    _, sound, videos, _ = call(media.DecodeJointLatent, latent)
    assert sound["sample_rate"] == 8000 and sound["waveform"].shape == (1, 1, 3200)
    assert (sound["waveform"][..., ::40] - halves(latent)[1])[..., 8:-8].abs().max() < 0.02
    videos[0].save_to(str(tmp_path / "clip.mp4"))
    again = InputImpl.VideoFromFile(str(tmp_path / "clip.mp4")).get_components()
    assert len(again.images) == 4 and again.frame_rate == 10 and again.audio["waveform"].abs().max() > 0.2
    published = {**latent, "sample_rate": 16000}
    assert torch.equal(call(media.DecodeJointLatent, published)[1]["waveform"], halves(latent)[1])


def test_cores_own_nodes_split_and_join_the_pair(model):
    (latent,) = call(media.EncodeJointLatent, model, "both", images=picture(), audio=tone())
    (masked,) = call(media.JointTimeMask, latent, "both", 0.2, 0.0)
    separate = core_av.LTXVSeparateAVLatent.execute(masked).result
    (joined,) = core_av.LTXVConcatAVLatent.execute(*separate).result
    assert all(torch.equal(a, b) for a, b in zip(halves(joined), halves(latent), strict=True))
    assert joined["fps"] == 10.0
    drawn = call(basic.RandomShiftAVSampler, model, joined, "video and sound", 1, 2, "dpm_solver", "replacement", 0.0)[0]
    assert torch.equal(halves(drawn)[0][:, :, :2], halves(latent)[0][:, :, :2])
    assert torch.equal(halves(drawn)[1][..., :40], halves(latent)[1][..., :40])
    assert not torch.equal(halves(drawn)[1][..., 40:], halves(latent)[1][..., 40:]) and "noise_mask" in drawn


def test_time_masks_add_up(model):
    (latent,) = call(media.EncodeJointLatent, model, "both", images=picture(), audio=tone())
    (once,) = call(media.JointTimeMask, latent, "video", 0.0, 0.1)
    (twice,) = call(media.JointTimeMask, once, "sound", 0.3, 0.0)
    shown, heard = twice["noise_mask"].unbind()
    assert shown[0, 0, :, 0, 0].tolist() == [1, 0, 0, 0] and shown.shape == (1, 1, 4, 8, 8)
    assert heard[0, 0].tolist() == [0.0] * 60 + [1.0] * 20
    assert not once["noise_mask"].unbind()[1].any() and "noise_mask" not in latent


@pytest.mark.parametrize("method", ["euler", "ddpm", "dpm"])
def test_parts_for_experts_work_with_cores_custom_sampler(model, method):
    (latent,) = call(media.EncodeJointLatent, model, "both", images=picture(), audio=tone())
    (latent,) = call(media.JointTimeMask, latent, "sound", 0.2, 0.0)
    (conditioning,) = call(basic.NoPrompt)
    sampler = {"euler": lambda: custom.KSamplerSelect.execute("euler").result,
               "ddpm": lambda: call(parts.DDPMSampler, 0.5), "dpm": lambda: call(parts.DPMSolverSampler)}[method]()[0]  # fmt: skip
    (sigmas,) = call(parts.RespacedSigmas, model, {"euler": "ddim4", "ddpm": "4", "dpm": "dpm4"}[method])
    with torch.inference_mode():
        out, denoised = custom.SamplerCustom.execute(
            model, True, 3, 1.0, conditioning, conditioning, sampler, sigmas, latent
        ).result
    assert torch.equal(halves(out)[0], halves(latent)[0])
    assert torch.equal(halves(out)[1][..., :40], halves(latent)[1][..., :40])
    assert halves(out)[1][..., 40:].isfinite().all() and out["sample_rate"] == 200
    assert [half.shape for half in halves(denoised)] == [half.shape for half in halves(out)]


def test_the_expert_parts_and_the_one_node_draw_the_same(model):
    (empty,) = call(media.EmptyJointLatent, model, 1)
    (conditioning,) = call(basic.NoPrompt)
    for method, sampler, text in (
        ("ddpm", call(parts.DDPMSampler, 0.0)[0], "4"),
        ("dpm_solver", call(parts.DPMSolverSampler)[0], "dpm4"),
    ):
        one = call(basic.RandomShiftAVSampler, model, empty, "video and sound", 8, 4, method, "replacement", 0.0)[0]
        (sigmas,) = call(parts.RespacedSigmas, model, text)
        with torch.inference_mode():
            other = custom.SamplerCustom.execute(model, True, 8, 1.0, conditioning, conditioning, sampler, sigmas, empty).result[0]
        assert all(torch.equal(a, b) for a, b in zip(halves(one), halves(other), strict=True))


def test_sigmas_are_the_authors(model):
    table = model.get_model_object("model_sampling").sigmas
    (sigmas,) = call(parts.RespacedSigmas, model, "ddim25")
    assert torch.equal(sigmas[:-1], table[list(range(960, -1, -40))]) and sigmas[-1] == 0
    (knots,) = call(parts.RespacedSigmas, model, "dpm20")
    assert len(knots) == 21 and abs(knots[0] - table[-1]) < 1e-3 and abs(knots[-1] / table[0] - 1) < 1e-3
    assert (knots.log().diff() - knots.log().diff()[0]).abs().max() < 1e-4


ENCODE = [
    ({"keep": "both", "audio": tone()}, 'keep is "both", but neither images nor video'),
    ({"keep": "video"}, 'keep is "video", but neither images nor video'),
    ({"keep": "sound", "video": video(picture())}, 'keep is "sound", but there is no sound'),
    ({"keep": "both", "images": picture()}, 'keep is "both", but there is no sound'),
    ({"keep": "video", "images": picture(), "video": video(picture())}, "video and images are both connected"),
    ({"keep": "video", "images": picture(), "fps": 0.0}, "fps 0 must be above 0"),
    ({"keep": "video", "images": picture() * torch.nan}, "images hold numbers that are not finite"),
    ({"keep": "sound", "audio": {"waveform": torch.zeros(1, 1, 5)}}, "audio has no sample rate"),
    ({"keep": "sound", "audio": {"waveform": torch.zeros(1, 1, 0), "sample_rate": 9}}, "audio holds no samples"),
    ({"keep": "sound", "audio": {"waveform": torch.full((1, 1, 5), torch.inf), "sample_rate": 9}}, "audio holds numbers that"),
]


@pytest.mark.parametrize(("inputs", "says"), ENCODE)
def test_what_cannot_be_encoded_is_refused(model, inputs, says):
    with pytest.raises(ValueError, match=says) as found:
        call(media.EncodeJointLatent, model, **inputs)
    assert str(found.value).startswith("StoryweftEncodeJointLatent: ")


def test_a_silent_source_is_said(model, caplog):
    with caplog.at_level(logging.WARNING):
        call(media.EncodeJointLatent, model, "sound", audio={"waveform": torch.zeros(1, 2, 80), "sample_rate": 200})
    assert "audio is silent" in caplog.text


def test_other_models_and_latents_are_refused(model):
    stranger = type("Stranger", (), {"model": torch.nn.Linear(1, 1)})()
    (latent,) = call(media.EmptyJointLatent, model, 1)
    plain = {"samples": torch.zeros(1, 4, 8, 8)}
    run = (1, 4, "ddpm", "replacement", 0.0)
    cases = [
        (lambda: call(media.EmptyJointLatent, stranger, 1), "model is a Linear"),
        (lambda: call(media.EncodeJointLatent, stranger, "both"), "model is a Linear"),
        (lambda: call(basic.RandomShiftAVSampler, stranger, latent, "video and sound", *run), "model is a Linear"),
        (lambda: call(basic.RandomShiftAVSampler, model, plain, "video and sound", *run), "latent is one tensor"),
        (lambda: call(media.DecodeJointLatent, plain), "is not a pair of video"),
        (lambda: call(media.DecodeJointLatent, {"samples": latent["samples"]}), "does not say its rates"),
        (lambda: call(media.JointTimeMask, plain, "video", 0.0, 0.0), "is not a pair of video"),
        (lambda: call(media.JointTimeMask, {"samples": latent["samples"]}, "video", 0.0, 0.0), "frames a second"),
        (lambda: call(media.JointTimeMask, latent, "video", 0.4, 0.0), "nothing of the video lies from 0.4 to 0.4"),
        (lambda: call(media.JointTimeMask, latent, "sound", 0.3, 0.2), "nothing of the sound lies"),
        (lambda: call(parts.RespacedSigmas, model, "often"), 'StoryweftRespacedSigmas: respacing "often"'),
        (lambda: call(parts.RespacedSigmas, model, "dpm"), "number of evaluations"),
        (lambda: basic.numbers("1, x"), 'windows "1, x"'),
    ]  # fmt: skip
    for attempt, says in cases:
        with pytest.raises(ValueError, match=says):
            attempt()


@pytest.mark.parametrize(
    ("keep", "task", "method", "guidance", "says"),
    [("both", "video to sound", "ddpm", "replacement", "latent holds both video and sound"),
     (None, "video to sound", "ddpm", "replacement", "needs a video in latent"),
     (None, "sound to video", "ddpm", "replacement", "needs a sound in latent"),
     ("video", "video to sound", "dpm_solver", "gradient", 'guidance "gradient" needs a given half and method "ddpm"'),
     (None, "video and sound", "ddpm", "gradient", "needs a given half")],
)  # fmt: skip
def test_tasks_that_do_not_fit_the_latent_are_refused(model, keep, task, method, guidance, says):
    if keep is None:
        (latent,) = call(media.EmptyJointLatent, model, 1)
    else:
        (latent,) = call(media.EncodeJointLatent, model, keep, images=picture(), audio=tone())
    with pytest.raises(ValueError, match=says):
        call(basic.RandomShiftAVSampler, model, latent, task, 1, 4, method, guidance, 1.0)


def test_strength_without_anything_given_is_refused(model):
    (empty,) = call(media.EmptyJointLatent, model, 1)
    (conditioning,) = call(basic.NoPrompt)
    (sigmas,) = call(parts.RespacedSigmas, model, "2")
    with pytest.raises(ValueError, match="StoryweftDDPMSampler: strength needs"), torch.inference_mode():
        custom.SamplerCustom.execute(
            model, True, 1, 1.0, conditioning, conditioning, call(parts.DDPMSampler, 1.0)[0], sigmas, empty
        )


@pytest.fixture()
def files(tmp_path):
    folder_paths.add_model_folder_path("diffusion_models", str(tmp_path))
    torch.save(tiny_weights(), tmp_path / "joint.pt")
    torch.manual_seed(2)
    network = FrameUpsampler(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,))
    torch.save(network.state_dict(), tmp_path / "up.pt")
    torch.save({"label_emb.weight": torch.zeros(2, 2)}, tmp_path / "openai.pt")
    yield tmp_path
    folder_paths.folder_names_and_paths["diffusion_models"][0].remove(str(tmp_path))


def test_loaders_read_from_the_models_folder(files):
    (loaded,) = call(basic.JointAVLoader, "joint.pt", "2", 16)
    assert loaded.model.media.samples == 25600 and loaded.model.diffusion_model.windows == {2: 2}
    with pytest.raises(ValueError, match="StoryweftFrameUpsamplerLoader: openai.pt: label_emb.weight"):
        call(parts.FrameUpsamplerLoader, "openai.pt")
    with pytest.raises(ValueError, match="StoryweftJointAVLoader: up.pt: these are not the weights"):
        call(basic.JointAVLoader, "up.pt")
    with pytest.raises(ValueError, match="StoryweftFrameUpsamplerLoader: joint.pt: these are not the weights"):
        call(parts.FrameUpsamplerLoader, "joint.pt")


def upscaled(model, images, same_noise=True):
    conditioning, latent = call(parts.UpscaleFrames, images, 4, same_noise)
    with torch.inference_mode():
        (out,) = nodes.KSampler().sample(model, 5, 3, 1.0, "euler", "normal", conditioning, conditioning, latent)
    return call(parts.FramesToImages, out)[0]


def test_a_clip_is_enlarged_frame_by_frame_with_one_noise(files, monkeypatch):
    (model,) = call(parts.FrameUpsamplerLoader, "up.pt", "fp32")
    images = picture(3, 4, 4)
    images[2] = images[0]
    large = upscaled(model, images)
    assert large.shape == (3, 16, 16, 3)
    assert (large[2] - large[0]).abs().max() < 1e-5  # alike frames stay alike
    assert (upscaled(model, images[:1])[0] - large[0]).abs().max() < 1e-4  # and do not know the others
    monkeypatch.setattr(frame_upsampler, "FRAMES_AT_ONCE", 1)
    assert (upscaled(model, images) - large).abs().max() < 1e-4
    other = upscaled(model, images, same_noise=False)
    assert (other[2] - other[0]).abs().max() > 0.01


def test_what_an_upsampler_cannot_take_is_refused(files):
    (model,) = call(parts.FrameUpsamplerLoader, "up.pt")
    conditioning, latent = call(parts.UpscaleFrames, picture(2, 4, 4))

    def sample(samples, conditioning=conditioning, cfg=1.0):
        with torch.inference_mode():
            nodes.KSampler().sample(model, 5, 1, cfg, "euler", "normal", conditioning, conditioning, {"samples": samples})

    empty = latent["samples"]
    for attempt, says in [
        (lambda: sample(torch.ones(2, 4, 16, 16)), "must be frames of 3 channels"),
        (lambda: sample(empty[..., :15]), "multiples of 2"),
        (lambda: sample(empty * torch.nan), "not finite"),
        (lambda: sample(empty[:1]), "positive holds 2 frames, latent_image 1"),
        (lambda: sample(empty, call(basic.NoPrompt)[0]), "positive holds no frames to enlarge"),
        (lambda: sample(empty, cfg=2.0), "cfg 2 must be 1"),
        (lambda: call(parts.UpscaleFrames, torch.rand(2, 4, 4, 4)), "images have 4 channels"),
        (lambda: call(parts.FramesToImages, {"samples": torch.zeros(1, 4, 8, 8)}), "must be frames of 3 channels"),
    ]:
        with pytest.raises(ValueError, match=says):
            attempt()
