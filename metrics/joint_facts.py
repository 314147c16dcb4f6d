"""Reads kind and place from either half of a clip of the picture-book world with sound, and how halves move together.

Two small classifiers trained on the generator's own facts (training/joint_facts.py), so that what sound and pictures of
sampled clips have in common can be counted. Their held-out accuracy and labels stand in the metadata of their weights.
"""

import json

import torch
from torch import Tensor, nn

WINDOW, HOP = 256, 100  # of the spectrogram, in samples


class PictureReader(nn.Module):
    """Frames [n, 3, 32, 32] in [-1, 1] to logits per label group."""

    def __init__(self, labels: dict[str, list[str]]):
        super().__init__()
        layers = []
        for before, after in ((3, 16), (16, 24), (24, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, 2 if before > 3 else 1, 1), nn.GroupNorm(4, after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())  # [n, 512]
        self.heads = nn.ModuleDict({name: nn.Linear(512, len(words)) for name, words in labels.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return {name: head(features) for name, head in self.heads.items()}


class SoundReader(nn.Module):
    """Waveforms [n, 1, L] to logits per label group, through their spectrogram."""

    def __init__(self, labels: dict[str, list[str]], width: int = 32):
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        bins = WINDOW // 2 + 1
        self.body = nn.Sequential(
            nn.Conv1d(bins, width, 3, 1, 1), nn.GroupNorm(4, width), nn.ReLU(),
            nn.Conv1d(width, width, 3, 2, 1), nn.GroupNorm(4, width), nn.ReLU(),
            nn.Conv1d(width, width, 3, 2, 1), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(2 * width, len(words)) for name, words in labels.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        power = torch.stft(x[:, 0].float(), WINDOW, HOP, window=self.window, return_complex=True).abs()
        features = self.body((power + 0.05).log())
        features = torch.cat([features.mean(-1), features.amax(-1)], 1)
        return {name: head(features) for name, head in self.heads.items()}


class JointReader(nn.Module):
    def __init__(self, labels: dict[str, list[str]]):
        super().__init__()
        self.labels, self.pictures, self.sounds = labels, PictureReader(labels), SoundReader(labels)


def load_joint_reader(tensors: dict[str, Tensor], metadata: dict[str, str]) -> JointReader:
    """The classifiers from the tensors and metadata of weights/joint_facts.safetensors."""
    net = JointReader(**json.loads(metadata["config"])).train(False).requires_grad_(False)
    net.load_state_dict({key: value.float() for key, value in tensors.items()})
    return net


def _words(reader: JointReader, logits: dict[str, Tensor]) -> list[dict[str, str]]:
    picked = {name: scores.argmax(-1).tolist() for name, scores in logits.items()}
    return [{name: reader.labels[name][ids[row]] for name, ids in picked.items()} for row in range(len(picked["kind"]))]


@torch.no_grad()
def read_pictures(reader: JointReader, video: Tensor) -> list[dict[str, str]]:
    """Kind and place of clips [n, F, 3, 32, 32] in [-1, 1]: the mean log probability over frames decides."""
    logits = reader.pictures(video.flatten(0, 1))
    return _words(reader, {k: s.log_softmax(-1).unflatten(0, video.shape[:2]).mean(1) for k, s in logits.items()})


@torch.no_grad()
def read_sounds(reader: JointReader, sound: Tensor) -> list[dict[str, str]]:
    """Kind and place of waveforms [n, 1, L] in [-1, 1]."""
    return _words(reader, reader.sounds(sound))


def motion(video: Tensor) -> Tensor:
    """How much moves in each frame of clips [n, F, 3, h, w]: mean absolute change to its neighbours, [n, F]."""
    change = video.diff(dim=1).abs().mean((2, 3, 4))
    return (torch.cat([change[:, :1], change], 1) + torch.cat([change, change[:, -1:]], 1)) / 2


def loudness(sound: Tensor, frames: int) -> Tensor:
    """Root mean square of the frames' pieces of waveforms [n, 1, L]: [n, F]."""
    return sound[:, 0, : sound.shape[-1] // frames * frames].unflatten(-1, (frames, -1)).square().mean(-1).sqrt()


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation of rows [n, F]: [n]."""
    one, other = (x - x.mean(-1, keepdim=True) for x in (one, other))
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1)).clamp(min=1e-8)
