"""Detect cycles over rounds of labels, by the preference that labels them.

Let b_j(y) be the chance of y against round j. Where a reward r stands behind the preference, b_j rises with r, and
every round moves weight to larger r: the mean of b_j over round n never falls with n. So a round that beats the one
before, and yet does worse than that one did against some earlier round j, disproves any reward: the population is
going round. Once it falls below one half against j the circle is closed. The test is one-sided: a preference with
cycles may make progress for some rounds before it shows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pfm._internal.significance import confirmed
from pfm.preferences.base import PreferenceModel

__all__ = ["CyclingWarning", "Labeller", "RoundCheck", "as_labeller", "compare_rounds", "labelled", "warn_of_cycle"]

Labeller = Callable[[Tensor, Tensor, Tensor | None], Any]
"""Labels outputs y, y' (B, \\*D) under contexts (B, C) or None: the probability (B,), or whether, y is preferred."""


class CyclingWarning(UserWarning):
    """Warns that the last round of labels beats the one before and loses ground against an earlier one."""


@dataclass(frozen=True)
class RoundCheck:
    """Holds how the last round's outputs do against those of every round before; round 0 is the reference.

    Attributes:
        rounds: number of the last round, n.
        pairs: number of comparisons behind each figure.
        wins: mean chance of round n against rounds 0..n - 1. errors: their standard errors.
        before: mean chance of round n - 1 against rounds 0..n - 2.
        slipped: rounds against which round n does worse than round n - 1 did, beyond chance, though it beats that.
        lost_to: rounds that beat round n beyond chance, though it beats round n - 1.
    """

    rounds: int
    pairs: int
    wins: list[float]
    errors: list[float]
    before: list[float]
    slipped: list[int]
    lost_to: list[int]

    @property
    def cycling(self) -> bool:
        """Return whether the rounds are seen to cycle."""
        return bool(self.slipped or self.lost_to)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self) | {"cycling": self.cycling}

    def __str__(self) -> str:
        last = self.rounds
        if not self.cycling:
            return f"round {last} wins {self.wins[-1]:.1%} against round {last - 1}; no sign of a cycle"
        losses = [
            f"{self.wins[j]:.1%} against round {j}" + ("" if j in self.lost_to else f", down from {self.before[j]:.1%}")
            for j in sorted({*self.slipped, *self.lost_to})
        ]
        return (
            f"round {last} wins {self.wins[-1]:.1%} against round {last - 1}, but {'; '.join(losses)}: the preferences "
            "are cyclic, and further rounds need not converge"
        )


def compare_rounds(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], labeller: Labeller, context: Tensor | None = None
) -> RoundCheck:
    """Compare the last of several populations with all before it.

    Args:
        ours, theirs: n + 1 >= 2 populations each, (B, \\*D): the reference's draws and what rounds 1..n made of them;
            row i of every one comes of the same draw, and the draws of ours and theirs are independent of each other.
        labeller: gives labels.
        context: (B, C) or None.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"ours and theirs must hold equally many rounds, 2 or more: got {len(ours)} and {len(theirs)}")
    last = len(ours) - 1
    count = len(ours[0])
    wins, errors, before, slipped, lost = [], [], [], [], []
    now = [labelled(labeller, ours[last], theirs[j], context) for j in range(last)]
    tests = 2 * (last - 1) + 1
    ahead = _beyond(now[-1] - 0.5, tests)
    for j, chance in enumerate(now):
        wins.append(float(chance.mean()))
        errors.append(_error(chance))
        if j < last - 1:
            earlier = labelled(labeller, ours[last - 1], theirs[j], context)
            before.append(float(earlier.mean()))
            if ahead and _beyond(earlier - chance, tests):
                slipped.append(j)
            if ahead and _beyond(0.5 - chance, tests):
                lost.append(j)
    return RoundCheck(last, count, wins, errors, before, slipped, lost)


def labelled(labeller: Labeller, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
    """Ask for labels, and give them as probabilities (B,) on the CPU.

    Raises:
        ValueError: the labels are not (B,) numbers in [0, 1].
    """
    label = torch.as_tensor(labeller(y, other, context)).float().cpu()
    if label.shape != (len(y),) or not bool(((label >= 0) & (label <= 1)).all()):
        raise ValueError(
            f"labeller must give ({len(y)},) probabilities in [0, 1], or booleans, that y is preferred: got "
            f"{tuple(label.shape)}" + (f" from {float(label.min()):g} to {float(label.max()):g}" if len(label) else "")
        )
    return label


def as_labeller(labeller: Labeller | PreferenceModel) -> Labeller:
    """Return a labeller that uses the probabilities of a fitted preference model; a function is returned unchanged."""
    if not isinstance(labeller, PreferenceModel):
        return labeller
    model = labeller

    def label(y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        with torch.no_grad():
            return torch.sigmoid(model.score(y, other, context))

    return label


def warn_of_cycle(check: RoundCheck) -> None:
    """Warn if the rounds are seen to cycle."""
    if check.cycling:
        warnings.warn(CyclingWarning(str(check)), stacklevel=4)


def _error(values: Tensor) -> float:
    return float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _beyond(values: Tensor, tests: int) -> bool:
    """Return whether the mean of values (B,) is above 0 beyond chance, at 95% over as many tests (Bonferroni)."""
    return bool(confirmed(values, torch.arange(len(values)), tests=tests))
