"""Clips with sound as the joint audio-video trainer takes them: a folder of videos, or the picture-book world.

Videos are read with PyAV and prepared as MM-Diffusion does (arXiv 2212.09478, its code): frames at 10 a second, scaled
to fit by bicubic interpolation without antialiasing and padded with black, sound mono (the left channel) as it is.
Whole videos are kept, so that an example may begin at any frame.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from . import (
    package,  # noqa: F401
    sounds,
)

from storyweft.models.joint_media import letterbox  # isort: skip


@dataclass(frozen=True)
class Clips:
    """frames uint8 [N, 3, S, S], sound float16 [N * samples] with `samples` a frame, starts [n]: an example is the
    `length` frames from a start on."""

    frames: Tensor
    sound: Tensor
    starts: Tensor
    length: int
    samples: int

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Video [n, length, 3, S, S] in [-1, 1] and sound [n, 1, length * samples]."""
        first = self.starts[index]
        frames = self.frames[first[:, None] + torch.arange(self.length)]
        sound = self.sound[(first * self.samples)[:, None] + torch.arange(self.length * self.samples)]
        return frames.float() / 127.5 - 1, sound.float()[:, None]


def read_video(path: Path, size: int, fps: int, rate: int) -> tuple[Tensor, Tensor]:
    """Frames uint8 [n, 3, size, size] at `fps` and sound float16 [n * rate / fps] of a video file.

    Raises ValueError, one sentence, when it has no video or no sound.
    """
    import av

    frames, now, begins = [], None, 0.0
    with av.open(str(path)) as file:
        if not file.streams.video or not file.streams.audio:
            raise ValueError(f"{path} has no {'sound' if file.streams.video else 'video'}")
        for picture in file.decode(video=0):
            if now is None:
                begins = picture.time
            while now is not None and picture.time - begins > len(frames) / fps + 1e-6:
                frames.append(now)
            now = letterbox(torch.from_numpy(picture.to_ndarray(format="rgb24"))[None], size, size)[0]
            now = ((now + 1) * 127.5).round().byte()
        while picture.time - begins > len(frames) / fps - 1e-6:
            frames.append(now)
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        resampler = av.AudioResampler("fltp", stream.layout if stream.channels <= 2 else "stereo", rate)
        blocks, offset = [], None
        for block in file.decode(audio=0):
            offset = block.time - begins if offset is None else offset
            blocks += [part.to_ndarray()[0] for part in resampler.resample(block)]
        blocks += [part.to_ndarray()[0] for part in resampler.resample(None)]
    if not blocks:
        raise ValueError(f"{path} has no sound")
    heard = torch.from_numpy(np.concatenate(blocks))
    late = round(offset * rate)
    heard = pad(heard, (late, 0)) if late > 0 else heard[-late:]
    return torch.stack(frames), pad(heard, (0, max(0, len(frames) * rate // fps - len(heard)))).half()[
        : len(frames) * rate // fps
    ]


def folder_clips(folder: Path, length: int, size: int, fps: int, rate: int) -> tuple[Clips, list[str]]:
    """Examples of every video in a folder and below, one at each frame that has enough after it; what was left out.

    Videos shorter than an example repeat their last frame and end in silence. Raises ValueError when none is left.
    """
    if rate % fps:
        raise ValueError(f"--sound-rate {rate} is not a multiple of --fps {fps}")
    samples, frames, sound, starts, left_out, total = rate // fps, [], [], [], [], 0
    for path in sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES):
        try:
            video, heard = read_video(path, size, fps, rate)
        except ValueError as error:
            left_out.append(str(error))
            continue
        missing = max(0, length - len(video))
        video = torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])
        frames.append(video)
        sound.append(pad(heard, (0, missing * samples)))
        starts.append(torch.arange(len(video) - length + 1) + total)
        total += len(video)
    if not frames:
        raise ValueError(f"no video with sound in {folder}: {'; '.join(left_out) or 'no video file at all'}")
    return Clips(torch.cat(frames), torch.cat(sound), torch.cat(starts), length, samples), left_out


SUFFIXES = {".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v"}


def demo_clips(seed: int, count: int, folder: str | Path | None = None) -> Clips:
    """`count` clips of the picture-book world with sound; kept in `folder` for the next time."""
    key = json.dumps([seed, count, sounds.SUBSETS, sounds.VOICES, sounds.MOTIONS, sounds.QUIET], default=str)
    path = Path(folder) / f"joint_clips_{sha256(key.encode()).hexdigest()[:12]}.pt" if folder else None
    if path and path.exists():
        frames, sound = torch.load(path, weights_only=True)
    else:
        drawn = [sounds.sample_clip(np.random.default_rng((seed, index))) for index in range(count)]
        frames = torch.from_numpy(np.concatenate([clip.frames for clip in drawn])).permute(0, 3, 1, 2).contiguous()
        sound = torch.from_numpy(np.concatenate([clip.waveform for clip in drawn])).half()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save((frames, sound), path)
    starts = torch.arange(count) * sounds.FRAMES
    return Clips(frames, sound, starts, sounds.FRAMES, sounds.RATE // sounds.FPS)
