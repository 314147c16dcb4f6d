"""Readers of kind and place of either half of a clip, and what is counted with them."""

import numpy as np
import torch
from loading import ROOT
from safetensors import safe_open
from storyweft.metrics import joint_facts
from storyweft.training import joint_data
from storyweft.training.joint_facts import HELD_OUT, facts


def reader():
    with safe_open(ROOT / "weights" / "joint_facts.safetensors", "pt") as file:
        return joint_facts.load_joint_reader({name: file.get_tensor(name) for name in file.keys()}, file.metadata())


def test_stored_readers_read_both_halves_of_held_out_clips():
    clips = joint_data.demo_clips(HELD_OUT + 1, 24)
    video, sound = clips.batch(torch.arange(24))
    known, net = facts(HELD_OUT + 1, 24), reader()
    for read in (joint_facts.read_pictures(net, video), joint_facts.read_sounds(net, sound)):
        assert np.mean([one == right for one, right in zip(read, known, strict=True)]) > 0.9
    hissing = sound + 0.05 * torch.randn(sound.shape, generator=torch.Generator().manual_seed(0))
    read = joint_facts.read_sounds(net, hissing)
    assert np.mean([one == right for one, right in zip(read, known, strict=True)]) > 0.9


def test_motion_is_where_pictures_change():
    video = torch.zeros(2, 6, 3, 4, 4)
    video[0, 3:] = 1.0  # changes once, between frames 2 and 3
    found = joint_facts.motion(video)
    assert found.shape == (2, 6) and (found[1] == 0).all()
    assert (found[0] > 0).tolist() == [False, False, True, True, False, False]


def test_loudness_is_that_of_each_frames_piece():
    sound = torch.zeros(1, 1, 60)
    sound[..., 20:30] = 0.5
    torch.testing.assert_close(joint_facts.loudness(sound, 6), torch.tensor([[0, 0, 0.5, 0, 0, 0]]))


def test_correlation_of_rows():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    found = joint_facts.correlation(x, torch.stack([2 * x[0] + 1, -x[1], torch.ones(16)]))
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, 0.0]))
