"""DDIM inversion: the noise from which a model draws a given picture, and every state between (arXiv 2312.02133).

States z are kept at unit scale, z = x / sqrt(sigma^2 + data^2), what the network sees; in the usual terms sqrt(alpha_bar) is
data / sqrt(sigma^2 + data^2). Noise is predicted at the step's destination: at the source, first of all at sigma near 0,
a prediction of noise means nothing.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]  # (x at sigma, sigma) -> clean estimate, guidance included


def inversion_step(denoise: Denoise, z: Tensor, source: float, target: float, sigma_data: float = 1.0) -> Tensor:
    """z [rows, ...] at sigma `source` taken to the higher sigma `target`; equal sigmas leave it bit-identical.

    z' = sqrt(a') (z - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - a') e with e predicted from z as if it stood at `target`.
    """
    here, there = (math.hypot(sigma, sigma_data) for sigma in (source, target))
    x = z * there
    noise = (x - denoise(x, target)) / target
    return z * (here / there) + noise * ((target - source) / there)


def invert(
    denoise: Denoise, z0: Tensor, sigmas: Sequence[float], sigma_min: float, sigma_data: float = 1.0
) -> Tensor:
    """Trajectory [steps + 1, *z0.shape]: state i belongs to sigmas[i] of a falling schedule that ends in 0, the last is z0.

    sigma_min is the least noise the model knows: the picture counts as a state of it. A schedule whose last step starts
    there, as the authors' does, has the identity as its first step of inversion.
    """
    states, before = [z0], sigma_min
    for sigma in reversed(sigmas[:-1]):
        states.append(inversion_step(denoise, states[-1], before, sigma, sigma_data))
        before = sigma
    return torch.stack(states[::-1])


def replay_index(step: int, offset: int) -> int:
    """State of a trajectory that stands for the picture at a step (from 0) of a run begun `offset` steps cleaner.

    The run starts from state `offset`; before step i > 0 the picture is set to state max(offset + 1, i), so it is cleaner
    than the step's sigma says until they meet.
    """
    return offset if step == 0 else max(offset + 1, step)
