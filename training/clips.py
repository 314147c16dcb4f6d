"""Silent clips for the motion trainer: a folder of videos, or the picture-book world, as equally long runs of frames."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .storybook import sample_clip

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


def folder_clips(folder: Path, length: int, size: int, fps: float) -> tuple[Tensor, list[str], list[str]]:
    """Clips uint8 [n, length, 3, size, size] one after the other in every video, their captions, and what was left out.

    The caption of film.mp4 is the text of film.txt, or nothing. Raises ValueError when there is no clip.
    """
    clips, captions, left_out = [], [], []
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
        for start in range(0, len(frames) - length + 1, length):
            clips.append(frames[start : start + length])
            captions.append(told.read_text().strip() if told.exists() else "")
    if not clips:
        raise ValueError(f"no clip of {length} frames in {folder}: {'; '.join(left_out) or 'no video file at all'}")
    return torch.stack(clips), captions, left_out


def demo_clips(seed: int, start: int, count: int) -> tuple[Tensor, list[str]]:
    """Clips uint8 [count, frames, 3, 128, 128] of the picture-book world and their captions."""
    drawn = [sample_clip(np.random.default_rng((seed, index))) for index in range(start, start + count)]
    frames = torch.from_numpy(np.stack([clip.frames for clip in drawn])).permute(0, 1, 4, 2, 3).contiguous()
    return frames, [clip.caption for clip in drawn]
