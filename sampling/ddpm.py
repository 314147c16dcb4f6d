"""Ancestral sampling with the variance that MM-Diffusion's authors use (fixed large: beta itself).

All on states at unit scale, x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e; `after` is the a of the next, cleaner level, 1 at the
end. A schedule with steps left out has beta = 1 - a / after.
"""

from typing import NamedTuple

from torch import Tensor


class Posterior(NamedTuple):
    """q(x_after | x, x0): mean = clean * x0 + here * x; variance of it, and the larger one that is sampled with."""

    clean: Tensor
    here: Tensor
    variance: Tensor
    large: Tensor


def posterior(alpha: Tensor, after: Tensor) -> Posterior:
    """Coefficients of a step between two levels; both may hold many levels at once."""
    beta = 1 - alpha / after
    return Posterior(
        beta * after.sqrt() / (1 - alpha),
        (1 - after) * (1 - beta).sqrt() / (1 - alpha),
        beta * (1 - after) / (1 - alpha),
        beta,
    )


def noised(clean: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def clean_estimate(x: Tensor, predicted: Tensor, alpha: Tensor) -> Tensor:
    """x0 of a state and the noise predicted in it, kept within -1 and 1."""
    return ((x - (1 - alpha).sqrt() * predicted) / alpha.sqrt()).clamp(-1, 1)


def ddpm_step(x: Tensor, clean: Tensor, alpha: Tensor, after: Tensor, noise: Tensor) -> Tensor:
    """The state at the next level; no noise is added to the last (after = 1)."""
    step = posterior(alpha, after)
    mean = step.clean.to(x.dtype) * clean + step.here.to(x.dtype) * x
    return mean + step.large.sqrt().to(x.dtype) * noise if after < 1 else mean


def levels(sigmas: Tensor) -> Tensor:
    """a of every sigma, float64."""
    return 1 / (1 + sigmas.double() ** 2)
