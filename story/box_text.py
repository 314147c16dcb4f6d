"""Boxes as text: the JSON form, and a short form for typing.

JSON: `{"canvas": [W, H], "fps": 8, "objects": [{"id": "fox", "words": "a red fox", "keyframes": [{"t": 0, "box": [x0, y0,
x1, y1]}, {"frame": 9, "box": null}]}], "background": "a forest"}`; only `objects` with `keyframes` must be there. `t` runs
from 0 (first frame) to 1 (last), `frame` counts from 0, `null` makes the object absent from there to its next key frame.

Short form, one object a line: `fox = a red fox | 0: 0.1 0.4 0.4 0.9 | 0.5: - | f9: 0.6 0.4 0.9 0.9`. Before the first bar the
words, or an id, `=` and the words; then key frames: the time (`f9` is frame 9), a colon, the four corners or `-` for
absent. `background: a forest` and `canvas: 512 320` may have lines of their own; `//` starts a comment line.

Corners are parts of the picture (0..1) or pixels of the canvas, the same throughout one text: numbers of at most 2 are
parts, so that a box may stand half outside; text with larger numbers is read as pixels.
"""

import json
import math
import re
from dataclasses import replace

from .boxes import BoxError, BoxPlan, Corners, Key, KeyedObject, check_corners, check_objects, show

MAX_TEXT = 512 * 1024  # characters
MAX_KEYS = 10_000  # of one object
LARGEST_PART = 2.0

_TOP = ("canvas", "fps", "objects", "background")
_OBJECT = ("id", "words", "keyframes")
_KEY = ("t", "frame", "box")


def parse_boxes(text: str, canvas: tuple[int, int] | None = None) -> BoxPlan:
    """A plan from the JSON or the short form; `canvas` (width, height) is that of pixels where the text names none.

    Raises BoxError.
    """
    if len(text) > MAX_TEXT:
        raise BoxError(f"the text has {len(text)} characters, the limit is {MAX_TEXT}.")
    if "\0" in text:
        raise BoxError("the text holds a NUL character; delete it.")
    plan = _from_json(text) if text.lstrip().startswith("{") else _from_lines(text)
    check_objects([item.id for item in plan.objects])
    return in_parts(plan, canvas)


def write_boxes(plan: BoxPlan) -> str:
    """The JSON form, one object a line, numbers to six decimals; `parse_boxes` reads the same plan back."""
    head = {"canvas": list(plan.canvas)} if plan.canvas else {}
    head |= {"fps": plan.fps} if plan.fps else {}
    lines = [json.dumps(_object(item), ensure_ascii=False) for item in plan.objects]
    fields = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    fields.append('"objects": [\n  ' + ",\n  ".join(lines) + "\n ]")
    if plan.background:
        fields.append(f'"background": {json.dumps(plan.background, ensure_ascii=False)}')
    return "{" + ",\n ".join(fields) + "}"


def in_parts(plan: BoxPlan, canvas: tuple[int, int] | None = None) -> BoxPlan:
    """The plan with corners as parts of the picture, each checked. Raises BoxError."""
    numbers = [value for item in plan.objects for key in item.keys if key.corners for value in key.corners]
    pixels = any(abs(value) > LARGEST_PART for value in numbers if math.isfinite(value))
    size = plan.canvas or canvas
    if pixels and size is None:
        raise BoxError(f"boxes are in pixels ({max(numbers, key=abs):g}); name the canvas they belong to.")
    scale = (*size, *size) if pixels else (1, 1, 1, 1)
    return replace(plan, objects=tuple(replace(item, keys=_scaled(item, scale, pixels)) for item in plan.objects))


def _scaled(item: KeyedObject, scale: tuple[int, ...], pixels: bool) -> tuple[Key, ...]:
    keys = []
    for number, key in enumerate(item.keys, 1):
        where = f"object {item.id!r}, key frame {number}"
        corners = key.corners
        if corners is not None:
            if pixels and (max(map(abs, corners)) <= LARGEST_PART or any(0 < value < 1 for value in corners)):
                raise BoxError(f"{where}: box {show(corners)} is in parts of the picture and others are in pixels; use one.")
            corners = check_corners(tuple(value / unit for value, unit in zip(corners, scale, strict=True)), where)
        keys.append(replace(key, corners=corners))
    return tuple(keys)


def _object(item: KeyedObject) -> dict:
    keys = []
    for key in item.keys:
        time = {"t": _number(key.t)} if key.frame is None else {"frame": key.frame}
        keys.append(time | {"box": [_number(value) for value in key.corners] if key.corners else None})
    return {"id": item.id, "words": item.words, "keyframes": keys}


def _number(value: float) -> float | int:
    value = round(value, 6)
    return int(value) if value == int(value) else value


def _from_json(text: str) -> BoxPlan:
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise BoxError("the JSON is nested too deeply.") from error
    except ValueError as error:
        raise BoxError(f"the JSON cannot be read: {error}.") from error
    _known(data, _TOP, "the text")
    objects = data.get("objects")
    if not isinstance(objects, list):
        raise BoxError(f"objects must be a list, not {_shown(objects)}.")
    read = tuple(_json_object(item, number) for number, item in enumerate(objects, 1))
    fps = data.get("fps")
    if fps is not None and not (_is_number(fps) and 0 < fps <= 1000):
        raise BoxError(f"fps must be a number above 0, not {_shown(fps)}.")
    return BoxPlan(read, _string(data.get("background") or "", "background"), _canvas(data.get("canvas")), fps)


def _json_object(item, number: int) -> KeyedObject:
    where = f"object {number}"
    _known(item, _OBJECT, where)
    words = _string(item.get("words") or "", f"{where}: words")
    name = item.get("id", words)
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) else _string(name, f"{where}: id")
    keys = item.get("keyframes")
    if not isinstance(keys, list) or not keys or len(keys) > MAX_KEYS:
        raise BoxError(f"object {name!r}: keyframes must be a list of 1 to {MAX_KEYS} key frames, not {_shown(keys)}.")
    read = tuple(_json_key(key, f"object {name!r}, key frame {place}") for place, key in enumerate(keys, 1))
    return KeyedObject(name.strip(), words, read)


def _json_key(key, where: str) -> Key:
    _known(key, _KEY, where)
    if ("t" in key) == ("frame" in key):
        raise BoxError(f"{where}: needs t (0 to 1) or frame (from 0), one of the two.")
    if "box" not in key:
        raise BoxError(f"{where}: has no box; write null for an absent object.")
    box = key["box"]
    if box is not None and not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise BoxError(f"{where}: box must be [x0, y0, x1, y1] or null, not {_shown(box)}.")
    return _timed(key.get("t"), key.get("frame"), tuple(map(float, box)) if box is not None else None, where)


def _timed(t, frame, corners: Corners | None, where: str) -> Key:
    if frame is not None and not (isinstance(frame, int) and not isinstance(frame, bool) and frame >= 0):
        raise BoxError(f"{where}: frame must be a whole number from 0, not {_shown(frame)}.")
    if frame is None and not (_is_number(t) and 0 <= t <= 1):
        raise BoxError(f"{where}: t must lie between 0 and 1, not {_shown(t)}.")
    return Key(corners, None if t is None else float(t), frame)


def _from_lines(text: str) -> BoxPlan:
    objects, background, canvas = [], "", None
    if text.count("|") > MAX_KEYS:
        raise BoxError(f"the text has {text.count('|')} key frames, the limit is {MAX_KEYS}.")
    names: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("//"):
            continue
        where = f"line {number}"
        head, bar, rest = line.partition("|")
        if not bar:
            field, _, value = (part.strip() for part in line.partition(":"))
            if field.lower() == "background" and value:
                background = value
            elif field.lower() == "canvas":
                canvas = _canvas([_typed(part) for part in _parts(value)])
            else:
                raise BoxError(f"{where}: {_shown(line)} is no object; write 'fox | 0: 0.1 0.4 0.4 0.9 | 1: 0.6 0.4 0.9 0.9'.")
            continue
        name, equals, words = (part.strip() for part in head.partition("="))
        if not equals:
            words, name = name, free_name(name, names)
        names.add(name)
        objects.append(KeyedObject(name, words, tuple(_typed_key(part, where) for part in rest.split("|"))))
    return BoxPlan(tuple(objects), background, canvas)


def free_name(name: str, taken: set[str]) -> str:
    """`name`, or `name 2`, `name 3` ... when that is taken."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} {number}"
    return free


def _typed_key(text: str, where: str) -> Key:
    time, colon, corners = (part.strip() for part in text.partition(":"))
    if not colon:
        raise BoxError(f"{where}: key frame {_shown(text.strip())} has no time; write '0.5: 0.1 0.4 0.4 0.9' or '0.5: -'.")
    frame = re.fullmatch(r"f\s*(\d{1,9})", time, re.IGNORECASE)
    numbers = [] if corners == "-" else [_typed(part) for part in _parts(corners)]
    if corners != "-" and (len(numbers) != 4 or None in numbers):
        raise BoxError(f"{where}: {_shown(corners)} is no box; write four numbers x0 y0 x1 y1, or - for absent.")
    if frame:
        return _timed(None, int(frame[1]), tuple(numbers) or None, where)
    moment = _typed(time)
    return _timed(time if moment is None else moment, None, tuple(numbers) or None, where)


def _parts(text: str) -> list[str]:
    return re.sub(r"[\[\](),;]", " ", text).split()


def _typed(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE) else None


def _known(data, names: tuple[str, ...], where: str) -> None:
    if not isinstance(data, dict):
        raise BoxError(f"{where}: must be {{{', '.join(names)}}}, not {_shown(data)}.")
    for name in data:
        if name not in names:
            raise BoxError(f"{where}: {_shown(name)} is unknown; known are {', '.join(names)}.")


def _canvas(value) -> tuple[int, int] | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(_is_number(side) and 1 <= side <= 65536 for side in value)):
        raise BoxError(f"canvas must be [width, height] in pixels, not {_shown(value)}.")
    return int(value[0]), int(value[1])


def _string(value, where: str) -> str:
    if not isinstance(value, str):
        raise BoxError(f"{where} must be text, not {_shown(value)}.")
    return " ".join(value.split())


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
