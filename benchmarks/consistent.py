"""Consistent Self-Attention: gathered form against the authors' masked form, the idle block, and a 100-panel story.

`python -m benchmarks.consistent` writes docs/benchmarks.md. Times are CPU seconds of one thread, so that other work on the
machine does not blur the ratios, and medians of runs taken in turn; memory is what a fresh process's peak grows by while
it runs one form.
"""

import argparse
import multiprocessing
import platform
import re
import statistics
import time
from pathlib import Path

import torch

from . import pack  # noqa: F401

from storyweft.attention.consistent import ConsistentOptions, sampled_tokens  # isort: skip
from storyweft.attention.joined import joined_attention  # isort: skip
from storyweft.attention.core import attend  # isort: skip

HEADS, DIM = 10, 64
LIMITS = {4: (0.70, 0.625), 8: (0.63, 0.5625), 16: (0.60, 0.531)}


def inputs(panels: int, tokens: int):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(panels, HEADS, tokens, DIM, generator=generator) for _ in range(3))
    return q, k, v, torch.rand(panels, tokens, generator=generator) < 0.5


def gathered(q, k, v, draw):
    pieces = sampled_tokens(k, v, draw)
    return joined_attention(q, k, v, [pieces[:row] + pieces[row + 1 :] for row in range(len(q))], attend)


def masked(q, k, v, draw):
    """The form of the authors' first demos: all panels as one sequence under a (panels x tokens)² boolean mask."""
    panels, _, tokens, _ = q.shape
    mask = draw.flatten().repeat(panels * tokens, 1)
    for row in range(panels):
        own = slice(row * tokens, (row + 1) * tokens)
        mask[own, own] = True
    one = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*one, attn_mask=mask)
    return out[0].unflatten(1, (panels, tokens)).transpose(0, 1)


def in_turn(forms, repeats: int, clock=time.process_time) -> list[float]:
    """Median seconds of each form by `clock`, run in turn."""
    seconds = [[] for _ in forms]
    for _ in range(repeats + 1):
        for kept, form in zip(seconds, forms, strict=True):
            start = clock()
            form()
            kept.append(clock() - start)
    return [statistics.median(kept[1:]) for kept in seconds]


def _resident(line: str) -> int:
    """KiB of this process: VmRSS now, or VmHWM, the peak since it was last reset (Linux)."""
    return int(re.search(rf"{line}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _grown(form, panels: int, tokens: int, pipe) -> None:
    data = inputs(panels, tokens)
    attend(*(x[:1] for x in data[:3]))
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    form(*data)
    pipe.send((_resident("VmHWM") - before) / 1024)


def peak(form, panels: int, tokens: int) -> float:
    """MiB by which one run raises the peak of a fresh process."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_grown, args=(form, panels, tokens, there))
    process.start()
    grown = here.recv()
    process.join()
    return grown


def forms(repeats: int) -> list[str]:
    lines = [
        "## Gathered form against the authors' masked form",
        "",
        f"One guidance part, {HEADS} heads x {DIM}, rate 0.5, float32.",
        "",
        "| panels | tokens each | masked s | gathered s | time ratio | aim | FLOP limit | masked MiB | gathered MiB | memory ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for panels, tokens in ((4, 1024), (8, 1024), (16, 1024), (4, 4096)):
        data = inputs(panels, tokens)
        slow, fast = in_turn([lambda d=data: masked(*d), lambda d=data: gathered(*d)], repeats)
        heavy, light = peak(masked, panels, tokens), peak(gathered, panels, tokens)
        aim, limit = LIMITS[panels]
        lines.append(
            f"| {panels} | {tokens} | {slow:.2f} | {fast:.2f} | **{fast / slow:.2f}** | {aim:.2f} | {limit} | {heavy:.0f} | "
            f"{light:.0f} | {light / heavy:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def idle(repeats: int) -> list[str]:
    from storyweft.host import override  # noqa: PLC0415  only these two need the demo model
    from storyweft.host.consistent import ConsistentRule
    from storyweft.host.demo import load_demo

    model, clip, *_ = load_demo()
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a fox in the forest by day"))
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    block = override.register(model, ConsistentRule(ConsistentOptions(rate=0.0), "output path"))
    latent = torch.zeros(8, 4, 32, 32)
    plain, patched = in_turn(
        [lambda: steps(model, positive, negative, latent, 4), lambda: steps(block, positive, negative, latent, 4)],
        repeats,
    )
    return [
        "",
        "## The idle block",
        "",
        f"Demo model, 8 pictures of 256 px, 4 steps: no block {plain:.2f} s, block with sampling_ratio 0 "
        f"{patched:.2f} s: {100 * (patched / plain - 1):+.1f} % (aim: at most 1 %).",
    ]


def steps(model, positive, negative, latent, count: int):
    import comfy.sample

    noise = comfy.sample.prepare_noise(latent, 0)
    return comfy.sample.sample(
        model, noise, count, 4.0, "ddim", "normal", positive, negative, latent, disable_pbar=True, seed=0
    )


def long_story(panels: int) -> list[str]:
    import comfy.sample
    from storyweft.host import override
    from storyweft.host.consistent import ConsistentRule
    from storyweft.host.demo import load_demo
    from storyweft.host.prompts import encode_panels
    from storyweft.host.story_sampling import Settings, StorySampler
    from storyweft.story.script import parse_script

    model, clip, *_ = load_demo()
    places = ("in the forest", "on the beach", "in the snow", "in the city", "in the desert", "in the meadow")
    story = parse_script("[Fox] a fox", "\n".join(f"[Fox] {places[i % 6]} by day" for i in range(panels)), id_count=4)
    marks = {"storyweft_panels": tuple(range(panels)), "storyweft_story": story}
    positive = [
        [text, extras | marks]
        for text, extras in encode_panels(clip, [panel.prompt for panel in story.panels], "bench")
    ]
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    block = override.register(model, ConsistentRule(ConsistentOptions(), "output path"))
    seconds, real = [], comfy.sample.sample

    def timed(*args, **kwargs):
        start = time.process_time()
        out = real(*args, **kwargs)
        seconds.append(time.process_time() - start)
        return out

    comfy.sample.sample = timed
    settings = Settings(0, 20, 4.0, "ddim", "normal", 1.0, "bank")
    _, characters, _ = StorySampler(
        "bench", block, positive, negative, {"samples": torch.zeros(1, 4, 16, 16)}, settings, None
    ).draw()
    comfy.sample.sample = real
    early, late = statistics.median(seconds[1:21]), statistics.median(seconds[-20:])
    return [
        "",
        f"## A story of {panels} panels",
        "",
        f"Demo model, bank of 4 id panels ({characters['Fox'].bytes / 2**20:.1f} MiB), 20 steps: a "
        f"panel takes {early:.2f} s early and {late:.2f} s at the end, {100 * (late / early - 1):+.1f} % (aim: within 10 %).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--panels", type=int, default=100)
    parser.add_argument("--out", default="docs/benchmarks.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        lines = [
            "# Benchmarks",
            "",
            f"`make bench`, torch {torch.__version__}, {platform.machine()}, CPU seconds of one thread.",
            "",
            *forms(args.repeats),
            *idle(args.repeats),
            *long_story(args.panels),
            "",
        ]
    Path(args.out).write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
