"""What the Semantic Motion Predictor adds between two pictures: clips of the generator, of which it sees first and last frame.

`python -m benchmarks.motion_effects`. Every way of filling the frames between has the same captions, noise and held ends.
Writes docs/motion.md and docs/motion_sheet.jpg.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import pack
from .effects import compared

from storyweft.host import demo, motion  # isort: skip
from storyweft.host.image_adapter import load_demo as demo_adapter  # isort: skip
from storyweft.metrics.facts import load_reader, read  # isort: skip
from storyweft.nodes.motion import KeyframeLatent, SemanticMotionPredictor  # isort: skip
from storyweft.training.storybook import FRAMES, sample_clip  # isort: skip
import nodes  # isort: skip

BLEND, NONE, PLAIN = "linear blend of the pictures", "no condition", "interpolated, pack's subject adapter"
TRAINED, PREDICTED, CEILING = (
    "interpolated, trained adapter",
    "predicted, trained adapter",
    "true frames through the VAE",
)
WAYS = (BLEND, NONE, PLAIN, TRAINED, PREDICTED, CEILING)
ROWS = {
    "distance": "distance to the true frame (grey levels)",
    "path": "path error of the character",
    "colour": "colour as in the pictures",
    "hat": "hat as in the pictures",
    "kind": "kind as in the true frame",
    "count": "one character in the frame",
    "ends": "greatest change of first and last frame",
}


class Studio:
    def __init__(self, steps: int, cfg: float):
        self.model, self.clip, self.vae, self.vision = demo.load_demo_video()
        self.reader = load_reader(*demo.read_weights("facts"))
        self.predictor, self.adapter = motion.load_demo(), demo_adapter()
        self.steps, self.cfg, self.sampling, self.predicting = steps, cfg, 0.0, 0.0

    def through(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(self.vae.encode(pictures))

    def frames(self, way: str, true: torch.Tensor, caption: str, seed: int) -> torch.Tensor:
        """Frames [8, 128, 128, 3] between the ends of `true`."""
        if way == CEILING:
            return self.through(true)
        ends, u = true[[0, -1]], torch.linspace(0, 1, len(true))[:, None, None, None]
        if way == BLEND:
            return torch.lerp(*self.through(ends)[:, None], u)
        positive, negative = (nodes.CLIPTextEncode().encode(self.clip, text)[0] for text in (caption, ""))
        latent = KeyframeLatent.execute(self.vae, ends, len(true)).result[0]
        model, given = self.model, {}
        if way == PLAIN:
            given = {"image_adapter": self.adapter}
        elif way == TRAINED:
            given = {"image_adapter": self.predictor.adapter}
        elif way == PREDICTED:
            given = {"motion_predictor": self.predictor}
        start = time.perf_counter()
        if given:
            model, positive, negative, *_ = SemanticMotionPredictor.execute(
                model, positive, negative, self.vision, ends, len(true), **given
            ).result
        ready = time.perf_counter()
        (found,) = nodes.KSampler().sample(
            model, seed, self.steps, self.cfg, "dpmpp_2m", "karras", positive, negative, latent
        )
        if way == PREDICTED:
            self.predicting += ready - start
            self.sampling += time.perf_counter() - ready
        return self.vae.decode(found["samples"])


def centre(box: tuple) -> np.ndarray:
    return np.array([box[0] + box[2], box[1] + box[3]]) / 2


def score(reader, frames: torch.Tensor, clip, through: torch.Tensor) -> dict[str, float]:
    """Means over the frames between the ends, and what became of the ends."""
    true = torch.from_numpy(clip.frames).float() / 255
    inner = list(range(1, len(true) - 1))
    found = read(reader, frames[inner])
    facts = [clip.facts[index] for index in inner]
    same = {
        name: float(np.mean([one.labels[name] == getattr(fact, name) for one, fact in zip(found, facts, strict=True)]))
        for name in ("colour", "hat", "kind")
    }
    path = [np.linalg.norm(centre(one.box) - centre(fact.box)) for one, fact in zip(found, facts, strict=True)]
    return same | {
        "distance": (frames[inner] - true[inner]).abs().mean().item() * 255,
        "path": float(np.mean(path)),
        "count": float(np.mean([one.labels["count"] == "one" for one in found])),
        "ends": (frames[[0, -1]] - through[[0, -1]]).abs().max().item() * 255,
    }


def report(scores: dict[str, list[dict]], args, studio: Studio) -> str:
    mean = {way: {name: np.mean([one[name] for one in found]) for name in ROWS} for way, found in scores.items()}
    error = {
        way: {name: np.std([one[name] for one in found]) / len(found) ** 0.5 for name in ROWS}
        for way, found in scores.items()
    }
    lines = [
        "# Frames between two pictures",
        "",
        f"`python -m benchmarks.motion_effects`: {args.clips} clips of the generator that no trainer saw, {FRAMES} frames each, of",
        f"which every way gets the first and the last; {args.steps} steps of dpmpp_2m karras, CFG {args.cfg:g}, ends held by Keyframe",
        "Latent, the same noise. Means over the frames between and the standard error over clips. Path error: distance of the",
        "character's centre to the true one,",
        "in picture widths. The last column is what the readings can reach.",
        "",
        f"| | {' | '.join(WAYS)} |",
        f"|---|{'---|' * len(WAYS)}",
    ]
    for name, words in ROWS.items():
        cells = [f"{mean[way][name]:.2f} ± {error[way][name]:.2f}" for way in WAYS]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    share = studio.predicting / studio.sampling
    ratio = studio.predictor.metadata["middle_error_over_interpolation"]
    lines += [
        "",
        f"- On held-out clips the predictor's error on middle frames is {ratio} of the interpolation's.",
        f"- CLIP vision, prediction and tokens of a clip together take {100 * share:.1f} % of its sampling time ({args.steps} steps).",
    ]

    def aim(words: str, name: str, way: str, sign: float = 1) -> str:
        before, after = ([sign * one[name] for one in scores[key]] for key in (way, PREDICTED))
        return compared(words, before, after)

    lines += [
        aim("predicted frames keep the pictures' colour better than no condition", "colour", NONE),
        aim("predicted frames keep the pictures' hat better than no condition", "hat", NONE),
        aim("predicted frames keep colour better than interpolated embeddings", "colour", TRAINED),
        aim("the character is nearer to its true place than without condition (minus the error)", "path", NONE, -1),
        aim("frames are nearer to the true ones than a linear blend (minus the distance)", "distance", BLEND, -1),
    ]
    lines += [
        f"- {'reached' if ok else 'MISSED'}: {words}"
        for ok, words in (
            (mean[PREDICTED]["ends"] < 1, "first and last frame are kept"),
            (share < 0.01, "the predictor takes less than 1 % of sampling time"),
        )
    ]
    lines += [
        "",
        "The embedding of the demo encoder says who is in a picture and not where: a linear probe of it (200 clips to learn from, 50",
        "to test) explains nothing of the character's place. So no predictor of such embeddings can steer the path in this world;",
        "what it carries over the frames is identity. `motion_sheet.jpg`: the first clips, one way below the other in the order of",
        "the table.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    studio, scores, shown = Studio(args.steps, args.cfg), {way: [] for way in WAYS}, []
    for index in range(args.clips):
        clip = sample_clip(np.random.default_rng((2077, index)))
        true = torch.from_numpy(clip.frames).float() / 255
        with torch.inference_mode():
            through = studio.through(true)
            for way in WAYS:
                frames = studio.frames(way, true, clip.caption, index)
                scores[way].append(score(studio.reader, frames, clip, through))
                if index < 3:
                    shown.append(np.concatenate(list((frames * 255).byte().numpy()), 1))
        print(f"clip {index + 1} of {args.clips}", flush=True)
    args.out.joinpath("motion.md").write_text(report(scores, args, studio))
    Image.fromarray(np.concatenate(shown)).save(args.out / "motion_sheet.jpg", **pack.JPEG)
    print(args.out.joinpath("motion.md").read_text())


if __name__ == "__main__":
    main()
