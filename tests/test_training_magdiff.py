"""The trainer of MagDiff's parts as it is started from the command line, on tiny amounts of data."""

import pytest
import torch
from loading import ROOT
from safetensors.torch import load_file
from storyweft.host import magdiff
from training_runs import outputs

STEPS = ["--steps", "2", "--minutes", "0", "--batch", "4", "--cpu", "--count", "4", "--warmup", "1", "--rate", "0.05"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("magdiff")
    base = ["--folder", str(folder), *STEPS]
    options = {
        "alone": base,
        "along": [*base, "--adapter", "--name", "along"],
        "dry": [*base, "--dry-run", "--name", "dry"],
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
