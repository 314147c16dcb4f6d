"""What a judge is: features of a caption, a sound and a picture, between which distances say how well they agree.

A judge answers to `text(caption)` and `audio(wave, rate, caption)` with features [1, width] that are made once, and to
`see(picture)` with the picture's feature in the space of each; gradients flow through `see` alone.
"""

import comfy.model_management
import torch
from torch import Tensor

from ..sampling.sound_optimise import LARGEST, prepare


class Judge:
    """The common part: a network on the device and pictures as it takes them."""

    size = 224
    log_scale: Tensor | float = LARGEST

    def __init__(self, network: torch.nn.Module):
        self.device = comfy.model_management.get_torch_device()
        self.network = network.to(self.device)

    def text(self, caption: str) -> Tensor:
        raise NotImplementedError

    def audio(self, wave: Tensor, rate: int, caption: str) -> Tensor:
        """Of a sound [samples]; its caption is for judges that hear through words."""
        raise NotImplementedError

    def _both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features of prepared pictures in the space of texts and in that of sounds."""
        raise NotImplementedError

    def see(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Features of pictures [n, 3, h, w] in [0, 1] in the space of texts and in that of sounds."""
        return self._both(prepare(picture.float().to(self.device), self.size))
