"""The fact classifier: shapes, agreement of pairs, and that it reads pages of the world."""

import json

import numpy as np
import torch
from loading import ROOT
from safetensors import safe_open
from storyweft.metrics.facts import FactNet, load_reader, pair_agreement, read
from storyweft.training import storybook

LABELS = {"kind": ["fox", "owl"], "time": ["day", "night", "sunset"]}


def test_pair_agreement_counts_equal_pairs():
    assert pair_agreement(["red"] * 4) == 1
    assert pair_agreement([1, 2, 3, 4]) == 0
    assert pair_agreement(["red", "red", "blue", "blue"]) == 2 / 6


def test_net_gives_one_score_per_label_and_a_box_inside_the_picture():
    logits, box = FactNet(LABELS)(torch.rand(3, 3, 128, 128))
    assert {name: tuple(scores.shape) for name, scores in logits.items()} == {"kind": (3, 2), "time": (3, 3)}
    assert box.shape == (3, 4) and box.min() >= 0 and box.max() <= 1


def test_released_classifier_reads_drawn_pages():
    with safe_open(ROOT / "weights" / "facts.safetensors", "pt") as file:
        net = load_reader({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118
    pages = [storybook.sample(np.random.default_rng((99, index)), "one") for index in range(40)]
    found = read(net, torch.from_numpy(np.stack([page.image for page in pages])) / 255)
    for group in ("kind", "colour", "hat", "place", "time"):
        right = [one.labels[group] == getattr(page.facts[0], group) for one, page in zip(found, pages, strict=True)]
        assert np.mean(right) >= 0.9, group


def test_labels_of_the_weights_match_the_world():
    with safe_open(ROOT / "weights" / "facts.safetensors", "pt") as file:
        labels = json.loads(file.metadata()["config"])["labels"]
    assert (labels["kind"], labels["place"]) == (list(storybook.KINDS), list(storybook.PLACES))
