"""Puts trained demo models into weights/: half precision, preview colours, checksums.

`python -m training.release` after the trainers; each file is written beside its place and then moved there.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import avg_pool2d

from .facts import load_autoencoder, pages
from .loop import checksums
from .video import temporal

import comfy.ops  # isort: skip
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # isort: skip

LIMITS = {  # bytes
    "unet": 12e6,
    "video": 3e6,
    "autoencoder": 3.2e6,
    "clip": 2e6,
    "facts": 0.7e6,
    "adapter": 0.6e6,
    "joint_av": 1.6e6,
    "joint_facts": 0.15e6,
    "storygen": 0.5e6,
    "captioner": 0.48e6,
    "sound_encoder": 0.26e6,
    "sound_mapping": 0.16e6,
    "motion": 0.5e6,
    "board": 0.6e6,
    "magdiff": 0.3e6,
}


@torch.no_grad()
def preview_colours(path: Path, count: int = 64) -> list[list[float]]:
    """Least-squares map of scaled latents to colours in [-1, 1]: one row per channel, then the constant."""
    autoencoder, scale = load_autoencoder(str(path))
    x = pages(9, count)[0] / 127.5 - 1
    latents = (autoencoder.encode(x) * scale).movedim(1, -1).reshape(-1, 4)
    colours = avg_pool2d(x, 8).movedim(1, -1).reshape(-1, 3)
    terms = torch.cat([latents, torch.ones(len(latents), 1)], 1)
    return [[round(value, 4) for value in row] for row in torch.linalg.lstsq(terms, colours).solution.tolist()]


def padded(tensors: dict[str, torch.Tensor], config: dict) -> dict[str, list[int]]:
    """Full sizes of the temporal tensors that the trainer keeps smaller or leaves out; the rest of them is zero."""
    full = UNetModel(**config, dtype=torch.float32, operations=comfy.ops.disable_weight_init).state_dict()
    names = [
        name for name in full if temporal(name) and (name not in tensors or tensors[name].shape != full[name].shape)
    ]
    return {name: list(full[name].shape) for name in names}


def release(source: Path, target: Path) -> None:
    with safe_open(source, "pt") as file:
        metadata, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if source.stem == "autoencoder":
        metadata["latent_rgb"] = json.dumps(preview_colours(source))
    if source.stem == "video":
        metadata["padded"] = json.dumps(padded(tensors, json.loads(metadata["config"])))
    part = target.with_suffix(".part")
    save_file(
        {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}, part, metadata
    )
    if part.stat().st_size > LIMITS[source.stem]:
        raise ValueError(f"{source} makes a file of {part.stat().st_size} bytes, more than {LIMITS[source.stem]:.0f}")
    part.chmod(0o644)
    os.replace(part, target)
    print(f"{target} {target.stat().st_size} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=Path("output/training"), help="folder the trainers wrote to")
    parser.add_argument("--out", type=Path, default=Path("weights"))
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    for name in LIMITS:
        source = args.source / f"{name}.safetensors"
        if source.is_file():
            release(source, args.out / source.name)
    checksums(args.out)


if __name__ == "__main__":
    main()
