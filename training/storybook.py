"""The picture-book world: one character in a place at a time of day, drawn with everything known about it.

A character has a kind, which captions name, and an identity (body colour, hat), which they never do: identity is what
consistency across panels has to keep. Many pictures show one character twice, or two panels of it, as character sheets
and comics do. Sprites are Fluent Emoji (MIT, see NOTICE), recoloured. `python -m training.storybook --sheet FILE` draws
examples.
"""

import argparse
import io
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageDraw

SIZE = 128
COLOURS = {
    "red": (222, 56, 52),
    "yellow": (248, 202, 58),
    "green": (58, 176, 84),
    "blue": (58, 122, 234),
    "purple": (150, 78, 196),
    "white": (238, 238, 242),
}
HATS = ("none", "top hat", "crown")
PLACES = {
    "forest": "in the forest",
    "beach": "on the beach",
    "snow": "in the snow",
    "city": "in the city",
    "desert": "in the desert",
    "meadow": "in the meadow",
}
TIMES = {"day": "by day", "sunset": "at sunset", "night": "at night"}
# kind -> fills that take the body colour with their brightness, and where a hat sits (x, y of its lower edge, width)
KINDS = {
    "fox": ({"#ff822d": 1.0, "#ff6723": 0.8}, (0.5, 0.40, 0.42)),
    "bear": ({"#e19747": 1.0, "#d3883e": 0.85}, (0.5, 0.16, 0.40)),
    "rabbit": ({"#cdc4d6": 1.0, "#b4acbc": 0.8}, (0.5, 0.46, 0.42)),
    "robot": ({"#cdc4d6": 1.0}, (0.5, 0.22, 0.46)),
    "owl": ({"#6d4534": 1.0}, (0.5, 0.14, 0.44)),
    "elephant": ({"#9b9b9b": 1.0, "#636363": 0.7, "#d3d3d3": 1.25}, (0.30, 0.26, 0.40)),
    "snail": ({"#a56953": 1.0, "#6d4534": 0.75}, (0.62, 0.20, 0.42)),
    "dinosaur": ({"#00d26a": 1.0, "#008463": 0.75}, (0.18, 0.12, 0.36)),
}
HEADROOM = 0.34  # of the sprite's side, above it, for the hat


@dataclass(frozen=True)
class Facts:
    """What one drawn character is and where: box is (x0, y0, x1, y1) in picture units."""

    kind: str
    colour: str
    hat: str
    place: str
    time: str
    box: tuple[float, float, float, float]

    @property
    def identity(self) -> tuple[str, str]:
        return self.colour, self.hat


@dataclass(frozen=True)
class Page:
    image: np.ndarray  # uint8 [SIZE, SIZE, 3]
    caption: str
    facts: tuple[Facts, ...]


@dataclass(frozen=True)
class Clip:
    frames: np.ndarray  # uint8 [frames, SIZE, SIZE, 3]
    caption: str
    motion: str
    facts: tuple[Facts, ...]  # one for each frame


def _render(body: str, size: int) -> Image.Image:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" viewBox="0 0 32 32">{body}</svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


@cache
def _bodies() -> dict[str, str]:
    return json.loads((Path(__file__).parent / "sprites.json").read_text())


@cache
def sprite(kind: str, colour: str, hat: str) -> Image.Image:
    """The character at full size, RGBA, with headroom above the body."""
    fills, (x, y, width) = KINDS[kind]
    body = _bodies()[kind]
    for fill, shade in fills.items():
        r, g, b = (min(255, round(channel * shade)) for channel in COLOURS[colour])
        body = body.replace(fill.upper(), f"#{r:02x}{g:02x}{b:02x}").replace(fill, f"#{r:02x}{g:02x}{b:02x}")
    side = SIZE
    top = round(HEADROOM * side)
    canvas = Image.new("RGBA", (side, side + top))
    canvas.alpha_composite(_render(body, side), (0, top))
    if hat != "none":
        worn = _render(_bodies()[hat], round(width * side))
        worn = worn.crop(worn.getbbox())
        canvas.alpha_composite(
            worn, (max(0, round(x * side - worn.width / 2)), max(0, round(top + y * side - worn.height)))
        )
    return canvas.crop(canvas.getbbox())


SKIES = {
    "day": ((120, 196, 250), (206, 236, 255)),
    "sunset": ((236, 96, 84), (255, 196, 110)),
    "night": ((16, 20, 58), (44, 48, 104)),
}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.78, 0.66), "night": (0.36, 0.40, 0.62)}
GROUNDS = {
    "forest": (70, 140, 70),
    "beach": (240, 216, 150),
    "snow": (240, 246, 255),
    "city": (128, 128, 136),
    "desert": (226, 168, 92),
    "meadow": (130, 200, 84),
}
HORIZON = 78


def _lit(colour, time: str) -> tuple[int, int, int]:
    return tuple(round(c * light) for c, light in zip(colour, LIGHT[time], strict=True))


def _trees(draw, rng, time, width):
    for x in np.arange(-6, width, 17) + rng.integers(-4, 5):
        height = int(rng.integers(40, 62))
        draw.rectangle((x + 6, HORIZON - 12, x + 10, HORIZON + 6), fill=_lit((110, 72, 44), time))
        draw.polygon(
            [(x - 4, HORIZON - 2), (x + 8, HORIZON - height), (x + 20, HORIZON - 2)], fill=_lit((30, 104, 56), time)
        )


def _sea(draw, rng, time, width):
    draw.rectangle((0, HORIZON - 14, width, HORIZON + 6), fill=_lit((40, 130, 205), time))
    for x in rng.integers(0, width, 7):
        draw.line((x, HORIZON - 6, x + 10, HORIZON - 6), fill=_lit((220, 240, 255), time), width=2)


def _peaks(draw, rng, time, width):
    for x in np.arange(-20, width, 46) + rng.integers(-8, 9):
        height = int(rng.integers(38, 60))
        draw.polygon(
            [(x - 16, HORIZON), (x + 22, HORIZON - height), (x + 60, HORIZON)], fill=_lit((140, 152, 178), time)
        )
        draw.polygon(
            [(x + 9, HORIZON - height * 0.66), (x + 22, HORIZON - height), (x + 35, HORIZON - height * 0.66)],
            fill=_lit((250, 252, 255), time),
        )


def _houses(draw, rng, time, width):
    for x in np.arange(-4, width, 22):
        height, shade = int(rng.integers(30, 66)), int(rng.integers(86, 150))
        draw.rectangle((x, HORIZON - height, x + 19, HORIZON + 2), fill=_lit((shade, shade - 14, shade + 8), time))
        for wx in (x + 4, x + 12):
            for wy in range(HORIZON - height + 5, HORIZON - 6, 11):
                draw.rectangle((wx, wy, wx + 3, wy + 5), fill=(255, 226, 120) if time != "day" else (196, 226, 244))


def _dunes(draw, rng, time, width):
    for x in np.arange(-30, width, 58) + rng.integers(-10, 11):
        draw.ellipse((x, HORIZON - 14, x + 84, HORIZON + 30), fill=_lit((238, 186, 112), time))
    for x in np.arange(8, width, 52) + rng.integers(-8, 9):
        draw.rounded_rectangle((x, HORIZON - 36, x + 6, HORIZON + 4), 3, fill=_lit((60, 140, 80), time))
        draw.rounded_rectangle((x - 8, HORIZON - 26, x - 4, HORIZON - 12), 2, fill=_lit((60, 140, 80), time))
        draw.rectangle((x - 8, HORIZON - 14, x, HORIZON - 11), fill=_lit((60, 140, 80), time))


def _hills(draw, rng, time, width):
    for x in np.arange(-40, width, 70) + rng.integers(-10, 11):
        draw.ellipse((x, HORIZON - 16, x + 100, HORIZON + 40), fill=_lit((104, 180, 76), time))
    for _ in range(22):
        fx, fy = rng.integers(0, width), rng.integers(HORIZON + 8, SIZE)
        colour = ((255, 255, 255), (250, 210, 60), (236, 110, 150))[rng.integers(3)]
        draw.ellipse((fx, fy, fx + 4, fy + 4), fill=_lit(colour, time))


SCENERY = {"forest": _trees, "beach": _sea, "snow": _peaks, "city": _houses, "desert": _dunes, "meadow": _hills}
VARIANTS, WIDE = 10, 192


@cache
def backdrop(place: str, time: str, variant: int) -> Image.Image:
    """Scenery of a place at a time, WIDE x SIZE."""
    rng = np.random.default_rng((list(PLACES).index(place), list(TIMES).index(time), variant))
    top, low = (np.array(colour, float) for colour in SKIES[time])
    ramp = np.linspace(0, 1, SIZE)[:, None, None] ** 0.8
    image = Image.fromarray(np.broadcast_to(top + (low - top) * ramp, (SIZE, WIDE, 3)).astype(np.uint8).copy())
    draw = ImageDraw.Draw(image)
    x, y = int(rng.integers(20, WIDE - 30)), int(rng.integers(8, 24))
    if time == "night":
        for sx, sy in rng.integers(0, (WIDE, 60), (26, 2)):
            draw.point((int(sx), int(sy)), fill=(255, 255, 230))
        draw.ellipse((x, y, x + 16, y + 16), fill=(246, 244, 214))
    else:
        draw.ellipse((x, y, x + 18, y + 18), fill=(255, 240, 140) if time == "day" else (255, 236, 190))
    draw.rectangle((0, HORIZON, WIDE, SIZE), fill=_lit(GROUNDS[place], time))
    SCENERY[place](draw, rng, time, WIDE)
    return image


def _choose(rng, options):
    return list(options)[rng.integers(len(options))]


def draw_scene(rng, facts: Facts, size: tuple[int, int], spots) -> tuple[Image.Image, list[Facts]]:
    """A backdrop of `size` with the character once per spot (centre x, side) in units of the picture's width, height."""
    width, height = size
    wide = backdrop(facts.place, facts.time, int(rng.integers(VARIANTS)))
    left = int(rng.integers(0, WIDE - width + 1))
    image = wide.crop((left, 0, left + width, SIZE)).convert("RGB")
    found = []
    for x, side in spots:
        figure = sprite(facts.kind, facts.colour, facts.hat)
        scale = side * SIZE / max(figure.size)
        figure = figure.resize(
            (max(8, round(figure.width * scale)), max(8, round(figure.height * scale))), Image.LANCZOS
        )
        if rng.random() < 0.5:
            figure = figure.transpose(Image.FLIP_LEFT_RIGHT)
        px = int(np.clip(round(x * width - figure.width / 2), 0, max(width - figure.width, 0)))
        py = int(np.clip(round(rng.uniform(0.86, 0.98) * height - figure.height), 0, height - figure.height))
        image.paste(figure, (px, py), figure)
        box = (px / width, py / height, (px + figure.width) / width, (py + figure.height) / height)
        found.append(replace(facts, box=box))
    return image, found


def phrase(rng, facts: Facts, words: str = "") -> str:
    """A caption of one scene in one of several wordings."""
    who, where, when = (
        f"{'an' if facts.kind[0] in 'aeiou' else 'a'} {facts.kind}{words}",
        PLACES[facts.place],
        TIMES[facts.time],
    )
    return _choose(
        rng, (f"{who} {where} {when}", f"{who} {when} {where}", f"{when}, {who} {where}", f"{where} {when}, {who}")
    )


def _draw_facts(rng, known: dict) -> Facts:
    return Facts(
        known.get("kind") or _choose(rng, KINDS),
        known.get("colour") or _choose(rng, COLOURS),
        known.get("hat") or _choose(rng, HATS),
        known.get("place") or _choose(rng, PLACES),
        known.get("time") or _choose(rng, TIMES),
        (0, 0, 0, 0),
    )


def sample(rng: np.random.Generator, form: str | None = None, **known) -> Page:
    """Draw a page: form "one" (a character), "twice" (the same one twice in a scene) or "panels" (two panels of it).

    `known` fixes kind, colour, hat, place or time. Image uint8 [128, 128, 3].
    """
    form = form or ("one", "twice", "panels")[np.searchsorted((0.45, 0.78), rng.random(), side="right")]
    facts = _draw_facts(rng, known)
    if form == "one":
        image, found = draw_scene(rng, facts, (SIZE, SIZE), [(rng.uniform(0.3, 0.7), rng.uniform(0.46, 0.62))])
        return Page(np.asarray(image), phrase(rng, facts), tuple(found))
    if form == "twice":
        spots = [(rng.uniform(0.2, 0.28), rng.uniform(0.4, 0.52)), (rng.uniform(0.72, 0.8), rng.uniform(0.4, 0.52))]
        image, found = draw_scene(rng, facts, (SIZE, SIZE), spots)
        return Page(np.asarray(image), phrase(rng, facts, " drawn twice"), tuple(found))
    other = replace(facts, place=_choose(rng, PLACES), time=_choose(rng, TIMES))
    page, found, half = Image.new("RGB", (SIZE, SIZE), "white"), [], SIZE // 2
    for index, part in enumerate((facts, other)):
        scene, drawn = draw_scene(rng, part, (half, SIZE), [(rng.uniform(0.45, 0.55), rng.uniform(0.40, 0.48))])
        page.paste(scene.crop((0, 0, half - 1, SIZE)), (index * (half + 1), 0))
        found += [
            replace(one, box=((one.box[0] + index) / 2, one.box[1], (one.box[2] + index) / 2, one.box[3]))
            for one in drawn
        ]
    return Page(np.asarray(page), f"two panels, {phrase(rng, facts)} and {phrase(rng, other)}", tuple(found))


FRAMES = 8
MOTIONS = ("right", "left", "near", "away", "still", "hop")
SIDES = (0.3, 0.62)  # a character's longer side, in picture widths


def emphasis(page: Page, side: int, inside: float) -> np.ndarray:
    """Loss weight of each latent cell: `inside` where a character is, 1 elsewhere; [1, side, side]."""
    weight = np.ones((1, side, side), np.float32)
    for facts in page.facts:
        x0, y0, x1, y1 = (round(edge * side) for edge in facts.box)
        weight[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = inside
    return weight


def prompts(kinds: list[str]) -> list[str]:
    """A scene with each of the kinds, in places and times one after the other."""
    places, times = list(PLACES.values()), list(TIMES.values())
    return [f"a {kind} {places[n % len(places)]} {times[n % len(times)]}" for n, kind in enumerate(kinds)]


def path(rng: np.random.Generator, motion: str, frames: int) -> np.ndarray:
    """Where a character is in each frame: [frames, 3] of x and y of the box from edge (0) to edge (1), and its side.

    x = 0 touches the left edge and x = 1 the right one, y = 0 the upper and y = 1 the lower edge, at any side. Two of
    three characters stand on the ground, the others anywhere.
    """
    way = np.linspace(0, 1, frames)
    side = np.full(frames, rng.uniform(*SIDES))
    x = np.full(frames, rng.random())
    y = np.full(frames, rng.uniform(0.75, 1) if rng.random() < 2 / 3 else rng.random())
    if motion in ("right", "left"):
        travel = rng.uniform(0.4, 1)
        start = rng.uniform(0, 1 - travel)
        x = start + travel * (way if motion == "right" else 1 - way)
    elif motion in ("near", "away"):
        small, large = rng.uniform(SIDES[0], 0.38), rng.uniform(0.5, SIDES[1])
        side = small + (large - small) * (way if motion == "near" else 1 - way)
    elif motion == "hop":
        x = x + rng.uniform(-0.3, 0.3) * way
        y = y - rng.uniform(0.3, 0.5) * abs(np.sin(np.pi * way * rng.integers(1, 3)))
    return np.stack([x.clip(0, 1), y.clip(0, 1), side], 1)


def sample_clip(rng: np.random.Generator, motion: str | None = None, frames: int = FRAMES, **known) -> Clip:
    """Draw a clip: one character moves over a backdrop that stands still; its identity and facing stay the same.

    `known` fixes kind, colour, hat, place or time. The caption is a page's: it names no motion, because the text
    encoder knows no word for it. Frames uint8 [frames, 128, 128, 3].
    """
    facts = _draw_facts(rng, known)
    motion = motion or _choose(rng, MOTIONS)
    left = int(rng.integers(0, WIDE - SIZE + 1))
    scene = backdrop(facts.place, facts.time, int(rng.integers(VARIANTS))).crop((left, 0, left + SIZE, SIZE))
    figure = sprite(facts.kind, facts.colour, facts.hat)
    if rng.random() < 0.5:
        figure = figure.transpose(Image.FLIP_LEFT_RIGHT)
    images, found = [], []
    for x, y, side in path(rng, motion, frames):
        scale = side * SIZE / max(figure.size)
        drawn = figure.resize((round(figure.width * scale), round(figure.height * scale)), Image.LANCZOS)
        px, py = round(x * (SIZE - drawn.width)), round(y * (SIZE - drawn.height))
        image = scene.convert("RGB")
        image.paste(drawn, (px, py), drawn)
        images.append(np.asarray(image))
        found.append(replace(facts, box=(px / SIZE, py / SIZE, (px + drawn.width) / SIZE, (py + drawn.height) / SIZE)))
    return Clip(np.stack(images), phrase(rng, facts), motion, tuple(found))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a sheet of the picture-book world.")
    parser.add_argument("--sheet", default="storybook.png", help="picture file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pages")
    args = parser.parse_args()
    sheet = Image.new("RGB", (8 * (SIZE + 4), 6 * (SIZE + 4)), "white")
    for index in range(48):
        page = sample(np.random.default_rng((args.seed, index)))
        sheet.paste(Image.fromarray(page.image), ((index % 8) * (SIZE + 4), (index // 8) * (SIZE + 4)))
        print(page.caption)
    sheet.save(args.sheet)


if __name__ == "__main__":
    main()
