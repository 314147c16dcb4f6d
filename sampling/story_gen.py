"""Numbers of a StoryGen step: how noisy each reference is, and guidance over three branches (arXiv 2306.00973 and code)."""

from collections import Counter
from math import gcd

AUTO, MULTI, ALONE = STAGES = ("auto-regressive", "multi-image-condition", "no")
LAST = 999  # the schedule's last timestep
PART = 10  # a reference has a tenth of the picture's timestep, times its distance in AUTO


def reference_timesteps(t: int, count: int, stage: str, last: int = LAST) -> list[int]:
    """Timestep of each of `count` references, oldest first, when the picture is at timestep t; none above `last`."""
    if stage == ALONE:
        return []
    part = t // PART
    return [min(part * (count - place if stage == AUTO else 1), last) for place in range(count)]


def without_repetition(pairs: list) -> list:
    """The shortest list over which attention gives the same: equal pairs as often as their greatest common divisor allows.

    A softmax over keys that all occur twice is that over each once; order does not matter to it.
    """
    counted = Counter(pairs)
    common = gcd(*counted.values())
    return [pair for pair, count in counted.items() for _ in range(count // common)]


def branches(text: float, image: float) -> tuple[str, ...]:
    """Branches whose weight in u + image (v - u) + text (a - v) is not zero. A text scale up to 1 means no guidance: a."""
    if text <= 1:
        return ("a",)
    weights = {"u": 1 - image, "v": image - text, "a": text}
    return tuple(name for name, weight in weights.items() if weight)
