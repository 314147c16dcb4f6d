"""Trains StoryImager's module (arXiv 2404.05979) for a U-Net: context extractor, prior, LoRA and gates of boards.

`python -m training.story_board --stories DIR --layout folder|pororo|flintstones --checkpoint FILE`; without --stories on
the picture-book world, without --checkpoint for the demo model. For SD1.5 give --side 512, or less where memory is short,
and --rate 1e-4. U-Net, text encoder and autoencoder stay as they are. A step draws one of three tasks for each board, a
third each: all frames; the rest after the first k; any other subset. Known frames enter without noise, the loss counts
target frames only, and a tenth of the boards lose all captions.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from . import (
    loop,
    package,  # noqa: F401
)
from .clips import covered
from .picture_model import PictureModel, add_arguments, chosen
from .stories import LAYOUTS, READERS, demo_stories, draw_targets

from storyweft.attention.frame_story import (  # isort: skip
    frame_index,
    masked_noising,
    merge_board,
    split_board,
    target_mask,
)
from storyweft.models.story_board import ContextExtractor, prior_board  # isort: skip
from storyweft.models.trained_board import BoardModule, SiteAttention, build  # isort: skip
from comfy.ldm.modules.attention import BasicTransformerBlock  # isort: skip

DEMO = {
    "heads": 4,
    "frame_layers": 1,
    "story_layers": 1,
    "context_tokens": 4,
    "story_tokens": 8,
    "hidden": 48,
    "prior": (8, 8),
}
RANKS = 3, 16  # of the LoRA; the paper tells neither rank nor sizes
HELD_OUT = 8  # stories that only the sheet of samples shows


class Boarded(nn.Module):
    """The frozen U-Net with a site at each cross-attention, and the module that is trained."""

    def __init__(self, module: BoardModule, unet):
        super().__init__()
        self.module, self.board = module, {}
        self.unet = unet.requires_grad_(False)
        blocks = [one for one in unet.modules() if isinstance(one, BasicTransformerBlock)]
        for block, site in zip(blocks, module.sites, strict=True):
            block.attn2 = SiteAttention(block.attn2, site, self.board)

    def forward(self, x: Tensor, t: Tensor, words: Tensor, targets: Tensor, y: Tensor | None, grid: Tensor) -> Tensor:
        """What the U-Net predicts for boards x [n, 4, H, W] with captions words [n, frames, tokens, width]."""
        context = self.module.ctx(words, targets)
        size = x.shape[-2:]
        self.board.update(captions=words, story=context.story, grid=grid, size=size)
        cell = size[0] // grid.shape[0], size[1] // grid.shape[1]
        return self.unet(x + prior_board(context.prior, grid, cell).to(x), t, words[:, 0], y)


class Boards(loop.Task):
    """latents [stories, frames, 4, h, w], texts [captions, 77, width] of which the first is that of no words, pooled
    [captions, P] of the same, and rows [stories, frames] that say which caption is whose."""

    def __init__(self, model: Boarded, base: PictureModel, latents, texts, pooled, rows, name: str, metadata: dict):
        self.name, self.model, self.base = name, model, base
        self.latents, self.texts, self.pooled, self.rows = latents, texts, pooled, rows
        self.examples = len(latents) - min(HELD_OUT, len(latents) // 2)
        self.metadata = model.module.metadata() | metadata
        self.config = {**self.metadata, "channels": model.module.channels}

    def grid(self, wide: bool) -> Tensor:
        """Frames in two rows, or in one."""
        frames = self.rows.shape[1]
        return torch.arange(frames).view(1 if wide or frames % 2 else 2, -1)

    def loss(self, network, index, generator):
        count, frames = len(index), self.rows.shape[1]
        grid = self.grid(torch.rand(1, generator=generator).item() < 0.3)
        clean = self.latents[index].float()
        rows = self.rows[index]
        rows[torch.rand(count, generator=generator) < 0.1] = 0
        words = self.texts[rows].float()
        targets = draw_targets(count, frames, generator)
        t = (1000 * (torch.arange(count) + torch.rand(count, generator=generator)) / count).long()
        a = self.base.alphas[t].view(-1, 1, 1, 1)
        whole = merge_board(clean, grid)
        mask = target_mask(targets, frame_index(grid, *clean.shape[-2:])).float()
        noise = torch.randn(whole.shape, generator=generator)
        x = masked_noising(whole, noise, a, mask)
        made = self.predicted(network, x, t, words, targets, rows, grid).cpu()
        error = (made - self.base.wanted(whole, noise, a)).square()
        return (mask * self.base.weight(a) * error).sum() / (mask.sum() * error.shape[1])

    def predicted(self, network, x, t, words, targets, rows, grid) -> Tensor:
        """Of boards x whose frames have the captions of `rows`; the pooled text of a board is the mean of its captions'."""
        device = next(self.model.parameters()).device
        y = self.base.vector(self.pooled[rows].float().mean(1), x.shape[-2:])
        given = (None if one is None else one.to(device) for one in (x, t, words, targets, y))
        return network(*given, grid).float()

    def check(self):
        frames = self.rows.shape[1]
        return [f"{self.examples} stories of {frames} pictures, {len(self.latents) - self.examples} more for samples"]

    def tensors(self):
        return self.model.module.state_dict()

    def show(self, model) -> Image.Image:
        """Held-out stories: as given, drawn anew, and continued after the first half."""
        rows = []
        count = min(3, 1 + self.examples // 100)
        for story in range(self.examples, min(self.examples + count, len(self.latents))):
            clean = self.latents[story].float()
            frames = len(clean)
            rows.append(clean)
            for known in (0, frames // 2):
                targets = (torch.arange(frames) >= known).long()[None]
                rows.append(self.drawn(model, self.rows[story], clean[None], targets, story)[0])
        pictures = [self.base.decode(row).numpy() for row in rows]
        return Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in pictures]))

    @torch.no_grad()
    def drawn(
        self, model: Boarded, captions: Tensor, clean: Tensor, targets: Tensor, seed: int, steps=16, cfg=4.0
    ) -> Tensor:
        """DDIM samples, latents [1, frames, 4, h, w]; known frames stay clean in both branches."""
        grid = self.grid(False)
        whole = merge_board(clean, grid)
        mask = target_mask(targets, frame_index(grid, *clean.shape[-2:])).float()
        x = torch.randn(whole.shape, generator=torch.Generator().manual_seed(seed))
        rows = torch.stack([captions, torch.zeros_like(captions)])
        words, asked = self.texts[rows].float(), targets.repeat(2, 1)
        times = torch.linspace(999, 0, steps + 1).round().long()
        for now, after in zip(times[:-1], times[1:], strict=True):
            a, b = self.base.alphas[now], self.base.alphas[after] if after > 0 else torch.tensor(1.0)
            x = mask * x + (1 - mask) * whole
            made = self.predicted(model, x.repeat(2, 1, 1, 1), now.repeat(2), words, asked, rows, grid)
            cond, uncond = made.cpu().chunk(2)
            guess, noise = self.base.parts(x, uncond + cfg * (cond - uncond), a)
            x = b.sqrt() * guess + (1 - b).sqrt() * noise
        return split_board(mask * x + (1 - mask) * whole, grid)


def data(args, base: PictureModel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, texts, pooled texts and rows of all stories; kept in the folder."""
    source = Path(args.stories).name if args.stories else f"demo_{args.seed}_{args.count}"
    path = Path(args.folder) / f"board_data_{base.hash[:12]}_{source}_{args.frames}_{args.side}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    if args.stories:
        stories = READERS[args.layout](Path(args.stories), args.frames)
    else:
        stories = demo_stories(args.seed, args.count, args.frames)
    known = ["", *sorted({picture.caption for story in stories for picture in story} - {""})]
    texts, pooled = base.text(known)
    rows = torch.tensor([[known.index(picture.caption) for picture in story] for story in stories])
    latents = []
    for story in stories:
        pixels = torch.stack([covered(picture.read(), args.side) for picture in story]).float() / 255
        latents.append(base.encode(pixels).bfloat16())
    made = torch.stack(latents), texts.bfloat16(), pooled.bfloat16(), rows
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made, path)
    return made


def new_module(args, channels: list[int], width: int) -> BoardModule:
    torch.manual_seed(args.seed)
    if args.start:
        tensors, metadata = read_module(args.start)
        return build(tensors, metadata, args.start).requires_grad_(True)
    ctx = ContextExtractor(width, max_frames=max(args.frames, 6), **({} if args.checkpoint else DEMO))
    rank = args.rank or RANKS[bool(args.checkpoint)]
    return BoardModule(ctx, channels, width, rank, float(rank))


def read_module(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32 and metadata of a module file."""
    with safe_open(path, "pt") as file:
        return {key: value.float() for key, value in load_file(path).items()}, dict(file.metadata() or {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", help="folder of stories")
    parser.add_argument("--layout", choices=LAYOUTS, default="folder", help="how the folder is laid out")
    parser.add_argument("--frames", type=int, default=4, help="pictures of a story; PororoSV and FlintstonesSV: 5")
    parser.add_argument("--side", type=int, default=128, help="pixels of a picture's side, a multiple of 32")
    parser.add_argument("--count", type=int, default=400, help="stories of the picture-book world")
    parser.add_argument(
        "--rank", type=int, default=0, help=f"of the LoRA (0: {RANKS[0]} for the demo model, else {RANKS[1]})"
    )
    add_arguments(parser)
    parser.add_argument("--start", help="module file to begin from")
    parser.add_argument("--name", default="board", help="stem of the files")
    loop.add_arguments(parser, batch=4, rate=2e-3, minutes=10, average=0.98, warmup=20)
    args = parser.parse_args()
    if args.side % 32 or args.frames < 2:
        parser.error(f"--side is {args.side} and --frames {args.frames}; give a multiple of 32 and at least 2")
    base = chosen(args)
    found = data(args, base)
    blocks = [one for one in base.unet.modules() if isinstance(one, BasicTransformerBlock)]
    module = new_module(args, [one.attn2.to_k.out_features for one in blocks], found[1].shape[2])
    metadata = {"base_model": base.hash, "known_frames": "clean"}
    task = Boards(Boarded(module, base.unet), base, *found, args.name, metadata)
    loop.Loop(task, args).run()


if __name__ == "__main__":
    main()
