"""What ImageBind hears: clips of a sound as normalised log-mel, by Kaldi's filter bank (arXiv 2305.05665)."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

RATE = 16000  # Hz
CLIP = 2.0  # seconds
CLIPS = 3
FRAME, HOP, FFT, MELS, COLUMNS = 400, 160, 512, 128, 204
LOW, HIGH = 20.0, 8000.0  # Hz
FLOOR = 1.1920929e-7
MEAN, STD = -4.268, 9.138
SHORT = ("loop", "pad")


def clip_starts(seconds: float, clips: int = CLIPS) -> list[float]:
    """Starts, in seconds, of clips of 2 s spread evenly from the beginning to the end."""
    rest = max(seconds - CLIP, 0.0)
    return [rest * index / (clips - 1) if clips > 1 else rest / 2 for index in range(clips)]


def kaldi_bank() -> Tensor:
    """Triangles [128, 256], linear in mel from 20 to 8000 Hz over the bins below the Nyquist; float64."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127 * torch.log(1 + hertz / 700)

    low, high = (mel(torch.tensor(edge, dtype=torch.float64)) for edge in (LOW, HIGH))
    step = (high - low) / (MELS + 1)
    left = low + torch.arange(MELS, dtype=torch.float64)[:, None] * step
    place = mel(torch.arange(FFT // 2, dtype=torch.float64) * RATE / FFT)
    return torch.minimum((place - left) / step, (left + 2 * step - place) / step).clamp(min=0)


def log_mel(wave: Tensor) -> Tensor:
    """[n, 1, 128, 204] of clips [n, samples] at 16 kHz: zeros beyond the end of a short one, not yet normalised."""
    wave = wave.double()
    wave = pad(wave, (0, max(FRAME - wave.shape[1], 0)))
    wave = wave - wave.mean(1, keepdim=True)
    found = wave.unfold(1, FRAME, HOP)
    found = found - found.mean(-1, keepdim=True)
    found = found - 0.97 * torch.cat([found[..., :1], found[..., :-1]], -1)
    hann = torch.hann_window(FRAME, periodic=False, dtype=torch.float64, device=wave.device)
    spectrum = torch.fft.rfft(found * hann, FFT)[..., : FFT // 2]
    power = spectrum.real.square() + spectrum.imag.square()
    level = (power @ kaldi_bank().to(power).T).clamp(min=FLOOR).log().transpose(1, 2)
    return pad(level, (0, max(COLUMNS - level.shape[2], 0)))[:, None, :, :COLUMNS].float()


def hear(wave: Tensor, clips: int = CLIPS, short: str = "pad") -> Tensor:
    """Normalised log-mel [n, clips, 1, 128, 204] of mono sounds [n, samples] at 16 kHz.

    The mean of each clip is taken from a copy; the authors take it from a view, so that their overlapping clips see each
    other's. short: "loop" repeats sounds below 2 s; "pad" leaves what is missing at 0, as the authors do, which is far from
    silence.
    """
    length = int(CLIP * RATE)
    if short == "loop" and wave.shape[1] < length:
        wave = wave.repeat(1, math.ceil(length / wave.shape[1]))[:, :length]
    starts = [int(start * RATE) for start in clip_starts(wave.shape[1] / RATE, clips)]
    found = {start: log_mel(wave[:, start : start + length]) for start in dict.fromkeys(starts)}
    return (torch.stack([found[start] for start in starts], 1) - MEAN) / STD
