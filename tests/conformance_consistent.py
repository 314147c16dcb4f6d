"""Runners for golden/consistent_attention: one layer, the sliding window, the U-Net and a 24-step run through it."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from storyweft.attention.consistent import sampled_tokens, window_attention
from storyweft.attention.core import attend, merge_heads, split_heads
from storyweft.attention.joined import Piece, joined_attention
from torch.nn.functional import linear


def read(path: Path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


class Layer:
    """The recorded attention layer: projections around an attention rule."""

    def __init__(self, data: dict, heads: int, dtype=torch.float32):
        self.q, self.k, self.v, self.o = (data[key].to(dtype) for key in ("to_q", "to_k", "to_v", "to_out_w"))
        self.bias = data["to_out_b"].to(dtype)
        self.heads = heads
        self.dtype = dtype

    def project(self, x, weight):
        return split_heads(linear(x.to(self.dtype), weight), self.heads)

    def __call__(self, x, rule):
        out = rule(self.project(x, self.q), self.project(x, self.k), self.project(x, self.v))
        return linear(merge_heads(out), self.o, self.bias)

    def pieces(self, tokens):
        """One key-value piece for each guidance half of a bank [2, tokens, channels]."""
        return [Piece(k, v) for k, v in zip(self.project(tokens, self.k), self.project(tokens, self.v), strict=True)]


def halves(rule):
    """Applies a rule to the uncond and the cond half by themselves."""

    def both(q, k, v):
        n = len(q) // 2
        return torch.cat([rule(q[:n], k[:n], v[:n], 0), rule(q[n:], k[n:], v[n:], 1)])

    return both


def shared(draw):
    """Write mode: each frame sees the drawn tokens of all others."""

    def rule(q, k, v, half):
        pieces = sampled_tokens(k, v, list(draw))
        seen = [pieces[:row] + pieces[row + 1 :] for row in range(len(q))]
        return joined_attention(q, k, v, seen, attend)

    return halves(rule)


def reading(*banks):
    """Read mode: every row sees the bank pieces of its half."""
    return halves(
        lambda q, k, v, half: joined_attention(q, k, v, [[bank[half] for bank in banks]] * len(q), attend)
    )


def sampled_inputs(x, draw):
    """What write mode stores: drawn layer inputs of each half, frames in order."""
    n = len(x) // 2
    return torch.stack([torch.cat([x[half * n + row, mask] for row, mask in enumerate(draw)]) for half in (0, 1)])


def csa_attn(path: Path, report) -> None:
    data, meta = read(path)
    heads, frames = int(meta["heads"]), int(meta["N"])
    plain = reading()
    for grid in sorted(json.loads(meta["L"])):
        part = {key[2:]: value for key, value in data.items() if key.startswith(grid + ".")}
        layer = Layer(data, heads)
        draw = part["sample"][:frames].bool()
        x, x2, late = part["x_write"], part["x_write2"], part["x_read"]
        bank, bank2 = sampled_inputs(x, draw), sampled_inputs(x2, draw)
        everything = x.reshape(2, -1, x.shape[-1])
        write = layer(x, shared(draw))
        results = {
            "v3_write": write,
            "v2_write": write,
            "bank": bank,
            "bank_counts": draw.sum(1),
            "v3_read": layer(late, reading(layer.pieces(bank))),
            "v2_read": layer(late, reading(layer.pieces(bank))),
            "v3_read_two": layer(late, reading(layer.pieces(bank), layer.pieces(bank2))),
            "v1_read_early": layer(late, reading(layer.pieces(everything))),
            "v3_read_nc": layer(late, plain),
            "v3_read_unshared": layer(late, plain),
        }
        results |= dict.fromkeys(("v3_write_unshared", "v3_write_step0", "v1_write_early"), layer(x, plain))
        exact = Layer(data, heads, torch.float64)
        for name, got in results.items():
            report.close(path.name, f"{grid}.{name}", got, part[name], 1e-5)
        report.close(path.name, f"{grid}.v3_write_f64", exact(x, shared(draw)), part["v3_write_f64"], 1e-9)
        report.apart(path.name, f"{grid}.own_duplicated", write, part["own_duplicated"], 0.1)


def csa_window(path: Path, report) -> None:
    data, meta = read(path)
    width, heads = int(meta["W"]), int(meta["heads"])
    tokens = data["x"].shape[1]
    draws = torch.zeros(len(data["idx"]), width * tokens, dtype=torch.bool).scatter_(1, data["idx"], True)
    draws = draws.view(-1, width, tokens)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        got = Layer(data, heads, dtype)(data["x"], lambda q, k, v: window_attention(q, k, v, draws, attend))
        report.close(path.name, f"out_nodup {str(dtype)[6:]}", got, data["out_nodup"], tolerance)
    report.apart(path.name, "out_dup", got, data["out_dup"], 1e-3)
    rows = len(data["x"])
    count = sum((torch.arange(rows) >= t) & (torch.arange(rows) < t + width) for t in range(rows - width + 1))
    report.close(path.name, "count", count, data["count"], 0)


def unet(path: Path, report) -> None:
    """Weights only: they must be exactly those of ComfyUI's class."""
    from conformance_unet import tiny_unet

    missing = tiny_unet(path).missing
    report.line(path.name, "state dict", len(missing), "<= 0", not missing)


def unet_csa(path: Path, report) -> None:
    from conformance_unet import consistent_run

    consistent_run(path, path.with_name(path.name.split("_", 1)[0] + "_unet.safetensors"), report)


RUNNERS = {
    ("consistent_attention", "csa_attn"): csa_attn,
    ("consistent_attention", "csa_window"): csa_window,
    ("consistent_attention", "unet"): unet,
    ("consistent_attention", "unet_csa"): unet_csa,
}
RUNNERS |= {kind: runner for (_, kind), runner in RUNNERS.items()}
