"""The trainer of StoryGen's demo weights end to end, in a process of its own, and its file on the demo U-Net."""

import subprocess
import sys

import pytest
import torch
from loading import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from storyweft.host import story_gen_weights as weights
from storyweft.host.demo import WEIGHTS, load_unet
from storyweft.host.reference_pass import Capture
from storyweft.host.story_gen import ImagePatches

RUN = """
import argparse, sys, torch
from safetensors.torch import save_file
from training import loop, story_gen
folder = sys.argv[1]
sys.argv = ["", "--folder", folder, "--steps", "2", "--minutes", "0", "--stories", "2", "--batch", "2", "--precision", "no"]
story_gen.SHOWN = 1
story_gen.main()
args = argparse.Namespace(base="weights", stories=1, inside=4.0, seed=11)
model = story_gen.StoryTask(args).model
for prefix, site in zip((prefix for prefix, _ in model.blocks), model.sites):
    found = story_gen.safe_open(f"{folder}/storygen.safetensors", "pt")
    site.load_state_dict({key: found.get_tensor(prefix + key).float() for key in site.state_dict()})
generator = torch.Generator().manual_seed(0)
x, e = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
words = torch.randn(2, 77, 96, generator=generator)
t, r = torch.tensor([500, 500]), torch.tensor([50, 50])
with torch.no_grad():
    out = model(x, t, words, model.features(e, r, words))
save_file({"x": x, "e": e, "words": words, "out": out.contiguous()}, f"{folder}/out.safetensors")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("storygen")
    done = subprocess.run([sys.executable, "-c", RUN, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_what_the_trainer_writes_goes_onto_the_demo_unet_and_gives_the_trainers_numbers(folder):
    state, metadata = weights.read(str(folder / "storygen.safetensors"), "test")
    model = weights.add(load_unet(str(WEIGHTS)), state, metadata, "trained", "test")
    own, network = weights.weights_of(model, "test"), model.model.diffusion_model
    assert own.pixel_range == (-1.0, 1.0) and not own.sites.twice
    data, capture, options = load_file(folder / "out.safetensors"), Capture(), {}
    with torch.no_grad():
        reference = {"patches": {"middle_patch": [capture]}}
        network(data["e"], torch.tensor([50, 50]), context=data["words"], transformer_options=reference)
        ImagePatches(own.sites.modules(network), own.sites, [(slice(0, 2), capture.features.get)], 1.0).add_to(options)
        got = network(data["x"], torch.tensor([500, 500]), context=data["words"], transformer_options=options)
        plain = network(data["x"], torch.tensor([500, 500]), context=data["words"], transformer_options={})
    assert torch.allclose(got, data["out"], atol=2e-5)
    assert not torch.allclose(got, plain, atol=1e-2)


def test_the_file_says_what_it_was_trained_on_and_how_and_pictures_lie_beside_it(folder):
    with safe_open(folder / "storygen.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["steps"] == "2" and metadata["examples_seen"] == "4"
    assert metadata["prediction"] == "V_PREDICTION" and metadata["residual"] == "once"
    assert len(metadata["base"]) == 64
    assert {path.name for path in folder.iterdir()} >= {"storygen_samples.png", "storygen_loss.png", "storygen_state.pt"}
