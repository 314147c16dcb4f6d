"""ImageBind-LLM's bind network and visual cache (arXiv 2309.03905), by the names of its published file."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

EPS = 1e-6
GATES = 3


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.weight.to(x)


class BindNetwork(nn.Module):
    """Embeddings [n, inside] -> [n, 1, width]: a projection, then three gated layers with a short way around each."""

    def __init__(self, inside: int, width: int, feed: int, operations=nn):
        super().__init__()
        self.image_bind_proj = operations.Linear(inside, width)
        for index in range(1, GATES + 1):
            self.add_module(f"image_bind_norm_{index}", RMSNorm(width))
            self.add_module(f"image_bind_f1_{index}", operations.Linear(width, feed, bias=False))
            self.add_module(f"image_bind_f2_{index}", operations.Linear(feed, width, bias=False))
            self.add_module(f"image_bind_f3_{index}", operations.Linear(width, feed, bias=False))

    def forward(self, e: Tensor) -> Tensor:
        x = self.image_bind_proj(e)
        for index in range(1, GATES + 1):
            norm, first, second, third = (
                getattr(self, f"image_bind_{name}_{index}") for name in ("norm", "f1", "f2", "f3")
            )
            seen = norm(x)
            x = x + second(silu(first(seen)) * third(seen))
        return x[:, None]


def mixed(embeddings: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of unit embeddings [n, width] with weights that are made to add up to 1."""
    total = sum(weights) + 1e-6
    return sum(normalize(e, dim=-1) * (weight / total) for e, weight in zip(embeddings, weights, strict=True))


def visual_cache(f: Tensor, bank: Tensor, k: int = 10, sharpness: float = 20.0, weight: float = 0.5) -> Tensor:
    """f [n, width] moved towards the `k` unit image embeddings of `bank` [M, width] that are most like it; unit norm."""
    scores, nearest = (f @ bank.T).topk(min(k, len(bank)), dim=-1)
    found = ((scores * sharpness).softmax(-1)[:, None] @ bank[nearest])[:, 0]
    return normalize((1 - weight) * f + weight * normalize(found, dim=-1), dim=-1)


def build(state: Mapping[str, Tensor], source: str, operations=nn) -> BindNetwork:
    """The network of a published file's tensors, other tensors of the file left out. Raises ValueError."""
    tensors = {key: value for key, value in state.items() if key.startswith("image_bind_")}
    for key in ("image_bind_proj.weight", "image_bind_f1_1.weight"):
        if key not in tensors:
            raise ValueError(f"{source} holds no bind network: it lacks {key} (first: {', '.join(list(state)[:3])}).")
    width, inside = tensors["image_bind_proj.weight"].shape
    with torch.device("meta"):
        network = BindNetwork(inside, width, tensors["image_bind_f1_1.weight"].shape[0], operations)
    own = network.state_dict()
    for key in own.keys() | tensors.keys():
        if key not in own or key not in tensors:
            raise ValueError(f"{source}: the tensor {key} is {'missing' if key in own else 'not known'}.")
    network.load_state_dict(tensors, assign=True)
    return network.train(False).requires_grad_(False)
