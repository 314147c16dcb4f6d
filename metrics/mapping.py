"""Whether a mapping between embeddings has collapsed: spread, fit and retrieval of predictions, in whitened space.

Predictions and targets are [N, D], pooled or flattened. Effective rank and participation ratio are free of scale and stay
high on a collapsed mapping with a little noise; they are reported, and decide nothing.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, relu

LEAST_DEVIATION = 1e-4
TAU = 0.07


def info_nce(a: Tensor, b: Tensor, tau: float | Tensor = TAU, same: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of finding each row's partner by cosine among unit rows a, b [N, D], from both sides.

    `same` [N, N] marks pairs off the diagonal that are no errors (one caption twice); they are left out of the sums.
    """
    logits = a @ b.T / tau
    if same is not None:
        logits = logits.masked_fill(same & ~torch.eye(len(a), dtype=torch.bool, device=a.device), -math.inf)
    own = logits.diagonal()
    return ((logits.logsumexp(1) - own).mean() + (logits.logsumexp(0) - own).mean()) / 2


def ranks(a: Tensor, b: Tensor) -> Tensor:
    """Place from 1 of each row's own partner among rows of b by cosine with unit rows a; ties count against it."""
    scores = a @ b.T
    own = scores.diagonal()[:, None]
    others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    return 1 + ((scores >= own) & others).sum(1)


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine of different rows."""
    unit = normalize(x, dim=1, eps=0)
    return (unit.sum(0).square().sum() - unit.square().sum()) / (len(x) * (len(x) - 1))


def diagnose(predictions: Tensor, targets: Tensor, tau: float = TAU) -> dict[str, float]:
    """The numbers of the collapse report, by name; both [N, D] with N > 1."""
    p, t = predictions.double(), targets.double()
    mean, deviation = t.mean(0), t.std(0, correction=0).clamp(min=LEAST_DEVIATION)
    pw, tw = (p - mean) / deviation, (t - mean) / deviation
    a, b = normalize(pw, dim=1), normalize(tw, dim=1)
    count, width = p.shape
    nce, place = info_nce(a, b, tau), ranks(a, b)
    apart = torch.pdist(a).square()
    centred = pw - pw.mean(0)
    covariance = centred.T @ centred / (count - 1)
    singular = torch.linalg.svdvals(p - p.mean(0))
    share = singular / singular.sum().clamp(min=1e-300)
    energy = singular.square()
    error = (pw - tw).square().mean()
    found = {
        "var_ratio": p.var(0, correction=0).sum() / t.var(0, correction=0).sum(),
        "r2_vs_mean": 1 - (p - t).square().sum() / (t - mean).square().sum(),
        "mean_offdiag_cos": mean_cosine(p),
        "mean_offdiag_cos_centred": mean_cosine(p - p.mean(0)),
        "retrieval_r1": (place == 1).double().mean(),
        "retrieval_mean_rank": place.double().mean(),
        "infonce": nce,
        "mi_lower_bound": math.log(count) - nce,
        "alignment": (a - b).square().sum(1).mean(),
        "uniformity": (-2 * apart).exp().mean().log(),
        "vicreg_var": relu(1 - (pw.var(0, correction=0) + 1e-4).sqrt()).mean(),
        "vicreg_cov": (covariance.square().sum() - covariance.diagonal().square().sum()) / width,
        "mse_whitened": error,
        "total_recommended": error + 0.1 * nce,
        "effective_rank": (-(share * share.clamp(min=1e-300).log()).sum()).exp(),
        "participation_ratio": energy.sum().square() / energy.square().sum().clamp(min=1e-300),
    }
    return {name: float(value) for name, value in found.items()}


def collapsed(report: dict[str, float]) -> bool:
    """Whether a report shows outputs that hardly depend on the input."""
    return report["var_ratio"] < 0.1 and (report["r2_vs_mean"] < 0.05 or report["mean_offdiag_cos"] > 0.98)
