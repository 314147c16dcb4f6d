"""Sentence attention: how likely each word of a caption is a noun (arXiv 2309.02405 reads NN and NNS)."""

from collections.abc import Callable
from pathlib import Path

import folder_paths
import torch

from ..story.heard import Caption, noun_probability, plain
from . import tagger_packages
from .model_files import check_tokenizer

FOLDER = "pos_taggers"  # of models/
BUILT_IN = "built-in word list"
NOUN_TAGS = ("NN", "NNS", "NOUN", "PROPN")  # Penn's common nouns; the universal tags draw no such line
Tagger = Callable[[Caption], list[float]]


def add_folder() -> None:
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def names() -> list[str]:
    """The word list, packages that may be installed, and folders of token classification models."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    found = [path.parent.name for folder in folders if folder.is_dir() for path in sorted(folder.glob("*/config.json"))]
    return list(dict.fromkeys([BUILT_IN, *tagger_packages.PACKAGES, *found]))


def load(name: str, node_id: str) -> Tagger:
    """What gives the noun probability of each word of a caption.

    Raises ValueError for a tagger that is not there, is not installed or knows no nouns.
    """
    if name == BUILT_IN:
        return lambda caption: [noun_probability(word) for word in caption.words]
    if name in tagger_packages.PACKAGES:
        pieces = tagger_packages.load(name, node_id)
    else:
        pieces = token_classifier(name, node_id)

    def tagged(caption: Caption) -> list[float]:
        """Punctuation stays in the caption and is taken off the words for the tagger."""
        words = [plain(word) or word for word in caption.words]
        return by_place(words, pieces(" ".join(words)))

    return tagged


def by_place(words: list[str], pieces: list[tuple[int, int, float]]) -> list[float]:
    """For each word of a text, joined by spaces, the greatest number of the pieces (begin, end, number) that lie on it."""
    found, first = [], 0
    for word in words:
        last = first + len(word)
        found.append(max((number for begin, end, number in pieces if begin < last and end > first and end > begin), default=0.0))
        first = last + 1
    return found


def token_classifier(name: str, node_id: str) -> tagger_packages.Pieces:
    """A folder of transformers: of each piece the sum over noun tags."""
    # seconds of import that only those who use it should wait for
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    places = [Path(folder) / name for folder in folder_paths.get_folder_paths(FOLDER)]
    path = next((place for place in places if (place / "config.json").is_file()), None)
    if path is None:
        raise ValueError(f"{node_id}: tagger '{name}' is not in models/{FOLDER}.")
    check_tokenizer(path, node_id)
    try:
        network = AutoModelForTokenClassification.from_pretrained(path, local_files_only=True).train(False)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{node_id}: {name} is no token classification model: {str(error).splitlines()[0]}") from error
    tags = [number for number, tag in network.config.id2label.items() if tag.upper().split("-")[-1] in NOUN_TAGS]
    if not tags:
        known = ", ".join(list(network.config.id2label.values())[:6])
        raise ValueError(f"{node_id}: {name} knows none of the tags {', '.join(NOUN_TAGS)} (its tags: {known}).")

    @torch.no_grad()
    def pieces(text: str) -> list[tuple[int, int, float]]:
        given = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        offsets = given.pop("offset_mapping")[0].tolist()
        chances = network(**given).logits[0].float().softmax(-1)[:, tags].sum(-1).tolist()
        return [(*offset, chance) for offset, chance in zip(offsets, chances, strict=True)]

    return pieces
