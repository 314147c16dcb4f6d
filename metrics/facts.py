"""Reads the facts of a picture-book page: kind, body colour, hat, place, time of day, count and box.

A small convolutional classifier trained on the generator's own facts (training/facts.py), so that effects on sampled
pictures can be counted. Its held-out accuracy and labels stand in the metadata of its weights.
"""

import json
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle


class FactNet(nn.Module):
    """Pictures [n, 3, 128, 128] in [0, 1] to logits per label group and boxes [n, 4] in picture units."""

    def __init__(self, labels: dict[str, list[str]], width: int = 24):
        super().__init__()
        self.labels = labels
        sizes, layers = (48, width, 2 * width, 3 * width, 4 * width), []
        for index, (before, after) in enumerate(pairwise(sizes)):
            conv = nn.Conv2d(before, after, 3, stride=2 if index else 1, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)  # [n, 4 * width, 4, 4]
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(4 * width * 16, 96), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(words)) for name, words in labels.items()})
        self.box = nn.Linear(96, 4)

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        features = self.neck(self.body(pixel_unshuffle(x * 2 - 1, 4)))
        return {name: head(features) for name, head in self.heads.items()}, self.box(features).sigmoid()


@dataclass(frozen=True)
class Reading:
    """Recognised labels of one picture by group ("kind", "colour", "hat", "place", "time", "count") and its box."""

    labels: dict[str, str]
    box: tuple[float, ...]

    @property
    def identity(self) -> tuple[str, str]:
        return self.labels["colour"], self.labels["hat"]


def load_reader(tensors: dict[str, Tensor], metadata: dict[str, str]) -> FactNet:
    """The classifier from the tensors and metadata of weights/facts.safetensors."""
    net = FactNet(**json.loads(metadata["config"])).train(False).requires_grad_(False)
    net.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in tensors.items()})
    return net


@torch.no_grad()
def read(net: FactNet, images: Tensor) -> list[Reading]:
    """Facts of pictures [n, 128, 128, 3] in [0, 1] (ComfyUI's IMAGE)."""
    logits, boxes = net(images.movedim(-1, 1))
    picked = {name: scores.argmax(1).tolist() for name, scores in logits.items()}
    return [
        Reading({name: net.labels[name][ids[row]] for name, ids in picked.items()}, tuple(boxes[row].tolist()))
        for row in range(len(images))
    ]


def pair_agreement(keys) -> float:
    """Share of the pairs of a story's panels whose keys are equal."""
    pairs = list(combinations(keys, 2))
    return sum(one == other for one, other in pairs) / len(pairs)
