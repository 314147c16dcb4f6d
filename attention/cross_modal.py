"""Random-shift multi-modal attention of MM-Diffusion (Ruan et al., CVPR 2023, section 3.3) as rolled windows.

A clip has F frames of s video tokens and L audio samples, p = L // F of them beside every frame. Frame i looks at the
audio of the S segments i+R .. i+R+S-1, segment i at the pixels of the S frames i+R .. i+R+S-1, both going round at the
end. R is the shift, one for the whole call. Nothing is looked up: keys and values are rolled by R segments and cut
into F overlapping windows, so that each direction is one fused attention with F times the rows.
"""

import random
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from .core import Attend, attend, merge_heads, split_heads

Shifts = Callable[[int, int], int]  # (frames, window) -> shift


class RandomShifts:
    """Shifts drawn evenly from 0 .. frames - window by a generator of its own; the same key gives the same shifts."""

    def __init__(self, key: Hashable):
        self.generator = random.Random(str(key))

    def __call__(self, frames: int, window: int) -> int:
        return self.generator.randint(0, frames - window)


def no_shift(frames: int, window: int) -> int:
    """Every window starts at its own frame (the authors' setting without shifting)."""
    return 0


def listed_shifts(values: Iterable[int]) -> Shifts:
    """The given shifts one after the other, a block each."""
    given = iter(values)
    return lambda frames, window: next(given)


def rolled_windows(x: Tensor, frames: int, length: int, span: int, shift: int) -> Tensor:
    """Window i is `span` segments of `length` tokens from segment i + shift on, going round at the end of the tokens.

    x [B, tokens, C] with tokens >= frames * length -> [B * frames, span * length, C].
    """
    start, size = shift * length, (frames + span - 1) * length
    rolled = x[:, start : start + size]
    short = size - rolled.shape[1]
    if short:
        rolled = torch.cat([rolled, x[:, :short]], 1)
    return rolled.unfold(1, span * length, length).transpose(2, 3).flatten(0, 1)


def cross_modal_attention(
    video: tuple[Tensor, Tensor, Tensor],
    audio: tuple[Tensor, Tensor, Tensor],
    frames: int,
    window: int,
    shift: int,
    heads: int,
    attend: Attend = attend,
) -> tuple[Tensor, Tensor]:
    """What every pixel sees of the audio and every sample of the video (equations 6 and 7 of the paper).

    video: queries, keys and values [B, frames * s, C], tokens in order (frame, row, column); audio: the same [B, L, C].
    Samples beyond frames * (L // frames) look where the last segment looks, and windows go round at L itself.
    Returns [B, frames * s, C] and [B, L, C]. ValueError: a window that is not 1 .. frames, a shift that is not
    0 .. frames - window, fewer samples than frames.
    """
    (q_video, k_video, v_video), (q_audio, k_audio, v_audio) = video, audio
    total = q_audio.shape[1]
    places, samples = q_video.shape[1] // frames, total // frames
    if not 1 <= window <= frames:
        raise ValueError(f"a window of {window} frames does not fit into a clip of {frames} frames")
    if not 0 <= shift <= frames - window:
        raise ValueError(f"shift {shift} is not one of 0 to {frames - window} (window {window} of {frames} frames)")
    if not samples:
        raise ValueError(f"{total} audio samples are fewer than the clip's {frames} frames at this level")

    def seen(q: Tensor, *keys_values: Tensor) -> Tensor:
        return merge_heads(attend(*(split_heads(x, heads) for x in (q, *keys_values)), None))

    def windows(x: Tensor, length: int) -> Tensor:
        return rolled_windows(x, frames, length, window, shift)

    if window == frames and total == frames * samples:
        of_audio = seen(q_video, k_audio, v_audio)
    else:
        keys, values = windows(k_audio, samples), windows(v_audio, samples)
        of_audio = seen(q_video.unflatten(1, (frames, places)).flatten(0, 1), keys, values)
        of_audio = of_audio.unflatten(0, (-1, frames)).flatten(1, 2)
    if window == frames:
        return of_audio, seen(q_audio, k_video, v_video)
    keys, values = windows(k_video, places), windows(v_video, places)
    within = q_audio[:, : frames * samples].unflatten(1, (frames, samples)).flatten(0, 1)
    of_video = seen(within, keys, values).unflatten(0, (-1, frames)).flatten(1, 2)
    if total > frames * samples:
        last = slice(frames - 1, None, frames)
        of_video = torch.cat([of_video, seen(q_audio[:, frames * samples :], keys[last], values[last])], 1)
    return of_audio, of_video
