"""Samplers that a gradient can follow, on x, sigma and a callable: DDIM, and PLMS (arXiv 2202.09778) as SD v1's scripts have it.

In units where the noise of x has standard deviation sigma, a DDIM step is x + (sigma' - sigma) e for the predicted noise e,
and PLMS puts a combination of the last four predictions in the place of e.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

METHODS = ("plms", "ddim")
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def calls(method: str, steps: int) -> int:
    """Evaluations of the model for a number of steps: PLMS takes one more, in its first step."""
    return steps + (method == "plms")


def walk(
    noise_of: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float], method: str, last: int | None = None
) -> Tensor:
    """x at sigmas[0] taken to sigmas[-1]; `noise_of(x, sigma)` is the predicted noise, guidance included.

    last: how many of the last evaluations a gradient flows through, None for all; those before are made without one.
    """
    total, made, past = calls(method, len(sigmas) - 1), 0, []

    def predict(x: Tensor, sigma: float) -> Tensor:
        nonlocal made
        made += 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and (last is None or made > total - last)):
            return noise_of(x, sigma)

    for here, there in zip(sigmas, sigmas[1:], strict=False):
        e = predict(x, here)
        if method == "plms":
            past = [e, *past[:3]]
            if len(past) == 1:  # the first step looks ahead once and takes the mean
                ahead = predict(x + (there - here) * e, there) if there > 0 else e
                e = (e + ahead) / 2
            else:
                e = sum(factor * one for factor, one in zip(ADAMS_BASHFORTH[len(past) - 1], past, strict=True))
        x = x + (there - here) * e
    return x
