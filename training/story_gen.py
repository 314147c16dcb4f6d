"""Trains StoryGen's image attention (arXiv 2306.00973) for an SD1.5 U-Net, which stays as it is.

`python -m training.story_gen` on the picture-book world for the demo model;
`python -m training.story_gen --checkpoint FILE --stories DIR --layout folder|pororo|flintstones` on your own. An example
is a page and one to three others of its story, at the noise and with the captions StoryGen gives them: 3, 2 or 1
references with 30, 30 and 40 %; prompt, and apart from it references and captions, are left out at times.

With --checkpoint it is the authors' second stage: attn3 and norm4 start as attn1 and norm1, attn3 alone is trained, the
residual counts twice, references enter the VAE in 0..1, and a page sees those before it, the further back the noisier. Their
numbers: --side 512 --batch 12 --accumulate 8 --rate 1e-5 --warmup 0 --decay 0 --average 0 --steps 50000 --minutes 0. Their
first stage, which tunes attn1 to the style of their books, is any fine-tuning of the checkpoint beforehand. The demo model
differs: the residual counts once, so that training starts near the model (a small one does not unlearn the second in
minutes), references are in the VAE's own range and of any order, and the wide layers have half of attn1's heads, for the
size of the file. The file says which, and the nodes follow it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import (
    kept,
    loop,
    package,  # noqa: F401
    written_out,
)
from .clips import covered
from .picture_model import PictureModel, add_arguments, chosen
from .stories import LAYOUTS, READERS, Picture
from .storybook import COLOURS, HATS, KINDS, emphasis, prompts, sample

import comfy.supported_models  # isort: skip
import comfy.utils  # isort: skip
from comfy.ldm.modules.attention import BasicTransformerBlock  # isort: skip
from storyweft.attention.core import attend as fused  # isort: skip
from storyweft.attention.story_gen import image_attention, join  # isort: skip
from storyweft.models.story_gen import ImageAttention  # isort: skip
from storyweft.sampling.story_gen import AUTO, MULTI, reference_timesteps  # isort: skip

PAGES = 4  # that a step looks at: one and up to three references
WIDEST = 64  # channels that attn3 of the demo model attends with at most
SHOWN = 8  # stories that only the sheet of samples shows


def attend(q: Tensor, k: Tensor, v: Tensor, bias=None) -> Tensor:
    """Written out: on a CPU it is differentiated in half the time of the fused form."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def published_sites(base: PictureModel) -> list[tuple[str, BasicTransformerBlock]]:
    """Published prefix of each transformer block and itself, in execution order. ValueError unless it is SD1.5's U-Net."""
    config = base.model.model.model_config
    if not isinstance(config, comfy.supported_models.SD15):
        raise ValueError(
            f"{base.name} is {type(config).__name__} and StoryGen's image attention is made for SD1.5's U-Net; give an SD1.5 "
            "checkpoint"
        )
    ending = "attn1.to_q.weight"
    prefixes = {
        own.removesuffix(f".{ending}"): published.removesuffix(ending)
        for published, own in comfy.utils.unet_to_diffusers(config.unet_config).items()
        if published.endswith(ending)
    }
    blocks = {name: block for name, block in base.unet.named_modules() if isinstance(block, BasicTransformerBlock)}
    return [(prefixes[name], block) for name, block in blocks.items()]


class StoryGen(nn.Module):
    """The frozen U-Net with an image attention in each transformer block; `widest`: channels at most, 0 is all.

    twice: whether the residual counts twice, as the authors have it.
    """

    def __init__(self, base: PictureModel, widest: int = 0, twice: bool = True, attend=fused):
        super().__init__()
        self.blocks, self.twice, self.attend = published_sites(base), twice, attend
        self.unet = base.unet
        self.sites = nn.ModuleList()
        for _, block in self.blocks:
            width, head = block.attn1.to_q.in_features, block.attn1.dim_head
            self.sites.append(ImageAttention(width, min(width, max(widest // head, 1) * head) if widest else width))

    @torch.no_grad()
    def copy(self) -> None:
        """attn3 and norm4 as attn1 and norm1, which stay: where the authors' second stage begins."""
        for site, (_, block) in zip(self.sites, self.blocks, strict=True):
            site.attn3.load_state_dict(block.attn1.state_dict())
            site.norm4.load_state_dict(block.norm1.state_dict())
            site.norm4.requires_grad_(False)

    @torch.no_grad()
    def start(self, features: list[Tensor]) -> None:
        """attn3 as attn1 would read normalised features: their mean and spread, which attn3 does not take out, go into it."""
        for site, (_, block), feature in zip(self.sites, self.blocks, features, strict=True):
            attn1, norm1, attn3 = block.attn1, block.norm1, site.attn3
            inner, width = attn3.to_q.weight.shape
            centre = torch.eye(width) - 1 / width
            fold = norm1.weight[:, None] * centre / feature.std(-1).mean()
            attn3.to_q.weight.copy_(attn1.to_q.weight[:inner])
            attn3.to_k.weight.copy_(attn1.to_k.weight[:inner] @ fold)
            attn3.to_v.weight.copy_(attn1.to_v.weight[:inner] @ fold)
            out = 0.5 * attn1.to_out[0].weight[:, :inner]
            attn3.to_out[0].weight.copy_(out)
            attn3.to_out[0].bias.copy_(0.5 * attn1.to_out[0].bias + out @ (attn1.to_v.weight[:inner] @ norm1.bias))
            site.norm4.load_state_dict(norm1.state_dict())

    def _run(self, x, t, context, patches) -> Tensor:
        x, t, context = (one.to(self.sites[0].norm4.weight.device) for one in (x, t, context))
        return self.unet(x, t, context, transformer_options={"patches": patches})

    @torch.no_grad()
    def features(self, x: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
        """Residual after self-attention [rows, tokens, C] of each block, in execution order."""
        found = []

        def keep(h, extra):
            found.append(h)
            return h

        self._run(x, t, context, {"middle_patch": [keep]})
        return found

    def forward(self, x: Tensor, t: Tensor, context: Tensor, features: list[Tensor], strength=1.0) -> Tensor:
        """Prediction for latents x [rows, 4, h, w]; features of their references [rows, tokens, C] of each block."""
        seen, parts = [], iter(zip(self.sites, self.blocks, features, strict=True))

        def remember(h, extra):
            seen.append(h)
            return h

        def add(n, extra):
            site, (_, block), image = next(parts)
            h = seen.pop()
            heads = len(site.attn3.to_q.weight) // block.attn1.dim_head
            found = image_attention(site.attn3, site.norm4, h, image, heads, self.attend)
            return join(h, n, found, strength, self.twice)

        return self._run(x, t, context, {"middle_patch": [remember], "attn2_output_patch": [add]})


class StoryTask(loop.Task):
    """found: what `data` gives. pixel_range: of references; ordered: a page sees those before it, else any others.

    unordered: share of steps in which references have one noise (multi-image-condition), else each its own.
    """

    def __init__(self, model: StoryGen, base: PictureModel, found: dict, name: str, pixel_range: str, unordered: float):
        self.name, self.model, self.base, self.unordered, self.metadata = name, model, base, unordered, {}
        for key in ("latents", "shown", "texts", "rows", "weights", "prompts", "grey", "held"):
            setattr(self, key, found[key])
        self.ordered = found["ordered"]
        self.examples = len(self.latents) - self.held
        self.metadata = {
            "prediction": base.model.model.model_type.name,
            "residual": "twice" if model.twice else "once",
            "pixel_range": pixel_range,
            "base": base.hash,
        }
        self.config = {"widths": [len(site.attn3.to_q.weight) for site in model.sites], "residual": self.metadata["residual"]}

    def start(self, copied: bool) -> None:
        """Begin at copies of attn1 and norm1, or near the model as it is by what its blocks hold of some pages."""
        if copied:
            self.model.copy()
            return
        clean = self.latents[:64, 0].float()
        t = torch.full((len(clean),), 50)
        words = self.texts[self.rows[:64, 0]].float()
        self.model.start(self.model.features(self.noised(clean, t, torch.zeros(())), t, words))

    def noised(self, clean: Tensor, t: Tensor, e: Tensor) -> Tensor:
        a = self.base.alphas[t].view(-1, 1, 1, 1)
        return (a.sqrt() * clean + (1 - a).sqrt() * e).to(memory_format=torch.channels_last)

    def pages(self, rows: int, count: int, generator: torch.Generator) -> Tensor:
        """Numbers [rows, 1 + count] of the page to be drawn and of its references, oldest first."""
        pages = self.rows.shape[1]
        if not self.ordered:
            return torch.rand((rows, pages), generator=generator).argsort(1)[:, : count + 1]
        last = torch.randint(PAGES - 1, pages, (rows, 1), generator=generator)
        return torch.cat([last, last - count + torch.arange(count)], 1)

    def features(self, shown: Tensor, steps: Tensor, e: Tensor, words: Tensor) -> list[Tensor]:
        """What the U-Net keeps of references [rows, n, ...] at timesteps [rows, n], joined along tokens, of each block."""
        found = [
            self.model.features(self.noised(shown[:, place], steps[:, place], e), steps[:, place], words[:, place])
            for place in range(shown.shape[1])
        ]
        return [torch.cat(parts, 1) for parts in zip(*found, strict=True)]

    def loss(self, network, index: Tensor, generator: torch.Generator) -> Tensor:
        def chance(size=()):
            return torch.rand(size, generator=generator)

        p, rows = chance(), len(index)
        count = 3 if p < 0.3 else 2 if p < 0.6 else 1
        stage = MULTI if chance() < self.unordered else AUTO
        order = self.pages(rows, count, generator)
        clean, context = self.latents[index, order[:, 0]].float(), self.rows[index, order[:, 0]]
        shown, captions = self.shown[index[:, None], order[:, 1:]].float(), self.rows[index[:, None], order[:, 1:]]
        context[chance(rows) < 0.05] = 0
        without = chance(rows) < 0.1
        shown[without], captions[without] = self.grey.float(), 0
        t = torch.randint(1000, (rows,), generator=generator)
        e, noise = (torch.randn(clean.shape, generator=generator) for _ in range(2))
        steps = torch.tensor([reference_timesteps(int(one), count, stage) for one in t])
        joined = self.features(shown, steps, e, self.texts[captions].float())
        made = network(self.noised(clean, t, noise), t, self.texts[context].float(), joined).float().cpu()
        error = (made - self.base.wanted(clean, noise, self.base.alphas[t].view(-1, 1, 1, 1))).square()
        weight = self.weights[index, order[:, 0]]
        return (weight * error).mean() / weight.mean()

    def check(self) -> list[str]:
        return [
            f"{self.examples} stories of {self.rows.shape[1]} pages, {self.held} more for samples; image attention of "
            f"{self.config['widths']} channels in {len(self.model.sites)} blocks"
        ]

    def tensors(self) -> dict[str, Tensor]:
        return {
            prefix + name: value
            for site, (prefix, _) in zip(self.model.sites, self.model.blocks, strict=True)
            for name, value in site.state_dict().items()
        }

    def draw(self, model: StoryGen, steps=16, text=4.0, image=2.0, seed=1, strength=1.0) -> Tensor:
        """Latents of other scenes with what the first pages of the held-out stories show; three branches as StoryGen's sampler."""
        shown, count = self.shown[-self.held :, 0].float(), self.held
        captions, empty = self.texts[self.rows[-count:, 0]].float(), self.texts[:1].float().expand(count, -1, -1)
        words = torch.cat([empty, empty, self.texts[self.prompts].float()])
        generator = torch.Generator().manual_seed(seed)
        x, e = (torch.randn(shown.shape, generator=generator) for _ in range(2))
        grey = self.grey.float().expand(count, -1, -1, -1)

        def predict(x: Tensor, now: Tensor) -> Tensor:
            step = (now // 10).repeat(2 * count)
            real = torch.cat([self.noised(shown, step[:count], e), self.noised(grey, step[:count], e)])
            found = model.features(real, step, torch.cat([captions, empty]))
            three = [torch.cat([f[count:], f[:count], f[:count]]) for f in found]
            u, v, a = model(x.repeat(3, 1, 1, 1), now.repeat(3 * count), words, three, strength).float().cpu().chunk(3)
            return u + image * (v - u) + text * (a - v)

        return self.base.sampled(x, steps, predict)

    def show(self, model: StoryGen) -> Image.Image:
        """Rows: a page of each held-out story, then other scenes drawn without and with it as reference."""
        own = self.latents[-self.held :, 0].float()
        return self.base.sheet([own, self.draw(model, strength=0.0), self.draw(model)])


def demo_stories(args, side: int) -> tuple[list[list[Picture]], Tensor, list[str]]:
    """Stories of one character each, loss weights [stories, PAGES, 1, side, side] of pages, and prompts of the last ones."""
    stories, weights, kinds = [], [], []
    for story in range(int(args.stories) + SHOWN):  # the last are never trained on
        rng = np.random.default_rng((args.seed, story))
        kind, colour, hat = (list(names)[rng.integers(len(names))] for names in (KINDS, COLOURS, HATS))
        pages = [sample(rng, "one", kind=kind, colour=colour, hat=hat) for _ in range(PAGES)]
        stories.append([Picture(lambda page=page: page.image, page.caption) for page in pages])
        weights.append(np.stack([emphasis(page, side, args.inside) for page in pages]))
        kinds.append(kind)
    return stories, torch.from_numpy(np.stack(weights)), prompts(kinds[-SHOWN:])


def data(args, base: PictureModel, pixel_range: tuple[float, float]) -> dict:
    """Latents and references' latents [stories, pages, 4, h, w], captions, loss weights, and what the samples show."""
    demo = args.stories.isdigit()
    if demo:
        stories, weights, asked = demo_stories(args, args.side // 8)
        held = SHOWN
    else:
        stories = READERS[args.layout](Path(args.stories), args.frames)
        if len(stories) < 2:
            raise ValueError(f"{args.stories} holds one story of {args.frames} pictures; give at least two")
        held = min(SHOWN, max(1, len(stories) // 10))
        weights = torch.ones(len(stories), args.frames, 1, 1, 1)
        asked = [story[1].caption for story in stories[-held:]]
    captions = [picture.caption for story in stories for picture in story]
    texts, _, rows = base.told(captions + asked)
    low, high = ((edge + 1) / 2 for edge in pixel_range)  # the VAE turns 0..1 into -1..1
    latents, shown = [], []
    for story in stories:
        pixels = torch.stack([covered(picture.read(), args.side) for picture in story]).float() / 255
        latents.append(base.encode(pixels).bfloat16())
        shown.append(latents[-1] if (low, high) == (0, 1) else base.encode(pixels * (high - low) + low).bfloat16())
    return {
        "latents": torch.stack(latents), "shown": torch.stack(shown), "texts": texts, "weights": weights,
        "rows": rows[: len(captions)].view(len(stories), -1), "prompts": rows[len(captions) :], "held": held,
        "grey": base.encode(torch.full((1, 3, args.side, args.side), 0.5)).bfloat16(), "ordered": not demo,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", default="1500", help="folder of stories, or how many of the picture-book world")
    parser.add_argument("--layout", choices=LAYOUTS, default="folder", help="how the folder is laid out")
    parser.add_argument("--frames", type=int, default=PAGES, help="pictures of a story; PororoSV and FlintstonesSV: 5")
    parser.add_argument("--side", type=int, default=128, help="pixels of a picture's side, a multiple of 64; SD1.5: 512")
    add_arguments(parser)
    parser.add_argument("--residual", choices=("once", "twice"), help="default: twice with --checkpoint, as the authors")
    parser.add_argument(
        "--pixel-range", choices=("-1 1", "0 1"), help='of references at the VAE; default: "0 1" with --checkpoint, as the authors'
    )
    parser.add_argument(
        "--unordered", type=float, help="share of steps whose references have one noise; default: 0.33 on the picture-book world, else 0"
    )
    parser.add_argument("--inside", type=float, default=4.0, help="loss weight of the character's box, picture-book world")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--name", default="storygen", help="stem of the files")
    loop.add_arguments(parser, minutes=25, batch=16, rate=1e-3, show_minutes=10, seed=11)
    args = parser.parse_args()
    if args.side % 64 or args.frames < PAGES:
        parser.error(f"--side is {args.side} and --frames {args.frames}; give a multiple of 64 and at least {PAGES}")
    real = args.checkpoint is not None
    args.residual = args.residual or ("twice" if real else "once")
    args.pixel_range = args.pixel_range or ("0 1" if real else "-1 1")
    if args.unordered is None:
        args.unordered = 0.33 if args.stories.isdigit() else 0.0
    args.cpu = args.cpu or not real  # the demo model is faster there
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if not args.checkpoint:
        written_out.use()
    base = chosen(args)
    twice = args.residual == "twice"
    model = StoryGen(base, 0 if args.checkpoint or twice else WIDEST, twice, fused if args.checkpoint else attend)
    if args.stories.isdigit():
        source = f"demo_{args.stories}_{args.seed}_{args.inside}"
    else:
        source = f"{args.layout}_{kept.mark(Path(args.stories))}"
    settings = f"{source}_{args.frames}_{args.side}_{args.pixel_range.replace(' ', '_')}"
    path = Path(args.folder) / f"storygen_data_{base.hash[:12]}_{settings}.pt"
    found = kept.kept(path, lambda: data(args, base, tuple(map(float, args.pixel_range.split()))))
    task = StoryTask(model, base, found, args.name, args.pixel_range, args.unordered)
    task.start(twice)
    loop.Loop(task, args).run()


if __name__ == "__main__":
    main()
