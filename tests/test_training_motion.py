"""The trainer of the Semantic Motion Predictor as it is started from the command line, on tiny amounts of data."""

import av
import numpy as np
import pytest
import torch
from loading import ROOT
from safetensors import safe_open
from training_runs import outputs

STEPS = ["--steps", "2", "--minutes", "0", "--batch", "2", "--cpu", "--clips", "10"]


def film(path, frames):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=16)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(frames):
            picture = np.full((64, 96, 3), 7 * index, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Outputs by name, and the folder that was written to."""
    folder = tmp_path_factory.mktemp("motion")
    videos, empty = folder / "videos", folder / "empty"
    for path in (videos, empty):
        path.mkdir()
    for name in ("one", "two"):
        film(videos / f"{name}.mp4", 34)
    film(videos / "short.mp4", 6)
    (videos / "broken.mp4").write_bytes(b"no video at all")
    base = ["--folder", str(folder), *STEPS]
    options = {
        "first": [*base, "--name", "first"],
        "second": [*base, "--stage", "video", "--start", str(folder / "first.safetensors"), "--precision", "bf16"],
        "adapter": [*base, "--stage", "video", "--start", str(folder / "first.safetensors"), "--adapter-only", "--name", "adapter"],
        "videos": [*base, "--videos", str(videos), "--dry-run"],
        "empty": [*base, "--videos", str(empty)],
        "film": [*base, "--videos", str(videos), "--stage", "video", "--dry-run"],
        "missing": [*base, "--videos", str(videos), "--stage", "video", "--checkpoint", str(folder / "no.safetensors")],
    }
    return dict(zip(options, outputs("training.motion_predictor", list(options.values())), strict=True)), folder


def stored(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def test_stage_one_then_stage_two_make_a_file_of_both(runs):
    told, folder = runs
    assert told["first"].endswith("done") and told["second"].endswith("done"), told
    tensors, metadata = stored(folder / "first.safetensors")
    assert metadata["encoder"] == "clip-128x3-96" and metadata["heads"] == "3" and metadata["pinned"] == "true"
    assert float(metadata["middle_error_over_interpolation"]) > 0
    assert tensors["out_proj.weight"].any() and tensors["out_proj.weight"].dtype == torch.float16
    both, metadata = stored(folder / "motion.safetensors")
    assert set(tensors) < set(both) and {"image_proj.proj.weight", "ip_adapter.13.to_v_ip.weight"} <= set(both)
    assert not [
        key for key in both if "unet" in key or "time_" in key
    ]  # the video model is not trained and not written
    assert len(metadata["video_model"]) == 64 and len(metadata["base_model"]) == 64
    adapter, _ = stored(ROOT / "weights" / "adapter.safetensors")
    moved = [key for key in adapter if not torch.equal(adapter[key], both[key])]
    assert "ip_adapter.13.to_v_ip.weight" in moved and "image_proj.proj.weight" in moved
    alone, _ = stored(folder / "adapter.safetensors")
    assert set(alone) == set(both) and all(torch.equal(alone[key], tensors[key]) for key in tensors)
    assert (folder / "motion_samples.png").exists() and (folder / "first_state.pt").exists()


def test_a_folder_of_videos_is_cut_into_clips(runs):
    told, folder = runs
    for name in ("videos", "film"):  # 17 frames at 8 a second in each: two clips
        assert "3 clips of 8 frames, 1 more held out" in told[name], told
        assert "short.mp4 has 3 frames at 8.0 a second, fewer than 8" in told[name] and "broken.mp4" in told[name]
    assert "would write" in told["film"]


def test_what_cannot_be_trained_is_named(runs):
    told, _ = runs
    assert "no clip of 8 frames in" in told["empty"] and "no video file at all" in told["empty"]
    assert "no.safetensors and there is no such file" in told["missing"]
