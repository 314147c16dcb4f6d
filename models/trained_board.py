"""StoryImager's trainable module as a file of its own (arXiv 2404.05979): context extractor and LoRA of both branches.

At each cross-attention of a U-Net: out = frame branch + gate · story branch, projections frozen, each branch with its own
LoRA on q, k, v and out; the gate is one number a layer and starts at 0, as the LoRA and the latent prior do, so that
training begins at the frame branch alone. No code or weights were published: names and this join are ours.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..attention.core import attend, merge_heads, split_heads
from ..attention.frame_story import merge_board, split_board
from .story_board import ContextExtractor, low_ranks

FORMAT = "storyweft.story_board"


class Site(nn.Module):
    """What is trained at one cross-attention `channels` wide, over text `width` wide."""

    def __init__(self, channels: int, width: int, rank: int, alpha: float):
        super().__init__()
        self.lora_frame, self.lora_story = (low_ranks(channels, width, rank, alpha) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(1))


class BoardModule(nn.Module):
    """`ctx` and one site for each cross-attention, in execution order; channels says how wide they are."""

    def __init__(self, ctx: ContextExtractor, channels: list[int], width: int, rank: int = 16, alpha: float = 16.0):
        super().__init__()
        self.ctx = ctx
        self.width, self.channels, self.rank, self.alpha = width, channels, rank, alpha
        self.sites = nn.ModuleList(Site(size, width, rank, alpha) for size in channels)

    def metadata(self) -> dict[str, str]:
        """What a file says beside its tensors."""
        heads = self.ctx.frame_tf[0].attn.heads
        prior = "x".join(map(str, self.ctx.prior[1:]))
        return {"format": FORMAT, "heads": str(heads), "alpha": str(self.alpha), "prior": prior}


class SiteAttention(nn.Module):
    """A frozen cross-attention of the U-Net with its site: what trainers put in its place.

    `board` is shared by all sites and set before each call: captions [n, frames, words, width], story [n, tokens, width],
    grid and the board's (height, width) in latent cells; without captions it is the attention it stands for.
    """

    def __init__(self, attention: nn.Module, site: Site, board: dict):
        super().__init__()
        self.attention, self.site, self.board = attention, site, board

    def forward(self, x: Tensor, context=None, value=None, mask=None, transformer_options=None) -> Tensor:
        board, site = self.board, self.site
        cells = self._cells(x)
        captions = board["captions"].flatten(0, 1)
        frame = self._branch(cells.flatten(0, 1), captions, site.lora_frame)
        frame = self._whole(frame.unflatten(0, cells.shape[:2]), x)
        story = self._branch(x, board["story"], site.lora_story)
        return frame + site.gate.to(x) * story

    def _size(self, tokens: int) -> tuple[int, int]:
        height, width = self.board["size"]
        while height * width > tokens:
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width

    def _cells(self, x: Tensor) -> Tensor:
        """Tokens [n, tokens, C] by frame, [n, frames, tokens of a frame, C]."""
        board = x.transpose(1, 2).unflatten(2, self._size(x.shape[1]))
        return split_board(board, self.board["grid"]).flatten(-2).transpose(-1, -2)

    def _whole(self, frames: Tensor, x: Tensor) -> Tensor:
        height, width = self._size(x.shape[1])
        rows, columns = self.board["grid"].shape
        frames = frames.transpose(-1, -2).unflatten(-1, (height // rows, width // columns))
        return merge_board(frames, self.board["grid"]).flatten(2).transpose(1, 2)

    def _branch(self, x: Tensor, text: Tensor, lora: nn.ModuleDict) -> Tensor:
        own = self.attention
        q, k, v = (
            split_heads(getattr(own, name)(given) + lora[name](given), own.heads)
            for name, given in (("to_q", x), ("to_k", text), ("to_v", text))
        )
        out = merge_heads(attend(q, k, v))
        return own.to_out(out) + lora["to_out"](out)


def build(state: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> BoardModule:
    """The module of a file, loaded strictly; sizes from its tensors, heads and LoRA scale from the metadata.

    Raises ValueError, naming `source`, for files of another kind and for missing, left-over or wrongly shaped tensors.
    """
    if metadata.get("format") != FORMAT or "ctx.query" not in state:
        raise ValueError(
            f"{source} is no trained board: its format is {metadata.get('format')!r}, not {FORMAT!r} (first tensors: "
            f"{', '.join(list(state)[:3])})."
        )
    tokens, width = state["ctx.query"].shape
    layers = [
        1 + max(int(key.split(".")[2]) for key in state if key.startswith(f"ctx.{part}_tf."))
        for part in ("frame", "story")
    ]
    prior = tuple(int(side) for side in metadata["prior"].split("x"))
    ctx = ContextExtractor(
        width,
        int(metadata["heads"]),
        *layers,
        tokens,
        state["ctx.story_query"].shape[0],
        state["ctx.frame_pos"].shape[0],
        state["ctx.prior_mlp.0.weight"].shape[0],
        prior,
    )
    count = sum(key.endswith(".gate") for key in state)
    downs = [state[f"sites.{index}.lora_frame.to_q.down"] for index in range(count)]
    module = BoardModule(ctx, [down.shape[1] for down in downs], width, downs[0].shape[0], float(metadata["alpha"]))
    own = module.state_dict()
    for key in own.keys() | state.keys():
        if key not in own or key not in state:
            raise ValueError(f"{source}: the tensor {key} is {'missing' if key in own else 'not known'}.")
        if own[key].shape != state[key].shape:
            raise ValueError(f"{source}: the tensor {key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}.")
    module.load_state_dict(state)
    return module.requires_grad_(False)
