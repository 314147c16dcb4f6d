"""What a rule is told about one attention call: rows by guidance chunk and panel, tokens by grid."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One conditioning entry of the guider: its list ("positive", "negative", "middle"...) and place in that list."""

    role: str
    index: int
    panels: tuple[int, ...] | None = None  # story panel of each row, when a Storyweft node made the entry
    story: Any = None

    @property
    def key(self) -> str:
        return f"{self.role}.{self.index}"


@dataclass(frozen=True)
class Layer:
    """One self-attention layer; `ordinal` counts them in execution order over the whole model."""

    path: str  # input, middle, output (U-Net); double, single, block (transformers)
    block: int
    depth: int
    ordinal: int

    def __str__(self) -> str:
        return f"{self.path} block {self.block}.{self.depth}"


@dataclass(frozen=True)
class Layout:
    """One self-attention call. Row r of q, k, v is latent `items[r % len(items)]` of chunk `r // len(items)`."""

    entries: tuple[Entry, ...]
    items: tuple[int, ...]
    layer: Layer
    grid: tuple[int, ...]  # (frames, height, width) of the image tokens
    image: slice  # where they lie in the sequence; the rest is text, padding or references

    def chunk_rows(self, chunk: int) -> range:
        return range(chunk * len(self.items), (chunk + 1) * len(self.items))

    def panel(self, chunk: int, row: int) -> int:
        """Story panel shown by the row-th latent of a chunk; rows of an unmarked entry count up from 0."""
        panels, item = self.entries[chunk].panels, self.items[row]
        return item if panels is None else panels[item % len(panels)]
