"""Captions with attentions as conditioning: rows of the prompt scaled, or their keys weighted where a norm would undo it.

U-Nets take the scaled rows as the paper does. On diffusion transformers the first norm of the text stream cancels a scale,
exactly or mostly; there the logarithm of the weight is added to the attention logits of that token's key.
"""

import logging

import torch
from torch import Tensor

from ..attention.sound import reweight, word_weights
from ..story.heard import Caption
from . import families, override
from .prompts import encode_panels, tokenizers
from .rule import Rule
from .sound_words import row_weights, tokenize
from .unet import UNetFamily

MARK = "storyweft_key_weights"  # of a conditioning entry: Tensor [rows, tokens], the weights of its words
NODE = "StoryweftAudioCaptionEmbedding"
FORMS = ("automatic", "scale rows", "weight keys")


class KeyWeightRule(Rule):
    """Adds log w to the logits of marked prompts' keys, in cross-attention and in the text part of joint attention."""

    node_id = NODE

    def __init__(self, joint: bool):
        self.kinds = frozenset({"self"} if joint else {"cross"})

    def expected(self, run) -> bool:
        return any(MARK in entry.cond for entry in run.listed)

    def plan(self, run, call, layout, plan) -> bool:
        marked = [chunk for chunk, entry in enumerate(layout.entries) if MARK in entry.cond]
        if not marked or layout.text is None:
            return False
        keys = plan.k.shape[2]
        for chunk in marked:
            logs = self._logs(layout, chunk, keys).to(plan.k)
            if layout.layer.kind == "cross":
                for branch in plan.text[chunk]:
                    branch.bias = logs if branch.bias is None else branch.bias + logs
            else:
                bias = plan.k.new_zeros(len(plan.k), 1, 1, keys) if plan.bias is None else plan.bias.clone()
                rows = layout.chunk_rows(chunk)
                bias[rows.start : rows.stop] += logs
                plan.bias = bias
        return True

    @staticmethod
    def _logs(layout, chunk: int, keys: int) -> Tensor:
        """[rows of the chunk, 1, 1, keys]."""
        weights = layout.entries[chunk].cond[MARK]
        text = range(*layout.text.indices(keys))
        repeats, rest = divmod(len(text), weights.shape[1])
        if rest:
            raise RuntimeError(
                f"{NODE}: {layout.layer} sees {len(text)} tokens of a prompt of {weights.shape[1]}, so words cannot be placed."
            )
        logs = torch.zeros(len(layout.items), 1, 1, keys)
        rows = [item % len(weights) for item in layout.items]
        logs[:, 0, 0, text.start : text.stop] = weights[rows].log().repeat(1, repeats).float()
        return logs


def cancels(model) -> bool:
    """Whether a model's first operations on the prompt take a row's scale away."""
    return not isinstance(families.find(model, NODE), UNetFamily)


def weight_rule(model):
    """Clone of `model` that weights keys."""
    family = families.find(model, NODE)
    return override.register(model, KeyWeightRule("cross" not in family.kinds))


def weights_of(caption: Caption, rule: str, position: bool, strength: float) -> list[float]:
    """The weight of every word; strength 0 leaves all at 1, 1 is the paper's, more is more."""
    if caption.nouns is None:
        raise ValueError(f"{NODE}: caption has no noun probabilities; put StoryweftSentenceAttention before it.")
    found = word_weights(caption.audio, caption.nouns, rule, position)
    return [1 + strength * (weight - 1) for weight in found]


def encode(
    clip, captions: list[Caption], words: list[list[float]], keys: bool, prefix: str = "", suffix: str = "", restore="mean"
) -> tuple[list, list[Tensor], bool]:
    """A conditioning with one row per caption, the weights of every row's tokens, and whether the guard had to act.

    words: the weight of each caption's words; prefix and suffix: text around every caption, of weight 1. keys: rows stay as
    they are and the entry is marked for KeyWeightRule. Pooled output and all else of the encoder are kept.
    """
    texts = [" ".join(part for part in (prefix, caption.text, suffix) if part) for caption in captions]

    def plainly(text: str) -> dict:
        return tokenize(clip, text)

    encoded = encode_panels(clip, texts, NODE, plainly)
    around = len(prefix.split()), len(suffix.split())
    rows = []
    for caption, text, weights in zip(captions, texts, words, strict=True):
        full = [1.0] * around[0] + list(weights) + [1.0] * around[1]
        if len(full) != len(text.split()):
            raise ValueError(f"{NODE}: the caption '{caption.text}' has {len(weights)} weights for its words.")
        rows.append(_fitted(clip, text, full, encoded[0][0].shape[1]))
    guarded = False
    out = []
    for z, extras in encoded:
        if keys:
            out.append([z, {**extras, MARK: torch.stack(rows)}])
            continue
        moved = [reweight(one, w.to(one), restore) for one, w in zip(z, rows, strict=True)]
        guarded |= any(lost for _, lost in moved)
        out.append([torch.stack([one for one, _ in moved]), dict(extras)])
    if guarded:
        logging.warning("%s: the weights take the prompt's mean away; its norm was restored in place of the mean.", NODE)
    return out, rows, guarded


def _fitted(clip, text: str, weights: list[float], length: int) -> Tensor:
    """w [length] of one row: a shorter prompt was repeated (CLIP chunks) or padded to the length of the longest."""
    own, chunked, left = own_length(clip, text)
    if chunked and length % own == 0:
        return row_weights(clip, text, text.split(), weights, own, NODE).repeat(length // own)
    if chunked or own >= length:
        return row_weights(clip, text, text.split(), weights, length, NODE)
    w = row_weights(clip, text, text.split(), weights, own, NODE)
    padding = torch.ones(length - own, dtype=w.dtype)
    return torch.cat([padding, w] if left else [w, padding])


def own_length(clip, text: str) -> tuple[int, bool, bool]:
    """Tokens that a text has by itself, whether they come in chunks of fixed size, and whether padding is on the left."""
    tokens = tokenize(clip, text)
    parts = {key: part for key, part in tokenizers(clip, tokens).items() if part is not None}
    chunked = bool(parts) and all(part.pad_to_max_length for part in parts.values())
    runs = [key for key, part in parts.items() if not part.pad_to_max_length] or list(parts)
    length = sum(len(chunk) for chunk in tokens[runs[0]]) if runs else 0
    left = any(part.pad_left for part in parts.values())
    return length, chunked, left


def clip_text(clip) -> bool:
    """Whether a text encoder is CLIP alone, whose models are the U-Nets."""
    parts = tokenizers(clip, clip.tokenize("a")).values()
    return all(part is not None and part.pad_to_max_length for part in parts)


def describe(captions: list[Caption], words: list[list[float]], guarded: bool, keys: bool) -> str:
    """The weight of every word, for people."""
    lines = [
        "  ".join(f"{word} {weight:.2f}" for word, weight in zip(caption.words, weights, strict=True))
        for caption, weights in zip(captions, words, strict=True)
    ]
    lines.append("Keys are weighted inside the model." if keys else "Rows of the prompt are scaled.")
    return "\n".join([*lines, *(["The prompt's norm was restored, since its mean was lost."] if guarded else [])])
