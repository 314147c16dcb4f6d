"""The template browser has a picture of every workflow that runs on the demo models."""

import numpy as np
import pytest
from loading import ROOT
from PIL import Image
from serving import RUNNABLE

LATER = {  # drawn by tools/thumbnails.py when the new weights of their models are in
    "av_inpaint", "board_continue", "board_trained", "joint_av", "keep_region", "motion_between_pictures", "sound_to_video",
    "story_to_film", "subject_video", "video_to_sound",
}  # fmt: skip
PICTURES = sorted((ROOT / "workflows").glob("*.jpg"))


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name not in LATER])
def test_a_workflow_has_a_small_picture_that_is_not_flat(name):
    path = ROOT / "workflows" / f"{name}.jpg"
    assert path.stat().st_size <= 9000
    picture = Image.open(path)
    assert picture.format == "JPEG"
    assert 150 <= max(picture.size) <= 320
    assert np.asarray(picture).std() > 15


def test_every_picture_belongs_to_a_workflow_and_none_waits_that_is_there():
    assert {path.stem for path in PICTURES} <= set(RUNNABLE) - LATER
