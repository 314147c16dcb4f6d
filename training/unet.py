"""Trains the demo text-to-image model: ComfyUI's own UNetModel on latents of picture-book pages, v-prediction.

`torchrun --nproc-per-node 2 -m training.unet` after autoencoder and clip; one process per core is a third faster than
one with two threads. Noise schedule of SD1.5; loss weighted by min-SNR 5 (arXiv 2303.09556); weights averaged. Writes
the model, a resumable state and a sheet of samples every few minutes.
"""

import argparse
import copy
import json
import os
import time

import numpy as np
import torch
import torch.distributed
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.autoencoder import TinyAutoencoder

from . import host_models, written_out  # noqa: F401
from .autoencoder import scaled
from .clip import Encoders, Vocabulary
from .storybook import KINDS, PLACES, TIMES, sample

import comfy.ops  # isort: skip
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # isort: skip

CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [1, 1, 0],
    "transformer_depth_output": [1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 96,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "legacy": False,
}
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()
written_out.use()


def new_unet() -> UNetModel:
    """UNetModel with fresh weights; the last layer of every residual branch starts at zero."""
    model = UNetModel(**CONFIG, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
        else:
            torch.nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
    for module in model.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(module.weight)
    for name, parameter in model.named_parameters():
        if name.endswith(("out_layers.3.weight", "proj_out.weight")) or name == "out.2.weight":
            torch.nn.init.zeros_(parameter)
    return model


class Text:
    """Caption -> context [77, width], by the finished text encoder; each caption is encoded once."""

    def __init__(self, path: str):
        weights = {key: value.float() for key, value in load_file(path).items()}
        self.vocabulary = Vocabulary()
        self.encoders = Encoders(len(self.vocabulary.ids) + 1)
        self.encoders.rows.data = weights.pop("text.rows")
        self.encoders.load_state_dict({k: v for k, v in weights.items() if k != "text.token_ids"}, strict=False)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> torch.Tensor:
        rows = torch.tensor([self.vocabulary.rows(caption) for caption in captions])
        model = self.encoders.text.text_model
        mask = torch.full((77, 77), -1e9).triu_(1)
        x = self.encoders.rows[rows] + model.embeddings.position_embedding.weight
        return model.final_layer_norm(model.encoder(x, mask=mask)[0])


@torch.no_grad()
def draw(
    model, autoencoder, factor: float, text: Text, captions: list[str], seed: int, steps=20, cfg=4.0
) -> np.ndarray:
    """DDIM samples of captions as pictures, uint8 [n, h, w, 3]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(captions), 4, 16, 16, generator=generator)
    context = torch.cat([text(captions), text([""]).expand(len(captions), -1, -1)])
    times = torch.linspace(999, 0, steps + 1).round().long()
    for now, after in zip(times[:-1], times[1:], strict=True):
        a, b = ALPHAS[now], ALPHAS[after] if after > 0 else torch.tensor(1.0)
        v = model(x.repeat(2, 1, 1, 1), now.repeat(2 * len(x)), context)
        cond, uncond = v.chunk(2)
        v = uncond + cfg * (cond - uncond)
        clean, noise = a.sqrt() * x - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x
        x = b.sqrt() * clean + (1 - b).sqrt() * noise
    out = autoencoder.decode(x / factor)
    return ((out + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def sheet(pictures_, path: str, columns=8) -> None:
    rows = [np.concatenate(pictures_[i : i + columns], 1) for i in range(0, len(pictures_), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def held_out(count: int) -> list[str]:
    return [
        f"a {kind} {list(PLACES.values())[i % 6]} {list(TIMES.values())[i % 3]}"
        for i, kind in zip(range(count), list(KINDS) * count, strict=False)
    ]


def data(args, autoencoder, factor: float, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [pages, 4, 16, 16] of standard deviation 1, and contexts [pages, 77, width] in bfloat16."""
    latents, contexts = [], []
    for start in range(RANK * 1000, args.pages, WORLD * 1000):
        pages = [
            sample(np.random.default_rng((args.seed, index))) for index in range(start, min(start + 1000, args.pages))
        ]
        images = torch.from_numpy(np.stack([page.image for page in pages])).permute(0, 3, 1, 2)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents += [autoencoder.encode(scaled(part)).float() * factor for part in images.split(50)]
        contexts += [text([page.caption for page in part]).bfloat16() for part in (pages[:500], pages[500:]) if part]
        print(f"pages {start + len(pages)}", flush=True)
    return torch.cat(latents), torch.cat(contexts)


class Trainer:
    def __init__(self, args):
        self.args = args
        with safe_open(f"{args.folder}/autoencoder.safetensors", "pt") as file:
            meta = file.metadata()
            weights = {key: file.get_tensor(key).float() for key in file.keys()}
        self.factor = float(meta["scale_factor"])
        self.autoencoder = TinyAutoencoder(**json.loads(meta["config"]))
        self.autoencoder.load_state_dict(weights)
        self.text = Text(f"{args.folder}/clip.safetensors")
        self.empty = self.text([""])[0].bfloat16()
        torch.manual_seed(args.seed)
        self.model = new_unet()
        self.average = copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.seconds = 0, 0.0
        self.generator = torch.Generator().manual_seed(args.seed * WORLD + RANK)
        self.state = f"{args.folder}/unet_state.pt"
        if os.path.exists(self.state):
            self.resume(torch.load(self.state, weights_only=True))
        self.model.to(memory_format=torch.channels_last)
        self.network = torch.nn.parallel.DistributedDataParallel(self.model) if WORLD > 1 else self.model

    def resume(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.manual_seed((state["step"] + 1) * WORLD + RANK)
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.state + ".part")
        os.replace(self.state + ".part", self.state)
        metadata = {
            "config": json.dumps(CONFIG),
            "scale_factor": str(self.factor),
            "prediction": "v",
            "pages_seen": str(self.step * self.args.batch),
            "minutes": f"{self.seconds / 60:.1f}",
            "seed": str(self.args.seed),
        }
        path = f"{self.args.folder}/unet.safetensors"
        save_file(
            {key: value.half().contiguous() for key, value in self.average.state_dict().items()},
            path + ".part",
            metadata,
        )
        os.replace(path + ".part", path)
        sheet(
            draw(self.average, self.autoencoder, self.factor, self.text, held_out(24), 0),
            f"{self.args.folder}/unet_{self.step}.png",
        )

    def loss(self, latents: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        size, generator = self.args.batch // WORLD, self.generator
        index = torch.randint(len(latents), (size,), generator=generator)
        context = contexts[index].float()
        context[torch.rand(size, generator=generator) < 0.1] = self.empty.float()
        t = torch.randint(1000, (size,), generator=generator)
        a = ALPHAS[t].view(-1, 1, 1, 1)
        noise = torch.randn(latents[index].shape, generator=generator)
        x = a.sqrt() * latents[index] + (1 - a).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            v = self.network(x.to(memory_format=torch.channels_last), t, context).float()
        snr = a / (1 - a)
        weight = snr.clamp(max=5) / (snr + 1)
        return (weight * (v - (a.sqrt() * noise - (1 - a).sqrt() * latents[index])).square()).mean()

    def clock(self, seconds: float) -> float:
        """The first process's time, so that all stop at the same step."""
        if WORLD == 1:
            return seconds
        told = torch.tensor(seconds)
        torch.distributed.broadcast(told, 0)
        return told.item()

    def run(self, latents: torch.Tensor, contexts: torch.Tensor) -> None:
        start, before, total, losses, kept = time.time(), self.seconds, self.args.minutes * 60, [], time.time()
        while self.seconds < total:
            for group in self.optimizer.param_groups:
                group["lr"] = (
                    self.args.rate * min(1, (self.step + 1) / 300) * min(1, 4 * (1 - self.seconds / total) + 0.01)
                )
            loss = self.loss(latents, contexts)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            keep = min(0.9995, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
            losses.append(loss.item())
            self.seconds = before + self.clock(time.time() - start)
            if self.step % 100 == 0 and RANK == 0:
                print(
                    f"step {self.step} pages {self.step * self.args.batch} loss {np.mean(losses):.4f} seconds {self.seconds:.0f}",
                    flush=True,
                )
                losses.clear()
            if RANK == 0 and time.time() - kept > 300:
                self.save()
                kept = time.time()
        if RANK == 0:
            self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", default="output/training", help="where autoencoder and clip are, and the model goes"
    )
    parser.add_argument("--minutes", type=float, default=80, help="training time in all, resumed runs counted")
    parser.add_argument("--pages", type=int, default=40000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    if WORLD > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
    trainer = Trainer(args)
    trainer.run(*data(args, trainer.autoencoder, trainer.factor, trainer.text))


if __name__ == "__main__":
    main()
