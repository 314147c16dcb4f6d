"""What the trained board of the demo adds: 2 x 2 boards, with the demo module, without training, and pictures drawn apart.

`python -m benchmarks.board_trained_effects`. Stories, readings and sampler are those of benchmarks/board_effects.py; three tasks:
all frames, the rest after two given ones, the two in the middle of given ones. Writes docs/board_trained.md and its sheet.
"""

import argparse
import json

import numpy as np
import torch
from PIL import Image

from . import pack
from .board_effects import ALONE, COLUMNS, FRAMES, SIDE, Studio
from .effects import CHECKED, compared, interval, prompt, story

from storyweft.host.trained_board import load_demo  # isort: skip
from storyweft.metrics.facts import pair_agreement, read  # isort: skip
from storyweft.nodes.board import BoardFrames, FrameStoryCrossAttention, StoryBoard  # isort: skip
from storyweft.nodes.trained_board import TrainedBoardBlock  # isort: skip

TASKS = {"visualisation": (), "continuation": (0, 1), "completion": (0, 3)}  # the frames that are given
FREE, TRAINED, APART = "training-free", "trained", "one prompt a picture"
SETTINGS = [(task, way) for task in TASKS for way in (FREE, TRAINED)]
LABEL = {(task, way): f"{task}, {way}" for task, way in SETTINGS} | {("visualisation", APART): APART}


class Boards(Studio):
    def __init__(self, steps: int, cfg: float):
        super().__init__(steps, cfg)
        self.trained = load_demo()

    def drawn(self, task: str, way: str, index: int) -> torch.Tensor:
        """Pictures [4, 128, 128, 3] of story `index`."""
        if way == APART:
            return self.frames(ALONE, index)
        given, pages = list(TASKS[task]), self.pages(index)
        captions = "\n".join(prompt(panel) for panel in story(index))
        latent, positive, board, _ = StoryBoard.execute(
            self.clip,
            captions,
            2,
            FRAMES // 2,
            SIDE,
            SIDE,
            "row by row",
            vae=self.vae,
            known_images=pages[given] if given else None,
            known_frames=", ".join(str(frame + 1) for frame in given),
        ).args
        negative = self.negative
        if way == TRAINED:
            model, positive, negative = TrainedBoardBlock.execute(
                self.model, self.trained, positive, negative, 1.0, "clean"
            ).args
        else:
            model, positive = FrameStoryCrossAttention.execute(self.model, positive, 0.0, "clean").args
        plain, self.negative = self.negative, negative
        sampled = self.sampled(model, positive, latent, index)
        self.negative = plain
        return BoardFrames.execute(sampled, board, self.vae).args[0]

    def read_story(self, task: str, pictures: torch.Tensor, index: int) -> dict[str, float]:
        """Share of drawn frames that show their caption, and agreement of frame pairs (of given with drawn ones)."""
        labels = [reading.labels for reading in read(self.reader, pictures.float().clone())]
        given = TASKS[task]
        drawn = [frame for frame in range(FRAMES) if frame not in given]
        found = {name: float(np.mean([labels[f][name] == story(index)[f][name] for f in drawn])) for name in CHECKED}
        places = [panel["place"] for panel in story(index)]
        foreign = [labels[f]["place"] != places[f] and labels[f]["place"] in places for f in drawn]
        found["foreign_place"] = float(np.mean(foreign))
        for name in ("colour", "hat", "kind"):
            words = [one[name] for one in labels]
            pairs = [words[k] == words[d] for k in given for d in drawn]
            found[f"same_{name}"] = float(np.mean(pairs)) if given else pair_agreement(words)
        return found


def report(args, results: dict, metadata: dict) -> list[str]:
    def rows_of(task, way, name):
        return [row[name] for row in results[task, way]]

    lines = ["| setting | boards | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for key, rows in results.items():
        cells = [interval([row[name] for row in rows]) for name in COLUMNS]
        lines.append(f"| {LABEL[key]} | {len(rows)} | " + " | ".join(cells) + " |")
    aims = []
    for task in TASKS:
        for name, words in (
            ("kind", "the character is what the caption says"),
            ("place", "the place is what the caption says"),
            ("same_colour", "frames agree in colour"),
        ):
            before, after = (rows_of(task, way, name) for way in (FREE, TRAINED))
            aims.append(compared(f"{task}: {words} more often than without training", before, after))
    apart, whole = (rows_of("visualisation", way, "same_colour") for way in (APART, TRAINED))
    aims.append(compared("frames agree in colour more than pictures drawn apart", apart, whole))
    return [
        "# Effect of a trained board on the demo model",
        "",
        f"`python -m benchmarks.board_trained_effects`: {args.boards} stories on 2 x 2 boards of 128 px frames, {args.steps} steps of",
        f"dpmpp_2m karras, CFG {args.cfg:g}; given frames enter without noise. Visualisation: all frames are drawn. Continuation: the",
        "first two are given. Completion: the first and the last. Training-free is Frame-Story Cross Attention with blend 0. What the",
        "columns mean: docs/board.md.",
        f"Training of the module: weights/README.md; its last run took {metadata['minutes']} minutes, {metadata['steps']} steps,",
        f"{metadata['examples_seen']} boards, and ended at loss {metadata['loss']}.",
        "",
        *lines,
        "",
        *aims,
        "",
        "Two stories; rows from top to bottom in the order of the table:",
        "",
        "![boards](board_trained_sheet.jpg)",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boards", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cfg", type=float, default=4.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    studio, keys, shown = Boards(args.steps, args.cfg), [("visualisation", APART), *SETTINGS], []
    results: dict = {key: [] for key in keys}
    for index in range(args.boards):
        strips = []
        for task, way in keys:
            with torch.inference_mode():
                pictures = studio.drawn(task, way, index)
            results[task, way].append(studio.read_story(task, pictures, index))
            strips.append(np.concatenate(list(pictures.mul(255).round().byte().numpy()), 1))
        if index < 2:
            shown.append(
                np.concatenate([np.pad(one, ((0, 4), (0, 12), (0, 0)), constant_values=255) for one in strips])
            )
        print(f"story {index + 1} of {args.boards}: {json.dumps(results[keys[-1]][-1])}", flush=True)
    lines = report(args, results, studio.trained.metadata)
    (pack.ROOT / "docs" / "board_trained.md").write_text("\n".join(lines) + "\n")
    Image.fromarray(np.concatenate(shown, 1)).save(pack.ROOT / "docs" / "board_trained_sheet.jpg", **pack.JPEG)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
