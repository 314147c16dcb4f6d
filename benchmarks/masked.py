"""Masked attention by parts against plain attention and against dense masks.

`python -m benchmarks.masked` writes docs/benchmarks_masked.md. Times are medians of runs taken in turn: processor time of
one thread on a CPU, which does not count what other programs take, and wall time on a GPU.
"""

import argparse
import platform
import time
from pathlib import Path

import torch

from .consistent import in_turn

from storyweft.attention.core import attend  # isort: skip
from storyweft.attention.labels import BoxRegions  # isort: skip
from storyweft.attention.masked import Constraint, masked_attention, partition  # isort: skip

HEADS, DIM, TOKENS = 4, 64, 4096


def inputs(rows: int, tokens: int, dtype, device):
    """q, k, v as hosts hand them over: tokens before heads in memory."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(rows, tokens, HEADS, DIM, generator=generator) for _ in range(3))
    return [x.to(device, dtype).transpose(1, 2) for x in made]


def boxes(frames: int, share: float, ragged: bool) -> BoxRegions:
    """A square of `share` of the picture that moves, or one that also changes its size."""
    found = []
    for frame in range(frames):
        side = (share * (1 + 0.5 * frame / frames if ragged else 1)) ** 0.5
        x = (1 - side) * frame / max(frames - 1, 1)
        found.append((x, (1 - side) / 2, x + side, (1 + side) / 2))
    return BoxRegions(torch.tensor([found], dtype=torch.float64))


def case(frames: int, share: float, ragged: bool, dtype, device, repeats: int, tokens=TOKENS):
    """(share of foreground, number of parts, times of plain, parts and, for one frame, additive and boolean mask)."""
    q, k, v = inputs(frames, tokens, dtype, device)
    side = round(tokens**0.5)
    labels = boxes(frames, share, ragged).labels([[frame] for frame in range(frames)], side, tokens // side)
    parts = partition([Constraint(labels, labels)], frames, q.device)
    forms = [lambda: attend(q, k, v), lambda: masked_attention(q, k, v, parts, attend)]
    if frames == 1:
        apart = (labels[:, :, None] != labels[:, None])[:, None]
        bias = torch.zeros(apart.shape, dtype=dtype).masked_fill_(apart, -10000.0).to(device)
        seen = ~apart.to(device)
        forms += [lambda: attend(q, k, v, bias), lambda: attend(q, k, v, seen)]
    if device != "cpu":
        forms = [_waiting(form) for form in forms]
    times = in_turn(forms, repeats, time.process_time if device == "cpu" else time.perf_counter)
    return float((labels > 0).double().mean()), len(parts), *times


def _waiting(form):
    def run():
        form()
        torch.cuda.synchronize()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", default="docs/benchmarks_masked.md")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    lines = [
        "# Benchmarks of masked attention",
        "",
        f"`python -m benchmarks.masked`, torch {torch.__version__}, {platform.machine()}, {args.device}, {args.dtype}, "
        f"{torch.get_num_threads()} threads. Self-attention of {TOKENS} tokens a picture, {HEADS} heads x {DIM}; index lists "
        "made beforehand, as they are kept for a run.",
        "",
        "| case | box share | attentions | plain s | parts s | parts / plain | aim | additive mask s | parts / additive | aim | "
        "boolean mask s | parts / boolean |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = (
        ("one picture", 1, 0.184, False, "0.80", "0.60"),
        ("one picture, half", 1, 0.5, False, "0.60", ""),
        ("16 frames, box moves", 16, 0.184, False, "1.00", ""),
        ("16 frames, box moves and grows", 16, 0.184, True, "1.00", ""),
    )
    with torch.inference_mode():
        for name, frames, share, ragged, aim, dense_aim in rows:
            few = args.repeats if frames == 1 else max(args.repeats // 3, 2)
            found, parts, plain, own, *dense = case(frames, share, ragged, dtype, args.device, few)
            against = [text for one in dense for text in (f"{one:.3f}", f"**{own / one:.2f}**")] or [""] * 4
            lines.append(
                f"| {name} | {found:.3f} | {parts} | {plain:.3f} | {own:.3f} | **{own / plain:.2f}** | {aim} | {against[0]} | "
                f"{against[1]} | {dense_aim} | {against[2]} | {against[3]} |"
            )
            print(lines[-1], flush=True)
    lines += [
        "",
        "The work that is left is share² + (1 - share)² of plain attention: 0.70 and 0.50. The additive mask is one for all heads; the "
        "aim against it was set where a masked call took 1.30 times a plain one.",
    ]
    Path(args.out).write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
