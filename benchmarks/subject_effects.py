"""Measures what a subject picture does to the demo model's drawings: `python -m benchmarks.subject_effects`.

Every subject is cut out of a page by the Subject node; all are drawn in one batch, each row with its own picture. Writes
docs/subject.md and its sheet. `--speed` measures the extra time of the image branch alone.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
from PIL import Image

from training.storybook import COLOURS, HATS, KINDS, PLACES, TIMES
from training.subjects import page

from . import pack
from .effects import interval

import nodes  # isort: skip
from storyweft.attention.apa import image_branch  # isort: skip
from storyweft.attention.branches import Branch, attend_branches  # isort: skip
from storyweft.attention.core import attend, merge_heads, split_heads  # isort: skip
from storyweft.host.demo import load_demo, read_weights  # isort: skip
from storyweft.metrics.facts import load_reader, read  # isort: skip
from storyweft.nodes.apa import DEMO, AdaptivePromptAlignment, LoadImageAdapter, Subject  # isort: skip

IMAGE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 3.0)
TEXT = (1.0, 0.7)
SHOWN = 6
COLUMNS = ("colour", "hat", "kind", "place", "time")
SD15 = [(4096, 320)] * 5 + [(1024, 640)] * 5 + [(256, 1280)] * 5 + [(64, 1280)]  # queries and width of each layer


def subject(index: int) -> tuple[dict[str, str], dict[str, str], Image.Image]:
    """What the prompt says, what the picture shows, and the picture (RGBA); every second picture is of another kind."""
    rng = np.random.default_rng((2027, index))
    kind, place, time_ = (list(names)[rng.integers(len(names))] for names in (KINDS, PLACES, TIMES))
    shown = {"colour": list(COLOURS)[index % len(COLOURS)], "hat": HATS[index // 2 % len(HATS)]}
    others = [other for other in KINDS if other != kind]
    shown["kind"] = others[rng.integers(len(others))] if index % 2 else kind
    where, when = (list(names)[rng.integers(len(names))] for names in (PLACES, TIMES))
    picture = page(rng, shown["kind"], shown["colour"], shown["hat"], where, when)
    return {"kind": kind, "place": place, "time": time_}, shown, picture


class Studio:
    def __init__(self, args):
        self.args = args
        self.model, clip, self.vae, self.vision = load_demo()
        self.reader = load_reader(*read_weights("facts"))
        self.adapter = LoadImageAdapter.execute(DEMO).args[0]
        self.said, self.shown, pages = zip(*(subject(index) for index in range(args.subjects)), strict=True)
        cut = [self.cut(picture) for picture in pages]
        self.pictures = torch.cat(cut)
        encode = nodes.CLIPTextEncode().encode
        rows = [
            encode(clip, f"a {said['kind']} {PLACES[said['place']]} {TIMES[said['time']]}")[0][0] for said in self.said
        ]
        pooled = torch.cat([row[1]["pooled_output"] for row in rows])
        self.positive = [[torch.cat([row[0] for row in rows]), {"pooled_output": pooled}]]
        self.negative = encode(clip, "")[0]

    @staticmethod
    def cut(picture: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(picture))[None] / 255
        found = Subject.execute(pixels[..., :3], pixels[..., 3], "black", True).args[0].movedim(-1, 1)
        return torch.nn.functional.interpolate(found, (128, 128), mode="bilinear", antialias=True).movedim(1, -1)

    @torch.inference_mode()
    def draw(self, text: float, image: float, guidance: str = "IP-Adapter") -> torch.Tensor:
        """Pictures [subjects, 128, 128, 3]."""
        model = AdaptivePromptAlignment.execute(
            self.model, self.adapter, self.vision, self.pictures, text, image, guidance
        ).args[0]
        latent = {"samples": torch.zeros(self.args.subjects, 4, 16, 16)}
        args = (self.args.seed, self.args.steps, self.args.cfg, "dpmpp_2m", "karras")
        done = nodes.KSampler().sample(model, *args, self.positive, self.negative, latent)
        return self.vae.decode(done[0]["samples"])

    def judge(self, pictures: torch.Tensor) -> dict[str, list[bool]]:
        """Per fact, whether each picture has it: colour and hat of the subject picture, the rest of the prompt."""
        labels = [reading.labels for reading in read(self.reader, pictures.float().clone())]
        wanted = [
            said | {name: seen[name] for name in ("colour", "hat")}
            for said, seen in zip(self.said, self.shown, strict=True)
        ]
        found = {name: [own[name] == want[name] for own, want in zip(labels, wanted, strict=True)] for name in COLUMNS}
        found["identity"] = [a and b for a, b in zip(found["colour"], found["hat"], strict=True)]
        found["text"] = [all(found[name][row] for name in ("kind", "place", "time")) for row in range(len(labels))]
        return found


def run(args) -> dict[str, dict[str, list[bool]]]:
    """Results per setting; settings of an interrupted run are read from output/."""
    folder = pack.ROOT / "output" / "subject"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{args.subjects}_{args.steps}_{args.cfg}_{args.seed}.json"
    found = json.loads(log.read_text()) if log.exists() else {}
    settings = [(text, image, "IP-Adapter") for text in TEXT for image in IMAGE]
    settings += [(1.0, image, "MagDiff") for image in (1.0, 1.5)]
    studio = Studio(args)
    for setting in settings:
        name = " ".join(map(str, setting))
        if name in found:
            continue
        pictures = studio.draw(*setting)
        found[name] = studio.judge(pictures)
        shown = pictures[:SHOWN].mul(255).round().byte().numpy()
        Image.fromarray(np.concatenate(list(shown), 1)).save(folder / f"{name}.png")
        log.write_text(json.dumps(found))
        print(name, {key: round(float(np.mean(value)), 2) for key, value in found[name].items()}, flush=True)
    strips = [np.concatenate(list(studio.pictures[:SHOWN].mul(255).round().byte().numpy()), 1)]
    strips += [np.asarray(Image.open(folder / f"1.0 {image} IP-Adapter.png")) for image in IMAGE]
    Image.fromarray(np.concatenate(strips)).save(pack.ROOT / "docs" / "subject_sheet.jpg", **pack.JPEG)
    return {name: found[name] for name in (" ".join(map(str, setting)) for setting in settings)}


def speed(tokens: int, rows: int = 1, repeats: int = 5) -> dict[str, float]:
    """Time of SD1.5's 16 cross-attention layers at 64 x 64 with the image branch, over that without; medians."""
    layers = []
    for queries, width in SD15:
        linear = [torch.randn(width, size) * size**-0.5 for size in (width, 768, 768, 768, 768, width)]
        layers.append((torch.randn(rows, queries, width), linear))
    words, picture = torch.randn(rows, 77, 768), torch.randn(rows, tokens, 768)
    whole = slice(0, rows)
    cached = [[split_heads(picture @ weight.T, 8) for weight in linear[3:5]] for _, linear in layers]

    def step(form: str) -> float:
        start = time.process_time()
        for (x, (to_q, to_k, to_v, *ip, to_out)), kept in zip(layers, cached, strict=True):
            q, k, v = (split_heads(y @ weight.T, 8) for y, weight in ((x, to_q), (words, to_k), (words, to_v)))
            branches = [Branch(whole, k, v)]
            if form == "recomputed":
                kept = [split_heads(picture @ weight.T, 8) for weight in ip]
            if form != "off":
                branches.append(image_branch(whole, *kept, 1.0))
            merge_heads(attend_branches(q, branches, attend)) @ to_out.T
        return time.process_time() - start

    times = {form: [] for form in ("off", "cached", "recomputed")}
    with torch.inference_mode():
        for _ in range(repeats):
            for form, kept in times.items():
                kept.append(step(form))
    base = statistics.median(times["off"])
    return {form: statistics.median(kept) / base for form, kept in times.items()}


def report(args, found, ratios) -> list[str]:
    lines = [
        "# Effect of a subject picture on the demo model",
        "",
        f"`python -m benchmarks.subject_effects`: {args.subjects} subjects, {args.steps} steps of dpmpp_2m karras, CFG {args.cfg}. Each",
        "is a character cut out of a page of its own by the Subject node; the prompt names a kind, a place and a time, every second",
        "time another kind than the picture shows, and never colour or hat. Colour, hat and identity (both) count what is as in the",
        "picture; kind, place, time and text (all three) what is as in the prompt, read by the fact classifier. In brackets: 95 %",
        "bootstrap interval over subjects. Guessing: colour 0.17, hat 0.33.",
        "",
        "| alpha_text | alpha_image | guidance | identity | colour | hat | text | kind | place | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, facts in found.items():
        cells = [interval(facts[key]) for key in ("identity", "colour", "hat", "text", "kind", "place", "time")]
        lines.append(f"| {' | '.join(name.split(' '))} | {' | '.join(cells)} |")
    colour, text = ({name: float(np.mean(facts[key])) for name, facts in found.items()} for key in ("colour", "text"))
    first, full, strong = (f"1.0 {image} IP-Adapter" for image in (IMAGE[0], 1.0, IMAGE[-1]))
    rising = all(
        colour[f"1.0 {a} IP-Adapter"] <= colour[f"1.0 {b} IP-Adapter"] + 0.05
        for a, b in zip(IMAGE, IMAGE[1:], strict=False)
    )
    aims = [
        (rising, "colour of the picture rises with alpha_image (no fall of more than 0.05 between neighbours)"),
        (
            colour[full] >= 2 * colour[first],
            f"at alpha_image 1 at least twice as often as off: {colour[first]:.2f} -> {colour[full]:.2f}",
        ),
        (
            text[strong] < text[first],
            f"text accuracy falls as the picture gains: {text[first]:.2f} -> {text[strong]:.2f}",
        ),
    ]
    hat = {name: float(np.mean(facts["hat"])) for name, facts in found.items()}
    aims.append((hat[full] >= hat[first] + 0.1, f"hat at alpha_image 1 above off: {hat[first]:.2f} -> {hat[full]:.2f}"))
    lines += ["", *(f"- {'reached' if met else 'MISSED'}: {words}" for met, words in aims), ""]
    lines += [
        "Why hats do not follow: a hat is two latent cells wide, the demo U-Net hardly copies hats even within one picture",
        "(effects.md), and the CLIP embedding tells hats apart in 62 % of cut-outs against 99 % for colours. Identity, which needs",
        "both, is held down by that. The text loses little because the adapter was trained with references of another kind half of",
        "the time; it is the kind that gives way first, place and time stay. With MagDiff's guidance CFG does not strengthen the",
        "picture, so that it needs a higher alpha_image for the same effect.",
        "",
        "## Time",
        "",
        "SD1.5's 16 cross-attention layers at 64 x 64 latents, one row, float32 on a CPU: processor time with the image branch over that",
        "without it, medians of one run. Cached: keys and values of the picture once a run, as the node does; recomputed: in every",
        "layer of every step, as the authors do. Work alone would say 1.01 and 1.02; the rest is a second attention call and the",
        "sum. Other programs ran beside it, so differences below 0.05 say nothing.",
        "",
        "| image tokens | cached | recomputed |",
        "|---|---|---|",
        *(f"| {count} | {ratio['cached']:.3f} | {ratio['recomputed']:.3f} |" for count, ratio in ratios.items()),
        "",
        "Columns of the sheet are subjects; the first row is the picture, then alpha_image 0, 0.25, 0.5, 0.75, 1, 1.5, 3.",
        "",
        "![subjects and alpha_image](subject_sheet.jpg)",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=36)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speed", action="store_true", help="only the times, printed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios = {tokens: speed(tokens) for tokens in (4, 16)}
    print(json.dumps(ratios))
    if args.speed:
        return
    lines = report(args, run(args), ratios)
    (pack.ROOT / "docs" / "subject.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
