"""Per-panel conditioning: every prompt encoded by itself, then one CONDITIONING whose row i belongs to latent i.

ComfyUI gives row i of a conditioning tensor to latent i of the batch, but no core node builds such a tensor. Prompts of
different token length meet at one length like this:
- CLIP chunks (SD1.5, SD2, SDXL): each row repeated to the least common multiple, as core does when it joins the prompt
  with its negative; cross-attention does not notice repetition, so every row equals encoding it alone.
- encoders that pad on the left and return a mask (Flux 2): zeros on the left, as core's model does itself.
- all others (T5, Qwen, Gemma, ...): shorter prompts are encoded again with the encoder's own padding tokens. Models
  that read the attention mask (LTXV, Qwen-Image) do not notice. The others (Wan, Flux, SD3, Z-Image) see what a longer
  minimum length would give them: nothing new for Wan up to 512 tokens and Flux up to 256.
"""

import math

import comfy.model_management
import comfy.utils
import torch
from comfy.conds import is_equal
from torch import Tensor

MASK = "attention_mask"


def encode_panels(clip, prompts: list[str], node_id: str, tokenize=None) -> list[list]:
    """A conditioning list [[tensor [panels, tokens, channels], extras], ...], one entry per scheduled range of `clip`.

    Extras with a batch dimension (pooled_output, attention_mask, ...) are stacked, all others must agree between
    prompts. `tokenize(prompt)` stands for the clip's own where given. Raises ValueError naming `node_id` when the encoder's
    answers cannot share a batch.
    """
    tokens = {prompt: (tokenize or clip.tokenize)(prompt) for prompt in prompts}
    encoded = _encode(clip, tokens, comfy.utils.ProgressBar(len(tokens)))
    join_rows = _repeated if _repeats(clip, tokens) else _left_padded if _pads_left(clip, tokens, encoded) else None
    if join_rows is None and len(_lengths(encoded)) > 1:
        padded = _pad_tokens(clip, tokens)
        short = {prompt: padded[prompt] for prompt in tokens if padded[prompt] != tokens[prompt]}
        encoded |= _encode(clip, short, comfy.utils.ProgressBar(len(short)))
    ranges = len(encoded[prompts[0]])
    if any(len(entries) != ranges for entries in encoded.values()):
        raise ValueError(f"{node_id}: the clip's hooks give prompts different schedules; remove them from the clip.")
    return [_stack([encoded[prompt][place] for prompt in prompts], join_rows, node_id) for place in range(ranges)]


def _encode(clip, tokens: dict[str, dict], progress) -> dict[str, list]:
    encoded = {}
    for prompt, pieces in tokens.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        encoded[prompt] = clip.encode_from_tokens_scheduled(pieces, show_pbar=False)
        progress.update(1)
    return encoded


def _lengths(encoded: dict[str, list]) -> set[int]:
    return {cond.shape[1] for entries in encoded.values() for cond, _ in entries}


def tokenizers(clip, keys) -> dict:
    """Token key -> the tokenizer that made it; a key is the tokenizer's attribute, with or without `clip_`."""
    parts = vars(clip.tokenizer)
    return {key: parts.get(key, parts.get(f"clip_{key}")) for key in keys}


def _repeats(clip, tokens: dict[str, dict]) -> bool:
    """Whether all text comes in CLIP chunks of fixed size."""
    parts = tokenizers(clip, next(iter(tokens.values())))
    return all(part is not None and vars(part).get("pad_to_max_length", False) for part in parts.values())


def _pads_left(clip, tokens: dict[str, dict], encoded: dict[str, list]) -> bool:
    parts = tokenizers(clip, next(iter(tokens.values())))
    rows = [row for entries in encoded.values() for row in entries]
    masked = all(MASK in extras and extras[MASK].shape[-1] == cond.shape[1] for cond, extras in rows)
    return masked and all(part is not None and vars(part).get("pad_left", False) for part in parts.values())


def _pad_tokens(clip, tokens: dict[str, dict]) -> dict[str, dict]:
    """Every prompt's token lists at the length of the longest: by padding tokens, or by empty chunks of fixed size."""
    out = {prompt: dict(pieces) for prompt, pieces in tokens.items()}
    for key, part in tokenizers(clip, next(iter(tokens.values()))).items():
        if part is None or not all(isinstance(pieces.get(key), list) for pieces in tokens.values()):
            continue
        if vars(part).get("pad_to_max_length", False):
            most = max(len(pieces[key]) for pieces in tokens.values())
            for pieces in out.values():
                pieces[key] = pieces[key] + part.tokenize_with_weights("") * (most - len(pieces[key]))
            continue
        most = max(len(pieces[key][-1]) for pieces in tokens.values())
        for pieces in out.values():
            *done, last = pieces[key]
            padding = [(part.pad_token, 1.0)] * (most - len(last))
            pieces[key] = [*done, padding + last if part.pad_left else last + padding]
    return out


def _repeated(conds: list[Tensor]) -> list[Tensor]:
    length = math.lcm(*(cond.shape[1] for cond in conds))
    return [cond.repeat(1, length // cond.shape[1], 1) for cond in conds]


def _left_padded(tensors: list[Tensor]) -> list[Tensor]:
    """[1, tokens, ...] each, zeros in front."""
    length = max(tensor.shape[1] for tensor in tensors)
    return [torch.cat([t.new_zeros(t.shape[0], length - t.shape[1], *t.shape[2:]), t], dim=1) for t in tensors]


def _stack(rows: list[list], join_rows, node_id: str) -> list:
    conds = [cond for cond, _ in rows]
    extras = [dict(extra) for _, extra in rows]
    if any(MASK in extra for extra in extras):
        for cond, extra in zip(conds, extras, strict=True):
            if extra.get(MASK) is None:  # encoders leave a mask out when nothing in it is masked
                extra[MASK] = torch.ones(cond.shape[:2], dtype=torch.long, device=cond.device)
    lengths = sorted({cond.shape[1] for cond in conds})
    if len(lengths) > 1:
        if join_rows is None:
            raise ValueError(
                f"{node_id}: this text encoder makes {lengths[0]} to {lengths[-1]} tokens of these prompts and takes "
                "no padding, so they cannot share a batch; draw these panels one at a time."
            )
        conds = join_rows(conds)
        if MASK in extras[0]:
            for extra, mask in zip(extras, _left_padded([extra[MASK] for extra in extras]), strict=True):
                extra[MASK] = mask
    keys = dict.fromkeys(key for extra in extras for key in extra)
    return [torch.cat(conds), {key: _join(key, [extra.get(key) for extra in extras], node_id) for key in keys}]


def _join(key: str, values: list, node_id: str):
    if all(torch.is_tensor(value) and value.ndim > 1 and value.shape[0] == 1 for value in values):
        if len({value.shape[1:] for value in values}) == 1:
            return torch.cat(values)
    elif all(is_equal(values[0], value) for value in values[1:]):
        return values[0]
    raise ValueError(
        f"{node_id}: this text encoder answers with {key!r}, which differs between prompts in a way that cannot share "
        "a batch; draw these panels one at a time."
    )
