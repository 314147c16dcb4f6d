"""MM-Diffusion's second model: a diffusion U-Net that makes a frame larger (guided-diffusion's upsampler, no classes).

Names and shapes of the weights are those of the published files (64 to 256 pixels, 311,027,910 parameters).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from ..attention.core import attend
from .joint_layers import GROUPS, at_least_single
from .joint_unet import sinusoid


def normed(layer: nn.Module, x: Tensor) -> Tensor:
    """Group norm in float32 or better whatever the features' type."""
    return layer(at_least_single(x)).to(x.dtype)


class FrameBlock(nn.Module):
    """Residual block [B, I, H, W] -> [B, C, H, W]; `resample` acts before the first convolution."""

    def __init__(
        self, before: int, channels: int, emb_channels: int, resample: str, dropout: float, operations, **place
    ):
        super().__init__()
        self.resample = resample
        exact = {**place, "dtype": torch.float32}
        norm, conv = operations.GroupNorm, operations.Conv2d
        self.in_layers = nn.Sequential(
            norm(GROUPS, before, **exact), nn.SiLU(), conv(before, channels, 3, padding=1, **place)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), operations.Linear(emb_channels, 2 * channels, **exact))
        self.out_layers = nn.Sequential(
            norm(GROUPS, channels, **exact),
            nn.SiLU(),
            nn.Dropout(dropout),
            conv(channels, channels, 3, padding=1, **place),
        )
        self.skip_connection = nn.Identity() if before == channels else conv(before, channels, 1, **place)

    def resized(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return avg_pool2d(x, 2)
        return interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[1](normed(self.in_layers[0], x))))
        scale, shift = self.emb_layers(emb).to(h.dtype)[..., None, None].chunk(2, 1)
        h = self.out_layers[1:](normed(self.out_layers[0], h) * (1 + scale) + shift)
        return self.skip_connection(self.resized(x)) + h


class FrameAttention(nn.Module):
    """Self-attention over the pixels with residual; the projection holds queries, keys and values head by head."""

    def __init__(self, channels: int, heads: int, operations, **place):
        super().__init__()
        self.heads = heads
        self.norm = operations.GroupNorm(GROUPS, channels, **{**place, "dtype": torch.float32})
        self.qkv = operations.Conv1d(channels, 3 * channels, 1, **place)
        self.proj_out = operations.Conv1d(channels, channels, 1, **place)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        heads = self.qkv(normed(self.norm, x).flatten(2)).unflatten(1, (self.heads, 3, -1)).transpose(-1, -2)
        seen = attend(*heads.unbind(2), None).transpose(-1, -2).flatten(1, 2)
        return x + self.proj_out(seen).view_as(x)


class FrameStage(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for block in self:
            x = block(x, emb)
        return x


class FrameUpsampler(nn.Module):
    """Noise of frames [B, 3, H, W] at times t [B] beside their small versions -> [B, 6, H, W]: noise, then variance."""

    def __init__(
        self,
        model_channels: int = 192,
        channel_mult: Iterable[int] = (1, 1, 2, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Iterable[int] = (8, 16, 32),
        heads: int = 4,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations=nn,
    ):
        super().__init__()
        mult, seen = tuple(channel_mult), tuple(attention_resolutions)
        self.model_channels, self.levels, emb = model_channels, len(mult), 4 * model_channels
        place = {"dtype": dtype, "device": device}
        exact = {**place, "dtype": torch.float32}
        linear = operations.Linear
        self.time_embed = nn.Sequential(linear(model_channels, emb, **exact), nn.SiLU(), linear(emb, emb, **exact))

        def block(before, after, resample=""):
            return FrameBlock(before, after, emb, resample, dropout, operations, **place)

        def attention(factor):
            return [FrameAttention(channels, heads, operations, **place)] if factor in seen else []

        channels, widths = mult[0] * model_channels, [mult[0] * model_channels]
        entry = operations.Conv2d(6, channels, 3, padding=1, **place)
        self.input_blocks = nn.ModuleList([nn.ModuleList([entry])])
        for level, wider in enumerate(mult):
            for _ in range(num_res_blocks):
                before, channels = channels, wider * model_channels
                self.input_blocks.append(FrameStage(block(before, channels), *attention(2**level)))
                widths.append(channels)
            if level < len(mult) - 1:
                self.input_blocks.append(FrameStage(block(channels, channels, "down")))
                widths.append(channels)
        middle = FrameAttention(channels, heads, operations, **place)
        self.middle_block = FrameStage(block(channels, channels), middle, block(channels, channels))
        self.output_blocks = nn.ModuleList()
        for level, wider in reversed(list(enumerate(mult))):
            for number in range(num_res_blocks + 1):
                before, channels = channels + widths.pop(), wider * model_channels
                stage = [block(before, channels), *attention(2**level)]
                if level and number == num_res_blocks:
                    stage.append(block(channels, channels, "up"))
                self.output_blocks.append(FrameStage(*stage))
        norm = operations.GroupNorm(GROUPS, channels, **exact)
        self.out = nn.Sequential(norm, nn.SiLU(), operations.Conv2d(channels, 6, 3, padding=1, **place))

    def forward(self, x: Tensor, small: Tensor, t: Tensor) -> Tensor:
        """`small` [B, 3, h, w] in [-1, 1] is enlarged to x's size; ValueError when H or W does not divide."""
        if any(side % 2 ** (self.levels - 1) for side in x.shape[2:]):
            raise ValueError(
                f"height and width must be multiples of {2 ** (self.levels - 1)}, not {tuple(x.shape[2:])}"
            )
        emb = self.time_embed(sinusoid(t, self.model_channels))
        large = interpolate(small.to(x.dtype), size=x.shape[2:], mode="bilinear", align_corners=False)
        h = self.input_blocks[0][0](torch.cat([x, large], 1))
        kept = [h]
        for stage in self.input_blocks[1:]:
            h = stage(h, emb)
            kept.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, kept.pop()], 1), emb)
        return self.out[1:](normed(self.out[0], h))


def upsampler_configuration(weights: dict[str, Tensor]) -> dict:
    """The arguments of FrameUpsampler that weights tell; the number of heads is not among them.

    ValueError when these are not the weights of a frame upsampler without classes.
    """
    if "label_emb.weight" in weights:
        raise ValueError(
            "label_emb.weight: this is OpenAI's class-conditional upsampler, from which the frame upsampler was trained; "
            "it needs ImageNet classes and cannot enlarge frames"
        )
    for key in ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight"):
        if key not in weights:
            raise ValueError(f"these are not the weights of an MM-Diffusion frame upsampler: {key} is missing")
    if weights["input_blocks.0.0.weight"].shape[1] != 6 or weights["out.2.weight"].shape[0] != 6:
        raise ValueError("these are not the weights of an MM-Diffusion frame upsampler: it takes and gives 6 channels")
    width = weights["time_embed.0.weight"].shape[1]
    outputs = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("output_blocks."))
    tail = "in_layers.0.weight"
    ups = [n for n in range(outputs) if any(f"output_blocks.{n}.{place}.{tail}" in weights for place in (1, 2))]
    blocks, levels = ups[0] if ups else outputs - 1, len(ups) + 1
    first = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    return {
        "model_channels": width,
        "channel_mult": tuple(weights[f"{name}.0.out_layers.3.weight"].shape[0] // width for name in first),
        "num_res_blocks": blocks,
        "attention_resolutions": tuple(2**n for n, name in enumerate(first) if f"{name}.1.qkv.weight" in weights),
    }
