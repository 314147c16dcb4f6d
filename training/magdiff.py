"""Trains MagDiff's parts (arXiv 2311.17338) for a U-Net: alphas, latent pyramid, conv_in's new channels.

`python -m training.magdiff` on the picture-book world for the demo model; for your own
`python -m training.magdiff --checkpoint FILE --adapter-file FILE --encoder CLIP_VISION_FILE --subjects DIR --side 512`, an
SD1.5, SD2 or SDXL checkpoint, an image adapter of its family in IP-Adapter's layout and the CLIP vision model it reads.
The folder holds cat.png, its mask cat.mask.png (or an alpha channel) and its caption cat.txt; with --frames 8 it holds
cat.mp4, the mask of its first frame and its caption (training/subject_data.py).

Half of the time the subject is kept on black ground, half of the time everything else (editing). The cut-out goes into CLIP
vision (cropped) and, in its place, at three sizes into the VAE; the model draws the whole picture from that and the text.
Of a clip the first frame alone gets the latents of the cut-out and the others those of a black picture; all frames get its
image tokens. Text is dropped in 15 %, the picture in 10 %. U-Net, encoders and the image adapter stay as they are,
`--adapter` trains the adapter along. The authors' numbers: --side 256 --frames 8 --rate 5e-5 --warmup 100 --decay 0.

Clips without --checkpoint train the demo video model. Checkpoints that this trainer reads have no temporal layers (ComfyUI
has none of SD2.1 with text and frames, which the authors inflated), so a clip's frames are rows by themselves, as the nodes
see frames of AnimateDiff. The temporal layers, self-attention and Resampler that the authors train too stay as they are, and
so does the checkpoint's noise schedule, which they rescale to zero terminal SNR.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from . import kept, loop, written_out
from .adapted import Adapted, read_adapter
from .clips import shared
from .picture_model import PictureEncoder, PictureModel, add_arguments, chosen, chosen_encoder
from .storybook import COLOURS, HATS, KINDS, PLACES, TIMES, Facts, phrase
from .subject_data import Subject, SubjectFolder, held_out, told_left_out
from .subjects import page

from storyweft.host.image_adapter import LoadedAdapter, check_features  # isort: skip
from storyweft.models.ip_adapter import ImageAdapter  # isort: skip
from storyweft.models.magdiff import Alignment, cut_out, square, subject_box  # isort: skip

SCALES = (1.5, 1.25, 1.0)
HELD_OUT = 6  # pictures that only the sheet of samples shows


def drawn(rng: np.random.Generator) -> Subject:
    """A character of the picture-book world."""
    kind, colour, hat, place, time = (str(rng.choice(list(words))) for words in (KINDS, COLOURS, HATS, PLACES, TIMES))
    pixels = torch.from_numpy(np.array(page(rng, kind, colour, hat, place, time))).float() / 255
    caption = phrase(rng, Facts(kind, colour, hat, place, time, (0, 0, 0, 0)))
    return Subject(pixels[None, ..., :3].movedim(-1, 1), pixels[..., 3], caption)


class Aligned(nn.Module):
    """The frozen U-Net with both prompts aligned and the subject beside the noise."""

    def __init__(self, alignment: Alignment, adapter: ImageAdapter, unet):
        super().__init__()
        self.alignment, self.adapter, self.unet = alignment, adapter, unet.requires_grad_(False)
        self.adapted = Adapted(self.unet, self.adapter)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, seen: Tensor, latents: list[Tensor], **more) -> Tensor:
        """What the U-Net predicts for x [n, 4, h, w]; CLIP features seen [n, ...] of the cut-out, its latents at every scale."""
        beside = self.alignment(latents)
        handle = self.unet.input_blocks[0][0].register_forward_hook(lambda _, __, out: out + beside.to(out))
        pairs = list(zip(self.alignment.alpha_text, self.alignment.alpha_image, strict=True))
        out = self.adapted(x, t, context, self.adapter.image_proj(seen), alphas=pairs, **more)
        handle.remove()
        return out


class Subjects(loop.Task):
    """Everything of each subject twice: with it kept (even numbers) and with the rest kept (odd ones); see `data`."""

    def __init__(self, model: Aligned, base: PictureModel, data: dict, name: str, metadata: dict, whole: bool):
        self.name, self.model, self.base, self.data, self.whole = name, model, base, data, whole
        self.frames = data["clean"].shape[1]
        self.held, self.left_out = data["held"], data["left_out"]
        self.examples = 2 * (len(data["clean"]) - self.held)
        self.share = getattr(base.model.model.model_sampling, "share", 0.0)  # of the noise of two frames
        self.more = {"num_video_frames": self.frames} if self.share else {}
        self.metadata = model.alignment.metadata() | metadata
        self.config = dict(model.alignment.metadata())

    def given(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Of examples [n], for their frames one after the other: latents, rows of captions, features, and the pyramid."""
        data, of = self.data, (index // 2)
        scales = []
        for number in range(len(SCALES)):
            rest = data[f"blank{number}"].float().expand(len(index), self.frames - 1, -1, -1, -1)
            scales.append(torch.cat([data[f"scale{number}"][index].float()[:, None], rest], 1).flatten(0, 1))
        rows = data["rows"][of].repeat_interleave(self.frames)
        return data["clean"][of].float().flatten(0, 1), rows, data["embedding"][index].float(), scales

    def noise(self, shape, generator: torch.Generator) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return shared(noise, self.frames, self.share) if self.share else noise

    def predicted(self, network, x, t, rows, seen, scales) -> Tensor:
        """On the CPU, for frames x whose captions are `rows`; features seen are one a clip."""
        device, size = next(self.model.parameters()).device, x.shape[-2:]
        y = self.base.vector(self.data["pooled"][rows].float(), size)
        more = self.more | ({} if y is None else {"y": y.to(device)})
        context, seen = self.data["texts"][rows].float(), seen.repeat_interleave(self.frames, 0)
        scales = [scale.to(device) for scale in scales]
        return network(*(one.to(device) for one in (x, t, context, seen)), scales, **more).float().cpu()

    def loss(self, network, index, generator):
        count = len(index)
        clean, rows, seen, scales = self.given(index)
        rows[(torch.rand(count, generator=generator) < 0.15).repeat_interleave(self.frames)] = 0
        hidden = torch.rand(count, generator=generator) < 0.1
        seen[hidden] = self.data["blank"].float()
        for number, scale in enumerate(scales):
            scale[hidden.repeat_interleave(self.frames)] = self.data[f"blank{number}"].float()
        t = (1000 * (torch.arange(count) + torch.rand(count, generator=generator)) / count).long()
        t = t.repeat_interleave(self.frames)
        a = self.base.alphas[t].view(-1, 1, 1, 1)
        noise = self.noise(clean.shape, generator)
        made = self.predicted(network, a.sqrt() * clean + (1 - a).sqrt() * noise, t, rows, seen, scales)
        return (made - self.base.wanted(clean, noise, a)).square().mean()

    def check(self):
        what = "pictures" if self.frames == 1 else f"clips of {self.frames} frames"
        return [
            f"{self.examples // 2} {what}, each with the character kept and with the rest kept; {self.held} more for samples",
            *told_left_out(self.left_out),
        ]

    def tensors(self):
        adapter = self.model.adapter.state_dict() if self.whole else {}
        return self.model.alignment.state_dict() | adapter

    def show(self, model) -> Image.Image:
        """Held-out pictures; below each what is drawn with the subject kept, and with the rest kept."""
        index = torch.arange(self.examples, self.examples + 2 * self.held)
        rows = [self.given(index[::2])[0]] + [self.sampled(model, index[side::2]) for side in (0, 1)]
        return self.base.sheet(rows)

    def sampled(self, model, index: Tensor, steps=12, cfg=4.0) -> Tensor:
        """DDIM samples with MagDiff's guidance: both rows see the picture."""
        clean, rows, seen, scales = self.given(index)
        both, doubled = torch.cat([rows, torch.zeros_like(rows)]), [scale.repeat(2, 1, 1, 1) for scale in scales]
        twice = seen.repeat(2, *[1] * (seen.ndim - 1))

        def predict(x: Tensor, now: Tensor) -> Tensor:
            found = self.predicted(model, x.repeat(2, 1, 1, 1), now.repeat(2 * len(x)), both, twice, doubled)
            cond, uncond = found.chunk(2)
            return uncond + cfg * (cond - uncond)

        return self.base.sampled(self.noise(clean.shape, torch.Generator().manual_seed(0)), steps, predict)


@torch.no_grad()
def data(subjects: Iterable[Subject], base: PictureModel, encoder: PictureEncoder, feature: str) -> dict[str, Tensor]:
    """clean [n, frames, 4, h, w]; of 2 n cut-outs CLIP features `embedding` and latents `scale0..2`, of no picture `blank`
    and `blank0..2`; texts, pooled and rows of captions."""

    def pyramid(picture: Tensor) -> list[Tensor]:
        sizes = [(round(picture.shape[-1] * scale / 8) * 8,) * 2 for scale in SCALES]
        scaled = [interpolate(picture, size=size, mode="bilinear", align_corners=False) for size in sizes]
        return [base.encode(one).bfloat16() for one in scaled]

    made: dict[str, list] = {"clean": [], "embedding": [], **{f"scale{number}": [] for number in range(len(SCALES))}}
    captions = []
    for subject in subjects:
        captions.append(subject.caption)
        made["clean"].append(base.encode(subject.pixels).bfloat16()[None])
        for mask in (subject.mask, (subject.mask == 0).float()):
            cut = cut_out(subject.pixels[:1], mask[None], 0.0, soft=True)
            close = square(cut, subject_box(mask[None], 0.05), 0.0)
            close = interpolate(close, size=(encoder.size,) * 2, mode="bicubic").clamp(0, 1)
            made["embedding"].append(encoder(close, feature))
            for number, z in enumerate(pyramid(cut)):
                made[f"scale{number}"].append(z)
    found = {name: torch.cat(parts) for name, parts in made.items()}
    found["texts"], found["pooled"], found["rows"] = base.told(captions)
    found["blank"] = encoder.blank(found["embedding"], feature)
    return found | {f"blank{number}": z[0] for number, z in enumerate(pyramid(torch.zeros_like(subject.pixels[:1])))}


def found_data(args, base: PictureModel, encoder: PictureEncoder, feature: str) -> dict:
    """The same of the options' subjects, kept in the folder, with how many are held out and which files were left out."""
    if args.subjects:
        subjects = SubjectFolder(args.subjects, args.side, args.frames, args.fps)
        source = f"{kept.mark(args.subjects)}_{args.frames}_{args.fps}_{args.side}"
        more = {"held": held_out(len(subjects), HELD_OUT), "left_out": subjects.left_out}
    else:
        subjects = (drawn(np.random.default_rng((args.seed, index))) for index in range(args.count + HELD_OUT))
        source, more = f"{args.seed}_{args.count}", {"held": HELD_OUT, "left_out": []}
    path = Path(args.folder) / f"magdiff_data_{base.hash[:12]}_{encoder.hash[:12]}_{feature}_{source}.pt"
    return kept.kept(path, lambda: data(subjects, base, encoder, feature)) | more


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=Path, help="folder of pictures or videos with masks and captions")
    parser.add_argument("--frames", type=int, default=1, help="1: pictures; else of a clip, from the start of each video")
    parser.add_argument("--fps", type=float, default=8.0, help="frames a second taken from videos")
    parser.add_argument("--side", type=int, default=128, help="pixels of a side, a multiple of 64, of --subjects")
    parser.add_argument("--count", type=int, default=1000, help="pictures of the picture-book world")
    add_arguments(parser)
    parser.add_argument("--adapter-file", type=Path, help="image adapter of the checkpoint's family")
    parser.add_argument("--encoder", type=Path, help="CLIP vision model that the adapter reads")
    parser.add_argument("--adapter", action="store_true", help="train the image adapter along; it is written beside")
    parser.add_argument("--name", default="magdiff", help="stem of the files")
    loop.add_arguments(parser, batch=16, rate=3e-3, minutes=6, average=0.98, warmup=20)
    args = parser.parse_args()
    if args.checkpoint and not (args.adapter_file and args.encoder):
        parser.error("--checkpoint needs --adapter-file, an image adapter of its family, and --encoder, the CLIP vision it reads")
    if args.side % 64 or args.frames < 1 or (args.frames > 1 and not args.subjects):
        parser.error(
            f"--side is {args.side} and --frames {args.frames}; give a multiple of 64, and clips only with --subjects"
        )
    return args


def main() -> None:
    args = arguments()
    if not args.checkpoint:
        written_out.use()
    base, encoder = chosen(args, video=args.frames > 1), chosen_encoder(args.encoder, args.weights)
    source = args.adapter_file or args.weights / "adapter.safetensors"
    adapter = read_adapter(source, base)
    feature = adapter.image_proj.feature
    check_features(LoadedAdapter(source.name, adapter), encoder(torch.zeros(1, 3, 64, 64), feature), "--encoder")
    found = found_data(args, base, encoder, feature)
    alignment = Alignment(len(adapter.channels), base.unet.input_blocks[0][0].weight.shape[0], 4, SCALES)
    metadata = {"base_model": base.hash, "image_adapter": loop.file_hash(source), "encoder": encoder.name}
    model = Aligned(alignment, adapter.requires_grad_(args.adapter), base.unet)
    loop.Loop(Subjects(model, base, found, args.name, metadata, args.adapter), args).run()


if __name__ == "__main__":
    main()
