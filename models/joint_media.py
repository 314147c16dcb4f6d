"""What MM-Diffusion's loaders do to frames and sound (section 2.11 of the notes on the authors' code)."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad


def letterbox(frames: Tensor, height: int, width: int, antialias: bool = False) -> Tensor:
    """Frames [F, h, w, 3] in 0..255 fitted into height x width with black bars: [F, 3, height, width] in [-1, 1].

    Bicubic on bytes; the authors' training resized without antialiasing.
    """
    source_height, source_width = frames.shape[1:3]
    scale = min(height / source_height, width / source_width)
    size = max(1, int(source_height * scale)), max(1, int(source_width * scale))
    pixels = frames.movedim(-1, 1).float()
    if size != (source_height, source_width):
        pixels = interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=antialias)
    pixels = pixels.round().clamp(0, 255)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    pixels = pad(pixels, (left, width - size[1] - left, top, height - size[0] - top))
    return pixels / 127.5 - 1


def frame_places(count: int, source_fps: float, frames: int, fps: float, start: float = 0.0) -> Tensor:
    """Index of the source frame that is seen at each of `frames` times from `start` seconds on; the last one stays."""
    times = start + (torch.arange(frames, dtype=torch.float64) + 1e-6) / fps
    return (times * source_fps).floor().long().clamp(0, count - 1)


def fitted_audio(waveform: Tensor, samples: int) -> Tensor:
    """Left channel of [B, channels, L], cut or filled with silence to [B, 1, samples], within -1 and 1."""
    left = waveform[:, :1, :samples]
    return pad(left, (0, samples - left.shape[-1])).clamp(-1, 1)
