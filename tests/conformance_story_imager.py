"""Runner for golden/story_imager: board layout, masked noising, context extractor, frame-story cross attention."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from storyweft.attention.frame_story import frame_index, masked_noising, merge_board, split_board, target_mask
from storyweft.models.story_board import ContextExtractor, FrameStoryAttention, Join, prior_board
from storyweft.story.board import ORDERS, BoardShape

META = ("rows", "columns", "order", "height", "width", "heads", "words", "context_tokens", "story_tokens", "frame_layers",
        "story_layers", "prior_height", "prior_width", "rank")  # fmt: skip
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


def module(data: dict, prefix: str, network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The network with the file's parameters; every one of them must find its place and none may be missing."""
    state = {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}
    network.to(dtype).load_state_dict(state, strict=True)
    return network


def extractor(data: dict, meta: dict, dtype) -> ContextExtractor:
    hidden, width = data["p.ctx.prior_mlp.0.weight"].shape
    return module(
        data,
        "p.ctx.",
        ContextExtractor(
            width,
            meta["heads"],
            meta["frame_layers"],
            meta["story_layers"],
            meta["context_tokens"],
            meta["story_tokens"],
            len(data["p.ctx.frame_pos"]),
            hidden,
            (meta["prior_height"], meta["prior_width"]),
        ),
        dtype,
    )


def attention(data: dict, meta: dict, dtype) -> FrameStoryAttention:
    channels, width = data["p.ca.to_k.weight"].shape
    network = FrameStoryAttention(channels, width, meta["heads"], meta["rank"], data["lora_alpha"].item())
    return module(data, "p.ca.", network, dtype)


@torch.no_grad()
def results(data: dict, meta: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    grid = torch.tensor(BoardShape(meta["rows"], meta["columns"], ORDERS[meta["order"]]).grid)
    size = meta["height"], meta["width"]
    words, z0, eps, tokens = (data[key].to(dtype) for key in ("words", "z0", "eps", "board_tokens"))
    index, targets = frame_index(grid, *size), data["mask"].to(dtype)
    noised = masked_noising(
        merge_board(z0, grid), merge_board(eps, grid), data["alpha_bar"].to(dtype), target_mask(targets, index)
    )
    context = extractor(data, meta, dtype)(words, targets)
    prior = prior_board(context.prior, grid, size)
    frame, story = attention(data, meta, dtype)(tokens, words, context.story, index.flatten())
    join = module(data, "p.fuse.", Join(len(data["p.fuse.proj.bias"])), dtype)
    return {
        "frame_index_board": index,
        "z_masked_board": noised,
        "context": context.tokens,
        "prior": context.prior,
        "prior_board": prior,
        "global_context": context.story,
        "fs_frame": frame,
        "fs_story": story,
        "fs_add": join(frame, story, "add"),
        "fs_blend05": join(frame, story, "blend", 0.5),
        "fs_concat_proj": join(frame, story, "concat_proj"),
        "input_add": noised + prior,
        "input_concat": torch.cat([noised, prior], 1),
    }


def storyimager(path: Path, report) -> None:
    data = load_file(path)
    meta = dict(zip(META, data["meta"].tolist(), strict=True))
    for dtype, tolerance in TOLERANCES.items():
        for name, got in results(data, meta, dtype).items():
            report.close(path.name, f"{name} {str(dtype)[6:]}", got, data[name], tolerance)
    grid = torch.tensor(BoardShape(meta["rows"], meta["columns"], ORDERS[meta["order"]]).grid)
    board = merge_board(data["z0"], grid)
    report.close(path.name, "z0 merged and split", split_board(board, grid), data["z0"], 0)


RUNNERS = {("story_imager", "storyimager"): storyimager, "storyimager": storyimager}
