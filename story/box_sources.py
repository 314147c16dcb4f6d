"""Boxes that other nodes give: detections, per-frame extents of a mask, drawn paths, point tracks.

All become keyed objects in parts of the picture, ready to stand beside those of the text in one plan.
"""

import json
import math
from collections.abc import Sequence

from .box_text import LARGEST_PART, MAX_TEXT, free_name
from .boxes import BoxError, Corners, Key, KeyedObject, check_corners, clip, keys_of, show

MAX_PATHS = 100
MAX_POINTS = 10_000

Found = tuple[str, tuple[Key, ...]]  # a name that may be empty, and its key frames


def from_bounding_boxes(value, frames: int, canvas: tuple[int, int]) -> list[Found]:
    """Core's BOUNDING_BOX, {"x", "y", "width", "height"} in pixels of the canvas, with an optional "label".

    A dict or a list of dicts: the same boxes in all frames, one object each. A list of lists: the boxes of every frame,
    one list for all frames or `frames` lists; the n-th box of a label (of the frame, without labels) is one object,
    absent in frames with fewer. Raises BoxError.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise BoxError(f"holds no box ({type(value).__name__}); connect a node that gives boxes.")
    per_frame = list(value) if isinstance(value[0], (list, tuple)) else [list(value)]
    _check_count(len(per_frame), frames, "lists of boxes")
    found: dict[tuple[str, int], list[Corners | None]] = {}
    for frame, boxes in enumerate(per_frame):
        if not isinstance(boxes, (list, tuple)):
            raise BoxError(f"frame {frame} is {type(boxes).__name__}, not a list of boxes.")
        counts: dict[str, int] = {}
        for number, box in enumerate(boxes, 1):
            corners = _pixels(box, canvas, f"frame {frame}, box {number}")
            label = str(box.get("label") or "")
            counts[label] = counts.get(label, 0) + 1
            found.setdefault((label, counts[label]), [None] * len(per_frame))[frame] = corners
    if not found:
        raise BoxError("holds no box in any frame.")
    return [(label, keys_of(boxes)) for (label, _), boxes in found.items()]


def from_extents(extents: Sequence[Corners | None], frames: int) -> list[Found]:
    """One object from the extent of a mask in every frame (or one for all frames), None where it is empty."""
    _check_count(len(extents), frames, "masks")
    if not any(extents):
        raise BoxError("is empty in all frames.")
    return [("", keys_of(extents))]


def from_paths(text: str, size: tuple[float, float], canvas: tuple[int, int]) -> list[Found]:
    """KJNodes spline paths: JSON `[{"x": .., "y": ..}, ...]` or a list of such lists, one object each.

    Points are centres of boxes of `size` (width and height as parts of the picture), evenly spaced in time; in pixels of
    the canvas, or in parts of the picture when no number is over 2. Raises BoxError.
    """
    if len(text) > MAX_TEXT:
        raise BoxError(f"the text has {len(text)} characters, the limit is {MAX_TEXT}.")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BoxError(f"{text[:60]!r} is no JSON list of points ({error}).") from error
    paths = [data] if isinstance(data, list) and data and isinstance(data[0], dict) else data
    if not isinstance(paths, list) or not paths or len(paths) > MAX_PATHS or not all(isinstance(p, list) and p for p in paths):
        raise BoxError(f"{text[:60]!r} must be a list of points {{x, y}}, or 1 to {MAX_PATHS} such lists.")
    read = [[_point(point, f"path {n}, point {i}") for i, point in enumerate(path, 1)] for n, path in enumerate(paths, 1)]
    if max(map(len, read)) > MAX_POINTS:
        raise BoxError(f"a path has {max(map(len, read))} points, the limit is {MAX_POINTS}.")
    pixels = any(abs(value) > LARGEST_PART for path in read for point in path for value in point)
    scale = canvas if pixels else (1, 1)
    return [("", _along(path, scale, size, f"path {number}")) for number, path in enumerate(read, 1)]


def from_tracks(
    points: Sequence[Sequence[Sequence[float]]], visible: Sequence[Sequence[bool]] | None, frames: int,
    size: tuple[float, float], canvas: tuple[int, int],
) -> list[Found]:
    """One object from point tracks [frames][points][x, y] in pixels: in every frame the box around all visible points,
    larger by `size` (parts of the picture); absent where none is visible inside the picture. Raises BoxError."""
    _check_count(len(points), frames, "frames of tracks")
    width, height = canvas
    boxes: list[Corners | None] = []
    for frame, row in enumerate(points):
        shown = [(x / width, y / height) for i, (x, y) in enumerate(row) if visible is None or visible[frame][i]]
        if not all(math.isfinite(value) for point in shown for value in point):
            raise BoxError(f"frame {frame} holds a point that is no number.")
        xs, ys = [x for x, _ in shown], [y for _, y in shown]
        corners = _around(min(xs), min(ys), max(xs), max(ys), size) if shown else None
        boxes.append(corners if corners and corners[0] < corners[2] and corners[1] < corners[3] and clip(corners) else None)
    return from_extents(boxes, frames)


def named(found: Sequence[Found], kind: str, words: list[str], taken: set[str]) -> list[KeyedObject]:
    """Objects with words from the front of `words` (which loses them), or their label where those are empty; ids not in
    `taken` (which gains them), made of the words or else of `kind`."""
    objects = []
    for label, keys in found:
        phrase = (words.pop(0) if words else "") or label
        name = free_name(phrase or kind, taken)
        taken.add(name)
        objects.append(KeyedObject(name, phrase, keys))
    return objects


def _check_count(count: int, frames: int, what: str) -> None:
    if count not in (1, frames):
        raise BoxError(f"holds {count} {what} for {frames} frames; give one for all frames or {frames}.")


def _pixels(box, canvas: tuple[int, int], where: str) -> Corners:
    sides = [box.get(name) for name in ("x", "y", "width", "height")] if isinstance(box, dict) else [None]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in sides):
        raise BoxError(f"{where}: {str(box)[:60]} is no box {{x, y, width, height}}.")
    x, y, width, height = sides
    if not (width > 0 and height > 0):
        raise BoxError(f"{where}: box {show(sides)} (x, y, width, height) has no size.")
    return check_corners((x / canvas[0], y / canvas[1], (x + width) / canvas[0], (y + height) / canvas[1]), where)


def _point(point, where: str) -> tuple[float, float]:
    values = (point.get("x"), point.get("y")) if isinstance(point, dict) else (None, None)
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise BoxError(f"{where}: {str(point)[:60]} is no point {{x, y}}.")
    return values


def _along(path: list, scale: tuple[int, int], size: tuple[float, float], where: str) -> tuple[Key, ...]:
    keys = []
    for place, (x, y) in enumerate(path):
        x, y = x / scale[0], y / scale[1]
        corners = check_corners(_around(x, y, x, y, size), f"{where}, point {place + 1}")
        keys.append(Key(corners, t=place / max(len(path) - 1, 1)))
    return tuple(keys)


def _around(x0: float, y0: float, x1: float, y1: float, size: tuple[float, float]) -> Corners:
    return x0 - size[0] / 2, y0 - size[1] / 2, x1 + size[0] / 2, y1 + size[1] / 2
