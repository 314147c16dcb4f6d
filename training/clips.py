"""Silent clips for the motion trainer: a folder of videos, or the picture-book world, as equally long runs of frames."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .storybook import FRAMES, sample_clip

SHARE = 0.8  # correlation of the noise of two frames of a clip of the demo video model
SUFFIXES = {".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".gif"}


def covered(frame: np.ndarray, size: int) -> Tensor:
    """The middle square of a picture uint8 [h, w, 3], uint8 [3, size, size]: what CLIP's preprocessing looks at."""
    x = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float()
    side = min(x.shape[-2:])
    top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
    x = x[..., top : top + side, left : left + side]
    return interpolate(x, (size, size), mode="bicubic", antialias=True).round().clamp(0, 255).byte()[0]


def read_frames(path: Path, size: int, fps: float) -> Tensor:
    """Frames uint8 [n, 3, size, size] of a video file at `fps`; of two at one time the earlier. ValueError without video."""
    import av

    frames: list[Tensor] = []
    with av.open(str(path)) as file:
        if not file.streams.video:
            raise ValueError("it has no video")
        begins = None
        for picture in file.decode(video=0):
            begins = picture.time if begins is None else begins
            if picture.time - begins >= len(frames) / fps - 1e-6:
                frames.append(covered(picture.to_ndarray(format="rgb24"), size))
    if not frames:
        raise ValueError("it has no frame")
    return torch.stack(frames)


def folder_clips(
    folder: Path, length: int, size: int, fps: float, left_out: list[str]
) -> Iterator[tuple[Tensor, str]]:
    """Of every video its clips uint8 [n, length, 3, size, size], one after the other, and its caption; `left_out` is told why.

    The caption of film.mp4 is the text of film.txt, or nothing. Raises ValueError at the end when there was no clip.
    """
    found = 0
    for path in sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES):
        try:
            frames = read_frames(path, size, fps)
        except (ValueError, OSError) as error:
            left_out.append(f"{path}: {error}")
            continue
        if len(frames) < length:
            left_out.append(f"{path} has {len(frames)} frames at {fps} a second, fewer than {length}")
            continue
        told = path.with_suffix(".txt")
        found += 1
        count = len(frames) // length
        yield frames[: count * length].unflatten(0, (count, length)), told.read_text().strip() if told.exists() else ""
    if not found:
        raise ValueError(f"no clip of {length} frames in {folder}: {'; '.join(left_out) or 'no video file at all'}")


def shared(noise: Tensor, frames: int = FRAMES, share: float = SHARE) -> Tensor:
    """Independent noise [clips * frames, ...] to noise whose frames have correlation `share` (arXiv 2305.10474).

    The mean over frames and the deviation from it are stretched apart: each frame stays standard normal.
    """
    noise = noise.unflatten(0, (-1, frames))
    mean = noise.mean(1, keepdim=True)
    return ((1 + (frames - 1) * share) ** 0.5 * mean + (1 - share) ** 0.5 * (noise - mean)).flatten(0, 1)


def demo_clips(seed: int, start: int, count: int) -> tuple[Tensor, list[str]]:
    """Clips uint8 [count, frames, 3, 128, 128] of the picture-book world and their captions."""
    drawn = [sample_clip(np.random.default_rng((seed, index))) for index in range(start, start + count)]
    frames = torch.from_numpy(np.stack([clip.frames for clip in drawn])).permute(0, 1, 4, 2, 3).contiguous()
    return frames, [clip.caption for clip in drawn]
