"""The joint audio-video trainer end to end on a folder of videos: preparation, training, going on, dry run, sampling."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from storyweft.models.joint_unet import JointUNet, configuration
from storyweft.training import joint_data, joint_unet, loop, sounds

SMALL = ["--size", "16", "--mult", "1", "1", "--cross", "2", "--windows", "4", "--attention", "2", "--batch", "2"]
SMALL += ["--precision", "no", "--cpu", "--minutes", "0", "--shown", "1", "--shown-steps", "2", "--sound-rate", "1000"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of the demo world and one that is silent film."""
    folder = tmp_path_factory.mktemp("videos")
    for index in range(2):
        clip = sounds.sample_clip(np.random.default_rng((1, index)))
        sounds.write_video(folder / f"{index}.mkv", clip.frames, clip.waveform, sounds.RATE)
    with av.open(str(folder / "film.mkv"), "w", format="matroska") as file:
        stream = file.add_stream("ffv1", rate=Fraction(10))
        stream.height, stream.width, stream.pix_fmt = 32, 32, "bgr0"
        for image in clip.frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        file.mux(stream.encode(None))
    return folder


def train(videos, folder, *options):
    AcceleratorState._reset_state(True)
    args = joint_unet.parsed(["--data", str(videos), "--folder", str(folder), *SMALL, *options])
    run = loop.Loop(joint_unet.Task(args), args)
    run.run()
    return run


def test_training_on_a_folder_goes_on_where_it_stopped(videos, tmp_path):
    whole = train(videos, tmp_path / "whole", "--steps", "4", "--decay", "0")
    train(videos, tmp_path / "parts", "--steps", "2", "--decay", "0")
    parts = train(videos, tmp_path / "parts", "--steps", "4", "--decay", "0")
    moved = 0.0
    for one, other in zip(whole.trained + whole.average, parts.trained + parts.average, strict=True):
        assert torch.equal(one, other)
        moved += one.abs().sum().item()
    assert moved > 0 and whole.task.model.video_out[-1].video_conv.weight.abs().sum() > 0
    with safe_open(tmp_path / "parts" / "joint_av.safetensors", "pt") as file:
        found, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    config = json.loads(found["config"])
    assert (config["frames"], config["height"], config["samples"], config["sample_rate"]) == (16, 16, 1600, 1000)
    told = configuration(tensors)
    assert told["channel_mult"] == tuple(config["channel_mult"]) == (1, 1)
    net = JointUNet(**told, windows=config["windows"], head_channels=config["head_channels"])
    net.load_state_dict(tensors)  # strict
    assert found["steps"] == "4" and found["world"] == str(videos) and found["shift"] == "random"
    for name in ("joint_av_samples.png", "joint_av_loss.png"):
        assert Image.open(tmp_path / "parts" / name).size[0] > 16


def test_dry_run_says_what_is_left_out_and_writes_nothing(videos, tmp_path, capsys):
    train(videos, tmp_path / "out", "--steps", "100", "--dry-run")
    told = capsys.readouterr().out
    assert "2 examples of 16 frames (16, 16) and 1600 samples" in told
    assert "film.mkv has no sound" in told and "100 steps" in told
    assert not (tmp_path / "out").exists()


def test_a_video_of_the_demo_world_comes_back_as_it_was_drawn(videos):
    clip = sounds.sample_clip(np.random.default_rng((1, 0)))
    frames, heard = joint_data.read_video(videos / "0.mkv", 32, 10, 4000)
    assert np.array_equal(frames.permute(0, 2, 3, 1).numpy(), clip.frames)
    assert np.allclose(heard.numpy(), clip.waveform, atol=1e-3)
    doubled = joint_data.read_video(videos / "0.mkv", 32, 20, 4000)
    assert len(doubled[0]) in (31, 32) and torch.equal(doubled[0][::2][:15], frames[:15])
    halved = joint_data.read_video(videos / "0.mkv", 32, 5, 4000)
    assert torch.equal(halved[0], frames[::2]) and len(halved[1]) == 6400


def test_wide_pictures_get_bars_and_stereo_its_left_channel(tmp_path):
    with av.open(str(tmp_path / "wide.mkv"), "w", format="matroska") as file:
        video, audio = file.add_stream("ffv1", rate=Fraction(10)), file.add_stream("pcm_f32le", rate=4000)
        audio.layout, video.height, video.width, video.pix_fmt = "stereo", 20, 40, "bgr0"
        for _ in range(3):
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.full((20, 40, 3), 200, np.uint8), "rgb24")))
        block = av.AudioFrame.from_ndarray(np.tile(np.array([0.5, -0.25], np.float32), 800)[None], "flt", "stereo")
        block.sample_rate, block.pts = 4000, 0
        for stream, last in ((audio, block), (audio, None), (video, None)):
            file.mux(stream.encode(last))
    clips, left_out = joint_data.folder_clips(tmp_path, 4, 16, 10, 4000)
    video, audio = clips.batch(torch.tensor([0]))
    assert not left_out and video.shape == (1, 4, 3, 16, 16) and audio.shape == (1, 1, 1600)
    assert (video[:, :, :, :4] == -1).all() and (video[:, :, :, 12:] == -1).all()
    assert torch.allclose(video[:, :, :, 4:12], torch.tensor(200 / 127.5 - 1))
    assert torch.equal(video[:, 3], video[:, 2])  # the last frame again
    assert (audio[0, 0, :800] == 0.5).all() and (audio[0, 0, 1200:] == 0).all()  # then silence


def test_an_example_begins_at_every_frame_that_has_enough_after_it(videos):
    clips, _ = joint_data.folder_clips(videos, 12, 16, 10, 1000)
    assert len(clips) == 2 * 5
    video, audio = clips.batch(torch.tensor([0, 1, 5]))
    assert torch.equal(video[0, 1:], video[1, :-1]) and torch.equal(audio[0, 0, 100:], audio[1, 0, :-100])
    assert not torch.equal(video[0], video[2])


def test_bad_folders_are_refused(tmp_path, videos):
    with pytest.raises(ValueError, match="no video with sound in .*no video file at all"):
        joint_data.folder_clips(tmp_path, 16, 16, 10, 1000)
    with pytest.raises(ValueError, match="--sound-rate 1001 is not a multiple of --fps 10"):
        joint_data.folder_clips(videos, 16, 16, 10, 1001)
    with pytest.raises(ValueError, match="too few for 16 frames"):
        train(videos, tmp_path, "--steps", "1", "--sound-rate", "20")


def test_weight_spends_less_on_small_noise_and_none_is_the_papers_loss():
    t = torch.arange(1000)
    snr = joint_unet.ALPHAS / (1 - joint_unet.ALPHAS)
    assert (joint_unet.weight(t, 0) == 1).all()
    found = joint_unet.weight(t, 0.1)
    torch.testing.assert_close(found.mean(), torch.tensor(1.0))
    strong = snr < 0.1
    assert (found[strong] == found[-1]).all() and found[-1] > 1
    torch.testing.assert_close(found[~strong] * snr[~strong], (found[-1] * 0.1).expand(int((~strong).sum())))

    # what is a quarter as strong is a sixteenth of the SNR
    torch.testing.assert_close(joint_unet.weight(t, 0.1, 0.25), joint_unet.weight(t, 1.6))


def test_video_scale_makes_the_pictures_smaller_and_the_file_says_so(videos, tmp_path):
    scaled = train(videos, tmp_path / "a", "--steps", "1", "--video-scale", "0.25")
    whole = train(videos, tmp_path / "b", "--steps", "1", "--video-scale", "1")
    index = torch.arange(2)
    assert torch.equal(scaled.task.halves(index)[0] * 4, whole.task.halves(index)[0])
    assert torch.equal(scaled.task.halves(index)[1], whole.task.halves(index)[1])
    assert scaled.task.config["video_scale"] == 0.25
    with pytest.raises(SystemExit):
        joint_unet.parsed(["--video-scale", "2"])


def test_start_goes_on_from_the_weights_of_a_file(videos, tmp_path):
    first = train(videos, tmp_path / "first", "--steps", "2")
    file = tmp_path / "first" / "joint_av.safetensors"
    begun = joint_unet.Task(joint_unet.parsed(["--data", str(videos), *SMALL, "--seed", "3", "--start", str(file)]))
    for one, other in zip(begun.model.parameters(), first.average, strict=True):
        torch.testing.assert_close(one.data, other.cpu(), atol=2e-3, rtol=1e-3)  # kept in half precision
    assert begun.metadata["start"] == loop.file_hash(file)


def test_group_norm_of_contiguous_copies_is_the_same():
    torch.manual_seed(1)
    x = torch.randn(2, 5, 7, 32).permute(0, 3, 1, 2).requires_grad_()
    y = x.detach().contiguous().requires_grad_()
    weight, bias = torch.randn(32), torch.randn(32)
    one, other = joint_unet.contiguous(x, 8, weight, bias), torch.nn.functional.group_norm(y, 8, weight, bias)
    torch.testing.assert_close(one, other)
    given = torch.randn_like(one)
    one.backward(given)
    other.backward(given)
    torch.testing.assert_close(x.grad, y.grad)


def perfect(clean_video, clean_audio):
    """The noise predictor of a world of one clip."""

    def model(video, audio, t, shifts=None):
        a = joint_unet.ALPHAS[t[0]]
        return tuple((x - a.sqrt() * c) / (1 - a).sqrt() for x, c in ((video, clean_video), (audio, clean_audio)))

    return model


def test_sampling_finds_the_one_clip_and_keeps_a_given_half():
    torch.manual_seed(2)
    clean = torch.rand(1, 3, 4, 8, 8) * 2 - 1, torch.rand(1, 1, 64) * 2 - 1
    noise = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 1, 64)
    video, audio = joint_unet.ddim(perfect(*clean), *noise, steps=10)
    torch.testing.assert_close(video, clean[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(audio, clean[1], atol=1e-3, rtol=0)
    given = torch.rand(1, 1, 64)
    seen = []

    def model(video, audio, t, shifts=None):
        a = joint_unet.ALPHAS[t[0]]
        seen.append((audio - a.sqrt() * given - (1 - a).sqrt() * noise[1]).abs().max().item())
        return perfect(*clean)(video, audio, t)

    video, audio = joint_unet.ddim(model, *noise, steps=5, known=(None, given))
    assert torch.equal(audio, given) and max(seen) < 1e-6 and len(seen) == 5
