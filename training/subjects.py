"""Draws the demo subjects: pages of the picture-book world whose alpha channel is the character's mask.

`python -m training.subjects` writes weights/subjects/*.png, which StoryweftDemoSubject shows.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from .storybook import SIZE, backdrop, sprite

SUBJECTS = {
    "blue fox": ("fox", "blue", "none", "city", "day"),
    "red bear with a crown": ("bear", "red", "crown", "forest", "day"),
    "purple rabbit with a top hat": ("rabbit", "purple", "top hat", "beach", "day"),
    "yellow robot with a top hat": ("robot", "yellow", "top hat", "snow", "sunset"),
    "green owl with a crown": ("owl", "green", "crown", "desert", "sunset"),
    "white elephant": ("elephant", "white", "none", "meadow", "night"),
}


def page(rng: np.random.Generator, kind: str, colour: str, hat: str, place: str, time: str) -> Image.Image:
    """A scene with one character, RGBA [SIZE, SIZE]; alpha is the character's."""
    picture = backdrop(place, time, int(rng.integers(10))).crop((0, 0, SIZE, SIZE)).convert("RGB")
    figure = sprite(kind, colour, hat)
    scale = rng.uniform(0.55, 0.7) * SIZE / max(figure.size)
    figure = figure.resize((round(figure.width * scale), round(figure.height * scale)), Image.LANCZOS)
    left, top = int(rng.integers(8, SIZE - figure.width - 8)), round(0.94 * SIZE) - figure.height
    picture.paste(figure, (left, top), figure)
    mask = Image.new("L", picture.size)
    mask.paste(figure.getchannel("A"), (left, top))
    picture.putalpha(mask)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("weights/subjects"))
    parser.add_argument("--seed", type=int, default=17)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for index, (name, known) in enumerate(SUBJECTS.items()):
        page(np.random.default_rng((args.seed, index)), *known).save(args.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
