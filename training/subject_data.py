"""Subjects for trainers: pictures or short videos with the mask of what is kept and a caption, from a folder.

`cat.png` with its mask in `cat.mask.png` (white is the subject) or in its own alpha channel, and its caption in `cat.txt`;
`cat.mp4` with the mask of its first frame in `cat.mask.png` and `cat.txt`. Folders below are looked through too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from . import clips
from .clips import covered, read_frames
from .stories import SUFFIXES

MASK = ".mask"


@dataclass(frozen=True)
class Subject:
    """pixels [frames, 3, side, side] and the mask [side, side] of what the first of them shows, both 0 to 1."""

    pixels: Tensor
    mask: Tensor
    caption: str


def _mask(path: Path, side: int) -> Tensor:
    """The mask beside a file, else its alpha channel. ValueError without one, and for one that keeps nothing or everything."""
    beside = path.with_name(f"{path.stem}{MASK}.png")
    picture = None if path.suffix.lower() in clips.SUFFIXES else Image.open(path)
    if beside.is_file():
        grey = Image.open(beside).convert("L")
    elif picture is not None and "A" in picture.getbands():
        grey = picture.getchannel("A")
    else:
        raise ValueError(f"it has no {beside.name}" + ("" if picture is None else " and no alpha channel"))
    mask = covered(np.asarray(grey)[..., None].repeat(3, 2), side)[0].float() / 255
    if not mask.any() or bool((mask == 1).all()):
        raise ValueError(f"its mask keeps {'everything' if mask.any() else 'nothing'}")
    return mask


def _pixels(path: Path, side: int, frames: int, fps: float) -> Tensor:
    if frames == 1:
        return covered(np.asarray(Image.open(path).convert("RGB")), side)[None]
    found = read_frames(path, side, fps)
    if len(found) < frames:
        raise ValueError(f"it has {len(found)} frames at {fps} a second, fewer than {frames}")
    return found[:frames]


def caption_of(path: Path) -> str:
    """The text beside a file, cat.txt of cat.png. ValueError without one."""
    told = path.with_suffix(".txt")
    if not told.is_file():
        raise ValueError(f"it has no {told.name}")
    return told.read_text().strip()


class SubjectFolder:
    """Subjects of `frames` frames (1: pictures) that a folder holds; read when asked for. `left_out`: files and why.

    Raises ValueError when there is none.
    """

    def __init__(self, folder: Path, side: int, frames: int = 1, fps: float = 8.0):
        self.side, self.frames, self.fps, self.left_out, self.paths = side, frames, fps, [], []
        wanted = SUFFIXES if frames == 1 else clips.SUFFIXES
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix.lower() not in wanted or path.stem.endswith(MASK):
                continue
            try:
                self._read(path)
            except (ValueError, OSError) as error:
                self.left_out.append(f"{path}: {error}")
                continue
            self.paths.append(path)
        if not self.paths:
            what = "picture" if frames == 1 else f"video of {frames} frames"
            reasons = "; ".join(self.left_out[:3]) or f"no {what} at all"
            raise ValueError(f"no {what} with mask and caption in {folder}: {reasons}")

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Subject]:
        return map(self._read, self.paths)

    def _read(self, path: Path) -> Subject:
        caption, mask = caption_of(path), _mask(path, self.side)
        return Subject(_pixels(path, self.side, self.frames, self.fps).float() / 255, mask, caption)


def told_left_out(left_out: list[str]) -> list[str]:
    """Lines of a dry run."""
    return ["left out:", *left_out] if left_out else []


def held_out(count: int, most: int) -> int:
    """How many of `count` examples only the sheet of samples shows: a tenth, at least one and at most `most`."""
    if count < 2:
        raise ValueError(f"there is {count} example to train on; give at least two")
    return min(most, max(1, count // 10))

