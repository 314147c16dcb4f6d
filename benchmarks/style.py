"""StyleAligned against plain attention, and group norms by moments against the authors' concatenation.

`python -m benchmarks.style` writes docs/style_aligned_speed.md. Times are medians of runs taken in turn, in one process; on the
CPU processor time, which other work on the machine does not touch.
"""

import argparse
import math
import platform
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from .consistent import in_turn

from storyweft.attention.core import attend, merge_heads, split_heads  # isort: skip
from storyweft.attention.style import StyleOptions, shared_group_norm  # isort: skip
from storyweft.host.layout import Layer, Layout  # isort: skip
from storyweft.host.plan import SelfPlan  # isort: skip
from storyweft.host.style import StyleRule  # isort: skip

AIM = 1.1


def synchronized() -> float:
    """Wall time once the device has done what was asked of it."""
    torch.cuda.synchronize()
    return time.perf_counter()


class Block:
    """A self-attention layer on x [rows, tokens, channels], with or without the rule."""

    def __init__(self, rows: int, tokens: int, heads: int, dim: int, dtype, device):
        generator = torch.Generator().manual_seed(0)
        channels = heads * dim
        self.heads, self.rows, self.tokens = heads, rows, tokens
        self.x = torch.randn(rows, tokens, channels, generator=generator).to(device, dtype)
        self.weights = [
            (torch.randn(channels, channels, generator=generator) / math.sqrt(channels)).to(device, dtype) for _ in range(4)
        ]

    def projected(self):
        return tuple(split_heads(self.x @ weight, self.heads) for weight in self.weights[:3])

    def plain(self):
        return merge_heads(attend(*self.projected())) @ self.weights[3]

    def styled(self, rule):
        tokens = self.tokens
        layout = Layout((None,), tuple(range(self.rows)), Layer("output", 0, 0, 0), (1, 1, tokens), slice(0, tokens))
        run = SimpleNamespace(family=SimpleNamespace(picture_only=True), acted={rule: 0})
        plan = SelfPlan(layout, *self.projected(), None)
        rule.plan(run, None, layout, plan)
        return merge_heads(plan.run(attend, None)) @ self.weights[3]

    def share(self) -> float:
        """FLOPs of the layer with twice the keys for all rows but the first, against plain: projections 8 L C^2 a row."""
        channels = self.weights[0].shape[0]
        projections, attention = 8 * self.tokens * channels**2, 4 * self.tokens**2 * channels
        return (self.rows * (projections + attention) + (self.rows - 1) * attention) / (self.rows * (projections + attention))


def layers(args, dtype, device) -> list[str]:
    lines = [
        "| pictures | tokens | heads x dim | option | plain ms | StyleAligned ms | ratio | FLOP share | ratio / share | aim |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rows, tokens, heads in ((4, 1024, 10), (8, 1024, 10), (4, 4096, 8)):
        block = Block(rows, tokens, heads, 64, dtype, device)
        for name, options in (("default", StyleOptions()), ("shift ln 2", StyleOptions(shared_score_shift=math.log(2)))):
            rule = StyleRule(options)
            plain, styled = in_turn([block.plain, lambda rule=rule, block=block: block.styled(rule)], args.repeats, args.clock)
            ratio, share = styled / plain, block.share()
            lines.append(
                f"| {rows} | {tokens} | {heads} x 64 | {name} | {1000 * plain:.0f} | {1000 * styled:.0f} | {ratio:.2f} | {share:.2f} | "
                f"**{ratio / share:.2f}** | {AIM} |"
            )
            print(lines[-1], flush=True)
    return lines


def norms(args, dtype, device) -> list[str]:
    lines = [
        "| pictures | channels | side | plain ms | moments ms | concatenation ms | moments / plain | concatenation / plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rows, channels, side in ((4, 320, 64), (4, 640, 32)):
        x = torch.randn(rows, channels, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        weight, bias = torch.ones(channels, device=device, dtype=dtype), torch.zeros(channels, device=device, dtype=dtype)

        def joined(x=x, weight=weight, bias=bias, side=side):
            both = torch.cat([x, x[:1].expand_as(x)], 2)
            return torch.nn.functional.group_norm(both, 32, weight, bias)[:, :, :side]

        def alone(x=x, weight=weight, bias=bias):
            return torch.nn.functional.group_norm(x, 32, weight, bias)

        def moments(x=x, weight=weight, bias=bias, rows=rows):
            return shared_group_norm(x, 32, weight, bias, 1e-5, rows)

        plain, ours, theirs = in_turn([alone, moments, joined], 4 * args.repeats, args.clock)
        lines.append(
            f"| {rows} | {channels} | {side} | {1000 * plain:.1f} | {1000 * ours:.1f} | {1000 * theirs:.1f} | {ours / plain:.2f} | "
            f"{theirs / plain:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", default="docs/style_aligned_speed.md")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    args.clock = time.process_time if args.device == "cpu" else synchronized
    with torch.inference_mode():
        lines = [
            "# Speed of StyleAligned",
            "",
            f"`python -m benchmarks.style`, torch {torch.__version__}, {platform.machine()}, {args.device}, {args.dtype}, "
            f"{torch.get_num_threads()} threads. One self-attention layer with its projections, medians of runs in turn.",
            "",
            *layers(args, dtype, args.device),
            "",
            "Shared group norms:",
            "",
            *norms(args, dtype, args.device),
            "",
        ]
    Path(args.out).write_text("\n".join(lines))


if __name__ == "__main__":
    main()
