"""How well an object follows its drawn boxes: PEEKABOO's measures on masks of a video (arXiv 2312.07509, section 5).

Masks are [frames, height, width], bool: the drawn one and the detected one, empty where nothing was detected.
"""

import torch
from torch import Tensor

SMALL = 1e-5  # the authors' guard against empty unions


def volume_iou(drawn: Tensor, found: Tensor) -> float:
    """Intersection over union of the whole video's volume."""
    return (drawn & found).sum().item() / ((drawn | found).sum().item() + SMALL)


def average_precision(drawn: Tensor, found: Tensor, threshold: float = 0.5) -> float:
    """Share of the frames with a detection whose IoU reaches `threshold`; 0 if there are none."""
    there = found.flatten(1).any(1)
    if not there.any():
        return 0.0
    both, either = (masks.flatten(1).sum(1).double() for masks in (drawn & found, drawn | found))
    return float((both / (either + SMALL) >= threshold)[there].double().mean())


def centroid(masks: Tensor) -> Tensor:
    """(row, column) of each frame's mask, [frames, 2] float64, as the authors take it.

    The middle between the first line of largest sum and the first line where the running sum is complete; (0, 0) for an
    empty mask.
    """
    lines = []
    for axis in (2, 1):
        sums = masks.long().sum(axis)
        lines.append((sums.argmax(1) + sums.cumsum(1).argmax(1)) / 2)
    return torch.stack(lines, 1).double()


def centroid_distance(drawn: Tensor, found: Tensor) -> float:
    """Mean distance of the two centroids in pixels; the paper divides it by the picture's diagonal."""
    return float((centroid(drawn) - centroid(found)).norm(dim=1).mean())
