"""Direct sound optimisation (arXiv 2309.02405, stage b): prompt weights tuned until the picture agrees with what was heard.

The same start noise draws every round's picture, so that its loss is a function of the weights alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ..attention.sound import reweight

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
LARGEST = math.log(100)  # of the logarithm of a learned scale
LEAST_CROP = 0.6  # of a picture's sides


@dataclass(frozen=True)
class Terms:
    """Factors of the three losses: distance of the prompt from the plain one, caption, sound."""

    distance: float = 0.01
    text: float = 1.0
    audio: float = 0.9


@dataclass(frozen=True)
class Round:
    """One round as it was drawn: its losses (factors included), picture [n, 3, h, w] and prompt [..., tokens, channels]."""

    loss: float
    terms: tuple[float, float, float]
    picture: Tensor
    prompt: Tensor


def prepare(picture: Tensor, size: int = 224) -> Tensor:
    """Pictures [n, 3, h, w] in [0, 1] as CLIP takes them: bilinear without antialiasing, CLIP's mean and deviation."""
    mean, std = (picture.new_tensor(x)[:, None, None] for x in (MEAN, STD))
    return (interpolate(picture, (size, size), mode="bilinear", antialias=False) - mean) / std


def views(picture: Tensor, count: int, seed: int) -> Tensor:
    """Pictures [n, 3, h, w], and after them `count` crops of each at their size, mirrored or not: [n (1 + count), 3, h, w].

    The paper's figure shows augmentation before the two similarities, its code has none. A seed always draws the same crops,
    so that rounds can be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = picture.shape[-2:]
    found = [picture]
    for share, down, right, turn in torch.rand(count, 4, generator=generator).tolist():
        side = LEAST_CROP + (1 - LEAST_CROP) * share
        h, w = max(1, round(side * height)), max(1, round(side * width))
        top, left = round(down * (height - h)), round(right * (width - w))
        part = picture[..., top : top + h, left : left + w]
        part = interpolate(part, (height, width), mode="bilinear", antialias=False)
        found.append(part.flip(-1) if turn < 0.5 else part)
    return torch.cat(found)


def spherical(a: Tensor, b: Tensor) -> Tensor:
    """Squared spherical distance of embeddings [n, width], mean over n: 0 to pi^2 / 2."""
    chord = (normalize(a, dim=-1) - normalize(b, dim=-1)).norm(dim=-1)
    return (2 * (chord / 2).arcsin().square()).mean()


def disagreement(a: Tensor, b: Tensor, log_scale: Tensor | float = LARGEST) -> Tensor:
    """1 - cosine of embeddings [n, width], times a learned scale of at most 100 over 100; mean over n."""
    scale = torch.as_tensor(log_scale, dtype=a.dtype, device=a.device).exp().clamp(1, 100) / 100
    return (1 - scale * (normalize(a, dim=-1) * normalize(b, dim=-1)).sum(-1)).mean()


def objective(z: Tensor, w: Tensor, draw, judge, terms: Terms, restore: str = "mean") -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The three losses with their factors, the picture and the prompt of weights w [tokens, channels]."""
    prompt, _ = reweight(z, w, restore)
    picture = draw(prompt)
    text, audio = judge(picture)
    distance = (z - prompt).square().sum()
    return (terms.distance * distance, terms.text * text, terms.audio * audio), picture, prompt


def optimise(
    z: Tensor,
    weights: Tensor,
    draw: Callable[[Tensor], Tensor],
    judge: Callable[[Tensor], tuple[Tensor, Tensor]],
    terms: Terms,
    rounds: int = 10,
    rate: float = 0.01,
    report: Callable[[int, Round], None] | None = None,
    scale: float = 1.0,
    restore: str = "mean",
) -> tuple[list[Round], Tensor]:
    """All rounds and the weights [tokens, channels] after the last one's update, which no round shows.

    z [..., tokens, channels] is the plain prompt, weights [tokens] the ones to begin with; `draw` makes pictures in [0, 1] of a
    prompt, `judge` gives their disagreement with caption and sound. scale multiplies the loss for the backward pass alone, so
    that gradients of half precision do not vanish. restore as for `reweight`. Raises RuntimeError when a gradient is no number.
    """
    w = weights.to(z)[:, None].repeat(1, z.shape[-1]).requires_grad_(True)
    optimiser = torch.optim.Adam([w], lr=rate)
    found = []
    for index in range(rounds):
        parts, picture, prompt = objective(z, w, draw, judge, terms, restore)
        loss = sum(parts)
        optimiser.zero_grad()
        (loss * scale).backward()
        w.grad /= scale
        if not w.grad.isfinite().all():
            raise RuntimeError(f"the gradient of round {index + 1} is no number; run the model in bfloat16 or float32.")
        one = Round(
            loss.item(), tuple(part.detach().item() for part in parts), picture.detach(), prompt.detach()
        )
        found.append(one)
        if report is not None:
            report(index, one)
        optimiser.step()
    return found, w.detach()


def best(rounds: Sequence[Round]) -> int:
    """Number of the round with the least loss."""
    return min(range(len(rounds)), key=[one.loss for one in rounds].__getitem__)
