"""Trains StoryGen's image attention (arXiv 2306.00973) on the demo U-Net, which stays as it is: `python -m training.story_gen`.

An example is one picture-book page and one to three other pages of the same character in other places, at the noise and
with the captions StoryGen gives them. As the authors: attn3 and norm4 start from attn1 and norm1; 3, 2 or 1 references
with 30, 30 and 40 %; prompt, and apart from it references and captions, are left out at times. Not as they: the residual
counts once, so that training starts near the base model (a small model does not unlearn the second in minutes), pixels of
references are in the VAE's own range, and the wide layers have half of attn1's heads, for the size of the file.
"""

import argparse
import json

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from attention.story_gen import image_attention, join
from models.autoencoder import TinyAutoencoder
from models.story_gen import ImageAttention
from sampling.story_gen import AUTO, MULTI, reference_timesteps

from .adapter import emphasis
from .autoencoder import scaled
from .loop import Loop, Task, add_arguments, file_hash
from .storybook import COLOURS, HATS, KINDS, PLACES, TIMES, sample
from .unet import ALPHAS, CONFIG, Text

import comfy.ops  # isort: skip
import comfy.utils  # isort: skip
from comfy.ldm.modules.attention import BasicTransformerBlock  # isort: skip
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # isort: skip

PAGES = 4  # of one character
HEAD = CONFIG["num_head_channels"]
WIDEST = 64  # channels that attn3 attends with at most
METADATA = {"prediction": "V_PREDICTION", "residual": "once", "pixel_range": "-1 1"}
SHOWN = 8


def attend(q: Tensor, k: Tensor, v: Tensor, bias=None) -> Tensor:
    """Written out: on a CPU it is differentiated in half the time of the fused form."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def published_sites(unet: UNetModel) -> dict[str, tuple[str, BasicTransformerBlock]]:
    """Name of each transformer block -> its published prefix and itself."""
    ending = "attn1.to_q.weight"
    prefixes = {
        own.removesuffix(f".{ending}"): published.removesuffix(ending)
        for published, own in comfy.utils.unet_to_diffusers(CONFIG).items()
        if published.endswith(ending)
    }
    blocks = {name: block for name, block in unet.named_modules() if isinstance(block, BasicTransformerBlock)}
    return {name: (prefixes[name], block) for name, block in blocks.items()}


class StoryGen(nn.Module):
    """The frozen U-Net with an image attention in each transformer block."""

    def __init__(self, unet: UNetModel):
        super().__init__()
        self.unet = unet.requires_grad_(False)
        self.blocks = list(published_sites(unet).values())
        widths = [block.attn1.to_q.in_features for _, block in self.blocks]
        self.sites = nn.ModuleList(ImageAttention(width, min(width, WIDEST)) for width in widths)

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
        seen, parts = [], iter(zip(self.sites, features, strict=True))

        def remember(h, extra):
            seen.append(h)
            return h

        def add(n, extra):
            site, image = next(parts)
            h = seen.pop()
            found = image_attention(site.attn3, site.norm4, h, image, len(site.attn3.to_q.weight) // HEAD, attend)
            return join(h, n, found, strength, twice=False)

        return self._run(x, t, context, {"middle_patch": [remember], "attn2_output_patch": [add]})


def load(path: str, network: nn.Module) -> dict:
    """Put a file's weights into a network; its metadata."""
    with safe_open(path, "pt") as file:
        network.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})
        return file.metadata()


class StoryTask(Task):
    name = "storygen"

    def __init__(self, args):
        self.args, self.examples = args, args.stories
        self.metadata = METADATA | {"base": file_hash(f"{args.base}/unet.safetensors")}
        self.config = {"heads": HEAD, "widest": WIDEST}
        with safe_open(f"{args.base}/autoencoder.safetensors", "pt") as file:
            meta = file.metadata()
        self.factor = float(meta["scale_factor"])
        self.autoencoder = TinyAutoencoder(**json.loads(meta["config"])).requires_grad_(False)
        load(f"{args.base}/autoencoder.safetensors", self.autoencoder)
        self.text = Text(f"{args.base}/clip.safetensors")
        unet = UNetModel(**CONFIG, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        load(f"{args.base}/unet.safetensors", unet)
        self.model = StoryGen(unet.to(memory_format=torch.channels_last))
        self.data()
        some = min(64, len(self.latents))
        t = torch.full((some,), 50)
        self.model.start(self.model.features(self.noised(self.latents[:some, 0], t, 0), t, self.contexts[:some, 0].float()))

    @torch.no_grad()
    def data(self) -> None:
        """Latents [stories, PAGES, 4, 16, 16], captions and loss weights of pages; each story shows one character."""
        latents, contexts, weights, self.kinds = [], [], [], []
        for story in range(self.args.stories + SHOWN):  # the last are never trained on
            rng = np.random.default_rng((self.args.seed, story))
            kind, colour, hat = (list(names)[rng.integers(len(names))] for names in (KINDS, COLOURS, HATS))
            pages = [sample(rng, "one", kind=kind, colour=colour, hat=hat) for _ in range(PAGES)]
            images = torch.from_numpy(np.stack([page.image for page in pages])).permute(0, 3, 1, 2)
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(self.autoencoder.encode(scaled(images)).float() * self.factor)
            contexts.append(self.text([page.caption for page in pages]).bfloat16())
            self.kinds.append(kind)
            weights.append(np.stack([emphasis(page, latents[0].shape[-1], self.args.inside) for page in pages]))
        self.latents, self.contexts = torch.stack(latents), torch.stack(contexts)
        self.weights = torch.from_numpy(np.stack(weights))
        self.grey = self.autoencoder.encode(torch.zeros(1, 3, 128, 128)) * self.factor
        self.empty = self.text([""])[0]

    def noised(self, clean: Tensor, t: Tensor, e) -> Tensor:
        a = ALPHAS[t].view(-1, 1, 1, 1)
        return (a.sqrt() * clean + (1 - a).sqrt() * e).to(memory_format=torch.channels_last)

    def loss(self, network, index: Tensor, generator: torch.Generator) -> Tensor:
        def chance(size=()):
            return torch.rand(size, generator=generator)

        p, rows = chance(), len(index)
        count = 3 if p < 0.3 else 2 if p < 0.6 else 1
        stage = MULTI if chance() < 0.33 else AUTO
        order = chance((rows, PAGES)).argsort(1)[:, : count + 1]
        clean, context = self.latents[index, order[:, 0]], self.contexts[index, order[:, 0]].float()
        shown, captions = (x[index[:, None], order[:, 1:]].float() for x in (self.latents, self.contexts))
        context[chance(rows) < 0.05] = self.empty
        without = chance(rows) < 0.1
        shown[without], captions[without] = self.grey[0], self.empty
        t = torch.randint(1000, (rows,), generator=generator)
        e, noise = (torch.randn(clean.shape, generator=generator) for _ in range(2))
        steps = torch.tensor([reference_timesteps(int(one), count, stage) for one in t])
        found = [
            self.model.features(self.noised(shown[:, place], steps[:, place], e), steps[:, place], captions[:, place])
            for place in range(count)
        ]
        joined = [torch.cat(parts, 1) for parts in zip(*found, strict=True)]
        a = ALPHAS[t].view(-1, 1, 1, 1)
        v = network(self.noised(clean, t, noise), t, context, joined).float().cpu()
        error = (v - (a.sqrt() * noise - (1 - a).sqrt() * clean)).square()
        weight = self.weights[index, order[:, 0]]
        return (weight * error).mean() / weight.mean()

    def check(self) -> list[str]:
        sizes = [len(site.attn3.to_q.weight) for site in self.model.sites]
        return [f"{self.examples} stories of {PAGES} pages, image attention of {sizes} channels in {len(sizes)} blocks"]

    def tensors(self) -> dict[str, Tensor]:
        return {
            prefix + name: value
            for site, (prefix, _) in zip(self.model.sites, self.model.blocks, strict=True)
            for name, value in site.state_dict().items()
        }

    @torch.no_grad()
    def draw(self, model: StoryGen, shown: int, steps=16, text=4.0, image=2.0, seed=1, strength=1.0) -> Tensor:
        """Latents of other scenes with the characters of the last `shown` stories, three branches as StoryGen's sampler."""
        latents, captions = self.latents[-shown:, 0], self.contexts[-shown:, 0].float()
        prompts = [
            f"a {kind} {list(PLACES.values())[n % 6]} {list(TIMES.values())[n % 3]}"
            for n, kind in enumerate(self.kinds[-shown:])
        ]
        context, empty = self.text(prompts), self.empty.expand(shown, -1, -1)
        generator = torch.Generator().manual_seed(seed)
        x, e = (torch.randn(latents.shape, generator=generator) for _ in range(2))
        times = torch.linspace(999, 0, steps + 1).round().long()
        grey = self.grey.expand(shown, -1, -1, -1)
        for now, after in zip(times[:-1], times[1:], strict=True):
            step = (now // 10).repeat(2 * shown)
            real = torch.cat([self.noised(latents, step[:shown], e), self.noised(grey, step[:shown], e)])
            found = model.features(real, step, torch.cat([captions, empty]))
            three = [torch.cat([f[shown:], f[:shown], f[:shown]]) for f in found]
            words = torch.cat([empty, empty, context])
            u, v, a = model(x.repeat(3, 1, 1, 1), now.repeat(3 * shown), words, three, strength).cpu().chunk(3)
            v = u + image * (v - u) + text * (a - v)
            alpha, later = ALPHAS[now], ALPHAS[after] if after > 0 else torch.tensor(1.0)
            clean, noise = alpha.sqrt() * x - (1 - alpha).sqrt() * v, alpha.sqrt() * v + (1 - alpha).sqrt() * x
            x = later.sqrt() * clean + (1 - later).sqrt() * noise
        return x

    def show(self, model: StoryGen) -> Image.Image:
        """Rows: a page of each character, drawn without and with it as reference."""
        rows = [self.latents[-SHOWN:, 0], self.draw(model, SHOWN, strength=0.0), self.draw(model, SHOWN)]
        pictures = self.autoencoder.decode(torch.cat(rows) / self.factor).clamp(-1, 1).add(1).mul(127.5).byte()
        sheet = pictures.permute(0, 2, 3, 1).unflatten(0, (3, SHOWN)).movedim(2, 1).flatten(2, 3).flatten(0, 1)
        return Image.fromarray(sheet.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, minutes=25, batch=16, rate=1e-3, show_minutes=10, seed=11, cpu=True)
    parser.add_argument("--base", default="weights", help="folder of unet, clip and autoencoder, which stay as they are")
    parser.add_argument("--stories", type=int, default=1500, help="characters with four pages each")
    parser.add_argument("--inside", type=float, default=4.0, help="loss weight of the character's box")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Loop(StoryTask(args), args).run()


if __name__ == "__main__":
    main()
