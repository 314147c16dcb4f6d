"""MM-Diffusion's coupled U-Net (Ruan et al., CVPR 2023): one network denoises the pixels and the sound of a clip.

Names and shapes of the weights are those of the published files. Video is kept as [B, C, F, H, W] throughout.
"""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, avg_pool2d, interpolate
from torch.utils.checkpoint import checkpoint

from ..attention.cross_modal import Shifts, cross_modal_attention, listed_shifts, no_shift
from .joint_layers import GROUPS, AudioConv, Norm, Reshaped, SelfAttention, VideoConv, VideoPoint

DILATIONS = 10  # the audio dilation of block n is 2 ** (n % DILATIONS)


class CoupledBlock(nn.Module):
    """Residual block of both branches under one time embedding, then self-attention: (video, audio) -> (video, audio).

    video [B, I, F, H, W] and audio [B, I, L] to C channels; `resample` "down" halves height and width and quarters the
    audio, "up" reverses it, after the first convolution.
    """

    def __init__(
        self,
        before: int,
        channels: int,
        emb_channels: int,
        dilation: int,
        resample: str = "",
        video_attention: bool = False,
        audio_attention: bool = False,
        heads: int = 4,
        dropout: float = 0.0,
        operations=nn,
        **place,
    ):
        super().__init__()
        self.resample = resample
        drop, device = nn.Dropout(dropout), place.get("device")
        given = (Norm(before, operations, device), nn.SiLU())
        self.video_in_layers = nn.Sequential(*given, VideoConv(before, channels, operations, **place))
        given = (Norm(before, operations, device), nn.SiLU())
        sound = AudioConv(before, channels, operations, dilation=dilation, **place)
        self.audio_in_layers = nn.Sequential(*given, sound)
        exact = {**place, "dtype": torch.float32}
        self.emb_layers = nn.Sequential(nn.SiLU(), operations.Linear(emb_channels, 2 * channels, **exact))
        made = (Norm(channels, operations, device), nn.SiLU(), drop)
        self.video_out_layers = nn.Sequential(*made, VideoPoint(channels, channels, operations, **place))
        made = (Norm(channels, operations, device), nn.SiLU(), drop)
        self.audio_out_layers = nn.Sequential(*made, AudioConv(channels, channels, operations, kernel=1, **place))
        self.video_skip_connection, self.audio_skip_connection = nn.Identity(), nn.Identity()
        if before != channels:
            self.video_skip_connection = VideoPoint(before, channels, operations, **place)
            self.audio_skip_connection = AudioConv(before, channels, operations, kernel=1, **place)
        self.video_attention, self.audio_attention = video_attention, audio_attention
        if video_attention:
            self.spatial_attention_block = SelfAttention(channels, heads, operations, **place)
            self.temporal_attention_block = SelfAttention(channels, heads, operations, **place)
        if audio_attention:
            self.audio_attention_block = SelfAttention(channels, heads, operations, **place)

    def resized(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        if self.resample == "down":
            small = avg_pool2d(video.flatten(1, 2), 2).unflatten(1, video.shape[1:3])
            return small, avg_pool1d(audio, 4)
        if self.resample == "up":
            large = interpolate(video.flatten(1, 2), scale_factor=2, mode="nearest").unflatten(1, video.shape[1:3])
            return large, interpolate(audio, scale_factor=4, mode="nearest")
        return video, audio

    def forward(self, video: Tensor, audio: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        skip_video, skip_audio = self.resized(video, audio)
        video, audio = self.resized(self.video_in_layers(video), self.audio_in_layers(audio))
        scale, shift = self.emb_layers(emb).to(video.dtype).chunk(2, 1)
        video = self.modulated(video, self.video_out_layers, scale, shift)
        audio = self.modulated(audio, self.audio_out_layers, scale, shift)
        video = self.video_skip_connection(skip_video) + video
        audio = self.audio_skip_connection(skip_audio) + audio
        if self.video_attention:
            video = self.attended(video)
        if self.audio_attention:
            audio = self.audio_attention_block(audio)
        return video, audio

    @staticmethod
    def modulated(x: Tensor, layers: nn.Sequential, scale: Tensor, shift: Tensor) -> Tensor:
        wide = (..., *[None] * (x.ndim - 2))
        return layers[1:](layers[0](x) * (1 + scale[wide]) + shift[wide])

    def attended(self, video: Tensor) -> Tensor:
        """Every frame by itself, then every pixel along time."""
        clips, _, frames, height, width = video.shape
        rows = self.spatial_attention_block(video.transpose(1, 2).flatten(3).flatten(0, 1))
        rows = rows.unflatten(0, (clips, frames)).permute(0, 3, 2, 1).flatten(0, 1)
        rows = self.temporal_attention_block(rows)
        return rows.unflatten(0, (clips, height, width)).permute(0, 3, 4, 1, 2)


class CrossModalBlock(Reshaped):
    """Random-shift attention between the branches with residual; `window` in frames, None sees the whole clip."""

    kernels = {"v_qkv": (), "a_qkv": ()}

    def __init__(self, channels: int, head_channels: int, window: int | None, operations=nn, **place):
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"head_channels {head_channels} does not divide the {channels} channels of a block")
        self.heads, self.window = channels // head_channels, window
        self.v_norm = Norm(channels, operations, place.get("device"))
        self.a_norm = Norm(channels, operations, place.get("device"))
        self.v_qkv = operations.Linear(channels, 3 * channels, **place)
        self.a_qkv = operations.Linear(channels, 3 * channels, **place)
        self.video_proj_out = VideoPoint(channels, channels, operations, **place)
        self.audio_proj_out = AudioConv(channels, channels, operations, kernel=1, **place)

    def forward(self, video: Tensor, audio: Tensor, shifts: Shifts = no_shift) -> tuple[Tensor, Tensor]:
        frames = video.shape[2]
        window = self.window or frames
        of_audio, of_video = cross_modal_attention(
            self.v_qkv(self.v_norm(video).flatten(2).transpose(1, 2)).chunk(3, -1),
            self.a_qkv(self.a_norm(audio).transpose(1, 2)).chunk(3, -1),
            frames,
            window,
            shifts(frames, window),
            self.heads,
        )
        video = video + self.video_proj_out(of_audio.transpose(1, 2).unflatten(2, video.shape[2:]))
        return video, audio + self.audio_proj_out(of_video.transpose(1, 2))


class JointStage(nn.Sequential):
    """Blocks of one place of the U-Net in turn."""

    def forward(self, video: Tensor, audio: Tensor, emb: Tensor, shifts: Shifts) -> tuple[Tensor, Tensor]:
        for block in self:
            if isinstance(block, CoupledBlock):
                video, audio = block(video, audio, emb)
            else:
                video, audio = block(video, audio, shifts)
        return video, audio


class Entry(nn.Module):
    """First layer: pixels and samples to `channels` channels each."""

    def __init__(self, channels: int, operations, **place):
        super().__init__()
        self.video_conv = VideoConv(3, channels, operations, **place)
        self.audio_conv = AudioConv(1, channels, operations, **place)


def sinusoid(t: Tensor, channels: int) -> Tensor:
    """Cosines, then sines of the times [B] at falling frequencies, float32 [B, channels]."""
    half = channels // 2
    angles = t.float()[:, None] * torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device))
    return torch.cat([angles.cos(), angles.sin()], 1)


class JointUNet(nn.Module):
    """Noise of a clip: video [B, 3, F, H, W], audio [B, 1, L] in [-1, 1] at times t [B] -> predictions of these shapes.

    `windows` are in frames, one for every entry of `cross_attention_resolutions` (how often the size was halved, as a
    factor 1, 2, 4, 8). All sizes are free as long as H and W divide by 2 ** (levels - 1), L by 4 ** (levels - 1), and
    every level keeps a sample for each frame. Defaults are the published settings (133,675,524 parameters). `groups` of
    the norms: with as many as channels no layer knows the mean colour of a clip, and samples get a tint of chance.
    `lean`: gradients compute every stage a second time and keep only what passes between stages.
    """

    lean = False

    def __init__(
        self,
        model_channels: int = 128,
        channel_mult: Iterable[int] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        cross_attention_resolutions: Iterable[int] = (2, 4, 8),
        windows: Iterable[int] = (1, 4, 8),
        video_attention_resolutions: Iterable[int] = (2, 4, 8),
        audio_attention_resolutions: Iterable[int] = (),
        head_channels: int = 64,
        heads: int = 4,
        groups: int = GROUPS,
        middle_cross: bool = True,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations=nn,
    ):
        super().__init__()
        mult, windows, cross = tuple(channel_mult), tuple(windows), tuple(cross_attention_resolutions)
        if len(windows) != len(cross):
            raise ValueError(f"windows {windows} must be as many as cross_attention_resolutions {cross}")
        self.model_channels, self.levels = model_channels, len(mult)
        self.windows = dict(zip(cross, windows, strict=True))
        self.seen, self.heard = tuple(video_attention_resolutions), tuple(audio_attention_resolutions)
        place = {"operations": operations, "dtype": dtype, "device": device}
        self.options = {"heads": heads, "dropout": dropout, "head_channels": head_channels, "place": place}
        linear = partial(operations.Linear, model_channels, model_channels, dtype=torch.float32, device=device)
        self.time_embed = nn.Sequential(linear(), nn.SiLU(), linear())
        channels, number, widths = model_channels, 1, [model_channels]
        self.input_blocks = nn.ModuleList([nn.ModuleList([Entry(channels, **place)])])
        for level, wider in enumerate(mult):
            for _ in range(num_res_blocks):
                before, channels = channels, wider * model_channels
                block = self._coupled(before, channels, number, 2**level)
                self.input_blocks.append(JointStage(block, *self._crossing(channels, 2**level)))
                widths.append(channels)
                number += 1
            if level < len(mult) - 1:
                self.input_blocks.append(JointStage(self._coupled(channels, channels, number, resample="down")))
                widths.append(channels)
                number += 1
        middle = [CrossModalBlock(channels, head_channels, None, **place)] if middle_cross else []
        pair = [self._coupled(channels, channels, number, middle=True) for _ in range(2)]
        self.middle_blocks = JointStage(pair[0], *middle, pair[1])
        self.output_blocks = nn.ModuleList()
        for level, wider in reversed(list(enumerate(mult))):
            for place_in_level in range(num_res_blocks + 1):
                number -= 1
                before, channels = channels + widths.pop(), wider * model_channels
                stage = [self._coupled(before, channels, number, 2**level), *self._crossing(channels, 2**level)]
                if level and place_in_level == num_res_blocks:
                    stage.append(self._coupled(channels, channels, number - 1, resample="up"))
                self.output_blocks.append(JointStage(*stage))
        norms = [Norm(channels, operations, device) for _ in range(2)]
        self.video_out = nn.Sequential(norms[0], nn.SiLU(), VideoPoint(channels, 3, kernel=3, **place))
        self.audio_out = nn.Sequential(norms[1], nn.SiLU(), AudioConv(channels, 1, **place))
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = groups

    def _coupled(self, before, channels, number, factor=None, resample="", middle=False) -> CoupledBlock:
        attention = {
            "video_attention": middle or factor in self.seen,
            "audio_attention": middle or factor in self.heard,
        }
        own = {name: self.options[name] for name in ("heads", "dropout")} | self.options["place"]
        dilation = 2 ** (number % DILATIONS)
        return CoupledBlock(before, channels, self.model_channels, dilation, resample, **attention, **own)

    def _crossing(self, channels: int, factor: int) -> list[CrossModalBlock]:
        if factor not in self.windows:
            return []
        head_channels = self.options["head_channels"]
        return [CrossModalBlock(channels, head_channels, self.windows[factor], **self.options["place"])]

    def start_quiet(self) -> None:
        """Zeroes what the authors start from zero: the last layer of every residual, attention and output."""
        for module in self.modules():
            if isinstance(module, CoupledBlock):
                last = [module.video_out_layers[-1].video_conv, module.audio_out_layers[-1].audio_conv]
            elif isinstance(module, CrossModalBlock):
                last = [module.video_proj_out.video_conv, module.audio_proj_out.audio_conv]
            elif isinstance(module, SelfAttention):
                last = [module.proj_out]
            elif module is self:
                last = [self.video_out[-1].video_conv, self.audio_out[-1].audio_conv]
            else:
                continue
            for layer in last:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def check(self, video: Tensor, audio: Tensor) -> None:
        """ValueError for sizes the network cannot take."""
        frames, height, width = video.shape[2:]
        halved, deepest = 2 ** (self.levels - 1), 4 ** (self.levels - 1)
        if height % halved or width % halved:
            raise ValueError(f"height and width must be multiples of {halved}, not {height} and {width}")
        if audio.shape[-1] % deepest:
            raise ValueError(f"the number of audio samples must be a multiple of {deepest}, not {audio.shape[-1]}")
        if audio.shape[-1] // deepest < frames:
            raise ValueError(
                f"{audio.shape[-1]} audio samples are too few for {frames} frames: {deepest} a frame at least"
            )
        if max(self.windows.values(), default=1) > frames:
            raise ValueError(f"the windows {tuple(self.windows.values())} do not fit into a clip of {frames} frames")

    def forward(
        self, video: Tensor, audio: Tensor, t: Tensor, shifts: Shifts | Iterable[int] = no_shift
    ) -> tuple[Tensor, Tensor]:
        """`shifts` says where each cross-modal block looks: called with (frames, window), or a shift a block in order.

        Order: input blocks, middle, output blocks. ValueError: see `check`, and cross_modal_attention's.
        """
        self.check(video, audio)
        shifts = shifts if callable(shifts) else listed_shifts(shifts)
        emb = sinusoid(t, self.model_channels)
        emb = self.time_embed(emb.to(torch.promote_types(video.dtype, emb.dtype)))
        entry = self.input_blocks[0][0]
        h = entry.video_conv(video), entry.audio_conv(audio)
        kept = [h]
        for stage in self.input_blocks[1:]:
            h = self._through(stage, h, emb, shifts)
            kept.append(h)
        h = self._through(self.middle_blocks, h, emb, shifts)
        for stage in self.output_blocks:
            joined = [torch.cat(pair, 1) for pair in zip(h, kept.pop(), strict=True)]
            h = self._through(stage, joined, emb, shifts)
        return self.video_out(h[0]), self.audio_out(h[1])

    def _through(self, stage: JointStage, h, emb: Tensor, shifts: Shifts) -> tuple[Tensor, Tensor]:
        if not (self.lean and torch.is_grad_enabled()):
            return stage(*h, emb, shifts)
        frames = h[0].shape[2]
        # drawn before the stage, or its second computation would look elsewhere
        drawn = [shifts(frames, block.window or frames) for block in stage if isinstance(block, CrossModalBlock)]
        return checkpoint(lambda *halves: stage(*halves, emb, listed_shifts(drawn)), *h, use_reentrant=False)


def configuration(weights: dict[str, Tensor]) -> dict:
    """The arguments of JointUNet that weights tell; windows, head_channels, heads and groups are not among them.

    ValueError when these are not the weights of a coupled U-Net.
    """
    required = (
        "time_embed.0.weight",
        "input_blocks.0.0.video_conv.video_conv_spatial.weight",
        "video_out.2.video_conv.weight",
    )
    required += ("middle_blocks.0.video_in_layers.2.video_conv_spatial.weight", "output_blocks.0.0.emb_layers.1.weight")
    for key in required:
        if key not in weights:
            raise ValueError(f"these are not the weights of an MM-Diffusion coupled U-Net: {key} is missing")
    width = weights["time_embed.0.weight"].shape[0]
    outputs = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("output_blocks."))
    tail = "video_in_layers.0.GroupNorm.weight"
    ups = [n for n in range(outputs) if any(f"output_blocks.{n}.{place}.{tail}" in weights for place in (1, 2))]
    blocks = ups[0] if ups else outputs - 1
    levels = len(ups) + 1
    first = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]

    def factors(key: str) -> tuple[int, ...]:
        return tuple(2**level for level, name in enumerate(first) if f"{name}.{key}" in weights)

    return {
        "model_channels": width,
        "channel_mult": tuple(weights[f"{name}.0.emb_layers.1.weight"].shape[0] // 2 // width for name in first),
        "num_res_blocks": blocks,
        "cross_attention_resolutions": factors("1.v_qkv.weight"),
        "video_attention_resolutions": factors("0.spatial_attention_block.qkv.weight"),
        "audio_attention_resolutions": factors("0.audio_attention_block.qkv.weight"),
        "middle_cross": "middle_blocks.1.v_qkv.weight" in weights,
    }
