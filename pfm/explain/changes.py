"""Changes of each trait: moved by the displacement, picked by b, labelled by the pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pfm._internal.significance import standard_errors
from pfm.explain.outputs import Array, Outputs
from pfm.explain.results import SMALLEST, TraitChange
from pfm.explain.traits import TRAITS, measure_traits
from pfm.statistics import Bootstrap, Estimate, interval

if TYPE_CHECKING:
    from pfm.data.encoded import EncodedPairs

__all__ = [
    "accuracy_of",
    "correlations",
    "excludes_zero",
    "moved_traits",
    "pair_labels",
    "trait_changes",
    "varying_traits",
]

FOLDS = 5

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the regressions, in units of the inputs' mean variance

MANY = 3.15 / 1.96  # widens a 95% interval to one for all of about 30 traits at once (Bonferroni)


def varying_traits(outputs: Outputs) -> tuple[list[str], Array]:
    """Return the names of the traits that vary within prompts, and them (n, F), centred there, with unit variance."""
    traits = outputs.centred(measure_traits(outputs.texts))
    spread = np.sqrt((traits**2).mean(0))
    varies = spread > 1e-6
    return [name for name, there in zip(TRAITS, varies, strict=True) if there], traits[:, varies] / spread[varies]


def pair_labels(encoded: EncodedPairs) -> tuple[Array, Array]:
    """Return each pair's weight and its label 2 p - 1, from -1 to 1, (N,) each."""
    count = len(encoded)
    weight = np.ones(count) if encoded.weight is None else encoded.weight.double().numpy()
    label = np.ones(count) if encoded.probability is None else 2 * encoded.probability.double().numpy() - 1
    return weight, label


def accuracy_of(
    b: Array, outputs: Outputs, encoded: EncodedPairs, label: Array, bootstrap: Bootstrap
) -> tuple[Estimate, float]:
    """Estimate the share of pairs that b orders as their labels do, and the z-score of its excess over one half.

    Pairs labelled as ties are left out of the share, unless there are no others.
    """
    first, second = outputs.rows[0::2], outputs.rows[1::2]
    weight = np.ones(len(first)) if encoded.weight is None else encoded.weight.double().numpy()
    agreement = weight * label * np.sign(b[first] - b[second])
    if np.any(weight * label):
        weight = weight * (label != 0)
    unit, count = outputs.unit[first], bootstrap.n
    estimate = bootstrap.share(np.bincount(unit, (weight + agreement) / 2, count), np.bincount(unit, weight, count))
    assert estimate is not None
    return estimate, standard_errors(torch.from_numpy(agreement), encoded.group)


def moved_traits(
    place: Array, displacement: Array, traits: Array, outputs: Outputs, seed: int
) -> tuple[Array, Array, Array]:
    """Predict what the displacement (n, D) makes of each trait (n, F), each output by a fit on other prompts.

    Returns:
        the changes (n, F), the standard errors (F,) of their means that the fits bring with them, by the jackknife over
        the folds, and the share (F,) of each trait's variance that those fits predict.
    """
    units = int(outputs.unit.max()) + 1
    fold = (np.random.default_rng([seed, 2]).permutation(units) % min(FOLDS, units))[outputs.unit]
    errors = np.zeros((len(PENALTIES), traits.shape[1]))
    changes = np.zeros((len(PENALTIES), *traits.shape))
    means: list[Array] = []
    grams = {number: place[fold == number].T @ place[fold == number] for number in np.unique(fold)}
    crosses = {number: place[fold == number].T @ traits[fold == number] for number in grams}
    for number in grams:
        part = fold == number
        rest = [other for other in grams if other != number] or [number]
        gram, cross = sum(grams[other] for other in rest), sum(crosses[other] for other in rest)
        values, vectors = np.linalg.eigh(gram)
        values = np.maximum(values, 0)
        unit = max(float(values.mean()), 1e-30)
        inside, moves, target = place[part] @ vectors, displacement[part] @ vectors, vectors.T @ cross
        mean = displacement.mean(0) @ vectors
        means.append(np.zeros((len(PENALTIES), traits.shape[1])))
        for row, penalty in enumerate(PENALTIES):
            weights = target / (values + penalty * unit)[:, None]
            errors[row] += ((traits[part] - inside @ weights) ** 2).sum(0)
            changes[row, part] = moves @ weights
            means[-1][row] = mean @ weights
    best = errors.argmin(0)
    columns = np.arange(traits.shape[1])
    told = 1 - errors[best, columns] / (traits**2).sum(0)
    errors_of_fits = math.sqrt(len(means) - 1) * np.stack(means)[:, best, columns].std(0)
    return changes[best, :, columns].T, errors_of_fits, np.maximum(told, 0)


def trait_changes(
    names: Sequence[str],
    traits: Array,
    changes: Array,
    fit_errors: Array,
    told: Array,
    b: Array,
    label: Array,
    label_weight: Array,
    outputs: Outputs,
    bootstrap: Bootstrap,
) -> list[TraitChange]:
    """Measure by how much each trait changes along the flow, by b and by the labels."""
    if not names:
        return []
    like = np.ones_like(traits)
    moved = [
        None if found is None else _widened(found, float(error))
        for found, error in zip(
            bootstrap.ratios(outputs.by_unit(changes), outputs.by_unit(like)), fit_errors, strict=True
        )
    ]
    above = outputs.centred(b)
    picked = bootstrap.ratios(outputs.by_unit(above[:, None] * traits), outputs.by_unit(b[:, None] * like))
    first, second = outputs.rows[0::2], outputs.rows[1::2]
    unit = outputs.unit[first]
    sums = [
        np.stack([np.bincount(unit, column, bootstrap.n) for column in columns.T], axis=1)
        for columns in (
            label[:, None] * (traits[first] - traits[second]) / 2,
            np.repeat(label_weight[:, None], len(names), axis=1),
        )
    ]
    labelled = bootstrap.ratios(sums[0], sums[1])
    correlation = correlations(traits, above, outputs, bootstrap)
    equal: list[Estimate | None] = [None] * len(names)
    if "words" in names:
        length = names.index("words")
        equal = _equal_length(traits, traits[:, length], above, b, outputs, bootstrap)
        equal[length] = None
    zero = Estimate(0.0, 0.0, 0.0)
    found = []
    for row, name in enumerate(names):
        three = (moved[row] or zero, picked[row] or zero, labelled[row] or zero)
        trait = TRAITS[name]
        change = three[1].value
        signs = {math.copysign(1, estimate.value) for estimate in three}
        confirmed = len(signs) == 1 and excludes_zero(three[2]) and abs(change) >= SMALLEST
        found.append(
            TraitChange(
                name,
                trait.more if change >= 0 else trait.less,
                *three,
                equal[row],
                correlation[row],
                float(told[row]),
                confirmed,
            )
        )
    return sorted(found, key=lambda change: -abs(change.picked.value))


def _widened(estimate: Estimate, error: float) -> Estimate:
    """Add an independent error to an estimate's 95% interval."""
    below, above = (
        math.hypot(bound - estimate.value, 1.96 * error) for bound in (estimate.low, estimate.high)
    )  # fmt: skip
    return Estimate(estimate.value, estimate.value - below, estimate.value + above)


def excludes_zero(estimate: Estimate) -> bool:
    """Return whether an interval for all traits at once excludes zero."""
    below, above = (MANY * (bound - estimate.value) for bound in (estimate.low, estimate.high))
    return estimate.high > estimate.low and (estimate.value + below) * (estimate.value + above) > 0


def _equal_length(
    traits: Array, length: Array, above: Array, b: Array, outputs: Outputs, bootstrap: Bootstrap
) -> list[Estimate | None]:
    """Estimate Cov(b, f) / E[b] of what a regression on the length, within prompts, leaves of both."""

    def both(values: Array) -> tuple[Array, Array]:
        of_units = outputs.by_unit(values)
        return of_units.sum(0)[None], bootstrap.sums(of_units)

    columns = (
        traits * above[:, None], traits * length[:, None], (length * above)[:, None], (length**2)[:, None], b[:, None]
    )  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        value, samples = (
            (fb - fl * lb / ll) / total for fb, fl, lb, ll, total in zip(*map(both, columns), strict=True)
        )
    return [interval(float(value[0, row]), samples[:, row], bootstrap.n) for row in range(traits.shape[1])]


def correlations(
    columns: Array, with_: Array, outputs: Outputs, bootstrap: Bootstrap, *, squared: bool = False
) -> list[Estimate | None]:
    """Estimate the correlations of columns (n, F) with (n,), all centred within prompts; or their squares."""
    products = [outputs.by_unit(values) for values in (columns * with_[:, None], columns**2, with_[:, None] ** 2)]
    with np.errstate(divide="ignore", invalid="ignore"):
        value, samples = (
            xy / np.sqrt(xx * yy)
            for xy, xx, yy in ([part.sum(0)[None] for part in products], [bootstrap.sums(part) for part in products])
        )
    if squared:
        value, samples = value**2, samples**2
    bounds = (0.0, 1.0) if squared else (-1.0, 1.0)
    return [interval(float(value[0, row]), samples[:, row], bootstrap.n, bounds) for row in range(columns.shape[1])]
