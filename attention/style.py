"""StyleAligned: pictures of a set take their style from the first one (arXiv 2312.02133, equations 4 and 5).

Queries and keys of every other picture get the mean and spread of the first picture's (AdaIN), then they also attend to
the first picture's tokens. Group norms can take their statistics over a picture and the first one together.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import group_norm

EPS = 1e-5


@dataclass(frozen=True)
class StyleOptions:
    """What is shared with the reference; the defaults are the authors'.

    shared_score_scale multiplies the reference's keys and shared_score_shift is added to their logits, for the pictures that look at
    them. only_self_level is the part of the layers that stays plain. full_attention_share lets every picture see all
    pictures instead, without AdaIN, scale and shift.
    """

    share_attention: bool = True
    adain_queries: bool = True
    adain_keys: bool = True
    adain_values: bool = False
    full_attention_share: bool = False
    shared_score_scale: float = 1.0
    shared_score_shift: float = 0.0
    share_group_norm: bool = True
    only_self_level: float = 0.0

    @property
    def touches_attention(self) -> bool:
        """Whether any layer can differ from plain self-attention."""
        shares = self.full_attention_share or self.share_attention
        return self.only_self_level < 1 and (shares or self.adain_queries or self.adain_keys or self.adain_values)


def moments(x: Tensor, dim: int, correction: int) -> tuple[Tensor, Tensor]:
    """Mean and variance over one dimension, which stays with size 1; torch.var_mean takes five times as long on CPUs."""
    mean = x.mean(dim, keepdim=True)
    spread = torch.linalg.vector_norm(x - mean, dim=dim, keepdim=True)
    return mean, (spread / math.sqrt(x.shape[dim] - correction)).square()


def adain(x: Tensor, size: int) -> Tensor:
    """AdaIN over tokens for x [rows, heads, tokens, dim], whose rows come in sets of `size` behind their reference.

    Per head and channel, (x - mean) / std x std_ref + mean_ref with std = sqrt(unbiased variance + 1e-5). References come
    out bit-identical.
    """
    sets = x.unflatten(0, (-1, size))
    mean, var = moments(sets, 3, min(1, x.shape[2] - 1))
    std = (var + EPS).sqrt()
    scale = std[:, :1] / std
    return torch.addcmul(mean[:, :1] - mean * scale, sets, scale).flatten(0, 1)


def shared_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, size: int
) -> Tensor:
    """Group norm of x [rows, channels, ...] with statistics over each row and the reference of its set of `size` rows.

    The authors normalise [x ; reference] joined in space and keep the first half. The same by moments: the mean of both
    is the mean of the means, the variance the mean of the variances plus the square of half the means' distance.
    References come out bit-identical to the plain norm.
    """
    plain = group_norm(x, groups, weight, bias, eps)
    pixels = x.reshape(-1, size, groups, math.prod(x.shape[1:]) // groups)
    mean, var = moments(pixels if x.dtype in (torch.float32, torch.float64) else pixels.float(), 3, 0)
    first_var, first_mean = var[:, :1], mean[:, :1]
    joined = (var + first_var) / 2 + ((mean - first_mean) / 2) ** 2
    std = (joined + eps).sqrt()
    ratio = (var + eps).sqrt() / std  # the plain norm is exact, so it is only rescaled and moved
    offset = (mean - (mean + first_mean) / 2) / std
    ratio, offset = (t.flatten(0, 1).expand(-1, -1, x.shape[1] // groups).flatten(1) for t in (ratio, offset))
    if weight is not None:
        offset = offset * weight
    if bias is not None:
        offset = offset + bias * (1 - ratio)
    shape = (*x.shape[:2], *[1] * (x.ndim - 2))
    return torch.addcmul(offset.to(x.dtype).view(shape), plain, ratio.to(x.dtype).view(shape))


def plain_layers(count: int, level: float) -> list[bool]:
    """Which of `count` layers, in the order down, up, middle, keep plain self-attention at an only_self_level (0 to 1).

    The authors' choice: every k-th layer, k = count // int(level x count), and above one half the complement of the choice
    at 1 - level. The integer period makes the plain part larger than asked for (0.4 of 70 layers: 35). Where they divide
    by zero, 0 < level x count < 1, one layer is chosen.
    """
    if level in (0, 1):
        return [level == 1] * count
    complement = level > 0.5
    chosen = max(1, int((1 - level if complement else level) * count))
    period = count // chosen
    return [(index % period == 0) != complement for index in range(count)]
