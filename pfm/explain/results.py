"""Results of an explanation: changes of traits, directions with words and texts at their ends, and a summary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pfm.statistics import Estimate

__all__ = ["Contrast", "Direction", "Results", "Term", "TraitChange"]

SMALLEST = 0.05  # standard deviations: smaller changes are not spoken of


@dataclass(frozen=True)
class TraitChange:
    """Holds the change of one trait.

    Attributes:
        name: of :data:`pfm.explain.traits.TRAITS`. words: how to say the direction of the change.
        moved, picked, labelled: changes in standard deviations between the answers to one prompt, see the module;
            positive for more of the trait, whatever ``words`` says.
        at_equal_length: what is left of ``picked`` when b and the trait are both compared at equal log length; None
            for the length itself.
        correlation: of b and the trait within prompts.
        told: share of the trait's variance within prompts that the embedding predicts on held-out prompts (R²).
        confirmed: labels, b and displacement agree in sign, the labels' interval, widened for the number of
            traits, excludes zero, and the change is not negligible.
    """

    name: str
    words: str
    moved: Estimate
    picked: Estimate
    labelled: Estimate
    at_equal_length: Estimate | None
    correlation: Estimate | None
    told: float
    confirmed: bool

    def towards(self, change: Estimate | None) -> Estimate | None:
        """Return a change of this trait counted in the direction of ``words``: of "shorter", positive for less."""
        if change is None or self.picked.value >= 0:
            return change
        return Estimate(0.0 - change.value, 0.0 - change.high, 0.0 - change.low)

    @property
    def with_length(self) -> bool:
        """Return whether the change is little more than that of the length."""
        if self.at_equal_length is None:
            return False
        left = self.at_equal_length.value * math.copysign(1, self.picked.value)
        return left < max(SMALLEST, abs(self.picked.value) / 4)


@dataclass(frozen=True)
class Term:
    """A word, or a mark such as "?", that one end has more of: ``z`` standard errors, ``counts`` at (high, low) end."""

    text: str
    z: float
    counts: tuple[int, int]


@dataclass(frozen=True)
class Contrast:
    """Two real outputs of one prompt: ``high`` lies furthest along a direction, ``low`` least far.

    ``gap`` is their distance along it, in standard deviations between the answers to one prompt; the rest is b.
    """

    prompt: str
    high: str
    low: str
    gap: float
    high_probability: float
    low_probability: float


@dataclass(frozen=True)
class Direction:
    """One way in which real outputs of a prompt differ and along which the flow acts.

    The place of an output along an axis u is (S + ridge)^-1 u times the output, with S the covariance within prompts:
    Fisher's discriminant (1936) between outputs and outputs moved along u. A plain projection on u would be ruled by
    the leading components of the embedding, whatever the flow does.

    Attributes:
        kind: "mean" of the displacement; "win", the win probability b, by which outputs are selected; or "principal",
            an axis along which the displacement differs most from its mean, at right angles to it.
        name: in words, of its traits; empty if none stands out.
        share: of the mean square displacement that lies along it; None for "win".
        moves: how far outputs move along it on average, in units of the root mean square distance of the answers to a
            prompt from their mean; None for "win".
        spreads: slope of the displacement on the place along the direction: below zero the flow draws outputs
            together, above zero it drives them apart; None for "win".
        correlation: of the place along the direction and b, within prompts.
        traits: the traits that go with it, (words, correlation within prompts), strongest first.
        more, less: contrastive terms of its high and of its low end.
        contrasts: texts of the pairs at both ends.
    """

    kind: str
    name: str
    share: float | None
    moves: float | None
    spreads: float | None
    correlation: Estimate | None
    traits: list[tuple[str, Estimate]]
    more: list[Term]
    less: list[Term]
    contrasts: list[Contrast]


@dataclass(frozen=True)
class Results:
    """Hold all that an explanation shows; :class:`pfm.explain.Explanation` draws and saves it.

    Attributes:
        confirmed: whether held-out prompts confirm any direction.
        summary: one line in plain words. reasons: what the verdict rests on. warnings: what to beware of.
        length_share: share of b's variance within prompts that the log of the length explains.
        accuracy: share of the given pairs that b orders as their labels do.
        traits: every trait that varies, by the size of its change.
        directions: the mean displacement first; none where none is confirmed.
        settings: what was looked at (JSON values).
    """

    confirmed: bool
    summary: str
    reasons: list[str]
    warnings: list[str]
    length_share: Estimate | None
    accuracy: Estimate
    traits: list[TraitChange]
    directions: list[Direction]
    settings: dict[str, Any]

    def spoken(self) -> list[str]:
        """Return the confirmed traits in words, strongest first, those that only come with the length last."""
        found = [trait for trait in self.traits if trait.confirmed] if self.confirmed else []
        return [trait.words for trait in sorted(found, key=lambda trait: trait.with_length)]
