"""Boxes of objects over the frames of a picture batch or video."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """Corners in picture units: 0 is left or top, 1 right or bottom."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class TrackedObject:
    """An object, its words in the prompt and its box in every frame, None where it is absent."""

    id: str
    words: str
    boxes: tuple[Box | None, ...]


@dataclass(frozen=True)
class BoxTrack:
    """Objects over `frames` frames; later objects lie on top. `background` are words for the rest."""

    frames: int
    objects: tuple[TrackedObject, ...]
    background: str = ""
