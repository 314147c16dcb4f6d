"""Trains the readers of kind and place on both halves of clips of the picture-book world with sound.

`python -m training.joint_facts` on one core. Clips are seen with noise, other loudness and blur, so that readings hold
for sampled clips; never tuned on sampled clips. The readers only measure.
"""

import argparse
import json

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from metrics.joint_facts import JointReader, read_pictures, read_sounds

from . import loop
from .joint_data import demo_clips
from .sounds import SUBSETS, sample_clip

LABELS = {"kind": list(SUBSETS["kinds"]), "place": list(SUBSETS["places"])}
HELD_OUT = 9000  # seed of the clips that are kept for measuring


def facts(seed: int, count: int) -> list[dict[str, str]]:
    """Kind and place of the clips of `demo_clips`."""
    clips = (sample_clip(np.random.default_rng((seed, index))) for index in range(count))
    return [{"kind": clip.kind, "place": clip.place} for clip in clips]


class Task(loop.Task):
    name = "joint_facts"

    def __init__(self, args):
        torch.manual_seed(args.seed)
        self.model, self.config = JointReader(LABELS), {"labels": LABELS}
        self.clips, self.examples = demo_clips(args.seed, args.clips, args.folder), args.clips
        known = facts(args.seed, args.clips)
        self.targets = {
            name: torch.tensor([words.index(one[name]) for one in known]) for name, words in LABELS.items()
        }

    def loss(self, network, index, generator):
        video, sound = self.clips.batch(index)
        rows = torch.arange(len(index))
        frames = video[rows[:, None], torch.randint(video.shape[1], (len(index), 2), generator=generator)].flatten(0, 1)
        spread = 0.5 * torch.rand(len(frames), 1, 1, 1, generator=generator) ** 2
        soft = interpolate(avg_pool2d(frames, 2), scale_factor=2, mode="bilinear")
        share = torch.rand(len(frames), 1, 1, 1, generator=generator)
        frames = share * soft + (1 - share) * frames + spread * torch.randn(frames.shape, generator=generator)
        gain = 0.6 + 0.6 * torch.rand(len(index), 1, 1, generator=generator)
        hiss = 0.15 * torch.rand(len(index), 1, 1, generator=generator) ** 2
        sound = gain * sound + hiss * torch.randn(sound.shape, generator=generator)
        total = 0.0
        for logits, repeats in ((self.model.pictures(frames), 2), (self.model.sounds(sound), 1)):
            for name, scores in logits.items():
                total = total + cross_entropy(scores.float(), self.targets[name][index].repeat_interleave(repeats))
        return total


def held_out(reader: JointReader, count: int = 300) -> dict[str, float]:
    """Share of held-out clips whose halves are read right."""
    video, sound = demo_clips(HELD_OUT, count).batch(torch.arange(count))
    known = facts(HELD_OUT, count)
    return {
        f"{name} from {half}": float(np.mean([one[name] == right[name] for one, right in zip(read, known, strict=True)]))
        for half, read in (("pictures", read_pictures(reader, video)), ("sound", read_sounds(reader, sound)))
        for name in LABELS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    loop.add_arguments(parser, steps=800, minutes=0, batch=32, rate=3e-3, seed=8, precision="no")
    parser.add_argument("--clips", type=int, default=2000)
    args = parser.parse_args()
    task = Task(args)
    run = loop.Loop(task, args)
    run.run()
    if not args.dry_run:
        with run.averaged():
            task.metadata = {"held_out": json.dumps(held_out(task.model.train(False)))}
        run.save()
        print(task.metadata["held_out"])


if __name__ == "__main__":
    main()
