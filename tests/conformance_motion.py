"""Runners for golden/semantic_motion_predictor: the transformer with gradients, a cross-attention layer, chains of keyframes.

Sizes come from tensors, heads from the files. Everything is compared in the recorded float64 and again in float32.
"""

import functools
from pathlib import Path

import torch
from conformance_consistent import read
from storyweft.attention.apa import image_branch, scale_text
from storyweft.attention.branches import Branch, attend_branches
from storyweft.attention.core import attend, merge_heads, split_heads
from storyweft.attention.motion import append_rows
from storyweft.models.motion_predictor import build, film, gate, interpolate, latent_means, time_embedding
from storyweft.story.transitions import latent_frames, places, total_frames
from torch.nn.functional import linear

TYPES = ((torch.float64, 1e-9), (torch.float32, 1e-4))


def keep(found: dict, index: int, block, inputs, out) -> None:
    """Forward hook that remembers what a block gives."""
    found[index] = out


def predictor(path: Path, report) -> None:
    data, _ = read(path)
    for dtype, tolerance in TYPES:
        given = {key: value.to(dtype) for key, value in data.items() if value.is_floating_point()}
        weights = {key[2:]: value.clone() for key, value in given.items() if key.startswith("w.")}
        network = build(weights, {"heads": str(int(data["heads"]))}, path.name).to(dtype)
        sizes = (network.dim_head, len(network.blocks)) == (int(data["dim_head"]), int(data["layers"]))
        report.line(path.name, "dim_head, layers", 0.0 if sizes else float("nan"), "as stated", sizes)
        hidden = {}
        for index, block in enumerate(network.blocks):
            block.register_forward_hook(functools.partial(keep, hidden, index))
        bits = f" {str(dtype)[-2:]}"
        u = given["u"]
        keys = interpolate(given["k_start"], given["k_end"], u)
        report.close(path.name, "lerp" + bits, keys, given["lerp"], tolerance)
        report.apart(path.name, "slerp" + bits, keys, given["slerp_for_contrast"], 1e-3)
        report.close(path.name, "posemb" + bits, time_embedding(u, network.hidden), given["posemb"], tolerance)
        report.close(path.name, "pred_gate1" + bits, network(keys, u, False), given["pred_gate1"], tolerance)
        for index in hidden:
            name = f"hidden_after_block.{index}"
            report.close(path.name, name + bits, hidden[index], given[name], tolerance)
        pinned = network.between(given["k_start"], given["k_end"], u, True)
        report.close(path.name, "pred_pinned" + bits, pinned, given["pred_pinned"], tolerance)
        exact = torch.equal(pinned[[0, -1]], torch.stack([given["k_start"], given["k_end"]]))
        report.line(path.name, "pinned ends exact" + bits, 0.0, "equal", exact and not gate(u, True)[[0, -1]].any())
        network.requires_grad_(True)
        loss = (network(keys, u, False) - given["target"]).square().mean()
        loss.backward()
        report.close(path.name, "mse_loss" + bits, loss.detach().view(1), given["mse_loss"], tolerance)
        for name, parameter in network.named_parameters():
            if f"grad.{name}" in given:
                report.close(path.name, f"grad.{name}"[:25] + bits, parameter.grad, given[f"grad.{name}"], tolerance)
        network.reset()
        start = network(keys, u, False)
        report.line(
            path.name, "zero start" + bits, (start - keys).abs().max().item(), "== lerp", torch.equal(start, keys)
        )


def attached(path: Path, report) -> None:
    data, _ = read(path)
    heads = int(data["heads"])
    for dtype, tolerance in TYPES:
        given = {key: value.to(dtype) for key, value in data.items() if value.is_floating_point()}
        bits = f" {str(dtype)[-2:]}"
        frames, weights = given["frames"], {key[2:]: value for key, value in given.items() if key.startswith("w.")}

        def project(rows, ending="", weights=weights):
            return [split_heads(linear(rows, weights[f"to_{name}{ending}.weight"]), heads) for name in "kv"]

        def answer(branches, frames=frames, weights=weights):
            q = split_heads(linear(frames, weights["to_q.weight"]), heads)
            out = merge_heads(attend_branches(q, branches, attend))
            return linear(out, weights["to_out.0.weight"], weights["to_out.0.bias"])

        rows = slice(0, len(frames))
        text = project(given["text"].expand(len(frames), -1, -1))
        for key in sorted(key for key in given if key.startswith("out.")):
            name = key.removeprefix("out.")
            branches = [Branch(rows, *text)]
            if name == "concat_paper_form":
                append_rows(branches[0], *project(given["pred"]))
            elif name.startswith("decoupled_"):
                alphas = [float(number) for number in name.split("_")[1:]]
                scale_text(branches, alphas[0])
                branches.append(image_branch(rows, *project(given["pred"], "_ip"), alphas[1]))
            elif name == "single_token_only":
                branches = [Branch(rows, *project(given["pred"][:, :1]))]
            report.close(path.name, name + bits, answer(branches), given[key], tolerance)
        silent = [Branch(rows, *text), image_branch(rows, *project(given["pred"], "_ip"), 0.0)]
        report.close(path.name, "decoupled_1_0 == text" + bits, answer(silent), answer([Branch(rows, *text)]), 0.0)
        forms = (given["out.concat_paper_form"], given["out.decoupled_1_1"])
        joined = [Branch(rows, *text)]
        append_rows(joined[0], *project(given["pred"]))
        report.apart(path.name, "concat is not decoupled" + bits, answer(joined), forms[1], 1e-3)


def chain(path: Path, report) -> None:
    data, _ = read(path)
    length, keyframes = int(data["frames_per_transition"]), data["keyframes"]
    for dtype, tolerance in TYPES:
        bits = f" {str(dtype)[-2:]}"
        found = film(None, keyframes.to(dtype), places(len(keyframes), length))
        report.close(path.name, "chain_lerp" + bits, found, data["chain_lerp"].to(dtype), tolerance)
        means = latent_means(found, latent_frames(total_frames(len(keyframes), length)))
        report.close(path.name, "wan_latent_mean" + bits, means, data["wan_latent_mean"].to(dtype), tolerance)


RUNNERS = {
    ("semantic_motion_predictor", "predictor"): predictor,
    ("semantic_motion_predictor", "attach"): attached,
    ("semantic_motion_predictor", "chain"): chain,
}
