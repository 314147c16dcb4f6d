"""The demo world's sounds: voices and ambiences of weights/sounds, mixed at a loudness each."""

from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from .demo import WEIGHTS

SOUNDS = WEIGHTS / "sounds"
NOBODY = "none"


def names(folder: Path = SOUNDS) -> tuple[list[str], list[str]]:
    """Voices and ambiences, by the names of their files: voice_<kind>, place_<place>."""
    found = [path.stem.partition("_") for path in sorted(folder.glob("*.opus"))]
    return [name for kind, _, name in found if kind == "voice"], [name for kind, _, name in found if kind == "place"]


def read(name: str, folder: Path = SOUNDS) -> tuple[Tensor, int]:
    """Samples [n] of one file and their rate."""
    with av.open(str(folder / f"{name}.opus")) as file:
        rate = file.streams.audio[0].rate
        blocks = [frame.to_ndarray() for frame in file.decode(audio=0)]
    return torch.from_numpy(np.concatenate(blocks, 1)[0]).float(), rate


def mix(parts: list[tuple[str, float]]) -> tuple[Tensor, int]:
    """Sum [n] of files at their loudness, kept inside [-1, 1], at their common rate and the shortest's length."""
    sounds = [(*read(name), loudness) for name, loudness in parts]
    length = min(len(wave) for wave, _, _ in sounds)
    total = sum(wave[:length] * loudness for wave, _, loudness in sounds)
    return total.clamp(-1, 1), sounds[0][1]
