"""Trains the demo image adapter: the picture of a cut-out character -> 4 tokens -> keys and values of the demo U-Net.

`python -m training.adapter --minutes 25` after clip, autoencoder and unet, all of which stay as they are. The reference
has the page's body colour and hat, half of the time on a character of another kind, so that kind stays with the text.
IP-Adapter's published layout and dropping of conditions (arXiv 2308.06721); loss weighted equally over noise levels,
because colour is settled early, and more inside the character's box. Writes the adapter, a resumable state and a sheet.
"""

import argparse
import json
import os
import time

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.autoencoder import TinyAutoencoder
from models.ip_adapter import ImageAdapter, Standard, in_file_order

from .autoencoder import scaled
from .clip import MEAN, STD
from .storybook import COLOURS, HATS, KINDS, SIZE, Page, sample, sprite
from .unet import ALPHAS, CONFIG, Text, held_out, sheet

import comfy.ops  # isort: skip
from comfy.ldm.modules.attention import SpatialTransformer  # isort: skip
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # isort: skip

GROUNDS = ((0, 0, 0), (128, 128, 128), (255, 255, 255))
TOKENS = 4
POSES = 20  # reference pictures of each kind, colour and hat


class Place:
    """One cross-attention layer of the U-Net and where it is."""

    def __init__(self, path: str, block: int, channels: int):
        self.path, self.block, self.channels = path, block, channels


def cross_layers(unet: UNetModel) -> list[Place]:
    blocks = [("input", index, block) for index, block in enumerate(unet.input_blocks)]
    blocks += [("middle", 0, unet.middle_block)]
    blocks += [("output", index, block) for index, block in enumerate(unet.output_blocks)]
    found = []
    for path, index, block in blocks:
        for module in block:
            if isinstance(module, SpatialTransformer):
                found.append(Place(path, index, module.transformer_blocks[0].attn2.to_k.out_features))
    return in_file_order(found)


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


@torch.no_grad()
def embeddings(text: Text, seed: int) -> torch.Tensor:
    """Pooled CLIP embeddings of references, [kinds, colours, hats, POSES, width]."""
    rows = []
    for k, kind in enumerate(KINDS):
        for c, colour in enumerate(COLOURS):
            for h, hat in enumerate(HATS):
                rng = np.random.default_rng((seed, k, c, h))
                pictures = np.stack([cut_out(rng, kind, colour, hat) for _ in range(POSES)])
                pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
                rows.append(text.encoders.vision(pixel_values=pixels, intermediate_output=-2)[2])
    return torch.stack(rows).unflatten(0, (len(KINDS), len(COLOURS), len(HATS)))


def numbers(page: Page) -> tuple[int, int, int]:
    """Kind, colour and hat of the page's character as indices."""
    facts = page.facts[0]
    return tuple(
        list(names).index(name) for names, name in ((KINDS, facts.kind), (COLOURS, facts.colour), (HATS, facts.hat))
    )


def emphasis(page: Page, side: int, inside: float) -> np.ndarray:
    """Loss weight of each latent cell: `inside` where a character is, 1 elsewhere; [1, side, side]."""
    weight = np.ones((1, side, side), np.float32)
    for facts in page.facts:
        x0, y0, x1, y1 = (round(edge * side) for edge in facts.box)
        weight[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = inside
    return weight


class Adapted:
    """The frozen U-Net with an image branch, weight `scale`, added to each cross-attention."""

    def __init__(self, unet: UNetModel, adapter: ImageAdapter):
        self.unet, self.adapter = unet, adapter
        self.places = cross_layers(unet)
        self.attention = [self._module(place) for place in self.places]

    def _module(self, place: Place):
        blocks = {
            "input": self.unet.input_blocks,
            "output": self.unet.output_blocks,
            "middle": [self.unet.middle_block],
        }
        block = blocks[place.path][place.block]
        return next(m for m in block if isinstance(m, SpatialTransformer)).transformer_blocks[0].attn2

    def __call__(self, x, t, context, tokens, scale=1.0, alphas=None, **more):
        """alphas: a weight of the text's answer and one of the picture's for each layer, instead of 1 and scale."""

        def patch(index):
            heads = self.attention[index].heads
            text, image = (1.0, scale) if alphas is None else alphas[index]

            def attend(q, k, v, extra):
                def one(k, v):
                    a, b, c = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
                    weights = (a @ b.transpose(-1, -2) * a.shape[-1] ** -0.5).softmax(-1)
                    return (weights @ c).transpose(1, 2).flatten(2)

                return text * one(k, v) + image * one(*self.adapter.project(index, tokens.to(q)))

            return attend

        patches = {(place.path, place.block): patch(index) for index, place in enumerate(self.places)}
        return self.unet(x, t, context, transformer_options={"patches_replace": {"attn2": patches}}, **more)


@torch.no_grad()
def draw(adapted: Adapted, embedding, captions, text: Text, decode, seed: int, steps=20, cfg=4.0, scale=1.0):
    """DDIM samples with IP-Adapter's guidance, uint8 [n, h, w, 3]; embedding [n, width]."""
    x = torch.randn(len(captions), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    context = torch.cat([text(captions), text([""]).expand(len(captions), -1, -1)])
    tokens = adapted.adapter.image_proj(torch.cat([embedding, torch.zeros_like(embedding)]))
    times = torch.linspace(999, 0, steps + 1).round().long()
    for now, after in zip(times[:-1], times[1:], strict=True):
        a, b = ALPHAS[now], ALPHAS[after] if after > 0 else torch.tensor(1.0)
        cond, uncond = adapted(x.repeat(2, 1, 1, 1), now.repeat(2 * len(x)), context, tokens, scale).chunk(2)
        v = uncond + cfg * (cond - uncond)
        clean, noise = a.sqrt() * x - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x
        x = b.sqrt() * clean + (1 - b).sqrt() * noise
    return ((decode(x) + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


class Trainer:
    def __init__(self, args):
        self.args = args
        with safe_open(f"{args.folder}/autoencoder.safetensors", "pt") as file:
            meta = file.metadata()
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        self.factor = float(meta["scale_factor"])
        self.autoencoder = TinyAutoencoder(**json.loads(meta["config"])).requires_grad_(False)
        self.autoencoder.load_state_dict(weights)
        self.text = Text(f"{args.folder}/clip.safetensors")
        unet = UNetModel(**CONFIG, dtype=torch.float32, operations=comfy.ops.disable_weight_init).requires_grad_(False)
        unet.load_state_dict({k: v.float() for k, v in load_file(f"{args.folder}/unet.safetensors").items()})
        unet.to(memory_format=torch.channels_last)
        torch.manual_seed(args.seed)
        width = CONFIG["context_dim"]
        adapter = ImageAdapter(Standard(96, width, TOKENS), [place.channels for place in cross_layers(unet)])
        for layer in adapter.ip_adapter.values():
            torch.nn.init.zeros_(layer.to_v_ip.weight)  # training starts at the model without a picture
        self.adapted = Adapted(unet, adapter)
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.seconds = 0, 0.0
        self.generator = torch.Generator().manual_seed(args.seed)
        self.state = f"{args.folder}/adapter_state.pt"
        if os.path.exists(self.state):
            state = torch.load(self.state, weights_only=True)
            adapter.load_state_dict(state["adapter"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.generator.manual_seed(args.seed + self.step)

    def data(self) -> None:
        """Latents, contexts, identities and loss weights of all pages, and the embeddings of references."""
        args, latents, contexts, known, weights = self.args, [], [], [], []
        self.references = embeddings(self.text, args.seed)
        for start in range(0, args.pages, 500):
            pages = [sample(np.random.default_rng((args.seed, i))) for i in range(start, start + 500)]
            images = torch.from_numpy(np.stack([page.image for page in pages])).permute(0, 3, 1, 2)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                latents += [self.autoencoder.encode(scaled(part)).float() * self.factor for part in images.split(50)]
            contexts.append(self.text([page.caption for page in pages]).bfloat16())
            known += [numbers(page) for page in pages]
            weights += [emphasis(page, latents[0].shape[-1], args.inside) for page in pages]
            print(f"pages {start + 500}", flush=True)
        self.latents, self.contexts = torch.cat(latents), torch.cat(contexts)
        self.known, self.weights = torch.tensor(known), torch.from_numpy(np.stack(weights))
        self.empty = self.text([""])[0]

    def chance(self, size: int) -> torch.Tensor:
        return torch.rand(size, generator=self.generator)

    def loss(self) -> torch.Tensor:
        size, generator = self.args.batch, self.generator
        index = torch.randint(len(self.latents), (size,), generator=generator)
        kind, colour, hat = self.known[index].T
        other = torch.randint(len(KINDS), (size,), generator=generator)
        kind = torch.where(self.chance(size) < 0.5, other, kind)
        embedding = self.references[kind, colour, hat, torch.randint(POSES, (size,), generator=generator)]
        context, dropped = self.contexts[index].float(), self.chance(size)
        context[dropped < 0.1] = self.empty  # text 5 %, picture 5 %, both 5 %
        embedding[(dropped >= 0.05) & (dropped < 0.15)] = 0
        t = torch.randint(1000, (size,), generator=generator)
        a = ALPHAS[t].view(-1, 1, 1, 1)
        clean = self.latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        x = (a.sqrt() * clean + (1 - a).sqrt() * noise).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            v = self.adapted(x, t, context, self.adapted.adapter.image_proj(embedding)).float()
        error = (v - (a.sqrt() * noise - (1 - a).sqrt() * clean)).square()
        return (self.weights[index] * error).mean() / self.weights[index].mean()

    def save(self) -> None:
        adapter = self.adapted.adapter
        state = {
            "adapter": adapter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.state + ".part")
        os.replace(self.state + ".part", self.state)
        metadata = {
            "pages_seen": str(self.step * self.args.batch),
            "minutes": f"{self.seconds / 60:.1f}",
            "seed": str(self.args.seed),
        }
        path = f"{self.args.folder}/adapter.safetensors"
        save_file({k: v.half().contiguous() for k, v in adapter.state_dict().items()}, path + ".part", metadata)
        os.replace(path + ".part", path)

    def show(self) -> None:
        """Sheet of samples: a reference, then six captions drawn with it, for four identities."""
        captions, found = held_out(6), []
        for colour, hat in [(c, h) for c in range(len(COLOURS)) for h in (0, 2)][::3]:
            names = (next(iter(KINDS)), list(COLOURS)[colour], HATS[hat])
            embedding = self.references[0, colour, hat, :1].expand(len(captions), -1)
            found += [cut_out(np.random.default_rng(0), *names)]
            found += list(draw(self.adapted, embedding, captions, self.text, self.decode, 0))
        sheet(found, f"{self.args.folder}/adapter_{self.step}.png", columns=len(captions) + 1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.decode(latents / self.factor)

    def run(self) -> None:
        start, before, total, losses, kept = time.time(), self.seconds, self.args.minutes * 60, [], time.time()
        parameters = list(self.adapted.adapter.parameters())
        while self.seconds < total:
            for group in self.optimizer.param_groups:
                group["lr"] = (
                    self.args.rate * min(1, (self.step + 1) / 100) * min(1, 3 * (1 - self.seconds / total) + 0.01)
                )
            loss = self.loss()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            losses.append(loss.item())
            self.seconds = before + time.time() - start
            if self.step % 50 == 0:
                print(
                    f"step {self.step} pages {self.step * self.args.batch} loss {np.mean(losses):.4f} seconds {self.seconds:.0f}",
                    flush=True,
                )
                losses.clear()
            if time.time() - kept > 300:
                self.save()
                kept = time.time()
        self.save()
        self.show()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", default="output/training", help="where clip, autoencoder and unet are; the adapter goes there"
    )
    parser.add_argument("--minutes", type=float, default=25, help="training time in all, resumed runs counted")
    parser.add_argument("--pages", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--inside", type=float, default=4.0, help="loss weight of the character's box")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    trainer = Trainer(args)
    trainer.data()
    trainer.run()


if __name__ == "__main__":
    main()
