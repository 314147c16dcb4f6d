"""Trains the fact classifier on pages of the picture-book world, drawn and passed through the demo autoencoder.

`python -m training.facts` on one core: each page is seen as drawn or as the autoencoder gives it back from noisy
latents, so that readings hold for sampled pictures. Never tuned on sampled pictures.
"""

import argparse
import json
import time

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate, smooth_l1_loss

from metrics.facts import FactNet
from models.autoencoder import TinyAutoencoder

from .storybook import COLOURS, HATS, KINDS, PLACES, TIMES, sample

LABELS = {
    "kind": list(KINDS),
    "colour": list(COLOURS),
    "hat": list(HATS),
    "place": list(PLACES),
    "time": list(TIMES),
    "count": ["one", "two"],
}
UNKNOWN = -100  # the target that cross entropy leaves out


def target(page) -> tuple[list[int], tuple]:
    """Label numbers in the order of LABELS and the box; place and time of two different panels are left out."""
    facts = page.facts
    known = {
        "kind": facts[0].kind,
        "colour": facts[0].colour,
        "hat": facts[0].hat,
        "count": LABELS["count"][len(facts) - 1],
    }
    for group in ("place", "time"):
        seen = {getattr(one, group) for one in facts}
        known[group] = seen.pop() if len(seen) == 1 else None
    return [words.index(known[group]) if known[group] else UNKNOWN for group, words in LABELS.items()], facts[0].box


def pages(seed: int, count: int, form: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 pictures [count, 3, 128, 128], label numbers [count, 6] and boxes [count, 4]."""
    drawn = [sample(np.random.default_rng((seed, index)), form) for index in range(count)]
    labels, boxes = zip(*(target(page) for page in drawn), strict=True)
    pictures = torch.from_numpy(np.stack([page.image for page in drawn])).permute(0, 3, 1, 2).contiguous()
    return pictures, torch.tensor(labels), torch.tensor(boxes, dtype=torch.float32)


def load_autoencoder(path: str) -> tuple[TinyAutoencoder, float]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    model = TinyAutoencoder(**json.loads(metadata["config"])).train(False).requires_grad_(False)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model, float(metadata["scale_factor"])


@torch.no_grad()
def worn(autoencoder, scale: float, x: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Pictures in [0, 1] as the autoencoder returns them from latents with `noise` standard deviations added."""
    with torch.autocast("cpu", torch.bfloat16):
        z = autoencoder.encode(x * 2 - 1)
        z = z + torch.randn(z.shape, generator=generator).to(z) * noise / scale
        return autoencoder.decode(z).float() / 2 + 0.5


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness, contrast, blur and noise of sampled pictures; nothing that changes a fact."""
    scale = torch.empty(len(x), 1, 1, 1).uniform_(0.85, 1.15, generator=generator)
    shift = torch.empty(len(x), 1, 1, 1).uniform_(-0.06, 0.06, generator=generator)
    soft = interpolate(avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    blur = torch.rand(len(x), 1, 1, 1, generator=generator)
    x = blur * soft + (1 - blur) * x
    return (x * scale + shift + 0.03 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def loss_of(net: FactNet, x: torch.Tensor, labels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    logits, found = net(x)
    names = sum(cross_entropy(scores, labels[:, i], ignore_index=UNKNOWN) for i, scores in enumerate(logits.values()))
    single = labels[:, -1] == 0
    return names + 10 * smooth_l1_loss(found[single], boxes[single], beta=0.05)


@torch.no_grad()
def accuracy(net: FactNet, x: torch.Tensor, labels: torch.Tensor, boxes: torch.Tensor) -> dict[str, float]:
    """Share of right labels per group over single-character pages, and the mean error of box edges."""
    logits, found = net(x)
    report = {
        name: (scores.argmax(1) == labels[:, i]).float().mean().item()
        for i, (name, scores) in enumerate(logits.items())
    }
    return {
        name: round(value, 4) for name, value in {**report, "box_error": (found - boxes).abs().mean().item()}.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", default="output/training/autoencoder.safetensors")
    parser.add_argument("--out", default="output/training/facts.safetensors")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--pages", type=int, default=16000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    autoencoder, scale = load_autoencoder(args.autoencoder)
    pictures, labels, boxes = pages(args.seed, args.pages)
    start, step, seconds, rate = time.time(), 0, args.minutes * 60, 2e-3
    print(f"{args.pages} pages drawn", flush=True)
    for part in range(0, args.pages // 2, 100):  # the first half is seen through the autoencoder
        pictures[part : part + 100] = (
            worn(autoencoder, scale, pictures[part : part + 100] / 255, 0.15, generator).mul(255).round().byte()
        )
    print(f"half of them passed through the autoencoder in {time.time() - start:.0f} s", flush=True)
    net = FactNet(LABELS)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.02)
    start = time.time()
    while (spent := time.time() - start) < seconds:
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 100, 2 * (1 - spent / seconds) + 0.01)
        index = torch.randint(args.pages, (args.batch,), generator=generator)
        loss = loss_of(net, augment(pictures[index] / 255, generator), labels[index], boxes[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step} pages {step * args.batch} loss {loss.item():.4f} seconds {spent:.0f}", flush=True)
    net.train(False)
    held, names, spots = pages(args.seed + 1000, 1000, "one")
    report = {
        "drawn": accuracy(net, held / 255, names, spots),
        "decoded": accuracy(net, worn(autoencoder, scale, held / 255, 0.0, generator), names, spots),
    }
    print(json.dumps(report, indent=1), flush=True)
    metadata = {
        "config": json.dumps({"labels": LABELS}),
        "held_out": json.dumps(report),
        "pages_seen": str(step * args.batch),
        "minutes": f"{seconds / 60:.1f}",
        "seed": str(args.seed),
    }
    save_file(
        {name: value.half() if value.is_floating_point() else value for name, value in net.state_dict().items()},
        args.out,
        metadata,
    )


if __name__ == "__main__":
    main()
