"""Semantic Motion Predictor (StoryDiffusion, arXiv 2405.01434, section 3.2): an embedding for every frame between two pictures.

The authors published neither code nor weights. What the paper says: CLIP embeddings of both pictures, linear
interpolation, transformer blocks. Chosen here: positions by relative time, pre-norm blocks, and what the transformer adds
starts at zero, so that training begins at the interpolation.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .ip_adapter import Standard

FORMAT = "storyweft.motion_predictor"
HEAD = 64  # width of one head where a file does not say it
PROJECTION = "context_proj."


def interpolate(start: Tensor, end: Tensor, u: Tensor) -> Tensor:
    """[..., L, D] on the straight line from start to end [..., D] at relative times u [L]; both ends exact."""
    u = u.to(start)[:, None]
    return (1 - u) * start[..., None, :] + u * end[..., None, :]


def time_embedding(u: Tensor, width: int) -> Tensor:
    """[sin, cos] of 1000 u at falling frequencies, [L, width]: depends on relative time, not on the number of frames."""
    rates = torch.exp(torch.arange(width // 2, dtype=torch.float64) * (-math.log(10000) / (width // 2)))
    angles = 1000 * u.cpu().double()[:, None] * rates  # float32 would lose the fastest waves
    return torch.cat([angles.sin(), angles.cos()], 1).to(u)


def gate(u: Tensor, pinned: bool) -> Tensor:
    """How much of the prediction is added at relative times u: 1, or 4u(1-u), which leaves both ends as they are."""
    return 4 * u * (1 - u) if pinned else torch.ones_like(u)


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward over the frames, without biases."""

    def __init__(self, hidden: int, heads: int, dim_head: int, operations=nn):
        super().__init__()
        self.heads = heads
        self.norm1 = operations.LayerNorm(hidden)
        self.to_q, self.to_k, self.to_v = (operations.Linear(hidden, heads * dim_head, bias=False) for _ in range(3))
        self.to_out = operations.Linear(heads * dim_head, hidden, bias=False)
        self.ff = nn.Sequential(
            operations.LayerNorm(hidden),
            operations.Linear(hidden, 4 * hidden, bias=False),
            nn.GELU(),
            operations.Linear(4 * hidden, hidden, bias=False),
        )

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm1(h)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        h = h + self.to_out(scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))
        return h + self.ff(h)


class MotionPredictor(nn.Module):
    """Interpolated embeddings K [..., L, dim] to predicted ones P of the same shape.

    `context_proj`, if trained with it, turns each P_i into tokens of the video model's prompt (see Standard).
    """

    def __init__(self, dim: int, hidden: int, heads: int, dim_head: int, layers: int, operations=nn):
        super().__init__()
        self.dim, self.hidden, self.heads, self.dim_head = dim, hidden, heads, dim_head
        self.in_proj = operations.Linear(dim, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, dim_head, operations) for _ in range(layers))
        self.norm_out = operations.LayerNorm(hidden)
        self.out_proj = operations.Linear(hidden, dim)
        self.context_proj: Standard | None = None

    def reset(self) -> "MotionPredictor":
        """Let it predict the plain interpolation: where training starts."""
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        return self

    def forward(self, keys: Tensor, u: Tensor, pinned: bool = True) -> Tensor:
        u = u.to(keys)
        h = self.in_proj(keys) + time_embedding(u, self.hidden)
        for block in self.blocks:
            h = block(h)
        return keys + gate(u, pinned)[:, None] * self.out_proj(self.norm_out(h))

    def between(self, start: Tensor, end: Tensor, u: Tensor, pinned: bool = True) -> Tensor:
        """Embeddings [L, dim] of the transition from start to end [dim] at relative times u [L]."""
        return self(interpolate(start, end, u), u, pinned)


def film(predictor: MotionPredictor | None, keyframes: Tensor, places, pinned: bool = True) -> Tensor:
    """Embeddings [frames, D] of a film through keyframes [M, D]; places: (transition, relative time) of every frame.

    Each transition is predicted whole, with both of its keyframes; a shared keyframe is taken from the later one.
    Without a predictor it is the interpolation.
    """
    rows = []
    for segment in range(len(keyframes) - 1):
        u = [time for index, time in places if index == segment]
        whole = torch.tensor([*u, *([1.0] if u[-1] < 1 else [])], dtype=keyframes.dtype, device=keyframes.device)
        start, end = keyframes[segment], keyframes[segment + 1]
        found = interpolate(start, end, whole) if predictor is None else predictor.between(start, end, whole, pinned)
        rows.append(found[: len(u)])
    return torch.cat(rows)


def latent_means(frames: Tensor, groups) -> Tensor:
    """Mean over the frames [F, D] that each latent frame holds (groups of frame indices), [latent frames, D]."""
    return torch.stack([frames[list(group)].mean(0) for group in groups])


def metadata_of(predictor: MotionPredictor, encoder: str, pinned: bool) -> dict[str, str]:
    """What a file says beside its tensors."""
    sizes = {"dim": predictor.dim, "hidden": predictor.hidden, "heads": predictor.heads, "dim_head": predictor.dim_head}
    sizes = {name: str(value) for name, value in sizes.items()}
    layers = str(len(predictor.blocks))
    return {"format": FORMAT, **sizes, "layers": layers, "encoder": encoder, "pinned": str(pinned).lower()}


def build(state: Mapping[str, Tensor], metadata: Mapping[str, str], source: str, operations=nn) -> MotionPredictor:
    """The predictor of a file, loaded strictly; sizes from its tensors. `source` names the file in messages.

    Raises ValueError for files of another kind and for missing, left-over or wrongly shaped tensors.
    """
    if "in_proj.weight" not in state or "blocks.0.to_q.weight" not in state:
        raise ValueError(
            f"{source} is no motion predictor: it lacks in_proj.weight or blocks.0.to_q.weight (first tensors: "
            f"{', '.join(list(state)[:3])})."
        )
    hidden, dim = state["in_proj.weight"].shape
    inner = state["blocks.0.to_q.weight"].shape[0]
    heads = int(metadata.get("heads", max(inner // HEAD, 1)))
    if inner % heads:
        raise ValueError(f"{source}: its attention is {inner} wide, which {heads} heads do not divide.")
    layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    predictor = MotionPredictor(dim, hidden, heads, inner // heads, layers, operations)
    if f"{PROJECTION}proj.weight" in state:
        rows, clip = state[f"{PROJECTION}proj.weight"].shape
        width = state[f"{PROJECTION}norm.weight"].shape[0] if f"{PROJECTION}norm.weight" in state else rows
        predictor.context_proj = Standard(clip, width, rows // width, operations)
    own = predictor.state_dict()
    for key in own.keys() | state.keys():
        if key not in own or key not in state:
            raise ValueError(f"{source}: the tensor {key} is {'missing' if key in own else 'not known'}.")
        if own[key].shape != state[key].shape:
            raise ValueError(f"{source}: the tensor {key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}.")
    predictor.load_state_dict(state, assign=True)
    return predictor.requires_grad_(False)
