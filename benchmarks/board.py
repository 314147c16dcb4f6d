"""Frame branch of a board: the split form of the pack against stock cross attention and against Attention Couple's form.

`python -m benchmarks.board` writes docs/board_speed.md. One cross-attention layer with its projections, one negative and one
positive row. Forms run in turn; times are medians of processor time, so that neighbours on the machine count for little.
"""

import argparse
import platform
from pathlib import Path

import torch
from torch.nn.functional import linear

from .consistent import in_turn

from storyweft.attention.branches import Branch, attend_branches  # isort: skip
from storyweft.attention.core import attend, merge_heads, split_heads  # isort: skip
from storyweft.attention.frame_story import frame_index, frame_story_branches  # isort: skip
from storyweft.host.plan import Divisions  # isort: skip
from storyweft.story.board import BoardShape  # isort: skip

WORDS, AIM, COUPLE_AIM = 77, 1.05, 3.0
# name, rows, columns, cell (height, width) in tokens, channels, heads, width of the text
LAYERS = (
    ("SDXL, 2 x 3 frames of 512, half size", 2, 3, (32, 32), 640, 10, 2048),
    ("SDXL, 2 x 3 frames of 512, quarter size", 2, 3, (16, 16), 1280, 20, 2048),
    ("SD1.5, 2 x 2 frames of 512, half size", 2, 2, (32, 32), 640, 8, 768),
)


class Layer:
    """Random weights, a board's tokens [2, tokens, channels] and its captions [1, frames · words, width]."""

    def __init__(self, rows, columns, cell, channels, heads, width):
        generator = torch.Generator().manual_seed(0)
        sizes = {"q": channels, "k": width, "v": width, "o": channels}
        self.weights = {n: torch.randn(channels, size, generator=generator) / size**0.5 for n, size in sizes.items()}
        self.index = frame_index(torch.tensor(BoardShape(rows, columns).grid), *cell).flatten()
        self.frames, self.heads = rows * columns, heads
        self.x = torch.randn(2, len(self.index), channels, generator=generator)
        self.prompt = torch.randn(2, WORDS, width, generator=generator)  # what a model is given without a board
        self.captions = torch.randn(1, self.frames * WORDS, width, generator=generator)
        self.labels = torch.arange(self.frames).repeat_interleave(WORDS)
        self.divisions = Divisions()
        self.kept = self.project("k", self.captions), self.project("v", self.captions)  # once per run
        self.masks = (self.index == torch.arange(self.frames)[:, None])[:, :, None].float()

    def project(self, name, x):
        return split_heads(linear(x, self.weights[name]), self.heads)

    def out(self, attended):
        return linear(merge_heads(attended), self.weights["o"])

    def stock(self):
        return self.out(
            attend(*(self.project(n, x) for n, x in zip("qkv", (self.x, self.prompt, self.prompt), strict=True)))
        )

    def split(self):
        q, k, v = (self.project(n, x) for n, x in zip("qkv", (self.x, self.prompt, self.prompt), strict=True))
        return self.out(self.branches(q, k, v))

    def branches(self, q, k, v):
        frame = frame_story_branches(slice(1, 2), *self.kept, self.index[None], self.labels, 0.0, name="board")
        return attend_branches(q, [Branch(slice(0, 1), k[:1], v[:1]), *frame], attend, self.divisions)

    def couple(self):
        """q once for every caption, all captions projected at each step, outputs weighted with the cells' masks."""
        x = torch.cat([self.x[:1], self.x[1:].expand(self.frames, -1, -1)])
        text = torch.cat([self.prompt[:1], self.captions.view(self.frames, WORDS, -1)])
        out = self.out(attend(*(self.project(n, given) for n, given in zip("qkv", (x, text, text), strict=True))))
        return torch.cat([out[:1], (out[1:] * self.masks).sum(0, keepdim=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", default="docs/board_speed.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Speed of the frame branch",
        "",
        f"`python -m benchmarks.board`, torch {torch.__version__}, {platform.machine()}, 1 thread, float32, one negative and one",
        "positive row. A layer with its projections; the split form keeps keys and values of all captions from the first step,",
        f"the couple form (every caption over the whole board, then masks) projects them at each. Aims: split at most {AIM} of stock",
        f"with one caption; couple at least {COUPLE_AIM} times the split form on 2 x 3 boards.",
        "",
        "| layer | tokens | stock ms | split ms | couple ms | split / stock | couple / split | attention alone, split / stock |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with torch.inference_mode():
        for name, *sizes in LAYERS:
            layer = Layer(*sizes)
            torch.testing.assert_close(layer.split()[1], layer.couple()[1], atol=1e-3, rtol=1e-3)
            stock, split, couple = in_turn([layer.stock, layer.split, layer.couple], args.repeats)
            q, k, v = (layer.project(n, x) for n, x in zip("qkv", (layer.x, layer.prompt, layer.prompt), strict=True))
            bare, bare_split = in_turn(
                [lambda p=(q, k, v): attend(*p), lambda p=(q, k, v), at=layer: at.branches(*p)], args.repeats
            )
            marks = [
                f"**{split / stock:.2f}** {'reached' if split / stock <= AIM else 'MISSED'}",
                f"{couple / split:.1f}"
                + ("" if layer.frames < 6 else " reached" if couple / split >= COUPLE_AIM else " MISSED"),
            ]
            lines.append(
                f"| {name} | {len(layer.index)} | {1e3 * stock:.0f} | {1e3 * split:.0f} | {1e3 * couple:.0f} | {marks[0]} | {marks[1]} | "
                f"{bare_split / bare:.2f} |"
            )
            print(lines[-1], flush=True)
    Path(args.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
