"""Boxes planned by a language model: the question to it, and its answer read into a plan.

The answer has the line form of LLM-grounded video planning (arXiv 2309.17444): "Frame 1: [{'id': 0, 'name': 'a fox', 'box':
[x, y, width, height]}, ...]" for every key frame and "Background keyword: forest". Key frame k of n is time (k - 1) / (n - 1).
Models do not always keep to it, so what can be mended is mended and reported, line by line. An answer in the JSON form of
box_text.py is read as well.
"""

import re
from dataclasses import dataclass, field
from itertools import combinations

from .box_text import LARGEST_PART, MAX_TEXT, free_name, in_parts, parse_boxes
from .boxes import MAX_OBJECTS, BoxError, BoxPlan, Corners, Key, KeyedObject, check_objects, clip, show

MAX_KEY_FRAMES = 200
ARTICLES = {"a", "an", "the"}
OVERLAP = 0.05  # of the smaller box; less is not worth a line

FRAME_LINE = r"(?im)^[ \t*#>-]*frame[ \t_]*(\d{1,4})[ \t]*\**[ \t]*:"
_BACKGROUND = r"(?im)^[ \t*#>-]*background(?:[ _]keyword)?s?[ \t]*\**[ \t]*:\**[ \t]*(.*)$"
_ENTRY = r"\{[^{}]{0,1000}\}"
_FIELD = r"""['"]?(\w+)['"]?\s*:\s*(\[[^\[\]]*\]|\([^()]*\)|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,{}\[\]]+)"""
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"

QUESTION = """Plan where things are in a short video. The picture is {width} pixels wide and {height} pixels high; (0, 0) is \
its top left corner. Give the boxes of the moving things in {keys} key frames, evenly spaced over the {frames} frames of the \
video.

Rules:
- A box is [x, y, w, h] in whole pixels: its top left corner, its width and its height. It lies inside the picture \
(x + w at most {width}, y + h at most {height}).
- A thing keeps its id and its name in all frames. Use the words of the caption as its name.
- Boxes of different things do not overlap.
- Boxes are as large as the thing would look, and move as it would move. Leave a thing out of the frames where it is not to be seen.
- Things that do not move belong to the background; name the background in one to three words.
- Write one short sentence of reasoning, then exactly the lines of the format, and nothing after them.

Example, 3 key frames, 512 x 320:
Caption: A boat sails past a lighthouse while a gull flies away.
Reasoning: The boat crosses from left to right at the bottom; the gull rises to the upper right and leaves.
Frame 1: [{{'id': 0, 'name': 'a boat', 'box': [10, 190, 150, 110]}}, {{'id': 1, 'name': 'a gull', 'box': [250, 60, 60, 40]}}]
Frame 2: [{{'id': 0, 'name': 'a boat', 'box': [180, 190, 150, 110]}}, {{'id': 1, 'name': 'a gull', 'box': [380, 30, 50, 35]}}]
Frame 3: [{{'id': 0, 'name': 'a boat', 'box': [350, 190, 150, 110]}}]
Background keyword: sea with lighthouse

Now, {keys} key frames, {width} x {height}:
Caption: {scene}
"""


def ask(scene: str, frames: int, canvas: tuple[int, int], keys: int = 6) -> str:
    """The text to send to a language model. `canvas` is (width, height) in pixels. Raises BoxError."""
    if not scene.strip():
        raise BoxError("there is no scene; write one sentence of what is to be seen.")
    if keys > frames:
        raise BoxError(f"{keys} key frames are more than the {frames} frames; ask for fewer.")
    width, height = canvas
    return QUESTION.format(width=width, height=height, keys=keys, frames=frames, scene=" ".join(scene.split()))


def read_boxes(text: str, canvas: tuple[int, int]) -> tuple[BoxPlan, list[str]]:
    """A plan from any text form (JSON, short lines, a language model's lines) and what was mended. Raises BoxError."""
    if re.search(FRAME_LINE, text[:MAX_TEXT]):
        return read_answer(text, canvas)
    return parse_boxes(text, canvas), []


def read_answer(text: str, canvas: tuple[int, int]) -> tuple[BoxPlan, list[str]]:
    """A plan from a language model's answer, and one line for everything mended or left out. Raises BoxError."""
    if len(text) > MAX_TEXT:
        raise BoxError(f"the answer has {len(text)} characters, the limit is {MAX_TEXT}.")
    text = text[text.rfind("</think>") + 8:] if "</think>" in text else text
    if not re.search(FRAME_LINE, text):
        first, last = text.find("{"), text.rfind("}")
        if '"objects"' in text[first:last]:
            return parse_boxes(text[first:last + 1], canvas), []
        begins = " ".join(text.split())[:80]
        raise BoxError(f"the answer holds no line 'Frame 1: [...]'; it begins with {begins!r}.")
    answer = _Answer(canvas)
    answer.read(text)
    return answer.plan(), answer.notes


@dataclass
class _Answer:
    """What has been read so far: `frames` holds per key frame the corners (in parts of the picture) of every id."""

    canvas: tuple[int, int]
    notes: list[str] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)  # by id, in order of appearance
    frames: dict[int, dict[str, Corners | None]] = field(default_factory=dict)
    background: str = ""
    unit: tuple[int, int] = (1, 1)

    def read(self, text: str) -> None:
        lines = list(re.finditer(FRAME_LINE, text))
        ends = [line.start() for line in lines[1:]] + [len(text)]
        bodies = []
        for line, end in zip(lines, ends, strict=True):
            number = int(line[1])
            if bodies and number <= bodies[-1][0]:
                self.notes.append(f"Frame {number} comes again after Frame {bodies[-1][0]}: the answer is read up to there.")
                text = text[: line.start()]
                break
            bodies.append((number, text[line.end():end]))
        if len(bodies) > MAX_KEY_FRAMES:
            raise BoxError(f"the answer has {len(bodies)} key frames, the limit is {MAX_KEY_FRAMES}.")
        found = [(number, re.findall(_ENTRY, body)) for number, body in bodies]
        boxes = [_box(_fields(entry)) for _, entries in found for entry in entries]
        if any(value > LARGEST_PART for box in boxes if box for value in box):
            self.unit = self.canvas
        for (number, entries), (_, body) in zip(found, bodies, strict=True):
            self.frame(number, entries, body)
        background = re.search(_BACKGROUND, text)
        self.background = background[1].strip(" .'\"*[]\t\r") if background else ""
        if not self.background:
            self.notes.append("There is no background keyword.")

    def frame(self, number: int, entries: list[str], body: str) -> None:
        here: dict[str, Corners | None] = {}
        where = f"Frame {number}"
        if body.count("{") > len(entries):
            self.notes.append(f"{where}: unfinished entries left out: {body.count('{') - len(entries)}.")
        if not entries and not re.match(r"\W*\[\s*\]", body):
            self.notes.append(f"{where}: no list of boxes in {' '.join(body.split())[:40]!r}; the line is left out.")
            return
        for entry in entries:
            fields = _fields(entry)
            box, name = _box(fields), " ".join(fields.get("name", fields.get("words", "")).split())
            if box is None or not name and fields.get("id") not in self.words:
                self.notes.append(f"{where}: {entry[:60]!r} has no {'name' if box else 'box of four numbers'}; left out.")
                continue
            key = self.identity(fields.get("id"), name, here, where)
            here[key] = self.corners(box, f"{where}, {self.words[key]!r}")
        self.frames[number] = here

    def identity(self, given: str | None, name: str, here: dict, where: str) -> str:
        """The object an entry means: by its id, or by its name where the id is missing, taken or another object's."""
        if given in self.words and given not in here and (not name or self.words[given].lower() == name.lower()):
            return given
        same = [key for key, words in self.words.items() if words.lower() == name.lower() and key not in here]
        if given in self.words and given not in here and not same and _alike(name, self.words[given]):
            self.notes.append(f"{where}: id {given} is now called {name!r}; it stays {self.words[given]!r}.")
            return given
        if given is not None and given not in self.words and not same:
            return self.new(given, name)
        if same:
            self.notes.append(f"{where}: {name!r} has {'no id' if given is None else f'the id {given}'}; taken as id {same[0]}.")
            return same[0]
        if given is not None:
            self.notes.append(f"{where}: {name!r} has the id {given} of {self.words[given]!r}; taken as another object.")
        return self.new(free_name(given or name, set(self.words)), name)

    def new(self, key: str, words: str) -> str:
        self.words[key] = words
        if len(self.words) > MAX_OBJECTS:
            raise BoxError(f"the answer has more than {MAX_OBJECTS} objects.")
        return key

    def corners(self, box: list[float], where: str) -> Corners | None:
        x, y, width, height = box
        corners = tuple(value / side for value, side in zip((x, y, x + width, y + height), self.unit * 2, strict=True))
        if width <= 0 or height <= 0:
            self.notes.append(f"{where}: box {show(box)} has no size; absent there.")
            return None
        if clip(corners) is None:
            self.notes.append(f"{where}: box {show(box)} lies outside the picture; absent there.")
            return None
        inside = clip(corners)
        if max(abs(a - b) for a, b in zip(corners, (inside.x0, inside.y0, inside.x1, inside.y1), strict=True)) > 1e-9:
            self.notes.append(f"{where}: box {show(box)} leaves the picture; cut at its edge.")
        return corners

    def plan(self) -> BoxPlan:
        numbers = sorted(self.frames)
        span = max(numbers[-1] - numbers[0], 1) if numbers else 1
        gaps = sorted(set(range(numbers[0], numbers[-1])) - set(numbers)) if numbers else []
        if gaps:
            self.notes.append(f"Missing frames: {', '.join(map(str, gaps))}; boxes there are interpolated.")
        if numbers and numbers[0] > 1:
            self.notes.append(f"The first line is Frame {numbers[0]}; the time starts there.")
        self._overlaps(numbers)
        objects, names = [], set()
        for key, words in self.words.items():
            keys = tuple(Key(self.frames[n].get(key), t=(n - numbers[0]) / span) for n in numbers)
            if any(one.corners for one in keys):
                name = free_name(words, names)
                names.add(name)
                objects.append(KeyedObject(name, words, _without_repeats(keys)))
            else:
                self.notes.append(f"{words!r} is in no frame; left out.")
        check_objects([item.id for item in objects])
        return in_parts(BoxPlan(tuple(objects), self.background, self.canvas))

    def _overlaps(self, numbers: list[int]) -> None:
        for below, above in combinations(self.words, 2):
            at = [n for n in numbers if _overlap(self.frames[n].get(below), self.frames[n].get(above)) > OVERLAP]
            if at:
                self.notes.append(
                    f"{self.words[below]!r} and {self.words[above]!r} overlap in frame{'s' * (len(at) > 1)} "
                    f"{', '.join(map(str, at))}; {self.words[above]!r} lies on top."
                )


def complete_prompt(scene: str, plan: BoxPlan) -> str:
    """The scene with what it does not name: the objects' words behind "| ", then ", <background> background"."""
    scene = " ".join(scene.split())
    missing = [item.words for item in plan.objects if item.words.lower() not in scene.lower()]
    prompt = f"{scene} | {', '.join(dict.fromkeys(missing))}" if missing else scene
    return f"{prompt}, {plan.background} background" if plan.background else prompt


def _alike(first: str, second: str) -> bool:
    """Whether two names share a word."""
    return bool(set(first.lower().split()) & set(second.lower().split()) - ARTICLES)


def _fields(entry: str) -> dict[str, str]:
    return {name.lower(): _bare(value) for name, value in re.findall(_FIELD, entry[1:-1])}


def _bare(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value


def _box(fields: dict[str, str]) -> list[float] | None:
    numbers = [float(number) for number in re.findall(_NUMBER, fields.get("box", fields.get("bbox", "")))]
    return numbers if len(numbers) == 4 else None


def _without_repeats(keys: tuple[Key, ...]) -> tuple[Key, ...]:
    """One key for a run of absent ones."""
    return tuple(
        key for place, key in enumerate(keys) if key.corners or not place or keys[place - 1].corners
    )


def _overlap(first: Corners | None, second: Corners | None) -> float:
    """Shared area as a part of the smaller box."""
    if first is None or second is None:
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return max(width, 0) * max(height, 0) / smaller
