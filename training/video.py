"""Trains the demo video model: the temporal layers of ComfyUI's UNetModel, on latents of picture-book clips.

`torchrun --nproc-per-node 2 -m training.video` after unet. The picture model's weights stay what they are; the file
holds temporal layers alone. They start as no change at all. Loss weighted by min-SNR 2 (arXiv 2303.09556) of a clip:
frames that show one thing have its signal-to-noise ratio as often as there are frames, and where a character is and
goes is settled where noise is strong. `--continued FILE` goes on from a finished file. Writes the model and a resumable
state every five minutes, a sheet of samples every fifteen.
"""

import argparse
import copy
import json
import os
import time

import numpy as np
import torch
import torch.distributed
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.autoencoder import TinyAutoencoder

from . import unet
from .autoencoder import scaled
from .clips import SHARE, shared
from .storybook import FRAMES, sample_clip
from .unet import ALPHAS, RANK, WORLD, Text, held_out, sheet

import comfy.ops  # isort: skip
from comfy.ldm.modules.attention import SpatialVideoTransformer  # isort: skip
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # isort: skip

CONFIG = {
    **unet.CONFIG,
    "use_temporal_attention": True,
    "disable_temporal_crossattention": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": -1.0,
}


_group_norm = torch.nn.functional.group_norm


def contiguous(x, groups, weight=None, bias=None, eps=1e-5):
    """Group norm of a contiguous copy: of channels-last bfloat16 it takes a CPU several times as long."""
    return _group_norm(x.contiguous(), groups, weight, bias, eps)


torch.nn.functional.group_norm = contiguous


def temporal(name: str) -> bool:
    return any(part in name for part in ("time_stack", "time_pos_embed", "time_mixer"))


def new_video(pictures: dict[str, torch.Tensor]) -> UNetModel:
    """UNetModel with the picture model's spatial weights, frozen, and temporal layers that change nothing yet.

    To fit in few megabytes the input feed-forward layer of a temporal block is left out (in the host it is there, with
    weights zero) and the frame embedding has a quarter of its hidden width (in the host the rest is zero).
    """
    plain = comfy.ops.disable_weight_init
    model = UNetModel(**CONFIG, dtype=torch.float32, operations=plain)
    for module in model.modules():
        if isinstance(module, SpatialVideoTransformer):
            width = module.in_channels
            module.time_pos_embed = torch.nn.Sequential(
                plain.Linear(width, width), torch.nn.SiLU(), plain.Linear(width, width)
            )
            for block in module.time_stack:
                block.ff_in = None
                del block.norm_in
    left_out = model.load_state_dict(pictures, strict=False)
    if left_out.unexpected_keys or not all(temporal(name) for name in left_out.missing_keys):
        raise ValueError(f"the picture model does not fit: {left_out}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(temporal(name))
        if not temporal(name) or name.endswith("mix_factor"):
            continue
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
        elif name.endswith("time_pos_embed.0.weight"):
            torch.nn.init.eye_(parameter)
        elif parameter.ndim == 1 or name.endswith(("to_out.0.weight", "ff.net.2.weight", "time_pos_embed.2.weight")):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
    return model


def temporal_state(model: UNetModel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if temporal(name)}


@torch.no_grad()
def draw(
    model, autoencoder, factor: float, text: Text, captions: list[str], seed: int, steps=20, cfg=4.0, frames=FRAMES
) -> np.ndarray:
    """DDIM samples of captions as clips, uint8 [clips, frames, h, w, 3]."""
    generator = torch.Generator().manual_seed(seed)
    x = shared(torch.randn(len(captions) * frames, 4, 16, 16, generator=generator), frames)
    context = torch.cat([text(captions), text([""]).expand(len(captions), -1, -1)]).repeat_interleave(frames, 0)
    times = torch.linspace(999, 0, steps + 1).round().long()
    for now, after in zip(times[:-1], times[1:], strict=True):
        a, b = ALPHAS[now], ALPHAS[after] if after > 0 else torch.tensor(1.0)
        with torch.autocast("cpu", torch.bfloat16):
            v = model(x.repeat(2, 1, 1, 1), now.repeat(2 * len(x)), context, num_video_frames=frames).float()
        cond, uncond = v.chunk(2)
        v = uncond + cfg * (cond - uncond)
        clean, noise = a.sqrt() * x - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x
        x = b.sqrt() * clean + (1 - b).sqrt() * noise
    out = autoencoder.decode(x / factor)
    out = ((out + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return out.reshape(len(captions), frames, *out.shape[1:])


def data(args, autoencoder, factor: float) -> tuple[torch.Tensor, list[str]]:
    """Latents [clips, frames, 4, 16, 16] of standard deviation 1, in bfloat16, and captions of this process's clips."""
    path = f"{args.folder}/video_clips_{args.seed}_{args.clips}_{RANK}_{WORLD}.pt"
    if os.path.exists(path):
        return torch.load(path, weights_only=True)
    latents, captions = [], []
    for index in range(RANK, args.clips, WORLD):
        clip = sample_clip(np.random.default_rng((args.seed, index)))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z = autoencoder.encode(scaled(torch.from_numpy(clip.frames).permute(0, 3, 1, 2)))
        latents.append((z.float() * factor).bfloat16())
        captions.append(clip.caption)
        if len(captions) % 250 == 0:
            print(f"clips {len(captions)} of process {RANK}", flush=True)
    torch.save((torch.stack(latents), captions), path)
    return torch.stack(latents), captions


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
        torch.manual_seed(args.seed)
        pictures = load_file(f"{args.folder}/unet.safetensors")
        self.model = new_video({key: value.float() for key, value in pictures.items()})
        if args.continued:
            finished = {key: value.float() for key, value in load_file(args.continued).items()}
            self.model.load_state_dict(finished, strict=False)
        self.average = copy.deepcopy(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.averaged = [p for p in self.average.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.seen, self.seconds = 0, 0, 0.0
        self.generator = torch.Generator().manual_seed(args.seed * WORLD + RANK)
        self.state = f"{args.folder}/video_state.pt"
        if os.path.exists(self.state):
            self.resume(torch.load(self.state, weights_only=True))
        self.model.to(memory_format=torch.channels_last)
        self.network = torch.nn.parallel.DistributedDataParallel(self.model) if WORLD > 1 else self.model

    def resume(self, state: dict) -> None:
        self.model.load_state_dict(state["model"], strict=False)
        self.average.load_state_dict(state["average"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.manual_seed((state["step"] + 1) * WORLD + RANK)
        self.step, self.seen, self.seconds = state["step"], state["seen"], state["seconds"]

    def save(self, loss: float) -> None:
        state = {
            "model": temporal_state(self.model),
            "average": temporal_state(self.average),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seen": self.seen,
            "seconds": self.seconds,
        }
        torch.save(state, self.state + ".part")
        os.replace(self.state + ".part", self.state)
        metadata = {
            "config": json.dumps(CONFIG),
            "prediction": "v",
            "frames": str(FRAMES),
            "noise_share": str(SHARE),
            "clips_seen": str(self.seen),
            "minutes": f"{self.seconds / 60:.1f}",
            "loss": f"{loss:.4f}",
            "seed": str(self.args.seed),
            "continued": self.args.continued or "",
        }
        path = f"{self.args.folder}/video.safetensors"
        tensors = {key: value.half().contiguous() for key, value in temporal_state(self.average).items()}
        save_file(tensors, path + ".part", metadata)
        os.replace(path + ".part", path)

    def show(self) -> None:
        clips = draw(self.average, self.autoencoder, self.factor, self.text, held_out(6), 0)
        sheet(list(clips.reshape(-1, *clips.shape[2:])), f"{self.args.folder}/video_{self.step}.png", FRAMES)

    def loss(self, latents: torch.Tensor, contexts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        size, generator = self.args.batch // WORLD, self.generator
        index = torch.randint(len(latents), (size,), generator=generator)
        clean = latents[index].float()
        back = torch.rand(size, generator=generator) < 0.5
        clean[back] = clean[back].flip(1)  # a clip that runs backwards has the same caption
        row = rows[index]
        row[torch.rand(size, generator=generator) < 0.1] = 0
        order = (
            torch.arange(size) * WORLD + RANK
        )  # times are spread evenly over the batch, closer where noise is strong
        t = 1000 * ((order + torch.rand(size, generator=generator)) / self.args.batch) ** 0.7
        t = t.long().repeat_interleave(FRAMES)
        a = ALPHAS[t].view(-1, 1, 1, 1)
        clean = clean.flatten(0, 1)
        noise = shared(torch.randn(clean.shape, generator=generator))
        x = (a.sqrt() * clean + (1 - a).sqrt() * noise).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            context = contexts[row].repeat_interleave(FRAMES, 0)
            v = self.network(x, t, context, num_video_frames=FRAMES).float()
        snr = a / (1 - a)
        weight = (FRAMES * snr).clamp(max=2) / (snr + 1)
        return (weight * (v - (a.sqrt() * noise - (1 - a).sqrt() * clean)).square()).mean()

    def clock(self, seconds: float) -> float:
        """The first process's time, so that all stop at the same step."""
        if WORLD == 1:
            return seconds
        told = torch.tensor(seconds)
        torch.distributed.broadcast(told, 0)
        return told.item()

    def run(self, latents: torch.Tensor, captions: list[str]) -> None:
        known = ["", *sorted(set(captions))]
        contexts = torch.cat([self.text(known[i : i + 100]) for i in range(0, len(known), 100)])
        rows = torch.tensor([known.index(caption) for caption in captions])
        start, before, total, losses = time.time(), self.seconds, self.args.minutes * 60, []
        kept, saves = time.time(), 0
        while self.seconds < total:
            for group in self.optimizer.param_groups:
                group["lr"] = (
                    self.args.rate * min(1, (self.step + 1) / 100) * min(1, 3 * (1 - self.seconds / total) + 0.01)
                )
            loss = self.loss(latents, contexts, rows)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.step, self.seen = self.step + 1, self.seen + self.args.batch
            keep = min(0.995, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.averaged, self.trained, 1 - keep)
            losses.append(loss.item())
            self.seconds = before + self.clock(time.time() - start)
            if self.step % 20 == 0 and RANK == 0:
                print(
                    f"step {self.step} clips {self.seen} loss {np.mean(losses[-100:]):.4f} seconds {self.seconds:.0f}",
                    flush=True,
                )
            if RANK == 0 and time.time() - kept > 300:
                self.save(float(np.mean(losses[-300:])))
                kept, saves = time.time(), saves + 1
                if saves % 3 == 0:
                    self.show()
        if RANK == 0:
            self.save(float(np.mean(losses[-300:])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="output/training", help="where unet, autoencoder and clip are; model goes")
    parser.add_argument("--minutes", type=float, default=60, help="training time in all, resumed runs counted")
    parser.add_argument("--continued", help="finished file to go on from; minutes and clips count from there")
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=4, help="clips a step")
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    if WORLD > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
    trainer = Trainer(args)
    trainer.run(*data(args, trainer.autoencoder, trainer.factor))


if __name__ == "__main__":
    main()
