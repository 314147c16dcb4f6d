"""Attention with its products written out, for the small demo models: on a CPU it is differentiated in half the time of the
fused form. Real checkpoints keep ComfyUI's own, which needs no (tokens)² elements."""

from . import host_models  # noqa: F401

import comfy.ldm.modules.attention  # isort: skip


def explicit(q, k, v, heads, *_, **__):
    rows, tokens, width = q.shape
    q, k, v = (x.view(rows, -1, heads, width // heads).transpose(1, 2) for x in (q * (width // heads) ** -0.5, k, v))
    return (q @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(1, 2).reshape(rows, tokens, width)


def use() -> None:
    """Let ComfyUI's U-Nets attend with it in this process."""
    comfy.ldm.modules.attention.optimized_attention = explicit
