"""MagDiff (arXiv 2311.17338) around the network: the subject on plain ground (SDA) and its latents at three scales (HFA).

Pictures are [n, 3, h, w]. The authors published neither weights nor the layers of the pyramid; its start is chosen so that
training begins exactly at the base model.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
GROUNDS = {"black": 0.0, "grey": 0.5, "white": 1.0}


def cut_out(picture: Tensor, mask: Tensor, ground: float, soft: bool = False) -> Tensor:
    """Picture where the mask [n or 1, h, w] is not 0, `ground` elsewhere; soft blends by the mask's value instead."""
    share = mask[:, None].to(picture) if soft else (mask[:, None] != 0).to(picture)
    return picture * share + ground * (1 - share)


def resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [n, h, w] in another size, smoothly."""
    return interpolate(mask[:, None], size=size, mode="bilinear", antialias=True)[:, 0].clamp(0, 1)


def subject_box(mask: Tensor, margin: float) -> tuple[int, int, int]:
    """Left, top and side of the square around what any mask of [n, h, w] keeps, widened by `margin` of its side each way."""
    kept = (mask != 0).any(0)
    rows, columns = kept.any(1).nonzero().flatten(), kept.any(0).nonzero().flatten()
    top, bottom, left, right = rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1
    side = math.ceil(max(bottom - top, right - left) * (1 + 2 * margin))
    return (left + right - side) // 2, (top + bottom - side) // 2, side


def square(picture: Tensor, box: tuple[int, int, int], ground: float) -> Tensor:
    """The square (left, top, side) of a picture, with ground where it reaches beyond the edges."""
    left, top, side = box
    height, width = picture.shape[-2:]
    edges = (max(0, -left), max(0, left + side - width), max(0, -top), max(0, top + side - height))
    padded = pad(picture, edges, value=ground)
    left, top = left + edges[0], top + edges[2]
    return padded[..., top : top + side, left : left + side]


def fit(picture: Tensor, side: int) -> Tensor:
    """Short side resized to `side` (bilinear, no antialias), then the middle side x side: what the VAE branch gets."""
    height, width = picture.shape[-2:]
    scale = side / min(height, width)
    size = (side, int(width * scale)) if height < width else (int(height * scale), side)
    picture = interpolate(picture, size=size, mode="bilinear", align_corners=False, antialias=False)
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return picture[..., top : top + side, left : left + side]


def _blurred(picture: Tensor, factors: tuple[float, float]) -> Tensor:
    """Gaussian blur that keeps a reduction by `factors` (height, width) from aliasing."""
    for factor, dim in zip(factors, (2, 3), strict=True):
        sigma = max((factor - 1) / 2, 0.001)
        size = int(max(4 * sigma, 3)) | 1
        x = torch.arange(size, dtype=picture.dtype) - size // 2
        weights = torch.exp(-(x**2) / (2 * sigma**2))
        shape = (1, 1, size, 1) if dim == 2 else (1, 1, 1, size)
        edge = (0, 0, size // 2, size // 2) if dim == 2 else (size // 2, size // 2, 0, 0)
        kernel = (weights / weights.sum()).view(shape).expand(picture.shape[1], 1, *shape[2:])
        picture = conv2d(pad(picture, edge, mode="reflect"), kernel.to(picture.device), groups=picture.shape[1])
    return picture


def clip_pixels(picture: Tensor, side: int = 224) -> Tensor:
    """Pictures in -1..1 as the authors' CLIP branch sees them: blurred, bicubic with aligned corners, normalised."""
    factors = tuple(length / side for length in picture.shape[-2:])
    if max(factors) > 1:
        picture = _blurred(picture, factors)
    picture = interpolate(picture, size=(side, side), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(x).to(picture).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return ((picture + 1) / 2 - mean) / std


class LatentPyramid(nn.Module):
    """z_s of HFA: latents [n, c, h_i, w_i] of several scales -> [n, c, h, w] of the last, by one 3 x 3 convolution."""

    def __init__(self, scales: int = 3, channels: int = 4, operations=nn):
        super().__init__()
        self.conv = operations.Conv2d(scales * channels, channels, 3, padding=1)

    @torch.no_grad()
    def start(self) -> "LatentPyramid":
        """Set the weights to give the last scale's latents unchanged."""
        channels = self.conv.out_channels
        self.conv.weight.zero_()
        self.conv.bias.zero_()
        self.conv.weight[:, -channels:, 1, 1] = torch.eye(channels)
        return self

    @staticmethod
    def stacked(latents: Sequence[Tensor]) -> Tensor:
        """All scales resized (bilinear, antialias) to the last one's size and laid on each other's channels."""
        size = latents[-1].shape[-2:]
        return torch.cat([interpolate(z, size=size, mode="bilinear", antialias=True) for z in latents], 1)

    def forward(self, latents: Sequence[Tensor]) -> Tensor:
        return self.conv(self.stacked(latents))


def beside_noise(noise: Tensor, subject: Tensor) -> Tensor:
    """The U-Net's input [n, 2c, frames, h, w]: noise [n, c, frames, h, w] and the subject's latents, of that shape."""
    return torch.cat([noise, subject], 1)


def widened(weight: Tensor, extra: int) -> Tensor:
    """conv_in's weight [out, in, kh, kw] with `extra` more input channels of zeros: the same output to begin with."""
    return pad(weight, (0, 0, 0, 0, 0, extra))


FORMAT = "storyweft.magdiff"
ALPHAS = {"alpha_text": 1.0, "alpha_image": 1.5}  # where the authors' code starts


class Alignment(nn.Module):
    """What MagDiff trains around a U-Net: alphas of each cross-attention, the latent pyramid, conv_in's new channels.

    `scales` are the sides of the subject's pictures over that of the target; alphas [layers] are in the order of adapter
    files. The new channels start at zero: HFA then changes nothing.
    """

    def __init__(self, layers: int, width: int, channels: int = 4, scales: Sequence[float] = (1.5, 1.25, 1.0)):
        super().__init__()
        self.scales = tuple(scales)
        for name, start in ALPHAS.items():
            self.register_parameter(name, nn.Parameter(torch.full((layers,), start)))
        self.pyramid = LatentPyramid(len(self.scales), channels).start()
        self.conv_in = nn.Parameter(torch.zeros(width, channels, 3, 3))

    def forward(self, latents: Sequence[Tensor]) -> Tensor:
        """What is added to conv_in's output [n, width, h, w] for subject latents of every scale [n, channels, h_i, w_i]."""
        return conv2d(self.pyramid(latents), self.conv_in, padding=1)

    def metadata(self) -> dict[str, str]:
        """What a file says beside its tensors."""
        return {"format": FORMAT, "scales": " ".join(str(scale) for scale in self.scales)}


def build(state: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Alignment:
    """The alignment of a file, loaded strictly. Raises ValueError, naming `source`, for anything else."""
    if metadata.get("format") != FORMAT or not {"conv_in", "alpha_text"} <= set(state):
        raise ValueError(f"{source} is no MagDiff alignment: its format is {metadata.get('format')!r}, not {FORMAT!r}.")
    width, channels = state["conv_in"].shape[:2]
    made = Alignment(len(state["alpha_text"]), width, channels, [float(x) for x in metadata["scales"].split()])
    own = made.state_dict()
    for key in own.keys() | state.keys():
        if key not in own or key not in state:
            raise ValueError(f"{source}: the tensor {key} is {'missing' if key in own else 'not known'}.")
        if own[key].shape != state[key].shape:
            raise ValueError(f"{source}: the tensor {key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}.")
        if not state[key].isfinite().all():
            raise ValueError(f"{source}: the tensor {key} holds numbers that are not finite.")
    made.load_state_dict(state)
    return made.requires_grad_(False)
