"""The test by which held-out prompts confirm a gain: one for every part that is kept or dropped.

Rows of one prompt depend on each other, so the prompts' totals are tested: by Student's t of a cluster-robust standard
error (CR2 and its degrees of freedom, Bell & McCaffrey 2002) and, for few prompts, by the exact sign-flip test. The t
test alone takes two prompts of equal gain for certainty. The p-value of the sign-flip test is at least 2^-G with G
prompts, so that fewer than five prompts confirm nothing at 5%. benchmarks/studies/confirmation.py simulates the rate of
false positives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CONFIRMED", "Confirmation", "choose_crosswise", "confirmable", "confirmed", "halves", "standard_errors"]

CONFIRMED = 1.645  # z-score of a one-sided p-value of 5%
LEVEL = 0.05
ENUMERATED = 12  # groups up to which all 2^G sign flips are listed
SMALLEST_P = 1e-300


@dataclass(frozen=True)
class Confirmation:
    """Holds the one-sided test that a mean is above zero.

    Attributes:
        z: z-score of the p-value, finite; above :data:`CONFIRMED` the p-value is below 5%.
        p_value: one-sided, in (0, 1].
        level: p-value below which the mean counts as confirmed.
        groups: number of independent groups (prompts, or units where there is one prompt).
        degrees: degrees of freedom of Student's t, at most groups - 1.
    """

    z: float
    p_value: float
    level: float
    groups: int
    degrees: float

    def __bool__(self) -> bool:
        """Return whether the mean is confirmed to be above zero."""
        return self.p_value < self.level


def confirmed(
    value: Tensor,
    group: Tensor,
    weight: Tensor | None = None,
    *,
    unit: Tensor | None = None,
    tests: int = 1,
    cross_fitted: bool = False,
) -> Confirmation:
    """Test whether the weighted mean of ``value`` is above zero, one-sided at 5%; its scale does not matter.

    Args:
        value: (N,) finite; a gain, or an agreement in [-1, 1].
        group: (N,) prompts, inside which rows may depend on each other.
        weight: (N,) >= 0, or None for 1; rows of weight 0 count for nothing.
        unit: (N,) what the rows of one prompt are about, such as a pair that stands in several rows; it takes the
            group's place where there is one group only. None: every row is a unit of its own.
        tests: number of tests of which this is the best (Bonferroni).
        cross_fitted: whether each value comes from a model fitted on the labels of the other groups. Two groups then
            use each other's labels, and where labels are at chance the variance of the total is up to twice the
            sum of the squares. The standard error is raised by that.
    """
    value, group = value.detach().double().cpu().flatten(), group.detach().cpu().flatten()
    weight = torch.ones_like(value) if weight is None else weight.detach().double().cpu().flatten()
    kept = weight > 0
    level = LEVEL / tests
    if not bool(kept.any()):
        return Confirmation(0.0, 1.0, level, 0, 0.0)
    member = _members(group, unit)[kept]
    value, weight = value[kept], weight[kept]
    _, member = torch.unique(member, return_inverse=True)
    count = int(member.max()) + 1
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, member, value * weight)
    size = torch.zeros(count, dtype=torch.float64).index_add_(0, member, weight)
    statistic, degrees = _student(total, size)
    if cross_fitted:
        statistic /= math.sqrt(2)
    p_value = _upper_tail(statistic, degrees)
    if count <= ENUMERATED:
        p_value = max(p_value, _sign_flips(total))
    elif math.isinf(statistic):
        p_value = max(p_value, 2.0**-count)
    p_value = max(p_value, SMALLEST_P)
    # Sign flips of few groups, or of totals of zero, give p-values up to 1 that do not say how far below zero it is.
    below = min(_z_score(_upper_tail(statistic, degrees)), 0.0) if degrees else 0.0
    return Confirmation(_z_score(p_value) if p_value < 0.5 else below, p_value, level, count, degrees)


def standard_errors(value: Tensor, group: Tensor) -> float:
    """Return the z-score of :func:`confirmed` for the mean of ``value`` (N,), clustered by ``group`` (N,)."""
    return confirmed(value, group).z


def confirmable(group: Tensor, unit: Tensor | None = None) -> bool:
    """Return whether rows (N,) of these prompts, of which there must be five, could confirm anything at all."""
    members = _members(group.detach().cpu(), unit)
    return 2.0 ** -len(torch.unique(members)) < LEVEL


def halves(group: Tensor, unit: Tensor | None = None) -> Tensor:
    """Return which rows (N,) form one half of the prompts; of the units (see :func:`confirmed`) of a single prompt."""
    _, member = torch.unique(_members(group.detach().cpu(), unit), return_inverse=True)
    return member % 2 == 0


def choose_crosswise(loss: Tensor, weight: Tensor, half: Tensor) -> Tensor:
    """Choose among K candidates by their losses (K, N) on one half of the rows for the other, and vice versa.

    A candidate chosen and judged on the same rows looks better than it is. Here no row takes part in the choice that
    it judges.

    Args:
        loss: (K, N). weight: (N,) >= 0. half: (N,) which rows are the first half.

    Returns:
        (N,) int64, the candidate chosen for each row.
    """
    share = weight.double()
    chosen = torch.zeros(loss.shape[1], dtype=torch.long, device=loss.device)
    for part in (half, ~half):
        chosen[part] = int((loss[:, ~part].double() @ share[~part]).argmin())
    return chosen


def _members(group: Tensor, unit: Tensor | None) -> Tensor:
    if bool((group != group[:1]).any()):
        return group
    return torch.arange(len(group)) if unit is None else unit.detach().cpu().flatten()


def _student(total: Tensor, size: Tensor) -> tuple[float, float]:
    """Return Student's t of the mean, sum(total) / sum(size), and its degrees of freedom.

    The group means x_g = T_g / n_g are taken to have one variance, the most cautious working model for groups of
    unequal size; then the variance is unbiased, and Satterthwaite's degrees of freedom have a closed form.
    """
    if len(total) < 2:
        return 0.0, 0.0
    share = size / size.sum()
    mean = float(total.sum() / size.sum())
    left = total / size - mean
    squares = float(share.square().sum())
    factor = share.square() / (1 - share)
    expected = factor * (1 - 2 * share + squares)
    variance = float((factor * left.square()).sum()) * squares / float(expected.sum())
    # The trace of (A S)^2, with the covariance S_gh = [g = h] - w_g - w_h + sum w^2 of the residuals.
    zeroth, first, second = (float((factor * share**power).sum()) for power in range(3))
    trace = float((factor.square() * (1 + 2 * (squares - 2 * share))).sum())
    trace += zeroth**2 * squares**2 + 2 * zeroth * second - 4 * squares * zeroth * first + 2 * first**2
    degrees = min(max(float(expected.sum()) ** 2 / trace, 1.0), len(total) - 1.0)
    # Equal values leave a variance of rounding errors.
    if variance > (1e-12 * float(total.abs().max() / size.mean())) ** 2:
        return mean / math.sqrt(variance), degrees
    return (math.copysign(math.inf, mean) if mean else 0.0), degrees


def _upper_tail(statistic: float, degrees: float) -> float:
    from scipy.special import stdtr

    if degrees == 0:
        return 1.0
    return float(stdtr(degrees, -statistic)) if math.isfinite(statistic) else float(statistic < 0)


def _z_score(p_value: float) -> float:
    from scipy.special import ndtri

    return float(-ndtri(min(p_value, 1 - 1e-16)))


def _sign_flips(total: Tensor) -> float:
    """Return the share of all sign flips of the groups' totals (G,) whose sum is at least the observed one."""
    places = torch.arange(len(total))
    signs = 1 - 2 * (torch.arange(2 ** len(total))[:, None] >> places & 1)
    sums = signs.double() @ total
    return float((sums >= total.sum() - 1e-9 * total.abs().sum()).double().mean())
