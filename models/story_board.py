"""StoryImager's trainable parts (arXiv 2404.05979): context extractor and frame-story cross attention with LoRA.

No code or weights were published. The figures fix what goes where; layer counts, widths, how the mask enters and the way
branches join are choices of this project, and so are the parameter names.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..attention.branches import attend_branches
from ..attention.core import attend, merge_heads, split_heads
from ..attention.frame_story import frame_story_branches, merge_board


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, operations):
        super().__init__()
        self.heads = heads
        self.qkv = operations.Linear(width, 3 * width)
        self.out = operations.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return self.out(merge_heads(attend(q, k, v)))


class TransformerLayer(nn.Module):
    """Pre-norm layer: x + attention(norm x), then x + perceptron(norm x) with an exact GELU."""

    def __init__(self, width: int, heads: int, operations):
        super().__init__()
        self.ln1 = operations.LayerNorm(width)
        self.attn = SelfAttention(width, heads, operations)
        self.ln2 = operations.LayerNorm(width)
        self.mlp = nn.Sequential(operations.Linear(width, 4 * width), nn.GELU(), operations.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Context(NamedTuple):
    """tokens [n, frames, context tokens, width], prior [n, frames, 4, h, w], story [n, story tokens, width]."""

    tokens: Tensor
    prior: Tensor
    story: Tensor


class ContextExtractor(nn.Module):
    """Captions and targets of a board to frame tokens, a latent prior of each frame, and tokens of the whole story."""

    def __init__(
        self,
        width: int = 768,
        heads: int = 8,
        frame_layers: int = 4,
        story_layers: int = 2,
        context_tokens: int = 8,
        story_tokens: int = 77,
        max_frames: int = 8,
        hidden: int = 1536,
        prior: tuple[int, int] = (32, 32),
        operations=nn,
    ):
        super().__init__()
        self.prior = (4, *prior)
        self.query = nn.Parameter(0.02 * torch.randn(context_tokens, width))
        self.prior_query = nn.Parameter(0.02 * torch.randn(1, width))
        self.mask_embed = nn.Parameter(0.02 * torch.randn(2, width))
        self.frame_pos = nn.Parameter(0.02 * torch.randn(max_frames, width))
        self.story_query = nn.Parameter(0.02 * torch.randn(story_tokens, width))
        self.frame_tf = nn.Sequential(*(TransformerLayer(width, heads, operations) for _ in range(frame_layers)))
        self.frame_ln = operations.LayerNorm(width)
        self.story_tf = nn.Sequential(*(TransformerLayer(width, heads, operations) for _ in range(story_layers)))
        self.story_ln = operations.LayerNorm(width)
        last = operations.Linear(hidden, 4 * prior[0] * prior[1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.prior_mlp = nn.Sequential(operations.Linear(width, hidden), nn.GELU(), last)

    def forward(self, words: Tensor, targets: Tensor) -> Context:
        """words [n, frames, tokens, width], targets [n, frames] with 1 = to be drawn."""
        n, frames, length = words.shape[:3]
        own = (
            torch.cat([self.query, self.prior_query]).to(words) + self.mask_embed.to(words)[targets.long()][:, :, None]
        )
        found = self.frame_ln(self.frame_tf(torch.cat([words, own], 2).flatten(0, 1)))[:, length:]
        tokens, prior = found[:, :-1].unflatten(0, (n, frames)), self.prior_mlp(found[:, -1])
        placed = (tokens + self.frame_pos[:frames, None].to(words)).flatten(1, 2)
        asked = self.story_query.to(words).expand(n, -1, -1)
        story = self.story_ln(self.story_tf(torch.cat([placed, asked], 1)))[:, placed.shape[1] :]
        return Context(tokens, prior.unflatten(0, (n, frames)).unflatten(-1, self.prior), story)


def prior_board(prior: Tensor, grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Priors [n, frames, 4, h, w], resized to cells of `size` latent cells and laid out: [n, 4, rows·h, columns·w]."""
    if prior.shape[-2:] != size:
        n = len(prior)
        prior = interpolate(prior.flatten(0, 1), size=size, mode="bilinear", align_corners=False).unflatten(0, (n, -1))
    return merge_board(prior, grid)


class LowRank(nn.Module):
    """(alpha / rank)·up·down, added to a linear layer; zero at the start."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.randn(rank, inputs) / rank)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.down.T.to(x) @ self.up.T.to(x))


def low_ranks(channels: int, width: int, rank: int, alpha: float) -> nn.ModuleDict:
    """A LowRank for each projection of a cross-attention `channels` wide over text `width` wide."""
    inputs = {"to_q": channels, "to_k": width, "to_v": width, "to_out": channels}
    return nn.ModuleDict({name: LowRank(size, channels, rank, alpha) for name, size in inputs.items()})


class FrameStoryAttention(nn.Module):
    """One cross-attention site: frozen projections shared by frame and story branch, each with its own LoRA."""

    def __init__(self, channels: int, width: int, heads: int, rank: int = 16, alpha: float = 16.0, operations=nn):
        super().__init__()
        self.heads = heads
        self.to_q = operations.Linear(channels, channels, bias=False)
        self.to_k = operations.Linear(width, channels, bias=False)
        self.to_v = operations.Linear(width, channels, bias=False)
        self.to_out = operations.Linear(channels, channels)
        self.lora_frame, self.lora_story = (low_ranks(channels, width, rank, alpha) for _ in range(2))

    def forward(self, x: Tensor, captions: Tensor, story: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Frame and story branch, each [n, tokens, channels].

        x [n, tokens, channels], captions [n, frames, words, width], story [n, story tokens, width], cells int64 [tokens].
        """
        labels = torch.arange(captions.shape[1]).repeat_interleave(captions.shape[2])
        frame = self._branch(self.lora_frame, x, captions.flatten(1, 2), cells, labels, 0.0)
        return frame, self._branch(self.lora_story, x, story, cells, torch.zeros(story.shape[1]), 1.0)

    def _branch(self, lora, x: Tensor, text: Tensor, cells: Tensor, labels: Tensor, blend: float) -> Tensor:
        q, k, v = (
            split_heads(getattr(self, name)(given) + lora[name](given), self.heads)
            for name, given in (("to_q", x), ("to_k", text), ("to_v", text))
        )
        rows = slice(0, len(x))
        out = merge_heads(attend_branches(q, frame_story_branches(rows, k, v, cells[None], labels, blend), attend))
        return self.to_out(out) + lora["to_out"](out)


class Join(nn.Module):
    """How the branches become one: frame + story, (1 - blend)·frame + blend·story, or proj [frame ; story]."""

    def __init__(self, channels: int, operations=nn):
        super().__init__()
        self.proj = operations.Linear(2 * channels, channels)

    def forward(self, frame: Tensor, story: Tensor, how: str, blend: float = 0.5) -> Tensor:
        """`how` is "add", "blend" or "concat_proj". Raises ValueError for anything else."""
        if how == "add":
            return frame + story
        if how == "blend":
            return (1 - blend) * frame + blend * story
        if how == "concat_proj":
            return self.proj(torch.cat([frame, story], -1))
        raise ValueError(f"frame and story branch cannot be joined by {how!r}; use add, blend or concat_proj")
