"""Storyboards as tensors, masked noising, and the two branches of frame-story cross attention.

StoryImager (arXiv 2404.05979): all frames of a story are one board, each cell attends to its own caption (frame branch)
and the whole board to the story (story branch), and known frames enter the model without noise. Nothing of it was
published as code; the formulas are those of docs/board.md.

A `grid` is an int64 tensor [rows, columns] with the frame that lies in each cell.
"""

from collections.abc import Hashable

import torch
from torch import Tensor

from .branches import Branch
from .masked import ANY, Constraint


def split_board(board: Tensor, grid: Tensor) -> Tensor:
    """Board [n, ..., rows·h, columns·w] -> its frames [n, frames, ..., h, w] in story order."""
    rows, columns = grid.shape
    cells = board.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1)).movedim((-4, -2), (1, 2)).flatten(1, 2)
    return cells[:, grid.flatten().argsort()]


def merge_board(frames: Tensor, grid: Tensor) -> Tensor:
    """Frames [n, frames, ..., h, w] -> board [n, ..., rows·h, columns·w]; the inverse of split_board."""
    cells = frames[:, grid.flatten()].unflatten(1, tuple(grid.shape)).movedim((1, 2), (-4, -2))
    return cells.flatten(-2, -1).flatten(-3, -2)


def frame_index(grid: Tensor, height: int, width: int) -> Tensor:
    """Frame that each place of a board of cells height x width belongs to, int64 [rows·height, columns·width]."""
    return grid.repeat_interleave(height, 0).repeat_interleave(width, 1)


def target_mask(targets: Tensor, index: Tensor) -> Tensor:
    """Targets [n, frames], 1 = to be drawn, at each place of a frame_index: [n, 1, height, width]."""
    return targets[:, index][:, None]


def masked_noising(known: Tensor, noise: Tensor, alpha_bar: Tensor | float, mask: Tensor) -> Tensor:
    """mask·(sqrt(alpha_bar)·known + sqrt(1 - alpha_bar)·noise) + (1 - mask)·known: only targets are noised."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=known.dtype, device=known.device)
    noised = alpha_bar.sqrt() * known + (1 - alpha_bar).sqrt() * noise
    return mask * noised + (1 - mask) * known


def frame_constraint(cells: Tensor, captions: Tensor, name: Hashable = None) -> Constraint:
    """Query tokens of cell f see the tokens of caption f; cells [rows or 1, Q] and captions [K] hold frames or ANY."""
    return Constraint(cells, captions[None], name)


def frame_story_branches(
    rows: slice,
    k: Tensor,
    v: Tensor,
    cells: Tensor,
    captions: Tensor,
    blend: float,
    story: int | None = None,
    bias: Tensor | None = None,
    name: Hashable = None,
) -> list[Branch]:
    """(1 - blend)·frame branch + blend·story branch over keys and values k, v [n, heads, K, dim] of all captions.

    cells int64 [1, Q] is the frame of each query, captions int64 [K] that of each key. The story is what bears the label
    `story`, no frame's number, or all keys with None. A branch of weight 0 is left out, so blend 0 is the frame branch
    and 1 the story branch, exactly. `name` makes the constraints' names.
    """
    branches = []
    if blend < 1:
        by_frame = frame_constraint(cells, captions, name and (name, "frame"))
        branches.append(Branch(rows, k, v, 1 - blend, [by_frame], bias))
    if blend > 0:
        of_story = []
        if story is not None:
            of_story = [frame_constraint(torch.full_like(cells, story), captions, name and (name, "story"))]
        branches.append(Branch(rows, k, v, blend, of_story, bias))
    return branches


def joint_constraint(cells: Tensor, captions: Tensor, image: slice, text: slice, length: int, name=None) -> Constraint:
    """The frame branch in one sequence of text and picture: picture tokens of cell f see caption f and the picture.

    cells int64 [rows, image tokens] and captions int64 [rows, text tokens] hold frames, ANY where a row has no captions. Text
    sees everything, and everything sees what is neither picture nor captioned text (references, padding).
    """
    query, key = (torch.full((len(cells), length), ANY) for _ in range(2))
    query[:, image] = cells
    key[:, text.start : text.start + captions.shape[1]] = captions
    return Constraint(query, key, name)
