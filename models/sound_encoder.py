"""A small sound encoder into the space of a CLIP: ACT's encoder, of which the class token is kept."""

from collections.abc import Mapping

from torch import Tensor, nn

from .act import Encoder


class SoundEncoder(nn.Module):
    """Features [n, frames, mels] in dB -> embeddings [n, width], not normalised; sizes as for ACT's encoder."""

    def __init__(self, sizes: Mapping[str, int], operations=nn):
        super().__init__()
        self.encoder = Encoder(sizes, operations)

    def forward(self, features: Tensor) -> Tensor:
        return self.encoder(features)[:, 0]
