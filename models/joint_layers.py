"""Layers of MM-Diffusion's coupled U-Net under the names of the published weights."""

import torch
from torch import Tensor, nn

from ..attention.core import attend, merge_heads, split_heads

GROUPS = 32


def at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Reshaped(nn.Module):
    """Layers whose published weight has another shape than the faster layer used here: {layer: kernel shape}."""

    kernels: dict[str, tuple[int, ...]]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name, kernel in self.kernels.items():
            key = f"{prefix}{name}.weight"
            if key in state_dict:
                weight = state_dict[key]
                state_dict[key] = weight.reshape(*weight.shape[:2], *kernel)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Norm(nn.Module):
    """Group norm with 32 groups in float32 or better, whatever the features' type."""

    def __init__(self, channels: int, operations, device):
        super().__init__()
        self.GroupNorm = operations.GroupNorm(GROUPS, channels, eps=1e-5, device=device, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.GroupNorm(at_least_single(x).contiguous()).to(x.dtype)  # other layouts take a CPU far longer


class VideoConv(Reshaped):
    """3 x 3 on every frame, then 3 along time at every pixel ("2d+1d"), [B, I, F, H, W] -> [B, C, F, H, W]."""

    kernels = {"video_conv_temporal": (3, 1)}

    def __init__(self, before: int, channels: int, operations, **place):
        super().__init__()
        self.video_conv_spatial = operations.Conv2d(before, channels, 3, padding=1, **place)
        self.video_conv_temporal = operations.Conv2d(channels, channels, (3, 1), padding=(1, 0), **place)

    def forward(self, x: Tensor) -> Tensor:
        clips, _, frames, height, width = x.shape
        x = self.video_conv_spatial(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (clips, frames)).transpose(1, 2)
        return self.video_conv_temporal(x.flatten(3)).unflatten(3, (height, width))


class VideoPoint(nn.Module):
    """A 3-D convolution, same size out: kernel 1 inside blocks, 3 at the output."""

    def __init__(self, before: int, channels: int, operations, kernel: int = 1, **place):
        super().__init__()
        self.video_conv = operations.Conv3d(before, channels, kernel, padding=kernel // 2, **place)

    def forward(self, x: Tensor) -> Tensor:
        return self.video_conv(x)


class AudioConv(nn.Module):
    def __init__(self, before: int, channels: int, operations, kernel: int = 3, dilation: int = 1, **place):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.audio_conv = operations.Conv1d(before, channels, kernel, padding=padding, dilation=dilation, **place)

    def forward(self, x: Tensor) -> Tensor:
        return self.audio_conv(x)


class SelfAttention(Reshaped):
    """Attention of the last axis to itself with residual, [rows, C, tokens]; queries, keys, values first, then heads."""

    kernels = {"qkv": (), "proj_out": ()}

    def __init__(self, channels: int, heads: int, operations, **place):
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels, operations, place.get("device"))
        self.qkv = operations.Linear(channels, 3 * channels, **place)
        self.proj_out = operations.Linear(channels, channels, **place)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.norm(x).transpose(1, 2)).chunk(3, -1))
        return x + self.proj_out(merge_heads(attend(q, k, v, None))).transpose(1, 2)
