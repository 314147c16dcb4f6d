"""Boxes drawn over pictures, and filled as masks."""

import numpy as np
from PIL import Image, ImageDraw

from ..story.boxes import Box, BoxTrack
from .fonts import Typeface

COLOURS = ("#ff5a5f", "#2fa4ff", "#ffc53d", "#35c46a", "#b678ff", "#ff8a34", "#20c7c0", "#f26fb2")  # as in web/js
GROUND = (38, 38, 44)


def draw_boxes(track: BoxTrack, frame: int, picture: Image.Image) -> Image.Image:
    """A copy of an RGB picture with the boxes of one frame, their words, and the way of their centres."""
    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    line = max(1, round(min(drawn.size) / 160))
    face = Typeface(max(9, round(min(drawn.size) / 24)))
    for number, item in enumerate(track.objects):
        colour = COLOURS[number % len(COLOURS)]
        way = [_centre(box, drawn.size) for box in item.boxes if box]
        if len(way) > 1:
            pen.line(way, fill=colour, width=1)
        box = item.boxes[frame]
        if box is None:
            continue
        left, top, right, bottom = cells(box, *drawn.size)
        pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=line)
        words = item.words or item.id
        pen.rectangle((left, top, left + face.width(words) + 2 * line + 4, top + face.line_height), fill=colour)
        face.draw(drawn, (left + line + 2, top), words, (20, 18, 24))
    return drawn


def ground(size: tuple[int, int]) -> Image.Image:
    """What boxes are drawn on when there is no picture: a plain sheet with thirds marked. `size` is (width, height)."""
    sheet = Image.new("RGB", size, GROUND)
    pen = ImageDraw.Draw(sheet)
    for part in (1, 2):
        x, y = round(size[0] * part / 3), round(size[1] * part / 3)
        pen.line((x, 0, x, size[1]), fill=(58, 58, 66))
        pen.line((0, y, size[0], y), fill=(58, 58, 66))
    return sheet


def fill_boxes(track: BoxTrack, size: tuple[int, int]) -> np.ndarray:
    """All objects together, float32 [frames, height, width] of 0 and 1; `size` is (width, height)."""
    width, height = size
    masks = np.zeros((track.frames, height, width), dtype=np.float32)
    for item in track.objects:
        for frame, box in enumerate(item.boxes):
            if box:
                left, top, right, bottom = cells(box, width, height)
                masks[frame, top:bottom, left:right] = 1
    return masks


def cells(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels, ends exclusive, at least one pixel each way."""
    left, top = min(round(box.x0 * width), width - 1), min(round(box.y0 * height), height - 1)
    return left, top, max(round(box.x1 * width), left + 1), max(round(box.y1 * height), top + 1)


def _centre(box: Box, size: tuple[int, int]) -> tuple[float, float]:
    return (box.x0 + box.x1) / 2 * size[0], (box.y0 + box.y1) / 2 * size[1]
