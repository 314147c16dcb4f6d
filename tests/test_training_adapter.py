"""The trainer of image adapters as it is started from the command line, on models that were not released yet."""

import shutil

import pytest
from loading import ROOT
from PIL import Image
from safetensors.torch import load_file
from training_runs import outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    for name in ("unet", "clip", "autoencoder"):
        shutil.copy(ROOT / "weights" / f"{name}.safetensors", folder)
    (folder / "own").mkdir()
    for name in ("one", "two", "three"):
        Image.new("RGB", (80, 64), (90, 40, 10)).save(folder / "own" / f"{name}.png")
        (folder / "own" / f"{name}.txt").write_text(f"a {name}")
    own = ["--folder", str(folder), "--pictures", str(folder / "own"), "--side", "64", "--batch", "2"]
    own += ["--steps", "2", "--minutes", "0", "--warmup", "1"]
    again = [*own, "--name", "again", "--start", str(folder / "adapter.safetensors"), "--dry-run"]
    return dict(zip(("own", "again"), outputs("training.adapter", [own, again]), strict=True)), folder


def test_it_writes_the_published_layout_and_goes_on_from_it(runs):
    told, folder = runs
    assert told["own"].endswith("done"), told
    found, shipped = (load_file(place / "adapter.safetensors") for place in (folder, ROOT / "weights"))
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in shipped.items()}
    assert found["ip_adapter.1.to_v_ip.weight"].any() and (folder / "adapter_samples.png").exists()
    assert "2 pictures with captions" in told["again"] and not (folder / "again.safetensors").exists()
