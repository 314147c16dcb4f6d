"""Pictures of what was heard: a spectrogram, and a caption whose words are shaded by their weight."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..models.act_frontend import RATE, log_mel
from ..story.heard import Caption
from .fonts import Typeface
from .sounds import resampled

PAPER, INK = (255, 255, 255), (24, 24, 28)
LIGHT, DEEP = np.array((245, 243, 236.0)), np.array((232, 128, 40.0))
STOPS = np.array([(12, 8, 38), (92, 22, 110), (200, 62, 76), (250, 160, 50), (252, 252, 190)], float)


def spectrogram(wave: Tensor, rate: int, height: int = 256) -> Tensor:
    """Log-mel picture [1, height, width, 3] of a mono sound [samples]: low notes below, 80 dB from dark to bright."""
    samples = max(len(wave) * RATE // rate, 1024)
    level = log_mel(resampled(wave[None].cpu(), rate, RATE), samples=samples)[0].T.flip(0)
    share = ((level - level.max() + 80) / 80).clamp(0, 1).numpy()
    place = share * (len(STOPS) - 1)
    low = np.minimum(place.astype(int), len(STOPS) - 2)
    part = (place - low)[..., None]
    colours = STOPS[low] * (1 - part) + STOPS[low + 1] * part
    picture = Image.fromarray(colours.round().astype(np.uint8))
    wide = min(max(picture.width, 2 * height), 16 * height)
    return _tensor([picture.resize((wide, height), Image.BILINEAR)])


def word_picture(captions: list[Caption], words: list[list[float]], width: int = 768, size: int = 30) -> Tensor:
    """[captions, height, width, 3]: every word on a ground that deepens with its weight, the weight below it."""
    face, small = Typeface(size), Typeface(max(10, size // 2))
    top = max(max(weights) for weights in words)
    laid = [_lay(caption, weights, face, small, width) for caption, weights in zip(captions, words, strict=True)]
    height = max(bottom for _, bottom in laid)
    return _tensor([_draw(boxes, (width, height), face, small, top) for boxes, _ in laid])


def _lay(caption: Caption, weights: list[float], face: Typeface, small: Typeface, width: int):
    """(word, weight, x, y, wide) of every word, and the height they take."""
    gap, x, y, boxes = face.size // 2, face.size // 2, face.size // 2, []
    tall = face.line_height + small.line_height
    for word, weight in zip(caption.words, weights, strict=True):
        wide = round(max(face.width(word), small.width(f"{weight:.2f}"))) + gap
        if x + wide > width - gap and boxes:
            x, y = gap, y + tall + gap
        boxes.append((word, weight, x, y, wide))
        x += wide + gap // 2
    return boxes, y + tall + gap


def _draw(boxes: list, size: tuple[int, int], face: Typeface, small: Typeface, top: float) -> Image.Image:
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    for word, weight, x, y, wide in boxes:
        share = min(max(weight / top, 0), 1) if top > 0 else 0
        ground = tuple(int(c) for c in (LIGHT + (DEEP - LIGHT) * share).round())
        pen.rounded_rectangle((x, y, x + wide, y + face.line_height), face.size // 4, fill=ground)
        face.draw(picture, (x + (wide - face.width(word)) / 2, y), word, INK)
        text = f"{weight:.2f}"
        small.draw(picture, (x + (wide - small.width(text)) / 2, y + face.line_height), text, (110, 110, 118))
    return picture


def _tensor(pictures: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255
