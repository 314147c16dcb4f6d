"""Zero-shot conditioning of a joint model (MM-Diffusion, section 3.4): one half of the pair is known, the other is drawn.

The known half is put in with one noise for the whole run. Replacement takes the ordinary step of the other half;
gradient guidance also moves it to where the model's own step of the known half would agree with what is known.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .ddpm import ddpm_step, noised


class Known(NamedTuple):
    """The half that is given: clean, and its noise of this run; both [B, ...]."""

    clean: Tensor
    noise: Tensor

    def at(self, alpha: Tensor) -> Tensor:
        return noised(self.clean, self.noise, alpha).to(self.clean.dtype)


Estimate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (known, wanted) at unit scale -> clean estimates of both


class Guided(NamedTuple):
    """The wanted half at the next level, the model's own step of the known half, the gradient if one was asked for."""

    wanted: Tensor
    known: Tensor
    gradient: Tensor | None


def guided_step(
    estimate: Estimate,
    known: Known,
    wanted: Tensor,
    alpha: Tensor,
    after: Tensor,
    noises: tuple[Tensor, Tensor],
    strength: float = 0.0,
) -> Guided:
    """One ancestral step of the wanted half [B, ...] between the levels alpha and `after` (1 at the end), 0-d float64.

    `noises` are those of this step for the known and the wanted half. With strength g the step is moved by
    -g sqrt(alpha) d|y' - y_after|^2 / d wanted, where y' is the model's step of the known half and y_after what it ought
    to be: summed over the elements of a sample, so no sample depends on how many there are. The authors' scale s of a
    mean over N elements and B samples is g = s / (N B). Strength 0 is replacement; the last step is never moved.
    """
    given = known.at(alpha)
    if not strength or after == 1:
        clean = estimate(given, wanted)
        own, moved = (
            ddpm_step(x, x0, alpha, after, z) for x, x0, z in zip((given, wanted), clean, noises, strict=True)
        )
        return Guided(moved, own, None)
    with torch.inference_mode(False), torch.enable_grad():
        start, given = wanted.clone().requires_grad_(), given.clone()
        clean = estimate(given, start)
        own = ddpm_step(given, clean[0], alpha, after, noises[0].clone())
        moved = ddpm_step(start, clean[1], alpha, after, noises[1].clone())
        loss = (own - known.at(after).clone()).square().sum()
        (gradient,) = torch.autograd.grad(loss, start)
    moved = moved.detach() - strength * alpha.sqrt().to(wanted.dtype) * gradient
    return Guided(moved, own.detach(), gradient)
