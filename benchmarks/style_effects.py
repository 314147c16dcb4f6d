"""What StyleAligned does to sets of pictures: four kinds in four places, off and on, read by features and facts.

`python -m benchmarks.style_effects --sets 24`. Only the first prompt of a set says the time of day; colours and hats no
prompt ever names. So the style of a set is its light, its palette, the character's colour and hat. Finished sets are kept in
output/style_effects. Writes docs/style_aligned.md and docs/style_aligned_sheet.jpg.
"""

import argparse
import json
import math
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import effects, pack

from storyweft.host.demo import load_demo  # isort: skip
from storyweft.metrics.facts import pair_agreement, read  # isort: skip
from storyweft.nodes.style import StyleAligned, StyleReferencePicture  # isort: skip
from storyweft.training.storybook import KINDS, PLACES, TIMES, sample  # isort: skip
import nodes  # isort: skip

PICTURES, SHOWN = 4, 5
OFF, ON, FREE, ONE = "off", "StyleAligned", "drawn by the generator, styles free", "drawn by the generator, one style"
SPLIT, FULL, GIVEN = "without AdaIN", "full sharing", "style from a picture"
# setting -> what the block is given, None without it; the main ones are run on all sets, the others on fewer
SETTINGS = {
    FREE: None,
    ONE: None,
    OFF: None,
    ON: {},
    SPLIT: {"adain_queries": False, "adain_keys": False},
    FULL: {"full_attention_share": True, "share_group_norm": False},
    GIVEN: {"shared_score_shift": math.log(2)},
    "without shared group norms": {"share_group_norm": False},
    "shift ln 2": {"shared_score_shift": math.log(2)},
    "values aligned too": {"adain_values": True},
    "half of the layers": {"only_self_level": 0.5},
}
MAIN = list(SETTINGS)[:4]
COLUMNS = {
    "clip": "CLIP spread",
    "moments": "style spread",
    "light": "light of picture 1",
    "colour": "same colour",
    "hat": "same hat",
    "kind": "kind",
    "place": "place",
}


def facts_of(index: int) -> list[dict[str, str]]:
    """Four kinds in four places; the time is the first picture's."""
    rng = np.random.default_rng((3024, index))
    kinds, places = rng.permutation(list(KINDS))[:PICTURES], rng.permutation(list(PLACES))[:PICTURES]
    light = list(TIMES)[index % len(TIMES)]
    return [{"kind": str(k), "place": str(p), "time": light} for k, p in zip(kinds, places, strict=True)]


def prompts(index: int) -> list[str]:
    """The first prompt says the time, the others leave it open."""
    out = []
    for number, facts in enumerate(facts_of(index)):
        article = "an" if facts["kind"][0] in "aeiou" else "a"
        words = f"{article} {facts['kind']} {PLACES[facts['place']]}"
        out.append(words if number else f"{words} {TIMES[facts['time']]}")
    return out


class Studio(effects.Studio):
    """The demo models and the sampler settings of one report."""

    def __init__(self, steps: int, cfg: float):
        super().__init__(steps, cfg)
        self.vision = load_demo()[3]

    def pictures(self, name: str, index: int) -> torch.Tensor:
        """Pictures [4, 128, 128, 3] of a set."""
        if name in (FREE, ONE):
            return self.drawn(index, name == ONE)
        rows = [nodes.CLIPTextEncode().encode(self.clip, prompt)[0][0] for prompt in prompts(index)]
        pooled = torch.cat([row[1]["pooled_output"] for row in rows])
        positive = [[torch.cat([row[0] for row in rows]), {"pooled_output": pooled}]]
        model, latent = self.model, {"samples": torch.zeros(PICTURES, 4, 16, 16)}
        if SETTINGS[name] is not None:
            model = StyleAligned.execute(model, **SETTINGS[name]).args[0]
        scheduler = "normal"
        with torch.inference_mode():
            if name == GIVEN:
                given = {"samples": self.vae.encode(self.drawn(index, True)[:1])}
                model, latent = StyleReferencePicture.execute(
                    model, positive, self.negative, given, PICTURES, self.steps, scheduler, 2.0, self.steps // 10
                ).args
            done = nodes.KSampler().sample(
                model, index, self.steps, self.cfg, "dpmpp_2m", scheduler, positive, self.negative, latent
            )
            return self.vae.decode(done[0]["samples"])

    def drawn(self, index: int, one_style: bool) -> torch.Tensor:
        """The set as the generator draws it, through the autoencoder, in one style or each as it comes."""
        rng = np.random.default_rng((3025, index))
        first, *others = facts_of(index)
        pages = [sample(rng, "one", **first)]
        look = {"colour": pages[0].facts[0].colour, "hat": pages[0].facts[0].hat}
        for facts in others:
            free = {key: facts[key] for key in ("kind", "place")}
            pages.append(sample(rng, "one", **(facts | look if one_style else free)))
        with torch.inference_mode():
            images = torch.from_numpy(np.stack([page.image for page in pages])) / 255
            return self.vae.decode(self.vae.encode(images))

    def judge(self, images: torch.Tensor, index: int) -> dict[str, float]:
        """Spreads of the set, and what the fact reader finds in it."""
        images = images.float().clone()
        labels = [reading.labels for reading in read(self.reader, images)]
        wanted = facts_of(index)
        found = {
            "clip": spread(self.vision.encode_image(images)["image_embeds"]),
            "moments": spread(moments(self.reader, images)),
            "light": float(np.mean([words["time"] == labels[0]["time"] for words in labels[1:]])),
        }
        for group in ("colour", "hat"):
            found[group] = pair_agreement([words[group] for words in labels])
        for group in ("kind", "place"):
            found[group] = float(np.mean([w[group] == f[group] for w, f in zip(labels, wanted, strict=True)]))
        return found


def spread(features: torch.Tensor) -> float:
    """Mean cosine distance between the pictures of a set, from features [pictures, n]."""
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    return float(np.mean([1 - float(unit[i] @ unit[j]) for i, j in combinations(range(len(unit)), 2)]))


@torch.no_grad()
def moments(reader, images: torch.Tensor) -> torch.Tensor:
    """Mean and spread over the picture of the first convolution's channels: style as a style loss measures it."""
    x = torch.nn.functional.pixel_unshuffle(images.movedim(-1, 1) * 2 - 1, 4)
    channels = reader.body[:3](x).flatten(2)
    return torch.cat([channels.mean(2), channels.std(2)], 1)


def run(args, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Results per setting, one per set; unfinished ones are sampled now."""
    studio, log = Studio(args.steps, args.cfg), folder / "results.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(line["setting"], line["set"]): line for line in lines}
    for name in SETTINGS:
        for index in range(args.sets if name in MAIN else min(args.sweep_sets, args.sets)):
            start = time.time()
            if (name, index) in known:
                continue
            images = studio.pictures(name, index)
            known[name, index] = {"setting": name, "set": index, **studio.judge(images, index)}
            if index < SHOWN:
                strip = np.concatenate(list(images.mul(255).round().byte().numpy()), 1)
                Image.fromarray(strip).save(folder / f"{name}_{index}.png")
            with log.open("a") as file:
                file.write(json.dumps(known[name, index]) + "\n")
            print(f"{name}: set {index + 1}, {time.time() - start:.1f} s", flush=True)
    found = {name: [line for (setting, _), line in sorted(known.items()) if setting == name] for name in SETTINGS}
    return {name: rows for name, rows in found.items() if rows}


def table(results: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = ["| setting | sets | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, rows in results.items():
        cells = [effects.interval([row[key] for row in rows]) for key in COLUMNS]
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    return lines


def verdict(results: dict[str, list[dict[str, float]]]) -> list[str]:
    mean = {name: {key: float(np.mean([row[key] for row in rows])) for key in COLUMNS} for name, rows in results.items()}
    off, on = mean[OFF], mean[ON]
    closed = {key: (off[key] - on[key]) / (off[key] - mean[ONE][key]) for key in ("clip", "moments")}
    lost = max(off[key] - on[key] for key in ("kind", "place"))
    few = len(results[FULL])
    full, aligned, split = (float(np.mean([row["colour"] for row in results[n][:few]])) for n in (FULL, ON, SPLIT))
    aims = [
        (on["clip"] < off["clip"], f"the set is closer in CLIP features: {off['clip']:.3f} -> {on['clip']:.3f}, {closed['clip']:.0%} "
         "of the way to sets drawn in one style"),
        (on["moments"] < off["moments"], f"the set is closer in style features: {off['moments']:.4f} -> {on['moments']:.4f}, "
         f"{closed['moments']:.0%} of the way"),
        (on["light"] >= 0.8, f"pictures take the light of the first: {off['light']:.2f} -> {on['light']:.2f} (aim 0.8)"),
        (on["colour"] >= 2 * off["colour"], f"colours agree at least twice as often: {off['colour']:.2f} -> {on['colour']:.2f}"),
        (lost <= 0.03, f"kind and place lose at most 3 points: {100 * lost:.1f}"),
        (full >= aligned >= split, f"the paper's order full sharing, StyleAligned, without AdaIN holds for colour on the same {few} sets: "
         f"{full:.2f}, {aligned:.2f}, {split:.2f}"),
    ]  # fmt: skip
    return [f"- {'reached' if met else 'MISSED'}: {words}" for met, words in aims]


def sheet(folder: Path, path: Path) -> None:
    """Sets below each other; from left to right off, StyleAligned, and with a given picture (its first)."""
    rows = []
    for index in range(SHOWN):
        strips = [np.asarray(Image.open(folder / f"{name}_{index}.png")) for name in (OFF, ON, GIVEN)]
        rows.append(np.concatenate([np.pad(one, ((0, 6), (0, 16), (0, 0)), constant_values=255) for one in strips], 1))
    Image.fromarray(np.concatenate(rows)).save(path, **pack.JPEG)


def report(args, results: dict[str, list[dict[str, float]]]) -> list[str]:
    return [
        "# Effect of StyleAligned on the demo models",
        "",
        f"`python -m benchmarks.style_effects`: {args.sets} sets of four pictures, four kinds in four places, {args.steps} steps of "
        f"dpmpp_2m, scheduler normal, CFG {args.cfg}.",
        "Only the first prompt says the time of day; body colour and hat no prompt names. The style of a set is what prompts leave",
        "open: light, palette, the character's colour. CLIP spread is the mean cosine distance between the demo CLIP vision",
        "embeddings of a set's pictures; style spread the same between mean and standard deviation of the channels of the fact",
        "reader's first convolution. Light: share of pictures 2 to 4 that show the time of day of picture 1. Same colour and",
        "hat: share of pairs that agree. Kind and place: share of pictures that show what the prompt says. In brackets: 95 %",
        "bootstrap interval over sets.",
        "",
        *table(results),
        "",
        *verdict(results),
        "",
        "![off, StyleAligned, style from a picture](style_aligned_sheet.jpg)",
        "",
        "Left: off. Middle: StyleAligned, the first picture of each set is the one without the block. Right: the first picture is",
        "given (drawn by the generator), inverted and replayed.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=24, help="sets of the main settings")
    parser.add_argument("--sweep-sets", type=int, default=8, help="sets of the other settings")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = pack.ROOT / "output" / "style_effects" / effects.stamp(args)
    folder.mkdir(parents=True, exist_ok=True)
    results = run(args, folder)
    lines = report(args, results)
    (pack.ROOT / "docs" / "style_aligned.md").write_text("\n".join(lines) + "\n")
    sheet(folder, pack.ROOT / "docs" / "style_aligned_sheet.jpg")
    print("\n".join(lines[10:]))


if __name__ == "__main__":
    main()
