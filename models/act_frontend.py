"""Log-mel features of the ACT captioner (DCASE 2021, pp. 211-215), as librosa 0.8.1 made them for its training."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

RATE = 32000  # Hz
SAMPLES = 320000  # 10 s
WINDOW, HOP, MELS = 1024, 640, 64


def slaney_mel(mels: int = MELS, window: int = WINDOW, rate: int = RATE) -> Tensor:
    """Triangles [mels, window / 2 + 1] of unit area, spaced on Slaney's scale from 0 Hz to half the rate; float64."""
    knee, log_step = 1000.0, math.log(6.4) / 27
    nyquist = rate / 2
    top = 3 * nyquist / 200 if nyquist < knee else 15 + math.log(nyquist / knee) / log_step
    mel = torch.linspace(0, top, mels + 2, dtype=torch.float64)
    edges = torch.where(mel < 15, mel * 200 / 3, knee * torch.exp(log_step * (mel - 15)))
    bins = torch.linspace(0, nyquist, window // 2 + 1, dtype=torch.float64)
    ramps = edges[:, None] - bins
    widths = edges.diff()
    rise, fall = -ramps[:-2] / widths[:-1, None], ramps[2:] / widths[1:, None]
    return torch.minimum(rise, fall).clamp(min=0) * (2 / (edges[2:] - edges[:-2]))[:, None]


def log_mel(wave: Tensor, edges: str = "reflect", samples: int = SAMPLES) -> Tensor:
    """Features [n, samples / 640, 64] in dB of mono sounds at 32 kHz, padded with zeros or cut to `samples`, 10 s.


    edges: "reflect" as the weights were trained with, or "constant", zeros beyond the ends as librosa from 0.10 has it.
    The floor lies 80 dB below the loudest value of each sound.
    """
    wave = pad(wave.double(), (0, max(samples - wave.shape[1], 0)))[:, :samples]
    hann = torch.hann_window(WINDOW, periodic=True, dtype=torch.float64, device=wave.device)
    found = torch.stft(
        pad(wave[:, None], (WINDOW // 2, WINDOW // 2), mode=edges)[:, 0],
        WINDOW,
        HOP,
        window=hann,
        center=False,
        return_complex=True,
    )
    power = found.real.square() + found.imag.square()
    level = 10 * (slaney_mel().to(power) @ power).clamp(min=1e-10).log10()
    level = level.maximum(level.amax((1, 2), keepdim=True) - 80)
    return level.transpose(1, 2)[:, :-1].float()
