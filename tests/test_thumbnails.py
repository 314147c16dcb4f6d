"""The template browser has a picture of every workflow that runs on the demo models."""

import numpy as np
import pytest
from loading import ROOT
from PIL import Image
from serving import RUNNABLE

PICTURES = sorted((ROOT / "workflows").glob("*.jpg"))


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_workflow_has_a_small_picture_that_is_not_flat(name):
    path = ROOT / "workflows" / f"{name}.jpg"
    assert path.stat().st_size <= 9000
    picture = Image.open(path)
    assert picture.format == "JPEG"
    assert 150 <= max(picture.size) <= 320
    assert np.asarray(picture).std() > 15


def test_every_picture_belongs_to_a_workflow():
    assert {path.stem for path in PICTURES} <= set(RUNNABLE)
