"""Reference pictures with captions: made ready for StoryGen's VAE input, encoded once each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .reference_pass import Reference

GROUNDS = {"white": 1.0, "grey": 0.5, "black": 0.0}
STANDARD = (-1.0, 1.0)  # pixel range that VAEs of Stable Diffusion are made for


@dataclass(frozen=True, eq=False)
class Picture:
    """pixels [1, h, w, 3] in 0..1, the text it was described with and that text's conditioning entry, the VAE to use."""

    pixels: Tensor
    text: str
    caption: list
    vae: Any


def caption_lines(text: str, count: int, node_id: str) -> list[str]:
    """One caption a line for `count` pictures, blank lines are empty captions. ValueError naming both counts."""
    lines = text.replace("\r\n", "\n").split("\n")
    while len(lines) > count and not lines[-1].strip():
        lines.pop()
    if len(lines) != count:
        raise ValueError(
            f"{node_id}: captions has {len(lines)} lines and images {count} pictures; give one line for each, an empty one for none."
        )
    return [line.strip() for line in lines]


def encode_caption(clip, text: str, node_id: str) -> list:
    """The entry [tokens, extras] of one caption. ValueError when the clip's hooks make several of it."""
    found = clip.encode_from_tokens_scheduled(clip.tokenize(text), show_pbar=False)
    if len(found) != 1:
        raise ValueError(f"{node_id}: the clip's hooks give a caption {len(found)} schedules; remove them from the clip.")
    return found[0]


def fitted(image: Tensor, size: tuple[int, int] | None, ground: str, node_id: str) -> Tensor:
    """A picture [h, w, 1, 3 or 4] as RGB [1, height, width, 3] in 0..1: alpha over `ground`, sides stretched to `size`."""
    channels = image.shape[-1]
    if channels not in (1, 3, 4):
        raise ValueError(f"{node_id}: images have {channels} channels; give grey, RGB or RGBA pictures.")
    pixels = image[None, ..., :3].expand(-1, -1, -1, 3).float()
    if channels == 4:
        alpha = image[None, ..., 3:].float()
        pixels = pixels * alpha + GROUNDS[ground] * (1 - alpha)
    if size is None or tuple(pixels.shape[1:3]) == size:
        return pixels.clone()
    resized = interpolate(pixels.movedim(-1, 1), size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1).movedim(1, -1).contiguous()


def encode(pictures: Sequence[Picture], pixel_range: tuple[float, float]) -> tuple[Reference, ...]:
    """Latents of the pictures with pixels in `pixel_range` as the network of the VAE sees them; equal ones are one object.

    ComfyUI's VAE turns 0..1 into -1..1, so pixels meant to stay in 0..1 are given as (p + 1) / 2.
    """
    made: list[tuple[Picture, Reference]] = []
    for picture in pictures:
        twin = next((found for other, found in made if _equal(picture, other)), None)
        if twin is None:
            low, high = ((edge + 1) / 2 for edge in pixel_range)
            twin = Reference(picture.vae.encode(picture.pixels * (high - low) + low), picture.caption)
        made.append((picture, twin))
    return tuple(found for _, found in made)


def _equal(a: Picture, b: Picture) -> bool:
    return a.vae is b.vae and torch.equal(a.pixels, b.pixels) and torch.equal(a.caption[0], b.caption[0])


def grey(like: Picture, negative: list) -> Reference:
    """What branch u reads: mid grey, which is 0 to the VAE's network, with the negative prompt."""
    return Reference(like.vae.encode(torch.full_like(like.pixels, 0.5)), negative)
