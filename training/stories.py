"""Stories for the board trainer: pictures with captions, from folders, PororoSV, FlintstonesSV, or the picture-book world.

Every reader gives stories of `frames` pictures; pictures are read when they are encoded.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .storybook import COLOURS, HATS, KINDS, sample

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
LAYOUTS = ("folder", "pororo", "flintstones")


@dataclass(frozen=True)
class Picture:
    """`read` gives uint8 [h, w, 3]."""

    read: Callable[[], np.ndarray]
    caption: str


def _opened(path: Path) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(Image.open(path).convert("RGB"))


def folder_stories(folder: Path, frames: int) -> list[list[Picture]]:
    """Each folder with captions.txt (a line a picture) and as many pictures, in the order of their names, is a story.

    Longer stories are cut into several. Raises ValueError where counts differ, or when no story is found.
    """
    stories = []
    for told in sorted(Path(folder).rglob("captions.txt")):
        captions = told.read_text().strip().splitlines()
        paths = sorted(path for path in told.parent.iterdir() if path.suffix.lower() in SUFFIXES)
        if len(paths) != len(captions):
            raise ValueError(f"{told} has {len(captions)} captions and its folder {len(paths)} pictures; give one each")
        pictures = [Picture(_opened(path), caption.strip()) for path, caption in zip(paths, captions, strict=True)]
        stories += [pictures[start : start + frames] for start in range(0, len(pictures) - frames + 1, frames)]
    return _some(stories, folder, frames, "folder with captions.txt and as many pictures")


def _stacked(path: Path, number: int) -> Callable[[], np.ndarray]:
    """A picture of a PororoSV file holds several frames of one shot one below the other; one of them is taken."""

    def read() -> np.ndarray:
        whole = np.asarray(Image.open(path).convert("RGB"))
        count = max(1, whole.shape[0] // whole.shape[1])
        top = number % count * whole.shape[1]
        return whole[top : top + whole.shape[1]]

    return read


def pororo_stories(folder: Path, frames: int) -> list[list[Picture]]:
    """PororoSV as StoryGAN published it: descriptions.npy, following_cache4.npy, img_cache4.npy, train_seen_unseen_ids.npy."""
    folder = Path(folder)
    told, first, following, split = (
        _array(folder / name)
        for name in ("descriptions.npy", "img_cache4.npy", "following_cache4.npy", "train_seen_unseen_ids.npy")
    )
    told, stories = told.item(), []
    for number in split[0]:
        names = [_text(name) for name in (first[number], *following[number])][:frames]
        pictures = [
            Picture(_stacked(folder / name, int(number)), told[Path(name).with_suffix("").as_posix()][0])
            for name in names
        ]
        stories += [pictures] if len(pictures) == frames else []
    return _some(stories, folder, frames, "training story")


def _array(path: Path) -> np.ndarray:
    """Arrays of names and texts are pickled, as they were published; open no file that you do not trust."""
    return np.load(path, allow_pickle=True, encoding="latin1")


def _text(name) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def flintstones_stories(folder: Path, frames: int) -> list[list[Picture]]:
    """FlintstonesSV: its annotations and split as json, following_cache4.pkl, video_frames_sampled/<id>.npy."""
    folder = Path(folder)
    told = {
        one["globalID"]: one["description"]
        for one in json.loads((folder / "flintstones_annotations_v1-0.json").read_text())
    }
    split = json.loads((folder / "train-val-test_split.json").read_text())["train"]
    with (folder / "following_cache4.pkl").open("rb") as file:
        following = pickle.load(file)
    stories = []
    for first in split:
        ids = [first, *following.get(first, [])][:frames]
        if len(ids) == frames and all(one in told for one in ids):
            stories.append([Picture(_shot(folder / "video_frames_sampled" / f"{one}.npy"), told[one]) for one in ids])
    return _some(stories, folder, frames, "training story")


def _shot(path: Path) -> Callable[[], np.ndarray]:
    return lambda: np.load(path)[0]


def _some(stories: list, folder: Path, frames: int, what: str) -> list:
    if not stories:
        raise ValueError(f"no {what} of {frames} pictures in {folder}")
    return stories


READERS = {"folder": folder_stories, "pororo": pororo_stories, "flintstones": flintstones_stories}


def demo_stories(seed: int, count: int, frames: int) -> list[list[Picture]]:
    """One character of one look in several places and times."""
    return [demo_story(np.random.default_rng((seed, index)), frames) for index in range(count)]


def demo_story(rng: np.random.Generator, frames: int) -> list[Picture]:
    known = {
        name: str(rng.choice(list(words))) for name, words in (("kind", KINDS), ("colour", COLOURS), ("hat", HATS))
    }
    pages = [sample(rng, "one", **known) for _ in range(frames)]
    return [Picture(lambda page=page: page.image, page.caption) for page in pages]


def draw_targets(count: int, frames: int, generator: torch.Generator) -> Tensor:
    """Targets [count, frames], 1 = to be drawn: visualisation, continuation (k uniform) or completion, a third each."""
    every = torch.arange(2**frames - 1) + 1
    bits = every[:, None] >> torch.arange(frames) & 1
    tail = bits.sort(1).values == bits  # all known frames come first
    others = bits[~tail.all(1)]
    chosen = torch.ones(count, frames, dtype=torch.long)
    for row, task in enumerate(torch.randint(3, (count,), generator=generator).tolist()):
        if task == 1 and frames > 1:
            chosen[row, : int(torch.randint(1, frames, (1,), generator=generator))] = 0
        elif task == 2 and len(others):
            chosen[row] = others[torch.randint(len(others), (1,), generator=generator)]
    return chosen
