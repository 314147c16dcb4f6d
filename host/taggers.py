"""Sentence attention: how likely each word of a caption is a noun (arXiv 2309.02405 reads NN and NNS)."""

from pathlib import Path

import folder_paths
import torch

from ..story.heard import Caption, noun_probability, plain

FOLDER = "pos_taggers"  # of models/
BUILT_IN = "built-in word list"
NOUN_TAGS = ("NN", "NNS", "NOUN", "PROPN")  # Penn's common nouns; the universal tags draw no such line


def add_folder() -> None:
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def names() -> list[str]:
    """The word list, and folders of token classification models."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    found = [path.parent.name for folder in folders if folder.is_dir() for path in sorted(folder.glob("*/config.json"))]
    return [BUILT_IN, *dict.fromkeys(found)]


def noun_probabilities(caption: Caption, name: str, node_id: str) -> list[float]:
    """Probability of each word of a caption. Raises ValueError for a tagger that is not there or knows no nouns."""
    if name == BUILT_IN:
        return [noun_probability(word) for word in caption.words]
    # seconds of import that only those who use it should wait for
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    places = [Path(folder) / name for folder in folder_paths.get_folder_paths(FOLDER)]
    path = next((place for place in places if (place / "config.json").is_file()), None)
    if path is None:
        raise ValueError(f"{node_id}: tagger '{name}' is not in models/{FOLDER}.")
    try:
        network = AutoModelForTokenClassification.from_pretrained(path, local_files_only=True).train(False)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{node_id}: {name} is no token classification model: {str(error).splitlines()[0]}") from error
    tags = [number for number, tag in network.config.id2label.items() if tag.upper().split("-")[-1] in NOUN_TAGS]
    if not tags:
        known = ", ".join(list(network.config.id2label.values())[:6])
        raise ValueError(f"{node_id}: {name} knows none of the tags {', '.join(NOUN_TAGS)} (its tags: {known}).")
    return tagged(caption, network, tokenizer, tags)


@torch.no_grad()
def tagged(caption: Caption, network, tokenizer, tags: list[int]) -> list[float]:
    """Sum over noun tags of each piece's probability, the greatest of a word's pieces, by place in the text.

    Punctuation stays in the caption and is taken off the words for the tagger.
    """
    words = [plain(word) or word for word in caption.words]
    text, starts = " ".join(words), []
    for word in words:
        starts.append(starts[-1][1] + 1 if starts else 0)
        starts[-1] = (starts[-1], starts[-1] + len(word))
    given = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = given.pop("offset_mapping")[0].tolist()
    chances = network(**given).logits[0].float().softmax(-1)[:, tags].sum(-1).tolist()
    found = [0.0] * len(words)
    for (begin, end), chance in zip(offsets, chances, strict=True):
        for index, (first, last) in enumerate(starts):
            if begin < last and end > first and end > begin:
                found[index] = max(found[index], chance)
    return found
