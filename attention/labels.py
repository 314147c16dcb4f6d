"""One label per token: which object's box or mask a token of a picture lies in, at any grid. 0 is the background.

PEEKABOO (arXiv 2312.07509) samples its masks; boxes are better read by area. Later objects lie on top.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = 0.5 - 1e-9  # a token cut exactly in half counts as covered, whatever the rounding


def causal_groups(pixel_frames: int, latent_frames: int) -> list[list[int]]:
    """Pixel frames that each latent frame of a video holds: the first alone, the others in equal runs.

    One pixel frame serves all latent frames. ValueError if the numbers do not fit.
    """
    if pixel_frames == 1:
        return [[0]] * latent_frames
    ratio, rest = divmod(pixel_frames - 1, max(latent_frames - 1, 1))
    if rest or latent_frames == 1:
        raise ValueError(f"{pixel_frames} pixel frames do not divide into {latent_frames} latent frames")
    return [[0]] + [list(range(1 + n * ratio, 1 + (n + 1) * ratio)) for n in range(latent_frames - 1)]


def paint(marked: Tensor) -> Tensor:
    """Labels int64 [...] of marks [objects, ...]: the number (from 1) of the last object that marks a token, else 0."""
    numbers = torch.arange(1, len(marked) + 1).view(-1, *[1] * (marked.ndim - 1))
    return (marked * numbers).amax(0) if len(marked) else torch.zeros(marked.shape[1:], dtype=torch.long)


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks [objects, frames, height, width] of boxes as the authors draw them: corners truncated, end left out."""
    scale = torch.tensor([width, height, width, height], dtype=boxes.dtype)
    corners = (boxes.clamp(0, 1) * scale).nan_to_num(0).long()[..., None, None]
    x0, y0, x1, y1 = corners.unbind(2)
    x, y = torch.arange(width), torch.arange(height)[:, None]
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


@dataclass(frozen=True, eq=False)
class MaskRegions:
    """Masks [objects, frames, height, width], bool, read at every stride-th place as the authors do."""

    masks: Tensor

    @property
    def frames(self) -> int:
        return self.masks.shape[1]

    @property
    def present(self) -> Tensor:
        """Where an object is at all, [objects, frames]."""
        return self.masks.flatten(2).any(2)

    def labels(self, groups: Sequence[Sequence[int]], height: int, width: int, union: bool = True) -> Tensor:
        """Labels [groups, height·width]; a group holds the frames that one token frame stands for.

        union marks what any frame of a group marks, otherwise what at least half of them mark.
        """
        rows, columns = (
            (torch.arange(side) * -(-size // side)).clamp(max=size - 1)
            for side, size in ((height, self.masks.shape[2]), (width, self.masks.shape[3]))
        )
        sampled = self.masks[:, :, rows[:, None], columns]
        held = [sampled[:, list(group)] for group in groups]
        marked = [of.any(1) if union else of.double().mean(1) >= HALF for of in held]
        return paint(torch.stack(marked, 1)).flatten(1)


@dataclass(frozen=True, eq=False)
class BoxRegions:
    """Boxes [objects, frames, 4] as x0, y0, x1, y1 in picture units, NaN where the object is absent; read by area."""

    boxes: Tensor

    @property
    def frames(self) -> int:
        return self.boxes.shape[1]

    @property
    def present(self) -> Tensor:
        """Where an object is at all, [objects, frames]."""
        return ~self.boxes[..., 0].isnan()

    def sampled(self, height: int, width: int) -> MaskRegions:
        """The same read as the authors do, from masks of the latent's size."""
        return MaskRegions(box_masks(self.boxes, height, width))

    def coverage(self, height: int, width: int) -> Tensor:
        """Covered share of every token, [objects, frames, height, width]."""
        along = []
        for side, first in ((height, 1), (width, 0)):
            cells = torch.arange(side, dtype=self.boxes.dtype)
            low, high = (self.boxes[..., first + 2 * end, None] * side for end in (0, 1))
            along.append((torch.minimum(high, cells + 1) - torch.maximum(low, cells)).clamp(min=0).nan_to_num(0))
        return along[0][..., :, None] * along[1][..., None, :]

    def labels(self, groups: Sequence[Sequence[int]], height: int, width: int, union: bool = True) -> Tensor:
        """Labels [groups, height·width]: tokens covered by at least half, by any frame of the group or on average.

        A box too small to cover any token by half marks the token that holds its centre.
        """
        covered = self.coverage(height, width)
        marked = torch.zeros(len(self.boxes), len(groups), height, width, dtype=torch.bool)
        for place, group in enumerate(groups):
            held = covered[:, list(group)]
            marked[:, place] = (held.amax(1) if union else held.mean(1)) >= HALF
            for number, there in enumerate(self.present[:, list(group)]):
                enough = there.any() if union else 2 * there.sum() >= len(group)
                if enough and not marked[number, place].any():
                    boxes = self.boxes[number, list(group)][there].clamp(0, 1)
                    x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).mean(0).tolist()
                    marked[number, place, min(int(y * height), height - 1), min(int(x * width), width - 1)] = True
        return paint(marked).flatten(1)
