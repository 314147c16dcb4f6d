"""Drawn paths as one point per frame."""

from collections.abc import Sequence


def resample_path(points: Sequence[Sequence[float]], frames: int) -> list[tuple[float, ...]]:
    """Points [n][2] of a drawn path at `frames` frames, as PEEKABOO's demo does (arXiv 2312.07509).

    More points than frames: evenly chosen ones. Fewer: each segment is filled with the same number of steps, whole
    numbers, and the last point is repeated to the end. ValueError without points or frames.
    """
    if not points or frames < 1:
        raise ValueError(f"a path of {len(points)} points cannot be spread over {frames} frames")
    count = len(points)
    if count >= frames:
        return [tuple(points[round(frame * (count - 1) / max(frames - 1, 1))]) for frame in range(frames)]
    steps = (frames - 1) // (count - 1) if count > 1 else 0
    filled = [
        tuple(round(a + (b - a) * step / steps) for a, b in zip(start, end, strict=True))
        for start, end in zip(points[:-1], points[1:], strict=True)
        for step in range(steps)
    ]
    return filled + [tuple(points[-1])] * (frames - len(filled))
