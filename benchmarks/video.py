"""What the demo video model draws: clips of 32 captions, read frame by frame by the fact classifier.

`python -m benchmarks.video`. The same captions and noise go through the picture model, which draws eight pictures
that know nothing of each other, from independent noise and from noise as alike as the video model's, and through the
generator and the autoencoder, which is the most a reading can reach.
Writes docs/video.md, and with --sheet a sheet of the first clips.
"""

import argparse
import hashlib
import json

import numpy as np
import torch
from PIL import Image

from . import pack

from storyweft.host.demo import CHECKSUMS, WEIGHTS, load_demo_video, load_unet, read_weights  # isort: skip
from storyweft.metrics.facts import Reading, load_reader, pair_agreement, read  # isort: skip
from storyweft.training.storybook import FRAMES, KINDS, PLACES, TIMES, sample_clip  # isort: skip
import nodes  # isort: skip

VIDEO, CEILING, SHOWN = "video model", "drawn by the generator (ceiling)", 12
PICTURES, ALIKE = "picture model", "picture model, noise alike"
COLUMNS = {
    "kind_first": "kind, first frame",
    "kind_last": "kind, last",
    "place_first": "place, first",
    "place_last": "place, last",
    "time_first": "time, first",
    "time_last": "time, last",
    "same_colour": "same colour",
    "same_hat": "same hat",
    "same_identity": "same identity",
    "way": "way",
    "jump": "largest step",
    "still_place": "change of place",
}


def asked(index: int) -> dict[str, str]:
    """Who, where and when of clip `index`."""
    rng = np.random.default_rng((2031, index))
    place, time = (list(words)[rng.integers(len(words))] for words in (PLACES, TIMES))
    return {"kind": list(KINDS)[index % len(KINDS)], "place": place, "time": time}


def prompt(facts: dict[str, str]) -> str:
    article = "an" if facts["kind"][0] in "aeiou" else "a"
    return f"{article} {facts['kind']} {PLACES[facts['place']]} {TIMES[facts['time']]}"


def change(images: torch.Tensor) -> float:
    """Median over pixels and frames of the change to the next frame, in grey levels of 255: that of the backdrop."""
    return images.diff(dim=0).abs().mean(-1).median().item() * 255


def score(readings: list[Reading], facts: dict[str, str], images: torch.Tensor) -> dict[str, float]:
    """Right text facts of first and last frame, agreement of frame pairs, and the way of the box's centre."""
    labels = [reading.labels for reading in readings]
    boxes = np.array([reading.box for reading in readings])
    centres = np.stack([boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]], 1) / 2
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    found = {
        f"{group}_{name}": float(labels[at][group] == facts[group])
        for group in facts
        for name, at in (("first", 0), ("last", -1))
    }
    found |= {f"same_{group}": pair_agreement([words[group] for words in labels]) for group in ("colour", "hat")}
    found["same_identity"] = pair_agreement([reading.identity for reading in readings])
    found["way"] = float(np.linalg.norm(centres[-1] - centres[0]))
    found["jump"] = float(steps.max())
    found["still_place"] = change(images)
    return found


class Studio:
    def __init__(self, steps: int, cfg: float):
        video, self.clip, self.vae, _ = load_demo_video()
        pictures = load_unet(str(WEIGHTS))
        alike = pictures.clone()
        alike.add_object_patch("model_sampling", video.get_model_object("model_sampling"))
        self.models = {VIDEO: video, PICTURES: pictures, ALIKE: alike}
        self.reader = load_reader(*read_weights("facts"))
        self.steps, self.cfg = steps, cfg

    def frames(self, name: str, index: int) -> torch.Tensor:
        """Frames [8, 128, 128, 3] of clip `index`."""
        positive, negative = (nodes.CLIPTextEncode().encode(self.clip, text)[0] for text in (prompt(asked(index)), ""))
        latent = {"samples": torch.zeros(FRAMES, 4, 16, 16)}
        with torch.inference_mode():
            done = nodes.KSampler().sample(
                self.models[name], index, self.steps, self.cfg, "dpmpp_2m", "karras", positive, negative, latent
            )
            return self.vae.decode(done[0]["samples"])

    def drawn(self, index: int) -> torch.Tensor:
        clip = sample_clip(np.random.default_rng((2032, index)), **asked(index))
        with torch.inference_mode():
            return self.vae.decode(self.vae.encode(torch.from_numpy(clip.frames) / 255))


def table(results: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for key, words in COLUMNS.items():
        lines.append(
            f"| {words} | " + " | ".join(f"{np.mean([r[key] for r in rows]):.2f}" for rows in results.values()) + " |"
        )
    return lines


def verdict(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """The aims in words, each reached or missed."""
    clips, alike, drawn = (
        {key: float(np.mean([row[key] for row in results[name]])) for key in COLUMNS}
        for name in (VIDEO, ALIKE, CEILING)
    )
    aims = [
        (
            clips["same_identity"] >= 0.8 * drawn["same_identity"],
            f"identity stays over the frames: {clips['same_identity']:.2f}, {alike['same_identity']:.2f} without "
            f"temporal layers, {drawn['same_identity']:.2f} at most",
        ),
        (clips["still_place"] < 1, f"the place stands still: {clips['still_place']:.1f} grey levels between frames"),
        (
            clips["way"] > 2 * clips["jump"],
            f"the character travels and does not jump: way {clips['way']:.2f}, largest step {clips['jump']:.2f}",
        ),
    ]
    return [f"- {'reached' if met else 'MISSED'}: {words}" for met, words in aims]


def stamp(args, name: str) -> str:
    """Names everything a model's clips depend on."""
    sums = [line for line in (WEIGHTS / CHECKSUMS).read_text().splitlines() if name == VIDEO or "video." not in line]
    return hashlib.sha256(f"{sums} {args.steps} {args.cfg}".encode()).hexdigest()[:12]


def run(args) -> dict[str, list[dict[str, float]]]:
    """Results per model, one per clip; those kept in output/video are not sampled again."""
    folder = pack.ROOT / "output" / "video"
    folder.mkdir(parents=True, exist_ok=True)
    studio, results = Studio(args.steps, args.cfg), {}
    for name in (*studio.models, CEILING):
        results[name] = []
        for index in range(args.clips):
            kept = folder / f"{stamp(args, name)}_{name.split()[0]}{len(name)}_{index}.json"
            if not kept.exists() and index % args.parts == args.part:
                images = (studio.drawn(index) if name == CEILING else studio.frames(name, index)).float().clone()
                strip = np.concatenate(list(images.mul(255).round().byte().numpy()), 1)
                Image.fromarray(strip).save(kept.with_suffix(".png"))
                kept.write_text(json.dumps(score(read(studio.reader, images), asked(index), images)))
            if kept.exists():
                results[name].append(json.loads(kept.read_text()))
    if args.sheet:
        strips = [folder / f"{stamp(args, VIDEO)}_{VIDEO.split()[0]}{len(VIDEO)}_{index}.png" for index in range(SHOWN)]
        Image.fromarray(np.concatenate([np.asarray(Image.open(path)) for path in strips])).save(args.sheet, **pack.JPEG)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--sheet", help="picture file of the first clips of the video model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", type=int, default=1, help="processes that share the clips; each writes no report")
    parser.add_argument("--part", type=int, default=0, help="number of this process; run without both afterwards")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = run(args)
    if args.parts > 1:
        return
    lines = [
        "# Clips of the demo video model",
        "",
        f"`python -m benchmarks.video`: {args.clips} captions, eight frames each, {args.steps} steps of dpmpp_2m karras, CFG "
        f"{args.cfg}, the same noise for both models.",
        "Kind, place and time: share of clips in which that frame shows what the caption says. Same: share of the frame pairs of a",
        "clip that the classifier reads as the same; identity is colour and hat together. Way: distance from the character's centre",
        "in the first frame to that in the last, largest step: between two frames, both in picture widths. Change of place: median",
        "over pixels of the change from one frame to the next, in grey levels of 255. The picture model draws eight pictures, from",
        "independent noise and from noise that is as alike as the video model's, which shows what the temporal layers add. The",
        "classifier was trained on pages, with characters on the ground and away from the edges: of clips it reads the kind less",
        "well, as the last column shows.",
        "",
        *table(results),
        "",
        *verdict(results),
    ]
    (pack.ROOT / "docs" / "video.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[8:]))


if __name__ == "__main__":
    main()
