"""What a rule is told about one attention call: rows by guidance chunk and panel, tokens by grid."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One conditioning entry of the guider: its list ("positive", "negative", "middle"...) and place in that list."""

    role: str
    index: int
    panels: tuple[int, ...] | None = None  # story panel of each row, when a Storyweft node made the entry
    story: Any = None
    cond: dict = field(
        default_factory=dict, compare=False
    )  # the guider's own entry, with whatever marks nodes put there

    @property
    def key(self) -> str:
        return f"{self.role}.{self.index}"


@dataclass(frozen=True)
class Layer:
    """One attention layer; `ordinal` counts those of its kind in execution order over the whole model.

    kind: "self", the picture's tokens, with the text's in one sequence on joint models; "cross", picture to text;
    "time", frame to frame at one place of a video U-Net.
    """

    path: str  # input, middle, output (U-Net); double, single, block (transformers)
    block: int
    depth: int
    ordinal: int
    kind: str = "self"

    def __str__(self) -> str:
        return f"{self.path} block {self.block}.{self.depth}" + ("" if self.kind == "self" else f" ({self.kind})")


@dataclass(frozen=True)
class Layout:
    """One attention call. Row r of q, k, v is latent `items[r % len(items)]` of chunk `r // len(items)`.

    In "time" layers a chunk has one row for each place of the grid instead, and its tokens are the frames `items`.
    """

    entries: tuple[Entry, ...]
    items: tuple[int, ...]
    layer: Layer
    grid: tuple[int, ...]  # (frames, height, width) of the image tokens
    image: slice  # where they lie among the queries; the rest is text, padding or references
    text: slice | None = None  # where the prompt lies among the keys, if it does

    @property
    def chunk_size(self) -> int:
        """Rows of one chunk."""
        return self.grid[1] * self.grid[2] if self.layer.kind == "time" else len(self.items)

    def chunk_rows(self, chunk: int) -> range:
        return range(chunk * self.chunk_size, (chunk + 1) * self.chunk_size)

    def panel(self, chunk: int, row: int) -> int:
        """Story panel shown by the row-th latent of a chunk; rows of an unmarked entry count up from 0."""
        panels, item = self.entries[chunk].panels, self.items[row]
        return item if panels is None else panels[item % len(panels)]
