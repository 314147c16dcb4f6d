"""AudioCLIP's learned time-frequency bank of frequency B-splines (arXiv 2106.13043, ESResNeXt-fbsp)."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

FULL_SCALE = 32768  # samples arrive as 16-bit numbers


def blackman_harris(length: int) -> Tensor:
    """Periodic Blackman-Harris window [length]."""
    angle = 2 * math.pi * torch.arange(length, dtype=torch.float64) / length
    terms = zip((0.35875, -0.48829, 0.14128, -0.01168), range(4), strict=True)
    return sum(factor * torch.cos(order * angle) for factor, order in terms).float()


def frames(wave: Tensor, window: Tensor, hop: int) -> Tensor:
    """Windowed frames [n, count, win] of sounds [n, samples], zeros added on both sides so that the last is whole."""
    samples, win = wave.shape[1], len(window)
    count = 1 if samples <= win else 1 + math.ceil((samples - win) / hop)
    missing = (count - 1) * hop + win - samples
    wave = pad(wave, (missing // 2, missing - missing // 2))
    return wave.unfold(1, win, hop) * window.to(wave)


class BSplineBank(nn.Module):
    """Complex wavelets of the order m, bandwidth fb and centre fc of each of the n_fft / 2 + 1 bins."""

    def __init__(self, n_fft: int):
        super().__init__()
        bins = n_fft // 2 + 1
        self.n_fft = n_fft
        self.m, self.fb, self.fc = (nn.Parameter(torch.empty(bins)) for _ in range(3))
        self.bias = nn.Parameter(torch.empty(0))  # files hold it, empty

    def bank(self) -> tuple[Tensor, Tensor]:
        """Real and imaginary part [bins, n_fft], in float32 and in the authors' order: quiet bins show every rounding."""
        m, fb, fc = (x.detach().float()[:, None] for x in (self.m, self.fb, self.fc))
        t = math.pi * torch.linspace(-1, 1, self.n_fft, device=m.device) + 1e-8
        u = fb * t / (m + 1e-8)
        sinc = torch.where(u == 0, torch.ones_like(u), u.sin() / u)
        size = sinc.abs() ** m * fb.sqrt()
        # a negative number raised to m is complex: its angle pi becomes m pi
        angle = torch.where(sinc >= 0, torch.zeros_like(m), torch.full_like(m, math.pi)) * m
        real, imaginary = size * angle.cos(), size * angle.sin()
        c, s = (fc * t).cos(), -(fc * t).sin()
        parts = real * c - imaginary * s, real * s + imaginary * c
        return tuple(part / math.sqrt(self.n_fft) for part in parts)

    def forward(self, windowed: Tensor) -> Tensor:
        """Spectrum [n, bins, count, 2] of frames [n, count, win]."""
        left = (self.n_fft - windowed.shape[-1]) // 2
        padded = pad(windowed, (left, self.n_fft - windowed.shape[-1] - left))
        return torch.stack([padded @ part.T.to(padded) for part in self.bank()], -1).transpose(1, 2)


def decibels(spectrum: Tensor) -> Tensor:
    """Spectrum [n, bins, count, 2] -> level of three equal bands as picture channels, [n, 3, bins // 3, count], in dB."""
    power = spectrum.square().sum(-1)
    power = torch.where(power == 0, torch.full_like(power, 1e-18), power)
    third = power.shape[1] // 3
    return 10 * power[:, : 3 * third].unflatten(1, (3, third)).log10()


def scaled(wave: Tensor, authors_scale: bool = False) -> Tensor:
    """Sounds in [-1, 1] as the network takes them: 16-bit numbers moved to [-1, 1].

    authors_scale: what the demo of AudioCLIP and the sound-to-image code do, where the 16-bit range is left out: 85 dB too
    quiet on an offset of half of full scale.
    """
    wave = wave.float() if authors_scale else wave.float() * FULL_SCALE
    return (wave + FULL_SCALE) * 2 / 65535 - 1  # in this order, since float32 rounds quiet sounds here
