"""Storyboards: where each frame of a story lies in a grid of cells, and which frames a model is asked to draw.

StoryImager (arXiv 2404.05979) draws a whole story as one board. Which frames are to be drawn makes the task: all of them
(visualisation), those after the first ones (continuation), or any others (completion).
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product

ORDERS = ("row by row", "column by column")
VISUALISATION, CONTINUATION, COMPLETION, REPLACE = TASKS = ("visualisation", "continuation", "completion", "replace")
MAX_FRAMES = 64


@dataclass(frozen=True)
class BoardShape:
    """A grid of rows x columns cells, filled with frames 0, 1, ... in one of ORDERS. Published drawings go by column."""

    rows: int
    columns: int
    order: str = ORDERS[0]

    @property
    def frames(self) -> int:
        return self.rows * self.columns

    @property
    def grid(self) -> tuple[tuple[int, ...], ...]:
        """Number of the frame in each cell, by row and column."""
        if self.order == ORDERS[0]:
            return tuple(tuple(range(r * self.columns, (r + 1) * self.columns)) for r in range(self.rows))
        return tuple(tuple(range(r, self.frames, self.rows)) for r in range(self.rows))


def task_of(targets: Sequence[bool], pictured: Collection[int] = ()) -> str:
    """Name of the task that draws the frames with a True; `pictured` are frames that already have a picture.

    Raises ValueError when nothing is to be drawn.
    """
    if not any(targets):
        raise ValueError("no frame is to be drawn, so there is no task")
    if any(targets[frame] for frame in pictured):
        return REPLACE
    if all(targets):
        return VISUALISATION
    known = list(targets).index(True)
    return CONTINUATION if all(targets[known:]) else COMPLETION


def target_sets(frames: int) -> dict[str, list[tuple[bool, ...]]]:
    """Every non-empty set of frames to be drawn, by task: 1, frames - 1 and 2^frames - 1 - frames of them."""
    sets: dict[str, list] = {task: [] for task in (VISUALISATION, CONTINUATION, COMPLETION)}
    for targets in product((False, True), repeat=frames):
        if any(targets):
            sets[task_of(targets)].append(targets)
    return sets


def draw_targets(rng: random.Random, frames: int) -> tuple[bool, ...]:
    """Frames to be drawn, for training: each task as often (one frame: visualisation only), evenly within a task."""
    task = rng.choice((VISUALISATION, CONTINUATION, COMPLETION)) if frames > 1 else VISUALISATION
    if task == VISUALISATION:
        return (True,) * frames
    if task == CONTINUATION:
        known = rng.randint(1, frames - 1)
        return tuple(frame >= known for frame in range(frames))
    while True:
        targets = tuple(bool(rng.getrandbits(1)) for _ in range(frames))
        if any(targets) and task_of(targets) == COMPLETION:
            return targets


def frames_of(text: str, count: int) -> tuple[int, ...]:
    """Frames (from 0) that a text such as "1, 3-4" names, numbered from 1, in its order. Raises ValueError."""
    chosen: dict[int, None] = {}
    for part in text.replace("\n", ",").split(","):
        if not part.strip():
            continue
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        ends = (first, last) if dash else (first, first)
        if not all(end.isascii() and end.isdigit() and len(end) < 6 for end in ends):
            raise ValueError(
                f"{part.strip()[:40]!r} is no frame number; write numbers from 1 to {count} such as '1, 3-4'"
            )
        low, high = int(ends[0]), int(ends[1])
        if not 1 <= low <= high <= count:
            raise ValueError(f"{part.strip()!r} names no frames of this board; it has frames 1 to {count}")
        chosen.update(dict.fromkeys(range(low - 1, high)))
    return tuple(chosen)


def captions_of(text: str, frames: int, boards: int = 1, leave_empty: bool = False) -> tuple[str, ...]:
    """One caption a line for every frame of one board, or of every board in turn. Raises ValueError.

    leave_empty: missing and blank lines are empty captions instead of an error.
    """
    lines = [line.strip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    wanted = sorted({frames, boards * frames})
    if leave_empty and len(lines) < wanted[0]:
        lines += [""] * (wanted[0] - len(lines))
    if len(lines) not in wanted:
        cells = f"{boards} boards of {frames} frames" if boards > 1 else f"{frames} frames"
        raise ValueError(f"holds {len(lines)} captions for {cells}; write one a line, {' or '.join(map(str, wanted))}")
    if not leave_empty and not all(lines):
        raise ValueError(f"line {lines.index('') + 1} is blank; write a caption, or choose to leave frames without one")
    return tuple(lines)
