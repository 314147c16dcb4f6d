"""Trains the demo autoencoder on pages of the picture-book world: L1 of pixels and of their differences.

`python -m training.autoencoder --minutes 8` on two cores; bfloat16 where the processor has it. `--start FILE` goes on
from a finished file; with `--keep-encoder` the latents stay what they are and only the decoder learns.
"""

import argparse
import json
import time

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import l1_loss

from models.autoencoder import TinyAutoencoder

from .storybook import sample

CONFIG = {"wide": 64, "deep": 96, "blocks": 3, "latent": 4}


def pictures(seed: int, count: int) -> torch.Tensor:
    """uint8 [count, 3, SIZE, SIZE] pages of the world."""
    pages = np.stack([sample(np.random.default_rng((seed, index))).image for index in range(count)])
    return torch.from_numpy(pages).permute(0, 3, 1, 2).contiguous()


def scaled(pages: torch.Tensor) -> torch.Tensor:
    return (pages.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def loss_of(model: TinyAutoencoder, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = (part.float() for part in model.moments(x))
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        out = model.decode(z).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    edges = sum(l1_loss(out.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
    return l1_loss(out, x) + edges + 2e-5 * kl


def save(model: TinyAutoencoder, pages: torch.Tensor, path: str, seen: int, seconds: float) -> None:
    """Write weights in fp16 with the factor that gives latents of standard deviation 1."""
    with torch.no_grad():
        x = scaled(pages[:128])
        mean = model.encode(x)
        psnr = -10 * ((model.decode(mean) - x) / 2).square().mean().log10().item()
    metadata = {
        "config": json.dumps(CONFIG),
        "scale_factor": str(1 / mean.std().item()),
        "pages_seen": str(seen),
        "minutes": f"{seconds / 60:.1f}",
        "psnr": f"{psnr:.2f}",
    }
    print(metadata, flush=True)
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, path, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="output/training/autoencoder.safetensors")
    parser.add_argument("--start", help="finished file to go on from")
    parser.add_argument("--keep-encoder", action="store_true")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--pages", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = TinyAutoencoder(**CONFIG)
    if args.start:
        model.load_state_dict({key: value.float() for key, value in load_file(args.start).items()})
    model.encoder.requires_grad_(not args.keep_encoder)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.rate, betas=(0.9, 0.98), weight_decay=1e-3
    )
    pages = pictures(args.seed, args.pages)
    start, step, seconds = time.time(), 0, args.minutes * 60
    while (spent := time.time() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 200) * min(1, 2 * (1 - spent / seconds) + 0.01)
        loss = loss_of(model, scaled(pages[torch.randint(len(pages), (args.batch,), generator=generator)]), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step} pages {step * args.batch} loss {loss.item():.4f} seconds {spent:.0f}", flush=True)
        if step % 1000 == 0:
            save(model, pages, args.out, step * args.batch, spent)
    save(model, pages, args.out, step * args.batch, seconds)


if __name__ == "__main__":
    main()
