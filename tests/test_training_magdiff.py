"""The trainer of MagDiff's parts as it is started from the command line, on tiny amounts of data."""

import pytest
import torch
from loading import ROOT
from PIL import Image
from safetensors.torch import load_file
from storyweft.host import magdiff
from training_runs import outputs

STEPS = ["--steps", "2", "--minutes", "0", "--batch", "4", "--cpu", "--count", "4", "--warmup", "1", "--rate", "0.05"]


def subjects(folder):
    """Three pictures with masks in their alpha channels and captions, and one without."""
    folder.mkdir()
    for name in ("one", "two", "three", "bare"):
        picture = Image.new("RGB", (80, 64), (90, 40, 10))
        if name != "bare":
            mask = Image.new("L", picture.size)
            mask.paste(255, (20, 10, 50, 40))
            picture.putalpha(mask)
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name}")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("magdiff")
    base = ["--folder", str(folder), *STEPS]
    own = [*base, "--subjects", str(subjects(folder / "own")), "--side", "64"]
    options = {
        "alone": base,
        "along": [*own, "--adapter", "--name", "along"],
        "dry": [*base, "--dry-run", "--name", "dry"],
        "own": [*own, "--name", "own", "--dry-run"],
        "alone_checkpoint": [*base, "--checkpoint", "some.safetensors"],
        "clips": [*base, "--frames", "4"],
    }
    return dict(zip(options, outputs("training.magdiff", list(options.values())), strict=True)), folder


def test_all_three_parts_are_trained_from_their_start(runs):
    told, folder = runs
    assert told["alone"].endswith("done"), told
    loaded = magdiff.load(str(folder / "magdiff.safetensors"), "Test")
    assert loaded.adapter is None and len(loaded.metadata["base_model"]) == 64 == len(loaded.metadata["image_adapter"])
    network = loaded.network
    assert network.scales == (1.5, 1.25, 1.0) and len(network.alpha_text) == 7
    assert network.conv_in.any() and (network.alpha_text != 1).any() and (network.alpha_image != 1.5).any()
    assert (folder / "magdiff_samples.png").exists()
    fresh = type(network)(7, network.conv_in.shape[0])
    assert not torch.equal(network.pyramid.conv.weight, fresh.pyramid.conv.weight)


def test_the_adapter_is_written_beside_when_it_is_trained_along(runs):
    told, folder = runs
    assert told["along"].endswith("done"), told
    loaded = magdiff.load(str(folder / "along.safetensors"), "Test")
    given = load_file(ROOT / "weights" / "adapter.safetensors")["image_proj.proj.weight"]
    assert not torch.equal(loaded.adapter.network.image_proj.proj.weight, given)
    assert magdiff.with_alphas(None, loaded, "Test").network is loaded.adapter.network


def test_a_dry_run_says_what_it_needs_and_writes_nothing(runs):
    told, folder = runs
    assert "4 pictures, each with the character kept and with the rest kept" in told["dry"]
    assert "s a step of 4 examples" in told["dry"] and not (folder / "dry.safetensors").exists()


def test_a_folder_of_subjects_is_checked_without_training(runs):
    told, folder = runs
    assert "2 pictures, each with the character kept" in told["own"] and "1 more for samples" in told["own"], told
    assert "left out:" in told["own"] and "bare.png: it has no bare.mask.png and no alpha channel" in told["own"]
    assert not (folder / "own.safetensors").exists()


def test_what_is_missing_is_named(runs):
    told, _ = runs
    assert "--checkpoint needs --adapter-file, an image adapter of its family, and --encoder" in told["alone_checkpoint"]
    assert "--frames 4; give a multiple of 64, and clips only with --subjects" in told["clips"]
