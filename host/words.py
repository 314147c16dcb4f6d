"""Which tokens of a prompt are an object's words, found by token ids.

CLIP texts come in chunks of fixed size: ids are matched as a set, anywhere in the prompt, as PEEKABOO's authors do, and
the start token of every chunk belongs to nobody. Other encoders: the phrase's ids as a run. Ids that several objects
name belong to each where its whole phrase stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..attention.masked import NOBODY
from .prompts import tokenizers

KEY = "storyweft_words"  # of a conditioning entry: its Words


@dataclass(frozen=True)
class Words:
    """Label of every token of an encoded prompt: 0 background, NOBODY, or the number of a group of objects.

    Objects with the same words form one group; groups[label] is that of an object's label, groups[0] is 0. `both`: the
    same places are masked in the negative prompt, whose tokens there are padding or words (CLIP).
    """

    labels: tuple[int, ...]
    groups: tuple[int, ...]
    both: bool


def find_words(clip, prompt: str, phrases: Sequence[str], length: int, node_id: str) -> Words:
    """Words of `prompt` encoded by `clip` to `length` tokens; phrases[k] are those of label k + 1.

    Raises ValueError naming a phrase that is empty or matches no token, or an encoder whose tokens cannot be placed.
    """
    unique, groups = _grouped(phrases, node_id)
    labels, parts = _labelled(clip, prompt, unique, length, node_id)
    _check_found(unique, labels, f"prompt '{prompt}'", node_id)
    return Words(tuple(labels), groups, all(part.pad_to_max_length for part in parts))


def find_board_words(clip, captions: Sequence[str], phrases: Sequence[str], length: int, node_id: str) -> Words:
    """The same in a board's captions, each encoded to `length` tokens as `encode_panels` does, one after the other.

    A phrase may be missing from some captions, not from all.
    """
    unique, groups = _grouped(phrases, node_id)
    labels: list[int] = []
    for caption in captions:
        alone = clip.encode_from_tokens_scheduled(clip.tokenize(caption), show_pbar=False)[0][0].shape[1]
        own, parts = _labelled(clip, caption, unique, alone, node_id)
        if alone == length:
            labels += own
        elif all(part.pad_to_max_length for part in parts):
            labels += own * (length // alone)
        elif len(parts) == 1:
            padding = [0] * (length - alone)
            labels += padding + own if parts[0].pad_left else own + padding
        else:
            raise ValueError(
                f"{node_id}: caption '{caption}' has {alone} tokens and the longest {length}, and this text encoder pads "
                "several parts; make the captions alike in length, or switch cross off."
            )
    _check_found(unique, labels, f"captions {'; '.join(captions)}", node_id)
    return Words(tuple(labels), groups, False)


def _grouped(phrases: Sequence[str], node_id: str) -> tuple[list[str], tuple[int, ...]]:
    """Different phrases, and the group of every label."""
    for number, phrase in enumerate(phrases):
        if not phrase.strip():
            raise ValueError(f"{node_id}: object {number + 1} of boxes has no words; give it some, or switch cross off.")
    unique = list(dict.fromkeys(phrase.strip() for phrase in phrases))
    return unique, (0, *(1 + unique.index(phrase.strip()) for phrase in phrases))


def _labelled(clip, prompt: str, phrases: Sequence[str], length: int, node_id: str) -> tuple[list[int], list]:
    """Labels of a prompt's tokens, and the tokenizers that made them."""
    labels: list[int] = []
    parts = []
    found = sequences(clip, clip.tokenize(prompt), length)
    if not found:
        raise ValueError(
            f"{node_id}: the text encoder makes {length} tokens of prompt '{prompt}' and it is unknown which words they are; "
            "switch cross off."
        )
    for part, ids in found:
        parts.append(part)
        labels += label_words(ids, [_spellings(part, phrase) for phrase in phrases], part.pad_to_max_length)
        if part.pad_to_max_length and part.start_token is not None:
            starts = len(labels) - len(ids)
            labels[starts :: part.max_length] = [NOBODY] * len(labels[starts :: part.max_length])
    return labels[-length:], parts


def _check_found(phrases: Sequence[str], labels: Sequence[int], where: str, node_id: str) -> None:
    for number, phrase in enumerate(phrases, 1):
        if number not in labels:
            raise ValueError(f"{node_id}: the words '{phrase}' of boxes match no token of {where}.")


def label_words(ids: Sequence[int], phrases: Sequence[Sequence[Sequence[int]]], anywhere: bool) -> list[int]:
    """Labels of prompt tokens `ids`; phrases[g] lists the ways group g + 1 may be spelled, as token ids.

    anywhere: an id that one group alone names is its wherever it stands; otherwise only whole phrases count.
    """
    labels = [0] * len(ids)
    named = [{token for spelling in spellings for token in spelling} for spellings in phrases]
    if anywhere:
        for place, token in enumerate(ids):
            owners = [group for group, tokens in enumerate(named, 1) if token in tokens]
            if len(owners) == 1:
                labels[place] = owners[0]
    spelled = [(spelling, group) for group, spellings in enumerate(phrases, 1) for spelling in spellings]
    taken: set[int] = set()
    for spelling, group in sorted(spelled, key=_longest_first):
        for start in range(len(ids) - len(spelling) + 1):
            run = range(start, start + len(spelling))
            if list(ids[start : run.stop]) == list(spelling) and taken.isdisjoint(run):
                taken.update(run)
                for place in run:
                    labels[place] = group
    return labels


def _longest_first(spelled) -> int:
    return -len(spelled[0])


def _spellings(part, phrase: str) -> list[list[int]]:
    """Token ids of a phrase without start and end, at the start of a text and after a space."""
    end = -1 if part.tokenizer_adds_end_token else None
    found = [part.tokenizer(text)["input_ids"][part.tokens_start : end] for text in (phrase.strip(), f" {phrase.strip()}")]
    return [ids for ids in found if ids]


def sequences(clip, tokens: dict, length: int) -> list[tuple]:
    """(tokenizer, ids) of the token sequences that follow each other in a prompt encoded to `length`; [] if unknown."""
    found = []
    for key, part in tokenizers(clip, tokens).items():
        if part is not None:
            # textual inversions are vectors in place of ids and match no word
            ids = [token if isinstance(token, int) else -1 for chunk in tokens[key] for token, *_ in chunk]
            found.append((part, ids))
    chunks = [one for one in found if one[0].pad_to_max_length]
    runs = [one for one in found if not one[0].pad_to_max_length]
    if not runs and chunks and len(chunks[0][1]) == length:
        return chunks[:1]  # CLIP-L and CLIP-G side by side in the channels: the same words at the same places
    for one in runs:
        if len(one[1]) == length:
            return [one]
        if chunks and len(chunks[0][1]) + len(one[1]) == length:
            return [chunks[0], one]  # SD3
    if len(runs) == 1 and len(runs[0][1]) > length:
        return runs  # language models leave out the template in front of the prompt
    return []
