"""DPM-Solver-fast (Lu et al., 2022, arXiv 2206.00927) in noise prediction on a grid even in lambda, as MM-Diffusion runs it.

The authors' copy updates the audio by another formula in steps of order 1; here every half is treated alike.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]  # (state at unit scale, lambda) -> noise


def parts(lam: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a) at lambda."""
    return torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()


def macro_step(predict: Predict, x: Tensor, lam: Tensor, target: Tensor, order: int) -> Tensor:
    """One singlestep update of order 1, 2 or 3 from lambda to target, with as many evaluations (equations 3.7, 4.1, 4.4)."""
    h, (signal, _) = target - lam, parts(lam)

    def moved(share: float, extra: tuple[float, Tensor] | None = None) -> Tensor:
        to_signal, to_noise = parts(lam + share * h)
        growth = torch.expm1(share * h)
        out = (to_signal / signal).to(x.dtype) * x - (to_noise * growth).to(x.dtype) * first
        if extra is not None:
            weight, change = extra
            out = out - (to_noise * weight).to(x.dtype) * change
        return out

    first = predict(x, lam)
    if order == 1:
        return moved(1.0)
    if order == 2:
        second = predict(moved(0.5), lam + 0.5 * h)
        return moved(1.0, (torch.expm1(h), second - first))
    r1, r2 = 1 / 3, 2 / 3
    second = predict(moved(r1), lam + r1 * h)
    curved = r2 / r1 * (torch.expm1(r2 * h) / (r2 * h) - 1)
    third = predict(moved(r2, (curved, second - first)), lam + r2 * h)
    return moved(1.0, ((torch.expm1(h) / h - 1) / r2, third - first))


def dpm_solver_fast(predict: Predict, x: Tensor, lambdas: Tensor, orders: Sequence[int]) -> Iterator[Tensor]:
    """States after every macro step; a step of order o spans o cells of the grid [evaluations + 1]."""
    knot = 0
    for order in orders:
        x = macro_step(predict, x, lambdas[knot], lambdas[knot + order], order)
        knot += order
        yield x
