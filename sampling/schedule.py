"""Noise levels of a discrete diffusion schedule and the authors' ways to leave steps out (MM-Diffusion, section 2.7 f.).

a is the cumulated product of 1 - beta: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e, sigma = sqrt((1 - a) / a).
"""

from typing import NamedTuple

import torch
from torch import Tensor


def linear_betas(start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


def previous(alphas: Tensor) -> Tensor:
    """The cumulated product one step cleaner, 1 before the first."""
    return torch.cat([alphas.new_ones(1), alphas[:-1]])


def section_counts(respacing: str) -> list[int]:
    """The numbers of "ddimN", "N" or "a,b,c"; ValueError when the text is none of these."""
    counts = respacing.strip().removeprefix("ddim").split(",")
    if not all(count.strip().isdecimal() and int(count) for count in counts):
        raise ValueError(f'respacing "{respacing}" is neither "ddim25" nor a number of steps nor numbers with commas')
    return [int(count) for count in counts]


def spaced_times(total: int, respacing: str) -> list[int]:
    """Times kept out of 0 .. total - 1, rising: "ddimN" (every total // N-th), "N", or "a,b,c" counts of equal sections.

    ValueError when the text is none of these or asks for more steps than there are.
    """
    counts = section_counts(respacing)
    if respacing.strip().startswith("ddim"):
        for stride in range(1, total):
            if len(range(0, total, stride)) == counts[0]:
                return list(range(0, total, stride))
        raise ValueError(f'respacing "{respacing}": no stride leaves {counts[0]} of {total} steps')
    size, longer = divmod(total, len(counts))
    times, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(f'respacing "{respacing}" asks for {count} of the {length} steps of a section')
        stride = (length - 1) / (count - 1) if count > 1 else 1
        times += [start + round(stride * step) for step in range(count)]
        start += length
    return times


class DPMGrid(NamedTuple):
    """Knots of the solver: log signal-to-noise ratios, times of them (index into the schedule, may be broken), orders."""

    lambdas: Tensor
    times: Tensor
    orders: list[int]


def log_snr(alphas: Tensor) -> Tensor:
    """lambda = log(sqrt(a) / sqrt(1 - a)) = -log(sigma)."""
    return 0.5 * (alphas.log() - torch.log1p(-alphas))


def single(alphas: Tensor) -> Tensor:
    """The table as the authors' solver has it, rounded to float32; that moves the cleanest lambda by 3e-4."""
    return alphas.float().double()


def times_of(lambdas: Tensor, alphas: Tensor) -> Tensor:
    """Broken indices into the schedule where log(a) / 2, taken as straight between them, has these lambdas."""
    wanted = 0.5 * torch.nn.functional.logsigmoid(2 * lambdas)
    known = 0.5 * single(alphas).log()
    after = torch.searchsorted(-known, -wanted).clamp(1, len(known) - 1)
    share = (wanted - known[after - 1]) / (known[after] - known[after - 1])
    return after - 1 + share


def solver_times(lambdas: Tensor, alphas: Tensor) -> Tensor:
    """The whole times, rounded down, at which the authors ask the network for these lambdas.

    A level that comes from sigmas in float32 may lie just below its own time; that is not rounded down.
    """
    return (times_of(lambdas, alphas) + 1e-4).long()


def solver_orders(evaluations: int) -> list[int]:
    """Orders of the macro steps that take so many evaluations in all: 3 as often as possible, 2 and 1 in place of the last 3."""
    whole, rest = divmod(evaluations, 3)
    if rest == 0:
        return [3] * (whole - 1) + [2, 1]
    return [3] * whole + [rest]


def dpm_grid(evaluations: int, alphas: Tensor) -> DPMGrid:
    """DPM-Solver-fast of order 3 from the noisiest to the cleanest level: evaluations + 1 knots, even in lambda."""
    first, last = log_snr(single(alphas)[[-1, 0]]).tolist()
    lambdas = torch.linspace(first, last, evaluations + 1, dtype=torch.float64)
    return DPMGrid(lambdas, times_of(lambdas, alphas), solver_orders(evaluations))
