"""Which tokens of an encoded caption belong to which of its words, and the weight of every row of the prompt."""

from torch import Tensor

from ..attention.sound import token_weights
from .words import sequences

IDENTIFIER = "embedding:"  # core's syntax for textual inversions


def tokenize(clip, caption: str) -> dict:
    """Tokens of a caption as plain text: brackets, weights and names of textual inversions in it mean nothing."""
    plain = caption.replace(IDENTIFIER, "embedding :")
    return clip.tokenize(plain.replace("(", "\\(").replace(")", "\\)"))


def row_owners(clip, caption: str, words: list[str], length: int, node_id: str) -> list[int | None]:
    """The word, by its place in `words`, that owns each row of the caption encoded to `length`; None for all other rows.

    Raises ValueError when the encoder's tokens cannot be placed.
    """
    owners: list[int | None] = []
    found = sequences(clip, tokenize(clip, caption), length)
    for part, ids in found:
        owners += place(ids, word_tokens(part, words), part.pad_to_max_length)
    if not found or set(owners) - {None} != set(range(len(words))):
        raise ValueError(
            f"{node_id}: the text encoder makes {length} tokens of the caption '{caption}' and it is unknown which words they are."
        )
    return owners[-length:]


def word_tokens(part, words: list[str]) -> list[tuple[int, int]]:
    """(token id, word) of every token of a caption, without start and end.

    Words tokenized alone where that gives the tokens of the whole, as with CLIP's; otherwise a token belongs to the word
    whose addition to the text brought it.
    """
    whole = _ids(part, " ".join(words))
    alone = [(token, index) for index, word in enumerate(words) for token in _ids(part, word)]
    if [token for token, _ in alone] == whole:
        return alone
    ends = [len(_ids(part, " ".join(words[: count + 1]))) for count in range(len(words))]
    return [(token, next((k for k, end in enumerate(ends) if place < end), len(words) - 1)) for place, token in enumerate(whole)]


def _ids(part, text: str) -> list[int]:
    end = -1 if part.tokenizer_adds_end_token else None
    return list(part.tokenizer(text.replace(IDENTIFIER, "embedding :"))["input_ids"][part.tokens_start : end])


def place(ids: list[int], tokens: list[tuple[int, int]], chunked: bool) -> list[int | None]:
    """The owner of each of `ids`: tokens in order around the marks of chunks, or as one run, the last there is."""
    owners: list[int | None] = [None] * len(ids)
    if chunked:
        waiting = iter(tokens)
        token, owner = next(waiting, (None, None))
        for index, seen in enumerate(ids):
            if seen == token:
                owners[index] = owner
                token, owner = next(waiting, (None, None))
        return owners if token is None else [None] * len(ids)
    run = [token for token, _ in tokens]
    starts = [start for start in range(len(ids) - len(run) + 1) if ids[start : start + len(run)] == run]
    for start in starts[-1:]:
        owners[start : start + len(run)] = [owner for _, owner in tokens]
    return owners


def row_weights(clip, caption: str, words: list[str], weights: list[float], length: int, node_id: str) -> Tensor:
    """w [length], float64: the weight of each row's word, 1 for start, end, padding and templates."""
    return token_weights(weights, row_owners(clip, caption, words, length, node_id))
