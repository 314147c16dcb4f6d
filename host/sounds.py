"""AUDIO on the pack's terms: checked, mono, at a rate, cut into windows; what there is to say about it."""

import math
from dataclasses import dataclass

import torch
import torchaudio
from torch import Tensor

SILENT = 1e-4  # greatest sample, of full scale, below which a sound counts as silence
LONGEST = 600  # windows of one sound


STYLES = ("clotho > caption: ", "audiocaps > caption: ", "audioset > keywords: ")
PROMPT = "Caption the input audio in one short sentence, naming every sound and the place. No other words."


@dataclass(frozen=True)
class Asked:
    """How a captioner is asked; each reads what concerns it.

    width: children of the best-first search, 1 is greedy (ACT). style: Whisper's. prompt: a language model's. geometric: a
    word's probability is the geometric mean over its tokens and not their product.
    """

    width: int = 1
    style: str = STYLES[0]
    prompt: str = PROMPT
    geometric: bool = False


@dataclass(frozen=True)
class Window:
    """A part of one sound: mono samples [n] at `rate` from `start` seconds on."""

    wave: Tensor
    rate: int
    start: float

    @property
    def end(self) -> float:
        return self.start + len(self.wave) / self.rate

    @property
    def silent(self) -> bool:
        return float(self.wave.abs().max()) < SILENT


def checked(audio: dict, node_id: str) -> tuple[Tensor, int]:
    """Samples [sounds, samples], mono by the mean of the channels, and their rate; the caller's tensor is not touched.

    Raises ValueError for what is no sound: no samples, no number, a rate that is not positive, nothing but zeros.
    """
    if not (isinstance(audio, dict) and torch.is_tensor(audio.get("waveform")) and "sample_rate" in audio):
        raise ValueError(f"{node_id}: audio is {type(audio).__name__}; connect AUDIO, for instance from Load Audio.")
    wave, rate = audio["waveform"], int(audio["sample_rate"])
    if rate <= 0:
        raise ValueError(f"{node_id}: audio has a sample rate of {rate} Hz.")
    if wave.ndim != 3 or not wave.numel():
        raise ValueError(f"{node_id}: audio is {tuple(wave.shape)} (sounds, channels, samples): it holds no samples.")
    if not wave.isfinite().all():
        raise ValueError(f"{node_id}: audio holds samples that are no numbers (NaN or infinity).")
    mono = wave.float().mean(1)
    for index, sound in enumerate(mono):
        if not sound.any():
            raise ValueError(f"{node_id}: sound {index + 1} of audio is all zeros; there is nothing to hear.")
    return mono, rate


def resampled(wave: Tensor, rate: int, wanted: int) -> Tensor:
    """[..., samples] at another rate."""
    return wave if rate == wanted else torchaudio.functional.resample(wave, rate, wanted)


def windows(wave: Tensor, rate: int, seconds: float, hop: float, node_id: str) -> list[Window]:
    """A sound [samples] in windows of `seconds`, one every `hop` seconds; a shorter sound is one window as it is.

    The last window ends with the sound. Raises ValueError for more than 600 windows.
    """
    length = round(seconds * rate)
    if len(wave) <= length:
        return [Window(wave, rate, 0.0)]
    step = max(1, round(hop * rate))
    count = 1 + math.ceil((len(wave) - length) / step)
    if count > LONGEST:
        raise ValueError(
            f"{node_id}: the sound is {len(wave) / rate:.0f} s long, which makes {count} windows at a hop of {hop} s; "
            f"give a hop of at least {math.ceil((len(wave) - length) / rate / (LONGEST - 1))} s."
        )
    starts = [min(index * step, len(wave) - length) for index in range(count)]
    return [Window(wave[start : start + length], rate, start / rate) for start in starts]
