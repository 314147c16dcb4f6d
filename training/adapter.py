"""Trains an image adapter in IP-Adapter's layout (arXiv 2308.06721): a picture -> tokens -> keys and values of a U-Net.

`python -m training.adapter --minutes 25` for the demo model, after clip, autoencoder and unet, which lie in --folder and
stay as they are. The reference has the page's body colour and hat, half of the time on a character of another kind, so that
kind stays with the text; the loss counts more inside the character's box.

`python -m training.adapter --checkpoint FILE --encoder CLIP_VISION_FILE --pictures DIR --side 512` for an SD1.5, SD2 or SDXL
checkpoint on a folder of cat.png with its caption cat.txt. As the authors: a picture is its own reference, keys and values
begin as those of the text, and of text, picture and both 5 % each are left out. Their numbers: --batch 64 --rate 1e-4
--warmup 0 --decay 0 --average 0 --steps 1000000 --minutes 0. --start FILE goes on from a published adapter of any kind but
FaceID. In both the loss weighs all noise levels alike.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import kept, loop, written_out
from .adapted import Adapted, read_adapter
from .clips import covered
from .picture_model import PictureEncoder, PictureModel, add_arguments, chosen, chosen_encoder
from .stories import SUFFIXES
from .storybook import COLOURS, HATS, KINDS, SIZE, Page, emphasis, prompts, sample, sprite
from .subject_data import MASK, caption_of, held_out, told_left_out

from storyweft.host.image_adapter import LoadedAdapter, channels, check_features  # isort: skip
from storyweft.host.unet import UNetFamily  # isort: skip
from storyweft.models.ip_adapter import ImageAdapter, Standard, in_file_order  # isort: skip

GROUNDS = ((0, 0, 0), (128, 128, 128), (255, 255, 255))
TOKENS = 4
POSES = 20  # reference pictures of each kind, colour and hat
SHOWN = 4  # references of the sheet of samples


def cut_out(rng: np.random.Generator, kind: str, colour: str, hat: str) -> np.ndarray:
    """A character alone on plain ground, any size from small to filling the picture; uint8 [SIZE, SIZE, 3]."""
    picture = Image.new("RGB", (SIZE, SIZE), GROUNDS[rng.integers(len(GROUNDS))])
    figure = sprite(kind, colour, hat)
    scale = rng.uniform(0.45, 0.98) * SIZE / max(figure.size)
    figure = figure.resize((round(figure.width * scale), round(figure.height * scale)), Image.LANCZOS)
    if rng.random() < 0.5:
        figure = figure.transpose(Image.FLIP_LEFT_RIGHT)
    left, top = (int(rng.integers(0, SIZE - side + 1)) for side in figure.size)
    picture.paste(figure, (left, top), figure)
    return np.asarray(picture)


def embeddings(encoder: PictureEncoder, seed: int) -> Tensor:
    """Pooled CLIP embeddings of references, [kinds, colours, hats, POSES, width]."""
    rows = []
    for k, kind in enumerate(KINDS):
        for c, colour in enumerate(COLOURS):
            for h, hat in enumerate(HATS):
                rng = np.random.default_rng((seed, k, c, h))
                pictures = np.stack([cut_out(rng, kind, colour, hat) for _ in range(POSES)])
                rows.append(encoder(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255))
    return torch.stack(rows).unflatten(0, (len(KINDS), len(COLOURS), len(HATS)))


def numbers(page: Page) -> tuple[int, int, int]:
    """Kind, colour and hat of the page's character as indices."""
    facts = page.facts[0]
    return tuple(
        list(names).index(name) for names, name in ((KINDS, facts.kind), (COLOURS, facts.colour), (HATS, facts.hat))
    )


class Reading(nn.Module):
    """The frozen U-Net with the adapter that is trained."""

    def __init__(self, unet, adapter: ImageAdapter):
        super().__init__()
        self.unet, self.adapter = unet.requires_grad_(False), adapter
        self.adapted = Adapted(self.unet, adapter)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, seen: Tensor, **more) -> Tensor:
        """What the U-Net predicts for x [n, 4, h, w] with CLIP features seen [n, ...] of a reference."""
        return self.adapted(x, t, context, self.adapter.image_proj(seen), **more)


class Pictures(loop.Task):
    """See `demo_data` and `folder_data` for what `data` holds."""

    def __init__(self, model: Reading, base: PictureModel, data: dict, name: str, metadata: dict):
        self.name, self.model, self.base, self.data, self.metadata = name, model, base, data, metadata
        self.examples = data["examples"]
        self.config = {"channels": model.adapter.channels, "feature": model.adapter.image_proj.feature}

    def references(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Features of a reference for each picture: itself, or a cut-out of the same look."""
        data = self.data
        if "known" not in data:
            return data["seen"][index].float()
        kind, colour, hat = data["known"][index].T
        other = torch.randint(len(KINDS), (len(index),), generator=generator)
        kind = torch.where(torch.rand(len(index), generator=generator) < 0.5, other, kind)
        return data["seen"][kind, colour, hat, torch.randint(POSES, (len(index),), generator=generator)]

    def predicted(self, network, x, t, rows, seen) -> Tensor:
        """On the CPU, for pictures x whose captions are `rows`."""
        device, more = next(self.model.parameters()).device, {}
        y = self.base.vector(self.data["pooled"][rows].float(), x.shape[-2:])
        if y is not None:
            more["y"] = y.to(device)
        given = (one.to(device) for one in (x, t, self.data["texts"][rows].float(), seen))
        return network(*given, **more).float().cpu()

    def loss(self, network, index, generator):
        data, count = self.data, len(index)
        seen, rows = self.references(index, generator), data["rows"][index]
        dropped = torch.rand(count, generator=generator)
        rows[dropped < 0.1] = 0  # text 5 %, picture 5 %, both 5 %
        seen[(dropped >= 0.05) & (dropped < 0.15)] = data["blank"].float()
        t = torch.randint(1000, (count,), generator=generator)
        a = self.base.alphas[t].view(-1, 1, 1, 1)
        clean = data["latents"][index].float()
        noise = torch.randn(clean.shape, generator=generator)
        x = (a.sqrt() * clean + (1 - a).sqrt() * noise).to(memory_format=torch.channels_last)
        error = (self.predicted(network, x, t, rows, seen) - self.base.wanted(clean, noise, a)).square()
        weight = data["weights"][index]
        return (weight * error).mean() / weight.mean()

    def check(self):
        return [f"{self.examples} pictures with captions", *told_left_out(self.data["left_out"])]

    def tensors(self):
        return self.model.adapter.state_dict()

    def show(self, model) -> Image.Image:
        """A row for each reference: itself, then what captions draw with it."""
        rows, data = [], self.data
        for own, seen, told in zip(data["shown"], data["shown_seen"], data["shown_rows"], strict=True):
            rows.append(torch.cat([own[None].float(), self.drawn(model, seen[None].float(), told)]))
        return self.base.sheet(rows)

    def drawn(self, model, seen: Tensor, told: Tensor, steps=20, cfg=4.0) -> Tensor:
        """DDIM samples of captions told [n] with IP-Adapter's guidance: the negative has no words and sees no picture."""
        count = len(told)
        both = torch.cat([part.expand(count, *part.shape[1:]) for part in (seen, self.data["blank"].float())])
        rows = torch.cat([told, torch.zeros_like(told)])

        def predict(x: Tensor, now: Tensor) -> Tensor:
            found = self.predicted(model, x.repeat(2, 1, 1, 1), now.repeat(2 * count), rows, both)
            cond, uncond = found.chunk(2)
            return uncond + cfg * (cond - uncond)

        shape = (count, *self.data["latents"].shape[1:])
        return self.base.sampled(torch.randn(shape, generator=torch.Generator().manual_seed(0)), steps, predict)


def demo_data(args, base: PictureModel, encoder: PictureEncoder) -> dict:
    """latents [n, 4, 16, 16] of pages with loss weights, captions and the identities `known` [n, 3], of which `seen` has
    embeddings; four identities to show with six captions each."""
    latents, captions, known, weights = [], [], [], []
    for start in range(0, args.pages, 50):
        pages = [sample(np.random.default_rng((args.seed, i))) for i in range(start, min(start + 50, args.pages))]
        pixels = torch.from_numpy(np.stack([page.image for page in pages])).permute(0, 3, 1, 2)
        latents.append(base.encode(pixels.float() / 255).bfloat16())
        captions += [page.caption for page in pages]
        known += [numbers(page) for page in pages]
        weights += [emphasis(page, latents[0].shape[-1], args.inside) for page in pages]
    asked = prompts(list(KINDS)[:6])
    looks = [(colour, hat) for colour in range(len(COLOURS)) for hat in (0, 2)][::3][:SHOWN]
    cuts = [cut_out(np.random.default_rng(0), next(iter(KINDS)), list(COLOURS)[c], HATS[h]) for c, h in looks]
    cuts = torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2).float() / 255
    texts, pooled, rows = base.told(captions + asked)
    seen = embeddings(encoder, args.seed)
    return {
        "latents": torch.cat(latents), "texts": texts, "pooled": pooled, "rows": rows[: len(captions)], "left_out": [],
        "known": torch.tensor(known), "weights": torch.from_numpy(np.stack(weights)), "seen": seen, "examples": args.pages,
        "blank": torch.zeros(1, seen.shape[-1]), "shown": base.encode(cuts),
        "shown_seen": torch.stack([seen[0, colour, hat, 0] for colour, hat in looks]),
        "shown_rows": rows[len(captions) :].expand(len(looks), -1),
    }  # fmt: skip


def folder_data(args, base: PictureModel, encoder: PictureEncoder, feature: str) -> dict:
    """latents [n, 4, h, w] of pictures, their features `seen` [n, ...] and captions; the last are shown, with and without words.

    Raises ValueError for a folder without two pictures that have captions.
    """
    latents, seen, captions, left_out = [], [], [], []
    for path in sorted(path for path in args.pictures.rglob("*") if path.suffix.lower() in SUFFIXES):
        if path.stem.endswith(MASK):
            continue
        try:
            caption, picture = caption_of(path), np.asarray(Image.open(path).convert("RGB"))
        except (ValueError, OSError) as error:
            left_out.append(f"{path}: {error}")
            continue
        captions.append(caption)
        pixels = covered(picture, args.side)[None].float() / 255
        latents.append(base.encode(pixels).bfloat16())
        seen.append(encoder(pixels, feature).bfloat16())
    if not captions:
        raise ValueError(f"no picture with a caption in {args.pictures}: {'; '.join(left_out[:3]) or 'no picture at all'}")
    held, (texts, pooled, rows) = held_out(len(captions), SHOWN), base.told(captions)
    latents, seen = torch.cat(latents), torch.cat(seen)
    return {
        "latents": latents, "texts": texts, "pooled": pooled, "rows": rows, "left_out": left_out, "seen": seen,
        "examples": len(latents) - held, "weights": torch.ones(len(latents), 1, 1, 1), "blank": encoder.blank(seen, feature),
        "shown": latents[-held:], "shown_seen": seen[-held:], "shown_rows": torch.stack([rows[-held:], rows[-held:] * 0], 1),
    }  # fmt: skip


def new_adapter(base: PictureModel, clip: int, seed: int, copied: bool) -> ImageAdapter:
    """One that reads pooled embeddings `clip` wide; its keys and values begin as the text's, or its values at nothing."""
    family = UNetFamily(base.unet)
    sizes, width = channels(family)
    torch.manual_seed(seed)
    adapter = ImageAdapter(Standard(clip, width, TOKENS), sizes)
    for layer, place in zip(adapter.ip_adapter.values(), in_file_order(family.cross_layers), strict=True):
        if copied:
            layer.to_k_ip.load_state_dict(family.modules[place].to_k.state_dict())
            layer.to_v_ip.load_state_dict(family.modules[place].to_v.state_dict())
        else:
            nn.init.zeros_(layer.to_v_ip.weight)
    return adapter


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder of pictures with captions")
    parser.add_argument("--side", type=int, default=128, help="pixels of a picture's side, a multiple of 64, of --pictures")
    parser.add_argument("--pages", type=int, default=8000, help="pages of the picture-book world")
    parser.add_argument("--inside", type=float, default=4.0, help="loss weight of the character's box, picture-book world")
    add_arguments(parser)
    parser.set_defaults(weights=None)
    parser.add_argument("--encoder", type=Path, help="CLIP vision model that the adapter is to read; default: the demo's")
    parser.add_argument("--start", type=Path, help="adapter file to begin from")
    parser.add_argument("--name", default="adapter", help="stem of the files")
    loop.add_arguments(parser, minutes=25, batch=32, rate=2e-3, average=0.0, seed=7)
    args = parser.parse_args()
    if args.checkpoint and not (args.encoder and args.pictures):
        parser.error("--checkpoint needs --encoder, the CLIP vision the adapter is to read, and --pictures")
    if args.side % 64:
        parser.error(f"--side is {args.side}; give a multiple of 64")
    args.cpu = args.cpu or not args.checkpoint  # the demo model is faster there
    return args


def main() -> None:
    args = arguments()
    if not args.checkpoint:
        torch.set_num_threads(1)
        written_out.use()
        if args.weights is None:  # models that were not released yet: what the demo loader checks is written for them
            args.weights = Path(args.folder)
            loop.checksums(args.weights)
    base, encoder = chosen(args), chosen_encoder(args.encoder, args.weights)
    if args.start:
        adapter = read_adapter(args.start, base, "--start").requires_grad_(True)
    else:
        width = encoder(torch.zeros(1, 3, 64, 64)).shape[-1]
        adapter = new_adapter(base, width, args.seed, args.checkpoint is not None)
    feature = adapter.image_proj.feature
    check_features(LoadedAdapter(args.name, adapter), encoder(torch.zeros(1, 3, 64, 64), feature), "--encoder")
    if args.pictures:
        source = f"{kept.mark(args.pictures)}_{args.side}_{feature}_{encoder.hash[:12]}"
        found = kept.kept(
            Path(args.folder) / f"adapter_data_{base.hash[:12]}_{source}.pt",
            lambda: folder_data(args, base, encoder, feature),
        )
    else:
        found = demo_data(args, base, encoder)
    metadata = {"base_model": base.hash, "encoder": encoder.name}
    loop.Loop(Pictures(Reading(base.unet, adapter), base, found, args.name, metadata), args).run()


if __name__ == "__main__":
    main()
