"""What is measured on outputs whose exact distribution is known, each figure beside what exact draws score on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.core.config import LawConfig
from benchmarks.laws.laws import Law
from pfm.distances import diversity, kolmogorov_smirnov, mean_distance, projected_wasserstein, projections
from pfm.statistics import Bootstrap, Estimate

__all__ = ["Drawn", "measure"]


@dataclass(frozen=True)
class Drawn:
    """Holds one set of outputs, as far as it is compared.

    Where a law has contexts, outputs are compared as :meth:`Law.aligned` gives them: those that are right on the whole
    but under the wrong contexts are then as far off as they should be.

    Attributes:
        projected: (L, N) sorted projections of the outputs, for the sliced Wasserstein distance.
        few: (n, D) some of the outputs, and within the mean distance of two of them, for the energy distance.
        numbers: figures of this set alone.
    """

    projected: Tensor
    few: Tensor
    within: float
    numbers: dict[str, float]

    @classmethod
    def of(
        cls, law: Law, y: Tensor, context: Tensor | None, stage: int, config: LawConfig, generator: torch.Generator
    ) -> Drawn:
        """Measure outputs y (N, D) under contexts (N, C), two neighbouring rows each, that aim at a round."""
        rows = law.aligned(y, context)
        few = rows[torch.randperm(len(rows), generator=generator)[: config.energy_samples]]
        opponent = law.reference(context, len(y), generator)
        reward = law.reward(y, context)
        numbers = {
            "off_support": float((~law.supported(y, context)).double().mean()),
            "win": float(law.preference(y, opponent, context).double().mean()),
            "diversity": diversity(y[: len(y) // 2 * 2].unflatten(0, (-1, 2))),
        }
        if reward is not None:
            numbers["reward"] = float(reward.double().mean())
        if law.distribution(y, stage) is not None:
            numbers["kolmogorov_smirnov"] = kolmogorov_smirnov(
                y, lambda values: law.distribution(values[:, None], stage)
            )
        return cls(projections(rows, directions=config.directions), few, mean_distance(few, few), numbers)

    def sliced_wasserstein(self, other: Drawn) -> float:
        """Return the sliced 2-Wasserstein distance of the two sets."""
        return projected_wasserstein(self.projected, other.projected)

    def energy_distance(self, other: Drawn) -> float:
        """Return the energy distance of the two subsamples."""
        return max(0.0, 2 * mean_distance(self.few, other.few) - self.within - other.within)


def measure(
    ours: Sequence[Drawn],
    target: Sequence[Drawn],
    floor: Sequence[Drawn],
    start: Sequence[Drawn],
    bootstrap: Bootstrap,
    *,
    best_of_two: list[float] | None,
) -> dict[str, Estimate | None]:
    """Return every figure with its 95% interval over the R sets of outputs.

    Args:
        ours: R sets of outputs. target, floor: R sets each of exact draws of the target distribution, all independent.
        start: R sets of the reference draws that were moved into ``ours``.
        bootstrap: resamples of the R sets.
        best_of_two: exact E[r] of the reference and of its winners, or None without a reward.

    Returns:
        ``sliced_wasserstein``, ``energy_distance``: mean distance of each of our sets to all target sets; with
        ``_floor`` that of the floor's sets to the same, and with ``_ratio`` the ratio of the two.
        ``kolmogorov_smirnov`` (on the line, to the exact distribution function), ``off_support``, ``diversity``
        (mean distance of two independent outputs under one context), ``win`` (chance to beat an independent
        reference draw), ``reward`` (E[r]): means over our sets, with ``_floor`` the exact draws' own.
        ``gain``: E[r] less that of the same draws before they were moved; ``gain_share``: the gain in units of the
        exact winners'. None where the law has no such figure.
    """
    figures: dict[str, Estimate | None] = {}
    for name in ("sliced_wasserstein", "energy_distance"):
        distance = getattr(Drawn, name)
        ours_to, floor_to = (
            np.array([np.mean([distance(one, other) for other in target]) for one in sets]) for sets in (ours, floor)
        )
        figures[name] = bootstrap.mean(ours_to)
        figures[f"{name}_floor"] = bootstrap.mean(floor_to)
        figures[f"{name}_ratio"] = bootstrap.ratio(ours_to, floor_to)
    for name in ("kolmogorov_smirnov", "off_support", "diversity", "win", "reward"):
        for suffix, sets in (("", ours), ("_floor", floor)):
            values = [one.numbers.get(name) for one in sets]
            figures[name + suffix] = None if None in values else bootstrap.mean(np.array(values, dtype=np.float64))
    figures["gain"] = figures["gain_share"] = None
    if best_of_two is not None:
        gain = np.array(
            [one.numbers["reward"] - before.numbers["reward"] for one, before in zip(ours, start, strict=True)]
        )
        figures["gain"] = bootstrap.mean(gain)
        figures["gain_share"] = bootstrap.mean(gain / (best_of_two[1] - best_of_two[0]))
    return figures
