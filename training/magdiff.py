"""Trains MagDiff's parts (arXiv 2311.17338) on the demo U-Net: alphas, latent pyramid, conv_in's new channels.

`python -m training.magdiff`. A picture of a character and its mask; half of the time the character is kept on black ground,
half of the time everything else (editing). The cut-out goes into CLIP vision (cropped) and, in its place, at three sizes
into the VAE; the model draws the whole picture from that and the text. U-Net, encoders and the demo image adapter stay as
they are, `--adapter` trains the adapter along. Text is dropped in 15 %, the picture in 10 %.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.ip_adapter import ImageAdapter
from models.ip_adapter import build as build_adapter
from models.magdiff import Alignment, cut_out, square, subject_box

from . import loop
from .adapter import Adapted
from .clip import MEAN, STD
from .facts import load_autoencoder
from .storybook import COLOURS, HATS, KINDS, PLACES, SIZE, TIMES, Facts, phrase
from .subjects import page
from .unet import ALPHAS, Text, new_unet

SCALES = (1.5, 1.25, 1.0)
HELD_OUT = 6  # pictures that only the sheet of samples shows


def drawn(rng: np.random.Generator) -> tuple[Tensor, Tensor, str]:
    """A picture [3, h, w] and the mask [h, w] of its character, both 0 to 1, and a caption."""
    kind, colour, hat, place, time = (str(rng.choice(list(words))) for words in (KINDS, COLOURS, HATS, PLACES, TIMES))
    pixels = torch.from_numpy(np.array(page(rng, kind, colour, hat, place, time))).float() / 255
    return (
        pixels[..., :3].movedim(-1, 0),
        pixels[..., 3],
        phrase(rng, Facts(kind, colour, hat, place, time, (0, 0, 0, 0))),
    )


class Aligned(nn.Module):
    """The frozen U-Net with both prompts aligned and the subject beside the noise."""

    def __init__(self, alignment: Alignment, adapter: ImageAdapter, unet):
        super().__init__()
        self.alignment, self.adapter, self.unet = alignment, adapter, unet.requires_grad_(False)
        self.adapted = Adapted(self.unet, self.adapter)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, embedding: Tensor, latents: list[Tensor]) -> Tensor:
        """v of x [n, 4, h, w]; embedding [n, width] of the cut-out and its latents at every scale."""
        beside = self.alignment(latents)
        handle = self.unet.input_blocks[0][0].register_forward_hook(lambda _, __, out: out + beside.to(out))
        pairs = list(zip(self.alignment.alpha_text, self.alignment.alpha_image, strict=True))
        out = self.adapted(x, t, context, self.adapter.image_proj(embedding), alphas=pairs)
        handle.remove()
        return out


class Subjects(loop.Task):
    """Everything of each picture twice: with the character kept (even numbers) and with the rest kept (odd ones)."""

    def __init__(self, model: Aligned, data: dict[str, Tensor], decode, name: str, metadata: dict, whole: bool):
        self.name, self.model, self.data, self.decode, self.whole = name, model, data, decode, whole
        self.examples = 2 * (len(data["clean"]) - HELD_OUT)
        self.metadata = model.alignment.metadata() | metadata
        self.config = dict(model.alignment.metadata())

    def given(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Latents, context, embedding and pyramid of examples."""
        data, of = self.data, index // 2
        scales = [data[f"scale{number}"][index].float() for number in range(len(SCALES))]
        return data["clean"][of].float(), data["texts"][data["rows"][of]].float(), data["embedding"][index], scales

    def loss(self, network, index, generator):
        count = len(index)
        clean, context, embedding, scales = self.given(index)
        context[torch.rand(count, generator=generator) < 0.15] = self.data["texts"][0].float()
        hidden = torch.rand(count, generator=generator) < 0.1
        embedding[hidden] = 0
        for scale, number in zip(scales, range(len(SCALES)), strict=True):
            scale[hidden] = self.data[f"blank{number}"].float()
        t = (1000 * (torch.arange(count) + torch.rand(count, generator=generator)) / count).long()
        a = ALPHAS[t].view(-1, 1, 1, 1)
        noise = torch.randn(clean.shape, generator=generator)
        x = a.sqrt() * clean + (1 - a).sqrt() * noise
        device = next(self.model.parameters()).device
        scales = [scale.to(device) for scale in scales]
        v = network(*(y.to(device) for y in (x, t, context, embedding)), scales).float()
        return (v - (a.sqrt() * noise - (1 - a).sqrt() * clean).to(device)).square().mean()

    def check(self):
        return [
            f"{self.examples // 2} pictures, each with the character kept and with the rest kept; {HELD_OUT} more for samples"
        ]

    def tensors(self):
        adapter = self.model.adapter.state_dict() if self.whole else {}
        return self.model.alignment.state_dict() | adapter

    def show(self, model) -> Image.Image:
        """Held-out pictures; below each what is drawn with the character kept, and with the rest kept."""
        index = torch.arange(self.examples, self.examples + 2 * HELD_OUT)
        rows = [self.given(index)[0][::2]] + [self.sampled(model, index[kept::2]) for kept in (0, 1)]
        pictures = [((self.decode(row) + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy() for row in rows]
        return Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in pictures]))

    @torch.no_grad()
    def sampled(self, model, index: Tensor, steps=12, cfg=4.0) -> Tensor:
        """DDIM samples with MagDiff's guidance: both rows see the picture."""
        clean, context, embedding, scales = self.given(index)
        x = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        both = torch.cat([context, self.data["texts"][:1].float().expand_as(context)])
        times = torch.linspace(999, 0, steps + 1).round().long()
        for now, after in zip(times[:-1], times[1:], strict=True):
            a, b = ALPHAS[now], ALPHAS[after] if after > 0 else torch.tensor(1.0)
            doubled = [scale.repeat(2, 1, 1, 1) for scale in scales]
            v = model(x.repeat(2, 1, 1, 1), now.repeat(2 * len(x)), both, embedding.repeat(2, 1), doubled).float()
            cond, uncond = v.chunk(2)
            v = uncond + cfg * (cond - uncond)
            guess, noise = a.sqrt() * x - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x
            x = b.sqrt() * guess + (1 - b).sqrt() * noise
        return x


@torch.no_grad()
def data(args) -> dict[str, Tensor]:
    """What Subjects needs, kept in the folder."""
    path = Path(args.folder) / f"magdiff_data_{args.seed}_{args.count}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    text = Text(f"{args.weights}/clip.safetensors")
    network, factor = load_autoencoder(f"{args.weights}/autoencoder.safetensors")

    def encoded(picture: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (network.encode(picture * 2 - 1).float() * factor).bfloat16()

    def pyramid(picture: Tensor) -> list[Tensor]:
        sizes = [(round(SIZE * scale / 8) * 8,) * 2 for scale in SCALES]
        return [encoded(interpolate(picture, size=size, mode="bilinear", align_corners=False)) for size in sizes]

    made: dict[str, list] = {"clean": [], "embedding": [], **{f"scale{number}": [] for number in range(len(SCALES))}}
    captions = []
    for index in range(args.count + HELD_OUT):
        picture, mask, caption = drawn(np.random.default_rng((args.seed, index)))
        captions.append(caption)
        made["clean"].append(encoded(picture[None]))
        for kept in (mask, (mask == 0).float()):
            cut = cut_out(picture[None], kept[None], 0.0, soft=True)
            seen = interpolate(square(cut, subject_box(kept[None], 0.05), 0.0), size=(SIZE, SIZE), mode="bicubic")
            pixels = (seen.clamp(0, 1) - MEAN) / STD
            made["embedding"].append(text.encoders.vision(pixel_values=pixels, intermediate_output=-2)[2])
            for number, z in enumerate(pyramid(cut)):
                made[f"scale{number}"].append(z)
    known = ["", *sorted(set(captions))]
    found = {name: torch.cat(parts) for name, parts in made.items()}
    found["texts"] = torch.cat([text(known[i : i + 100]) for i in range(0, len(known), 100)]).bfloat16()
    found["rows"] = torch.tensor([known.index(caption) for caption in captions])
    found |= {f"blank{number}": z[0] for number, z in enumerate(pyramid(torch.zeros(1, 3, SIZE, SIZE)))}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="pictures of the picture-book world")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="folder of the demo models")
    parser.add_argument("--adapter", action="store_true", help="train the image adapter along; it is written beside")
    parser.add_argument("--name", default="magdiff", help="stem of the files")
    loop.add_arguments(parser, batch=16, rate=3e-3, minutes=6, average=0.98, warmup=20)
    args = parser.parse_args()
    found = data(args)
    unet = new_unet()
    unet.load_state_dict({key: value.float() for key, value in load_file(args.weights / "unet.safetensors").items()})
    tensors = {key: value.float() for key, value in load_file(args.weights / "adapter.safetensors").items()}
    adapter = build_adapter(tensors, "adapter").requires_grad_(args.adapter)
    alignment = Alignment(len(adapter.channels), unet.input_blocks[0][0].weight.shape[0], 4, SCALES)
    network, factor = load_autoencoder(f"{args.weights}/autoencoder.safetensors")

    def decode(x: Tensor) -> Tensor:
        return network.decode(x.cpu() / factor)

    metadata = {
        "base_model": loop.file_hash(args.weights / "unet.safetensors"),
        "image_adapter": loop.file_hash(args.weights / "adapter.safetensors"),
    }
    task = Subjects(Aligned(alignment, adapter, unet), found, decode, args.name, metadata, args.adapter)
    loop.Loop(task, args).run()


if __name__ == "__main__":
    main()
