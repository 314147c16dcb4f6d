"""Storyboards in the host: captions joined into one conditioning, known frames laid out in a latent, frames cut out again.

A board is one latent row, so to the model it is one picture. Its conditioning holds the tokens of all captions one after
the other (what any model can read as one long prompt) with a BoardText beside it, which says whose they are.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention.frame_story import frame_index, merge_board, split_board
from ..story.board import BoardShape
from .prompts import MASK, encode_panels

MARK = "storyweft_board"  # key of a conditioning entry that holds its BoardText
POOLED = "pooled_output"


@dataclass(frozen=True, eq=False)
class Board:
    """What belongs to a board's frames and must not be lost: captions in story order, targets, and what is known.

    cell is (height, width) in latent cells; latents [channels, (frames,) h, w] and pictures [height, width, 3] by frame.
    """

    shape: BoardShape
    cell: tuple[int, int]
    captions: tuple[str, ...]
    targets: tuple[bool, ...]
    latents: dict[int, Tensor] = field(default_factory=dict)
    pictures: dict[int, Tensor] = field(default_factory=dict)

    @property
    def grid(self) -> Tensor:
        return torch.tensor(self.shape.grid)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the board in latent cells."""
        return self.shape.rows * self.cell[0], self.shape.columns * self.cell[1]

    @property
    def known(self) -> list[int]:
        """Frames that keep the picture they have."""
        return [frame for frame, target in enumerate(self.targets) if not target]

    def mask(self) -> Tensor:
        """1 where the board is to be drawn, [height, width]."""
        return torch.tensor(self.targets, dtype=torch.float32)[frame_index(self.grid, *self.cell)]

    def latent(self, empty: Tensor, boards: int) -> Tensor:
        """Board latents [boards, channels, ..., height, width]; `empty` is a frame [channels, ..., h, w] without picture."""
        frames = torch.stack([self.latents.get(frame, empty) for frame in range(self.shape.frames)])
        return merge_board(frames[None], self.grid).repeat(boards, *[1] * empty.ndim)

    def frames(self, samples: Tensor) -> Tensor:
        """Frames [boards · frames, channels, ..., h, w] of sampled boards, the known ones exactly as they were given."""
        frames = split_board(samples, self.grid)
        for frame in self.known:
            frames[:, frame] = self.latents[frame].to(frames)
        return frames.flatten(0, 1)

    def repaired(self, samples: Tensor, start: Tensor) -> Tensor:
        """`samples` with the cells of known frames as they are in `start`."""
        return torch.where(self.mask().to(samples.device) > 0, samples, start.to(samples))


@dataclass(frozen=True, eq=False)
class BoardText:
    """Whose the tokens of a board's conditioning are: labels int64 [tokens], frame numbers; `story` for a summary's.

    text [1 or boards, tokens, width] is what the conditioning held when it was made. captions, on U-Nets, are the tokens
    that stand for it in every cross attention.
    """

    board: Board
    text: Tensor
    labels: Tensor
    captions: Tensor | None = None
    has_summary: bool = False

    @property
    def story(self) -> int | None:
        """Label of the summary's tokens; None where the whole of all captions is the story."""
        return self.board.shape.frames if self.has_summary else None

    @property
    def plain(self) -> bool:
        """One frame without a summary: an ordinary prompt."""
        return self.board.shape.frames == 1 and not self.has_summary


def encode_board(clip, board: Board, node_id: str) -> list[list]:
    """Conditioning [[tokens [boards, all captions' tokens, width], extras], ...] of a board's captions.

    pooled_output is the mean over the frames, a mask is joined like the tokens. Raises ValueError naming `node_id` when
    the text encoder answers with anything else that belongs to one caption.
    """
    frames = board.shape.frames
    conditioning = []
    for text, extras in encode_panels(clip, list(board.captions), node_id):
        boards, length = len(text) // frames, text.shape[1]
        joined = text.view(boards, frames * length, -1)
        marks = {key: _joined(key, value, boards, frames, node_id) for key, value in extras.items()}
        if MASK in marks and marks[MASK].all():
            del marks[MASK]
        labels = torch.arange(frames).repeat_interleave(length)
        conditioning.append([joined, {**marks, MARK: BoardText(board, joined, labels)}])
    return conditioning


def _joined(key: str, value, boards: int, frames: int, node_id: str):
    if not torch.is_tensor(value) or value.ndim < 2 or len(value) != boards * frames or frames == 1:
        return value
    if key == POOLED:
        return value.view(boards, frames, *value.shape[1:]).mean(1)
    if key == MASK:
        return value.reshape(boards, -1)
    raise ValueError(f"{node_id}: this text encoder answers with {key!r} for each caption, which a board cannot join.")


def with_summary(text: Tensor, extras: dict, summary: list) -> tuple[Tensor, dict]:
    """Tokens and extras of a board's conditioning with the tokens of a summary [[tokens, extras]] after the captions'."""
    told, more = summary[0]
    n = max(len(text), len(told))
    out = torch.cat([text.expand(n, -1, -1), told.to(text).expand(n, -1, -1)], 1)
    if MASK not in extras and MASK not in more:
        return out, extras
    ones = [e.get(MASK, torch.ones(len(t), t.shape[1], dtype=torch.long, device=t.device)) for t, e in ((text, extras), (told, more))]
    return out, {**extras, MASK: torch.cat([mask.expand(n, -1) for mask in ones], 1)}


def encode_frames(vae, pictures: Tensor) -> Tensor:
    """Latents [n, channels, ..., h, w] of pictures [n, height, width, 3], each by itself: a video VAE makes one clip of a
    batch, and a frame's latent must not depend on its neighbours."""
    return torch.cat([vae.encode(picture[None]) for picture in pictures])
