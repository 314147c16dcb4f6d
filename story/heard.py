"""Captions of sounds as words with numbers: how sure the captioner was of each, and how likely each is a noun."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .nouns import DEEDS, NOUNS, SUFFIXES

MARKS = ",.!?;:\""
LEAST_CONFIDENCE = 0.2  # mean probability of a caption's words below which it is reported as a guess


@dataclass(frozen=True)
class Caption:
    """One sound's caption. audio: probability of each word; nouns: that of being a noun, None while unknown.

    start, end: the window of the sound, in seconds, that it describes; note: what is to be told about it.
    """

    words: tuple[str, ...]
    audio: tuple[float, ...]
    nouns: tuple[float, ...] | None = None
    start: float = 0.0
    end: float = 0.0
    note: str = ""

    def __post_init__(self):
        if not self.words:
            raise ValueError("the caption is empty.")
        for name in ("audio", "nouns"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != len(self.words):
                raise ValueError(f"{name} attention has {len(numbers)} numbers for {len(self.words)} words.")

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def confidence(self) -> float:
        """Mean probability of the words."""
        return sum(self.audio) / len(self.audio)

    def with_nouns(self, nouns: Sequence[float]) -> "Caption":
        return replace(self, nouns=tuple(nouns))

    def describe(self) -> str:
        """One line a word: the word, its audio attention and, if known, its sentence attention."""
        rows = [f"{self.text}  ({self.start:.1f}-{self.end:.1f} s, mean {self.confidence:.2f})"]
        for index, word in enumerate(self.words):
            noun = "" if self.nouns is None else f"  noun {self.nouns[index]:.2f}"
            rows.append(f"  {word}: heard {self.audio[index]:.4f}{noun}")
        return "\n".join([*rows, *([f"  {self.note}"] if self.note else [])])


def plain(word: str) -> str:
    """A word without the punctuation around it, in lower case."""
    return word.strip(MARKS + "'()[]").lower()


def noun_probability(word: str) -> float:
    """1 for a thing of the built-in list or its plural, a deed in its base form, or a word with a noun's ending; else 0."""
    bare = plain(word)
    if bare in DEEDS:
        return 1.0
    forms = {bare, bare.removesuffix("'s"), bare.removesuffix("s"), bare.removesuffix("es")}
    if bare.endswith("ies"):
        forms.add(bare[:-3] + "y")
    return float(bool(forms & NOUNS) or len(bare) > 6 and bare.endswith(SUFFIXES))


def typed_caption(text: str, audio: str = "", nouns: str = "") -> Caption:
    """A caption from words and, separated by spaces or commas, a number for each: 1 where none are given.

    Raises ValueError for no words, another count of numbers, or what is no number from 0 up.
    """
    words = text.split()
    if not words:
        raise ValueError("the caption is empty.")
    heard = _numbers("audio_attention", audio)
    known = _numbers("noun_probability", nouns)
    return Caption(tuple(words), tuple(heard) or (1.0,) * len(words), tuple(known) or None)


def _numbers(name: str, text: str) -> list[float]:
    found = []
    for piece in text.replace(",", " ").split():
        try:
            number = float(piece)
        except ValueError:
            raise ValueError(f"{name} holds '{piece}', which is no number.") from None
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} holds {piece}; give numbers from 0 up.")
        found.append(number)
    return found


def group(pieces: Sequence[str], probabilities: Sequence[float], geometric: bool = False) -> tuple[list[str], list[float]]:
    """Words of a text that a model wrote in `pieces` (token texts in order), and the probability of each.

    A word's probability is the product over its pieces, or their geometric mean. A piece that begins with a space, or
    follows one that ends with it, begins a word.
    """
    words: list[str] = []
    chances: list[list[float]] = []
    fresh = True
    for piece, chance in zip(pieces, probabilities, strict=True):
        parts = piece.split()
        if not parts:
            fresh = fresh or bool(piece)
            continue
        starts = fresh or piece[0].isspace()
        for index, part in enumerate(parts):
            if starts or index or not words:
                words.append(part)
                chances.append([chance])
            else:
                words[-1] += part
                chances[-1].append(chance)
        fresh = piece[-1].isspace()
    power = [1 / len(chance) if geometric else 1.0 for chance in chances]
    return words, [math.prod(chance) ** p for chance, p in zip(chances, power, strict=True)]


def caption_words(caption: str) -> list[str]:
    """Words of a training caption by ACT's rule, its begin and end among them."""
    text = caption.lower()
    for mark in MARKS:
        text = text.replace(mark, " ")
    return f"<sos> {text} <eos>".split()


def vocabulary(captions: Iterable[str]) -> list[str]:
    """ACT's list of words: those of its training captions in the order in which they first appear."""
    return list(dict.fromkeys(word for caption in captions for word in caption_words(caption)))


def read_vocabulary(path: str | Path) -> list[str]:
    """Words of a JSON list, or those of the `caption` column of a training CSV. Raises ValueError for anything else."""
    path = Path(path)
    if path.suffix == ".json":
        words = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise ValueError(f"{path.name} is no list of words.")
        return words
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            names = [name for name in rows.fieldnames or () if name.startswith("caption")]
            if not names:
                raise ValueError(f"{path.name} has no column 'caption' (its columns: {rows.fieldnames}).")
            return vocabulary(row[name] for row in rows for name in names if row[name])
    raise ValueError(f"{path.name} is not read, since a {path.suffix} file can hold a program; give a .json list or the .csv.")
