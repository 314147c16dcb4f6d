"""The demo models' autoencoder: 8 times smaller, 4 latent channels, as SD1.5's, but without norms and at low resolution.

Pixels are folded 4 x 4 into channels first (pixel unshuffle), so that all convolutions run at a quarter of the size:
ten times less work than AutoencoderKL for pictures this simple.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu


class Residual(nn.Module):
    def __init__(self, channels: int, operations):
        super().__init__()
        self.conv1 = operations.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = operations.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(silu(self.conv1(silu(x))))


class TinyAutoencoder(nn.Module):
    """Pictures [n, 3, h, w] in [-1, 1] to latents [n, 4, h/8, w/8] and back; h and w multiples of 8."""

    def __init__(self, wide: int = 64, deep: int = 96, blocks: int = 3, latent: int = 4, operations=nn):
        super().__init__()
        conv = operations.Conv2d
        self.encoder = nn.Sequential(
            conv(48, wide, 3, padding=1),
            *(Residual(wide, operations) for _ in range(blocks - 1)),
            conv(wide, deep, 2, stride=2),
            *(Residual(deep, operations) for _ in range(blocks)),
            conv(deep, 2 * latent, 1),
        )
        self.decoder = nn.Sequential(
            conv(latent, deep, 3, padding=1),
            *(Residual(deep, operations) for _ in range(blocks)),
            conv(deep, 4 * wide, 1),
            nn.PixelShuffle(2),
            *(Residual(wide, operations) for _ in range(blocks)),
            conv(wide, 48, 3, padding=1),
        )

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents."""
        mean, logvar = self.encoder(pixel_unshuffle(x, 4)).chunk(2, 1)
        return mean, logvar.clamp(-20, 10)

    def encode(self, x: Tensor) -> Tensor:
        return self.moments(x)[0]

    def decode(self, z: Tensor, **_) -> Tensor:
        return torch.tanh(pixel_shuffle(self.decoder(z), 4))
