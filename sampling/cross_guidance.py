"""Zero-shot conditioning of a joint model (MM-Diffusion, section 3.4): part of the clip is known, the rest is drawn.

What is known is put in with one noise for the whole run. Replacement takes the ordinary step of the rest; gradient
guidance also moves the rest to where the model's own step of the known part would agree with what is known.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .ddpm import ddpm_step, noised


class Known(NamedTuple):
    """A clip of which a part is given: its values, its noise of this run, and 1 where it is to be drawn; all [B, ...]."""

    clean: Tensor
    noise: Tensor
    drawn: Tensor

    def at(self, alpha: Tensor) -> Tensor:
        """The given part at a level (what is to be drawn is not meant)."""
        return noised(self.clean, self.noise, alpha).to(self.clean.dtype)

    def put_into(self, x: Tensor, alpha: Tensor) -> Tensor:
        return x * self.drawn + self.at(alpha) * (1 - self.drawn)


class Guided(NamedTuple):
    """The state at the next level, of which only the drawn part counts; the gradient, if one was asked for."""

    x: Tensor
    gradient: Tensor | None


def guided_step(
    estimate: Callable[[Tensor], Tensor],
    known: Known,
    x: Tensor,
    alpha: Tensor,
    after: Tensor,
    noise: Tensor,
    strength: float = 0.0,
) -> Guided:
    """One ancestral step of x [B, ...] at unit scale from level alpha to `after` (1 at the end), both 0-d float64.

    `estimate` gives x0 of a state, `noise` is that of this step. With strength g the drawn part is moved by
    -g sqrt(alpha) d|y - y_after|^2 / d x, where y is the model's step of the known part and y_after what it ought to be:
    summed over the elements of a clip, so no clip depends on how many there are. The authors' scale s of a mean over N
    known elements and B clips is g = s / (N B). Strength 0 is replacement; the last step is never moved.
    """
    if not strength or after == 1:
        x = known.put_into(x, alpha)
        return Guided(ddpm_step(x, estimate(x), alpha, after, noise), None)
    with torch.inference_mode(False), torch.enable_grad():
        known, start = Known(*(part.clone() for part in known)), x.clone().requires_grad_()
        state = known.put_into(start, alpha)
        moved = ddpm_step(state, estimate(state), alpha, after, noise.clone())
        loss = ((moved - known.at(after)) * (1 - known.drawn)).square().sum()
        (gradient,) = torch.autograd.grad(loss, start)
        return Guided(moved.detach() - strength * alpha.sqrt().to(x.dtype) * gradient, gradient)
