"""Trains MM-Diffusion's coupled U-Net (arXiv 2212.09478) on clips with sound.

`python -m training.joint_unet --data FOLDER` takes any videos with sound, without --data the picture-book world is
drawn. `accelerate launch` in place of `python` trains on several GPUs or machines. The loss is the paper's: the noise of
both halves at one time, with a shift drawn for every cross-modal block at every step. `--weight-video C` and
`--weight-audio C` (0: as the paper) multiply a half's loss by min(1, C / SNR), scaled to mean 1 over all times, which
spends less on small noise (min-SNR, arXiv 2303.09556): a short training has to learn what is seen and heard first.
`--video-scale` multiplies the pictures (arXiv 2301.10972), for worlds whose pictures are settled long before their sound.
The published model: --frames 16 --size 64 --sound-rate 16000 --channels 128
--mult 1 2 3 4 --blocks 2 --cross 2 4 8 --windows 1 4 8 --attention 2 4 8 --head-channels 64 --groups 32
--weight-video 0 --weight-audio 0 --rate 1e-4 --batch 128.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from . import (
    loop,
    package,  # noqa: F401
    sounds,
)
from .joint_data import demo_clips, folder_clips

from storyweft.attention.cross_modal import RandomShifts, no_shift  # isort: skip
from storyweft.models.joint_unet import JointUNet  # isort: skip

ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
_group_norm = torch.nn.functional.group_norm


class Contiguous(torch.autograd.Function):
    """The same values in order in memory, forwards and backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous()


def contiguous(x, groups, weight=None, bias=None, eps=1e-5):
    """Group norm of contiguous copies: other layouts take a CPU several times as long, backwards above all."""
    return Contiguous.apply(_group_norm(Contiguous.apply(x), groups, weight, bias, eps))


def weight(t: Tensor, limit: float, scale: float = 1.0) -> Tensor:
    """min(1, limit / SNR) of times [B] of what is multiplied by `scale`, of mean 1 over all times; limit 0: 1."""
    if not limit:
        return torch.ones(t.shape)
    every = (limit * (1 - ALPHAS) / (scale**2 * ALPHAS)).clamp(max=1)
    return (every / every.mean())[t]


@torch.no_grad()
def ddim(model, video: Tensor, audio: Tensor, steps: int, shifts=no_shift, known=None) -> tuple[Tensor, Tensor]:
    """Deterministic samples from noise of both halves, x0 clipped to [-1, 1].

    `known` (video, None) or (None, audio) is kept: at every step that half is the given one with the noise it began
    with (the paper's replacement).
    """
    noise, x = (video, audio), [video, audio]
    times = torch.linspace(999, 0, steps + 1).round().long().tolist()
    for now, after in zip(times[:-1], times[1:], strict=True):
        a, b = ALPHAS[now], ALPHAS[after] if after > 0 else torch.tensor(1.0)
        for half, given in enumerate(known or ()):
            if given is not None:
                x[half] = a.sqrt() * given + (1 - a).sqrt() * noise[half]
        made = model(*x, torch.full((len(video),), now), shifts=shifts)
        for half in range(2):
            clean = ((x[half] - (1 - a).sqrt() * made[half].float()) / a.sqrt()).clamp(-1, 1)
            rest = (x[half] - a.sqrt() * clean) / (1 - a).sqrt()
            x[half] = b.sqrt() * clean + (1 - b).sqrt() * rest
    for half, given in enumerate(known or ()):
        if given is not None:
            x[half] = given
    return x[0], x[1]


def spectrogram(sound: Tensor, height: int, width: int) -> np.ndarray:
    """Picture of a waveform [L], low notes below, uint8 [height, width, 3]."""
    power = torch.stft(sound, 256, 64, window=torch.hann_window(256), return_complex=True).abs()
    level = ((power + 0.02).log10() + 1.7) / 3.2
    picture = Image.fromarray((level.clamp(0, 1) * 255).byte().flip(0).numpy()).resize((width, height))
    return np.asarray(picture.convert("RGB"))


def strip(video: Tensor, sound: Tensor, every: int = 2, scale: int = 2) -> np.ndarray:
    """A clip as a row: every second frame, then the spectrogram."""
    frames = ((video[::every] + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    row = np.concatenate(list(frames), 1).repeat(scale, 0).repeat(scale, 1)
    return np.concatenate([row, spectrogram(sound[0].float(), row.shape[0], 3 * row.shape[0])], 1)


class Task(loop.Task):
    def __init__(self, args):
        self.name, self.args, self.left_out = args.name, args, []
        if args.data:
            size = args.frames, args.size, args.fps, args.sound_rate
            self.clips, self.left_out = folder_clips(Path(args.data), *size)
        else:
            self.clips = demo_clips(args.seed, args.clips, args.folder)
        self.examples = len(self.clips)
        built = {
            "model_channels": args.channels, "channel_mult": args.mult, "num_res_blocks": args.blocks,
            "cross_attention_resolutions": args.cross, "windows": args.windows,
            "video_attention_resolutions": args.attention, "head_channels": args.head_channels, "groups": args.groups,
        }  # fmt: skip
        samples = self.clips.samples * self.clips.length
        self.config = {
            **built, "frames": self.clips.length, "height": args.size, "width": args.size, "samples": samples,
            "sample_rate": args.sound_rate, "fps": args.fps, "video_scale": args.video_scale,
        }  # fmt: skip
        self.metadata = {"world": str(args.data or "picture book"), "weight_video": str(args.weight_video),
                         "weight_audio": str(args.weight_audio), "shift": args.shift}  # fmt: skip
        torch.manual_seed(args.seed)
        self.model = JointUNet(**built, dropout=args.dropout)
        self.model.start_quiet()
        if args.start:
            self.model.load_state_dict({name: value.float() for name, value in load_file(args.start).items()})
            self.metadata["start"] = loop.file_hash(args.start)
        self.model.check(*(torch.empty(1, *half.shape[1:]) for half in self.halves(torch.zeros(1, dtype=torch.long))))

    def halves(self, index: Tensor) -> tuple[Tensor, Tensor]:
        video, audio = self.clips.batch(index)
        return self.args.video_scale * video.transpose(1, 2).contiguous(), audio

    def check(self) -> list[str]:
        video, audio = self.halves(torch.arange(min(64, self.examples)))
        quiet = int((audio.abs().amax((1, 2)) < 1e-3).sum())
        return [
            f"{self.examples} examples of {self.clips.length} frames {tuple(video.shape[3:])} and {audio.shape[-1]} samples",
            *(f"left out: {words}" for words in self.left_out),
            f"of the first {len(audio)} examples {quiet} are silent; loudness (standard deviation) {audio.std():.3f}",
        ]

    def shifts(self, generator: torch.Generator):
        if self.args.shift == "off":
            return no_shift
        return RandomShifts(int(torch.randint(2**62, (1,), generator=generator)))

    def loss(self, network, index, generator):
        clean, size = self.halves(index), len(index)
        # times are spread evenly over the batch
        t = (1000 * (torch.arange(size) + torch.rand(size, generator=generator)) / size).long()
        a = ALPHAS[t]
        noises, noisy = [], []
        for half in clean:
            level = a.view(-1, *[1] * (half.ndim - 1))
            noises.append(torch.randn(half.shape, generator=generator))
            noisy.append(level.sqrt() * half + (1 - level).sqrt() * noises[-1])
        device = next(network.parameters()).device
        noises, noisy = [[half.to(device) for half in halves] for halves in (noises, noisy)]
        made = network(*noisy, t.to(device), shifts=self.shifts(generator))
        total, limits = 0.0, ((self.args.weight_video, self.args.video_scale), (self.args.weight_audio, 1.0))
        for made_half, noise, limit in zip(made, noises, limits, strict=True):
            each = (made_half.float() - noise).square().flatten(1).mean(1)
            total = total + (weight(t, *limit).to(device) * each).mean()
        return total

    def show(self, model) -> Image.Image:
        generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
        video, audio = self.halves(torch.zeros(self.args.shown, dtype=torch.long))
        noise = [torch.randn(half.shape, generator=generator).to(device) for half in (video, audio)]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            video, audio = ddim(model, *noise, self.args.shown_steps, self.shifts(generator))
        video = video / self.args.video_scale
        rows = [strip(one.cpu().transpose(0, 1), heard.cpu()) for one, heard in zip(video, audio, strict=True)]
        return Image.fromarray(np.concatenate(rows))


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loop.add_arguments(parser, minutes=80, batch=4, rate=2e-3, average=0.995, seed=12)
    add = parser.add_argument
    add("--data", help="folder of videos with sound; without it the picture-book world is drawn")
    add("--name", default="joint_av", help="stem of the files written")
    add("--start", type=Path, help="file of the same sizes whose weights are gone on from")
    add("--clips", type=int, default=4000, help="clips of the picture-book world")
    add("--frames", type=int, default=sounds.FRAMES, help="frames of an example (the picture-book world has 16)")
    add("--size", type=int, default=sounds.PIXELS, help="side of the square pictures")
    add("--fps", type=int, default=sounds.FPS, help="frames a second")
    add("--sound-rate", type=int, default=sounds.RATE, help="sound samples a second")
    add("--channels", type=int, default=32, help="width of the first level, a multiple of 32")
    add("--mult", type=int, nargs="+", default=[1, 1, 1, 1], help="widths of the levels, in --channels")
    add("--blocks", type=int, default=1, help="residual blocks a level")
    add("--cross", type=int, nargs="+", default=[4, 8], help="cross-modal attention where the size is halved to 1 / N")
    add("--windows", type=int, nargs="+", default=[1, 4], help="its windows in frames, one for each of --cross")
    add("--attention", type=int, nargs="+", default=[8], help="video self-attention where the size is 1 / N")
    add("--head-channels", type=int, default=16, help="channels of a head of the cross-modal attention")
    add("--groups", type=int, default=8, help="groups of the norms; fewer than channels, or mean colours are not seen")
    add("--shift", default="random", choices=("random", "off"), help="shift of the cross-modal windows")
    add("--weight-video", type=float, default=0.005, help="C of the weight on the loss of pictures, 0: none")
    add("--weight-audio", type=float, default=0.03, help="C of the weight on the loss of sound, 0: none")
    add("--video-scale", type=float, default=1.0, help="what pictures in -1..1 are multiplied by")
    add("--dropout", type=float, default=0.0)
    add("--shown", type=int, default=6, help="clips of the sample sheet")
    add("--shown-steps", type=int, default=25, help="DDIM steps of the sample sheet")
    args = parser.parse_args(words)
    if not 0 < args.video_scale <= 1:
        parser.error(f"--video-scale is {args.video_scale:g}; it must be above 0 and at most 1, the clip of clean estimates")
    return args


def main() -> None:
    args = parsed()
    torch.nn.functional.group_norm = contiguous
    loop.Loop(Task(args), args).run()


if __name__ == "__main__":
    main()
