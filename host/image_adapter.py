"""Image adapters on ComfyUI's terms: files of models/ipadapter, CLIP vision features, tokens of pictures."""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.ip_adapter import TEXT_FAMILIES, ImageAdapter, build, in_file_order
from .demo import WEIGHTS, read_weights

SUBJECTS = WEIGHTS / "subjects"
GUIDANCE = ("IP-Adapter", "IPAdapter_plus", "MagDiff")
ALPHAS = {"alpha_text": "text_cross_attention_scale", "alpha_image": "image_cross_attention_scale"}
ENCODERS = {1024: "ViT-H", 1280: "ViT-bigG"}


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter with the name of its file, and learned (alpha_text, alpha_image) of each layer in the file's order.

    `patcher` moves its image_proj to the device; the layers' weights stay where they are and are used once a run.
    """

    name: str
    network: ImageAdapter
    alphas: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self):
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.network.image_proj,
            comfy.model_management.get_torch_device(),
            comfy.model_management.unet_offload_device(),
        )

    @property
    def feature(self) -> str:
        return self.network.image_proj.feature


def read(path: str, node_id: str) -> dict:
    """State dict of a .safetensors file, or of a .bin file if it holds tensors and nothing else."""
    try:
        return comfy.utils.load_torch_file(path, safe_load=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{node_id}: {Path(path).name} holds more than weights and is not opened; get the .safetensors file."
        ) from error


def load(path: str, node_id: str) -> LoadedAdapter:
    """The adapter of a file. Raises ValueError for FaceID files and for anything but an image adapter."""
    name = Path(path).name
    return LoadedAdapter(name, build(read(path, node_id), f"{node_id}: {name}", comfy.ops.manual_cast))


def load_demo() -> LoadedAdapter:
    """The adapter of weights/ for the demo U-Net."""
    return LoadedAdapter("demo adapter", build(read_weights("adapter")[0], "demo adapter", comfy.ops.manual_cast))


def demo_subjects() -> list[str]:
    """Names of the pictures in weights/subjects."""
    return sorted(path.stem for path in SUBJECTS.glob("*.png"))


def demo_subject(name: str) -> tuple[Tensor, Tensor]:
    """A page [1, h, w, 3] and the mask [1, h, w] of its character, kept in the picture's alpha channel."""
    pixels = torch.from_numpy(np.array(Image.open(SUBJECTS / f"{name}.png").convert("RGBA"))) / 255
    return pixels[None, ..., :3], pixels[None, ..., 3]


def read_alphas(path: str, layers: int, node_id: str) -> tuple[tuple[float, float], ...]:
    """Learned (alpha_text, alpha_image) of each layer, in the order of adapter files (down, up, middle).

    From tensors alpha_text and alpha_image [layers], or from the scales [1] of MagDiff's U-Net. Raises ValueError.
    """
    state, name, found = read(path, node_id), Path(path).name, []
    for own, theirs in ALPHAS.items():
        keys = sorted((key for key in state if key.endswith(theirs)), key=_place)
        values = torch.cat([state[key].flatten() for key in keys]) if keys else state.get(own)
        if values is None:
            raise ValueError(f"{node_id}: {name} holds neither {own} nor layers' {theirs}.")
        if values.shape != (layers,) or not values.isfinite().all():
            raise ValueError(
                f"{node_id}: {own} of {name} has shape {tuple(values.shape)}; it must be {layers} finite numbers, one a layer."
            )
        found.append(values.tolist())
    return tuple(zip(*found, strict=True))


def _place(key: str) -> tuple:
    """Down path, up path, middle; then the numbers in the key."""
    path = next((rank for rank, part in enumerate(("down_blocks", "up_blocks", "mid_block")) if part in key), 3)
    return path, [int(number) for number in re.findall(r"\d+", key)]


def channels(family) -> tuple[list[int], int]:
    """Width of each cross-attention layer in the order of adapter files, and that of the prompt's tokens."""
    layers = [family.modules[layer].to_k for layer in in_file_order(family.cross_layers)]
    return [layer.out_features for layer in layers], layers[0].in_features


def check_family(adapter: LoadedAdapter, family, node_id: str) -> None:
    """ValueError naming both sides unless the adapter was made for such a U-Net."""
    own, width = channels(family)
    network = adapter.network
    if network.image_proj.width == width and network.channels == own:
        return
    made, model = (TEXT_FAMILIES.get(x, "another model") for x in (network.image_proj.width, width))
    raise ValueError(
        f"{node_id}: {adapter.name} was made for {made} ({len(network.channels)} layers, tokens {network.image_proj.width} "
        f"wide) and the model is {model} ({len(own)} cross-attention layers, tokens {width} wide); load the adapter of "
        "its family."
    )


def features(clip_vision, pictures: Tensor, feature: str) -> Tensor:
    """What an adapter reads of pictures [n, h, w, 3] in 0..1: pooled [n, width] or hidden [n, tokens, width]."""
    found = clip_vision.encode_image(pictures)
    return found["image_embeds"] if feature == "pooled" else found["penultimate_hidden_states"]


def blank_features(clip_vision, seen: Tensor, feature: str, guidance: str) -> Tensor:
    """Features of no picture: zeros for pooled ones; else, as the authors do, of zeros after normalisation.

    IPAdapter_plus takes a black picture before normalisation instead.
    """
    if feature == "pooled":
        return torch.zeros_like(seen[:1])
    side = clip_vision.image_size
    if guidance == "IPAdapter_plus":
        return features(clip_vision, torch.zeros(1, side, side, 3), feature)
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    blank = torch.zeros(1, 3, side, side, device=clip_vision.load_device)
    return clip_vision.model(pixel_values=blank, intermediate_output=-2)[1].to(seen)


def check_features(adapter: LoadedAdapter, seen: Tensor, node_id: str) -> None:
    """ValueError if the features have the wrong form or width for the adapter."""
    projection = adapter.network.image_proj
    form = "pooled" if seen.ndim == 2 else "hidden"
    if form != projection.feature:
        raise ValueError(
            f"{node_id}: {adapter.name} reads {projection.feature} features of CLIP vision and was given {form} ones."
        )
    if seen.shape[-1] != projection.clip:
        needed = ENCODERS.get(projection.clip)
        raise ValueError(
            f"{node_id}: {adapter.name} reads {projection.feature} CLIP features {projection.clip} wide and clip_vision "
            f"gives {seen.shape[-1]}; load the {f'{needed} ' if needed else ''}CLIP vision model it was trained with."
        )


@torch.inference_mode()
def encode(adapter: LoadedAdapter, clip_vision, pictures: Tensor, guidance: str, node_id: str) -> tuple[Tensor, Tensor]:
    """Tokens [n, tokens, D] of pictures [n, h, w, 3] and [1, tokens, D] of no picture, float32 on the CPU."""
    seen = features(clip_vision, pictures, adapter.feature)
    check_features(adapter, seen, node_id)
    seen = torch.cat([seen, blank_features(clip_vision, seen, adapter.feature, guidance)]).float()
    comfy.model_management.load_model_gpu(adapter.patcher)
    tokens = adapter.network.image_proj(seen.to(adapter.patcher.load_device)).cpu()
    return tokens[:-1], tokens[-1:]
