"""Distances between two distributions of which draws are given, and measures of single draws.

Two finite sets of draws of *one* distribution are a positive distance apart too. A distance therefore means something
only beside its floor: the same distance between two fresh sets of draws of that distribution, of equal size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pfm._internal.checks import as_float_tensor, check_finite, check_number, check_seed, check_whole

__all__ = [
    "diversity",
    "energy_distance",
    "kolmogorov_smirnov",
    "mean_distance",
    "off_support",
    "projected_wasserstein",
    "projections",
    "sliced_wasserstein",
]

CHUNK_VALUES = 4_000_000  # distances, or projected values, held at once


def sliced_wasserstein(x: Any, y: Any, *, directions: int = 128, seed: int = 0) -> float:
    """Return the sliced 2-Wasserstein distance, in the outputs' unit.

    The root of the mean, over random directions u, of W2^2 between the draws' projections on u. Between two points
    at distance d in D dimensions it is d / sqrt(D) in the mean over all directions. In one dimension it is W2.

    Args:
        x: (N, \\*D) draws of one distribution. y: (M, \\*D) of the other; N and M may differ.
        directions: how many directions, the same for every call with the same ``seed`` and D.

    Source: Rabin, Peyré, Delon and Bernot, "Wasserstein barycenter and its application to texture mixing" (2011);
    Bonneel, Rabin, Peyré and Pfister, "Sliced and Radon Wasserstein barycenters of measures" (2015).

    >>> sliced_wasserstein([[0.0], [1.0]], [[3.0], [2.0]])
    2.0
    """
    seed = check_seed(seed)
    x, y = _two_sets(x, y)
    one, other = (projections(part, directions=directions, seed=seed) for part in (x, y))
    return projected_wasserstein(one, other)


def projections(y: Any, *, directions: int = 128, seed: int = 0) -> Tensor:
    """Project draws (N, \\*D) on random directions and sort: (directions, N), or (1, N) in one dimension.

    Sets that are compared with many others are sorted once this way; :func:`projected_wasserstein` compares them.
    """
    seed = check_seed(seed)
    y = _draws("y", y)
    check_whole("directions", directions, 1)
    if y.shape[1] == 1:
        return y.T.sort(1).values
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(directions, y.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    drawn = torch.nn.functional.normalize(drawn, dim=1).to(y)
    rows = max(1, CHUNK_VALUES // len(y))
    return torch.cat([(part @ y.T).sort(1).values for part in drawn.split(rows)])


def projected_wasserstein(x: Tensor, y: Tensor) -> float:
    """Return the root mean square, over rows, of W2 between sorted samples (L, N) and (L, M).

    In one dimension the optimal plan joins equal quantiles, so W2^2 is the integral of the squared difference of
    the two quantile functions; both are steps, and the integral a finite sum, also for N unlike M.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"x and y must be sorted projections (L, N) and (L, M) on the same L directions: got {tuple(x.shape)} "
            f"and {tuple(y.shape)}; make both with projections(..., directions=L, seed=...)"
        )
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return float((x - y.to(x.device)).square().mean(dtype=torch.float64).sqrt())
    # The levels at which either quantile function steps, as whole multiples of 1 / (n m).
    y = y.to(x.device)
    steps = (torch.arange(1, n + 1, device="cpu") * m, torch.arange(1, m + 1, device="cpu") * n)
    levels = torch.cat(steps).unique().to(x.device)
    width = levels.diff(prepend=levels.new_zeros(1)).double() / (n * m)
    of_x, of_y = (levels - 1) // m, (levels - 1) // n
    total = 0.0
    for one, other in zip(x.split(16), y.split(16), strict=True):  # 16 directions at a time
        total += float(((one[:, of_x] - other[:, of_y]).square().double() @ width).sum())
    return (total / len(x)) ** 0.5


def energy_distance(x: Any, y: Any) -> float:
    """Return the energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| >= 0, in the outputs' unit.

    Zero only for equal distributions; in one dimension twice the integral of the squared difference of the distribution
    functions. The means are over all pairs of draws, a draw with itself included, so that the value is that of the
    two empirical distributions and never negative.

    Args:
        x: (N, \\*D) draws of one distribution. y: (M, \\*D) of the other. The cost is O((N + M)^2), the memory O(N +
            M).

    Source: Székely and Rizzo, "Energy statistics: a class of statistics based on distances" (2013).

    >>> energy_distance([[0.0], [0.0]], [[1.0], [1.0]])
    2.0
    """
    x, y = _two_sets(x, y)
    return max(0.0, 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y))


def mean_distance(x: Any, y: Any) -> float:
    """Return the mean Euclidean distance over all pairs of a row of x (N, \\*D) and a row of y (M, \\*D)."""
    x, y = _two_sets(x, y)
    total = sum(float(block.sum(dtype=torch.float64)) for block in _distances(x, y))
    return total / (len(x) * len(y))


def kolmogorov_smirnov(x: Any, y_or_cdf: Any) -> float:
    """Return the largest difference of two distribution functions on the line, in [0, 1].

    Args:
        x: (N,) or (N, 1) draws.
        y_or_cdf: (M,) or (M, 1) draws of another distribution, or its continuous distribution function: a callable that
            takes (N,) values to (N,) probabilities.
    """
    x = _line("x", x).sort().values
    if callable(y_or_cdf):
        exact = torch.as_tensor(y_or_cdf(x)).to(x.device).double()
        if exact.shape != x.shape or bool((exact < 0).any() | (exact > 1).any()):
            raise ValueError(
                f"the distribution function must give ({len(x)},) probabilities: got {tuple(exact.shape)} from "
                f"{float(exact.min()):g} to {float(exact.max()):g}"
            )
        ranks = torch.arange(len(x) + 1, dtype=torch.float64, device="cpu").to(x.device) / len(x)
        return float(torch.maximum((ranks[1:] - exact).max(), (exact - ranks[:-1]).max()))
    y = _line("y_or_cdf", y_or_cdf).to(x.device).sort().values
    both = torch.cat([x, y])
    one, other = (torch.searchsorted(part, both, right=True).double() / len(part) for part in (x, y))
    return float((one - other).abs().max())


def off_support(y: Any, reference: Any, *, neighbours: int = 5, level: float = 0.99) -> float:
    """Return the share of outputs that lie further from the reference's draws than its own draws do.

    An output is off the support where the distance to its k-th nearest reference draw is above the ``level``
    quantile of the same distance among the reference's draws, each left out of its own neighbours. Fresh draws of
    the reference score 1 - ``level``: the floor.

    Args:
        y: (N, \\*D) outputs. reference: (M, \\*D) draws of the reference, M > ``neighbours``.
        neighbours: k. level: in (0, 1).

    Source: the k-nearest-neighbour estimate of a support of Kynkäänniemi et al., "Improved precision and recall
    metric for assessing generative models" (2019), with one radius for all instead of one a draw.

    >>> draws = torch.linspace(0, 1, 100)[:, None]
    >>> off_support([[0.5], [0.25], [7.0], [8.0]], draws)
    0.5
    """
    y, reference = _two_sets(y, reference, ("y", "reference"))
    check_whole(
        "neighbours", neighbours, 1, len(reference) - 1, hint="there must be more reference draws than neighbours"
    )
    level = check_number("level", level, above=0, below=1)
    # The nearest neighbour of a draw among all draws is itself.
    own = _nearest(reference, reference, neighbours + 1)
    radius = own.kthvalue(max(1, round(level * len(own)))).values
    return float((_nearest(y, reference, neighbours) > radius).double().mean())


def diversity(y: Any) -> float:
    """Return the mean distance of two independent draws, in the outputs' unit: 0 where all outputs are one.

    Args:
        y: (N, \\*D) with ``y.ndim == 2``: draws of one distribution; the mean is over all pairs of two different rows.
            Or (G, K, D): K draws each under G contexts; the mean is over pairs under one context.
    """
    y = as_float_tensor("y", y)
    if y.ndim not in (2, 3) or y.shape[-2] < 2 or y.shape[0] == 0:
        raise ValueError(
            f"y must be (N, D) or (G, K, D) with at least two draws of a distribution: got {tuple(y.shape)}"
        )
    check_finite("y", y)
    groups = y if y.ndim == 3 else y[None]
    count = groups.shape[1]
    if len(groups) == 1:
        return mean_distance(groups[0], groups[0]) * count / (count - 1)
    rows = max(1, CHUNK_VALUES // count**2)
    total = sum(float(_cdist(part, part).sum(dtype=torch.float64)) for part in groups.float().split(rows))
    return total / (len(groups) * count * (count - 1))


# -- shared ---------------------------------------------------------------------------------------------------------


def _draws(name: str, value: Any) -> Tensor:
    tensor = as_float_tensor(name, value)
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise ValueError(
            f"{name} must be (N, *D), one row a draw and at least one: got {tuple(tensor.shape)}"
            + ("; for scalar outputs use tensor[:, None]" if tensor.ndim == 1 and len(tensor) else "")
        )
    check_finite(name, tensor)
    flat = tensor.flatten(1)
    return flat if flat.dtype == torch.float64 else flat.float()


def _two_sets(x: Any, y: Any, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
    one, other = _draws(names[0], x), _draws(names[1], y)
    other = other.to(one.device)
    if one.shape[1] != other.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have draws of one size: got {one.shape[1]} and {other.shape[1]} values"
        )
    return (one, other) if one.dtype == other.dtype else (one.double(), other.double())


def _line(name: str, value: Any) -> Tensor:
    tensor = as_float_tensor(name, value)
    if tensor.numel() == 0 or tensor.numel() != len(tensor):
        raise ValueError(f"{name} must be draws of numbers, (N,) or (N, 1): got {tuple(tensor.shape)}")
    check_finite(name, tensor)
    return tensor.flatten().double()


def _cdist(x: Tensor, y: Tensor) -> Tensor:
    # The product form of the distance loses half of the digits where points are close.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    for part in x.split(max(1, CHUNK_VALUES // len(y))):
        yield _cdist(part, y)


def _nearest(y: Tensor, reference: Tensor, number: int) -> Tensor:
    """Return the distance (N,) of each row to its ``number``-th nearest reference draw."""
    return torch.cat([block.kthvalue(number, dim=1).values for block in _distances(y, reference)])
