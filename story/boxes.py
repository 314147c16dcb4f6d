"""Boxes over time: key frames as a user draws or types them (BoxPlan) and one box per frame (BoxTrack).

The boxes of PEEKABOO (arXiv 2312.07509) for several objects: lengths are parts of the picture's width and height, 0..1,
x to the right and y down. Between two key frames a box moves linearly, or smoothly by monotone cubic interpolation
(Fritsch and Carlson 1980, weighted harmonic slopes) of its centre and its size, which passes through every key frame
without overshoot. A key frame without a box starts a span in which the object is absent.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

INTERPOLATIONS = ("linear", "smooth")
MAX_FRAMES = 10_000
MAX_OBJECTS = 100
SNAP = 0.02  # frames; times are written with four decimals, so that a key meant for a frame may miss it by a little

Corners = tuple[float, float, float, float]


class BoxError(ValueError):
    """Boxes that cannot be used; the message says which and why, without the name of a node."""


@dataclass(frozen=True)
class Box:
    """Left, top, right, bottom in picture units: 0 <= x0 < x1 <= 1, the same for y. Raises BoxError."""

    x0: float
    y0: float
    x1: float
    y1: float

    def __post_init__(self):
        if not (0 <= self.x0 < self.x1 <= 1 and 0 <= self.y0 < self.y1 <= 1):
            raise BoxError(f"box {show((self.x0, self.y0, self.x1, self.y1))} is no box inside the picture.")

    @property
    def area(self) -> float:
        return (self.x1 - self.x0) * (self.y1 - self.y0)


@dataclass(frozen=True)
class TrackedObject:
    """An object's words in the prompt (may be empty) and its box in every frame, None where it is absent."""

    id: str
    words: str
    boxes: tuple[Box | None, ...]


@dataclass(frozen=True)
class BoxTrack:
    """Boxes of all objects in `frames` frames; later objects lie on top. Raises BoxError."""

    frames: int
    objects: tuple[TrackedObject, ...]
    background: str = ""

    def __post_init__(self):
        check_frames(self.frames)
        check_objects([item.id for item in self.objects])
        for item in self.objects:
            if len(item.boxes) != self.frames:
                raise BoxError(f"object {item.id!r} has {len(item.boxes)} boxes for {self.frames} frames.")
            if not any(item.boxes):
                raise BoxError(f"object {item.id!r} is absent in all {self.frames} frames; give it a box or delete it.")

    def describe(self) -> str:
        """One line per object: words, frames in which it is there, mean area."""
        lines = [f"{self.frames} frames, {len(self.objects)} object{'' if len(self.objects) == 1 else 's'}"]
        for item in self.objects:
            there = [frame for frame, box in enumerate(item.boxes) if box]
            area = sum(box.area for box in item.boxes if box) / len(there)
            words = f" = {item.words}" if item.words and item.words != item.id else "" if item.words else " (no words)"
            small = "; small: under 2 % rarely acts" if area < 0.02 else ""
            large = "; large: over 70 % leaves little to place" if area > 0.7 else ""
            lines.append(f"{item.id}{words}: frames {_ranges(there)}, {area:.0%} of the picture{small}{large}")
        if self.background:
            lines.append(f"background: {self.background}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Key:
    """A key frame at time `t` (0 the first frame, 1 the last) or at `frame` (from 0); `corners` may leave the picture,
    None is absent."""

    corners: Corners | None
    t: float | None = None
    frame: int | None = None

    def position(self, frames: int) -> float:
        """Where it lies, in frames; a single frame is time 0."""
        if self.frame is not None:
            if self.frame >= frames:
                raise BoxError(f"key frame at frame {self.frame}, but the frames are 0 to {frames - 1}.")
            return float(self.frame)
        place = self.t * max(frames - 1, 1)
        return float(round(place)) if abs(place - round(place)) < SNAP else place


@dataclass(frozen=True)
class KeyedObject:
    id: str
    words: str
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class BoxPlan:
    """Key frames of all objects. `canvas` (width, height in pixels) and `fps` are kept for whoever reads the text."""

    objects: tuple[KeyedObject, ...]
    background: str = ""
    canvas: tuple[int, int] | None = None
    fps: float | None = None


def make_track(plan: BoxPlan, frames: int, interpolation: str = "linear") -> BoxTrack:
    """Every frame's boxes of a plan, cut at the picture's edges.

    Before the first key frame and after the last one the nearest box stays; so does the last box before an absent span.
    Raises BoxError.
    """
    check_frames(frames)
    if interpolation not in INTERPOLATIONS:
        raise BoxError(f"interpolation {interpolation!r} is unknown; choose {' or '.join(INTERPOLATIONS)}.")
    return BoxTrack(frames, tuple(_tracked(item, frames, interpolation) for item in plan.objects), plan.background)


def keys_of(boxes: Sequence[Corners | None]) -> tuple[Key, ...]:
    """Key frames of boxes known in every frame: all of them but the inner ones of a run that stands still."""
    last = len(boxes) - 1
    return tuple(
        Key(corners, frame=frame)
        for frame, corners in enumerate(boxes)
        if not (frame > 0 and boxes[frame - 1] == corners and (frame == last or boxes[frame + 1] == corners))
        and not (frame > 0 and corners is None and boxes[frame - 1] is None)
    )


def check_frames(frames: int) -> None:
    if isinstance(frames, bool) or not isinstance(frames, int) or not 1 <= frames <= MAX_FRAMES:
        raise BoxError(f"frames must be a whole number from 1 to {MAX_FRAMES}, not {frames!r}.")


def check_objects(ids: Sequence[str]) -> None:
    """Some objects, not too many, with different names."""
    if not ids:
        raise BoxError("there is no object; draw a box or write one.")
    if len(ids) > MAX_OBJECTS:
        raise BoxError(f"{len(ids)} objects, the limit is {MAX_OBJECTS}.")
    for name in ids:
        if not name.strip():
            raise BoxError("an object has an empty id; give it a name.")
        if ids.count(name) > 1:
            raise BoxError(f"two objects have the id {name!r}; give each its own.")


def check_corners(corners: Corners, where: str) -> Corners:
    """Corners in picture units that enclose a part of the picture. Raises BoxError that begins with `where`."""
    x0, y0, x1, y1 = corners
    if not all(math.isfinite(value) for value in corners):
        raise BoxError(f"{where}: box {show(corners)} holds a value that is no number.")
    if x1 <= x0 or y1 <= y0:
        raise BoxError(f"{where}: box {show(corners)} must run from left to right and top to bottom (x0 < x1, y0 < y1).")
    if clip(corners) is None:
        raise BoxError(f"{where}: box {show(corners)} lies outside the picture; write null for an absent object.")
    return corners


def clip(corners: Corners) -> Box | None:
    """The part inside the picture; None when there is none."""
    x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in corners)
    return Box(x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def show(corners: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in corners) + "]"


def _tracked(item: KeyedObject, frames: int, interpolation: str) -> TrackedObject:
    try:
        keys = sorted(((key.position(frames), key.corners) for key in item.keys), key=_first)
    except BoxError as error:
        raise BoxError(f"object {item.id!r}: {error}") from error
    if not keys:
        raise BoxError(f"object {item.id!r} has no key frame.")
    places = [place for place, _ in keys]
    for before, after in zip(places, places[1:], strict=False):
        if before == after:
            raise BoxError(f"object {item.id!r} has two key frames at frame {before:g} of {frames}; keep one.")
    spans = _spans(keys)
    boxes = []
    for frame in range(frames):
        start = max(bisect_right(places, frame) - 1, 0)
        span = spans[start]
        boxes.append(clip(_at(span, float(frame), interpolation)) if span else None)
    return TrackedObject(item.id, item.words, tuple(boxes))


def _first(pair: tuple[float, Corners | None]) -> float:
    return pair[0]


def _spans(keys: list) -> list[list | None]:
    """For every key the run of neighbouring keys with boxes that it belongs to; None where it is absent."""
    spans: list[list | None] = []
    for key in keys:
        if key[1] is None:
            spans.append(None)
        elif spans and spans[-1] is not None:
            spans[-1].append(key)
            spans.append(spans[-1])
        else:
            spans.append([key])
    return spans


def _at(span: list[tuple[float, Corners]], place: float, interpolation: str) -> Corners:
    places = [key[0] for key in span]
    index = bisect_right(places, place) - 1
    if index < 0 or index == len(span) - 1 or places[index] == place:
        return span[max(index, 0)][1]
    if interpolation == "linear":
        share = (place - places[index]) / (places[index + 1] - places[index])
        return tuple(a + (b - a) * share for a, b in zip(span[index][1], span[index + 1][1], strict=True))
    forms = [_centred(corners) for _, corners in span]
    x, y, width, height = (_cubic(places, values, index, place) for values in zip(*forms, strict=True))
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _centred(corners: Corners) -> Corners:
    x0, y0, x1, y1 = corners
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


def _cubic(places: Sequence[float], values: Sequence[float], index: int, place: float) -> float:
    """Monotone cubic Hermite value between keys index and index + 1."""
    width = places[index + 1] - places[index]
    u = (place - places[index]) / width
    first, second = (_slope(places, values, end) * width for end in (index, index + 1))
    rise = values[index + 1] - values[index]
    return values[index] + u * (first + u * (3 * rise - 2 * first - second + u * (first + second - 2 * rise)))


def _slope(places: Sequence[float], values: Sequence[float], at: int) -> float:
    """Slope at a key: the weighted harmonic mean of both sides' slopes, 0 where they turn; at an end the side's own."""
    sides = [
        (values[end] - values[end - 1], places[end] - places[end - 1]) for end in (at, at + 1) if 0 < end < len(values)
    ]
    if len(sides) == 1:
        return sides[0][0] / sides[0][1]
    (rise, width), (next_rise, next_width) = sides
    if rise * next_rise <= 0:
        return 0.0
    weight, next_weight = 2 * next_width + width, next_width + 2 * width
    return (weight + next_weight) / (weight * width / rise + next_weight * next_width / next_rise)


def _ranges(frames: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    runs: list[list[int]] = []
    for frame in frames:
        if runs and frame == runs[-1][1] + 1:
            runs[-1][1] = frame
        else:
            runs.append([frame, frame])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
