"""What does a flow prefer? The directions along which it moves outputs, named so that a person can judge them.

Everything is told within prompts: what sets an answer apart from the other answers to its own prompt. A trait
(length, lists, hedging, ...) is quantified three ways, in standard deviations between the answers to one prompt:

- *moved*: what the flow's displacement T(y) - y makes of it. A ridge regression of the trait on the embedding, fitted
  on the other folds of prompts, is applied to the displacement. What the embedding does not tell of a trait is missing
  from it, so it errs towards zero; ``told`` says how much the embedding tells. Its interval holds the regression's own
  error.
- *picked*: what choosing among real outputs with probability proportional to b makes of it, Cov(b, f) / E[b].
  With p1 = 2 pi_ref b that is the aim of one pass, without any regression.
- *labelled*: half the difference between chosen and rejected outputs in the given pairs, the same quantity from the
  labels alone. It is the one whose interval knows how noisy the labels are.

What the flow's own held-out prompts did not confirm is reported as no direction at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pfm._internal.significance import CONFIRMED, standard_errors
from pfm.data.identity import PromptIdentity, prompt_identity
from pfm.devices import standard_defaults
from pfm.explain.traits import TRAITS, measure_traits, tokens
from pfm.reasoning import training_text
from pfm.statistics import Bootstrap, Estimate, interval

if TYPE_CHECKING:
    from pfm.data.encoded import EncodedPairs
    from pfm.data.pairs import PreferencePairs
    from pfm.encoders import Encoder
    from pfm.flow.preference_flow import PreferenceFlow

__all__ = ["Contrast", "Direction", "Explanation", "Term", "TraitChange", "contrastive_terms", "explain"]

Array = NDArray[np.float64]

FOLDS = 5
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the regressions, in units of the inputs' mean variance
SMALLEST = 0.05  # standard deviations: smaller changes are not spoken of
STRONG = 0.2  # correlation from which a trait names a direction
MANY = 3.15 / 1.96  # widens a 95% interval to one for all of about 30 traits at once (Bonferroni)
RIDGE = 0.1  # of the discriminants, in units of the mean variance
PRIOR_TOKENS = 1000.0
SHOWN = 3.0  # standard errors
FOLLOWED = 1 / 3  # of what the labels say of a trait: b that picks less follows them little


@dataclass(frozen=True)
class TraitChange:
    """Says what becomes of one trait.

    Attributes:
        name: of :data:`pfm.explain.traits.TRAITS`. words: how to say the direction of the change.
        moved, picked, labelled: changes in standard deviations between the answers to one prompt, see the module.
        at_equal_length: what is left of ``picked`` when b and the trait are both compared at equal log length; None
            for the length itself.
        correlation: of b and the trait within prompts.
        told: share of the trait's variance within prompts that the embedding tells of prompts it was not fitted on.
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

    @property
    def with_length(self) -> bool:
        """Tell whether the change hardly goes beyond that of the length."""
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
class Explanation:
    """Says what a flow prefers.

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

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return asdict(self)

    def save_json(self, path: str | Path) -> None:
        """Write everything as JSON."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        Path(path).expanduser().write_text(text, encoding="utf-8", errors="backslashreplace")

    def save_html(self, path: str | Path) -> None:
        """Write one self-contained HTML page."""
        from pfm.explain.render import page

        Path(path).expanduser().write_text(page(self), encoding="utf-8", errors="xmlcharrefreplace")

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from pfm.explain.render import terminal

        yield from terminal(self, options.max_width)


@dataclass(frozen=True)
class _Outputs:
    """Holds the distinct outputs of each prompt: what is centred is so within prompts.

    ``rows`` maps each place of a pair (2 i chosen, 2 i + 1 rejected) to its output; ``unit`` (n,) numbers what is
    resampled: prompts, or with one prompt only, outputs.
    """

    texts: list[str]
    prompts: list[str]
    group: NDArray[np.int64]
    unit: NDArray[np.int64]
    rows: NDArray[np.int64]
    y: Tensor
    context: Tensor | None

    def centred(self, values: Array) -> Array:
        """Take each prompt's mean from values (n,) or (n, K)."""
        columns = values.reshape(len(values), -1)
        count = np.bincount(self.group)[:, None]
        sums = np.stack([np.bincount(self.group, column, len(count)) for column in columns.T], axis=1)
        return (columns - (sums / np.maximum(count, 1))[self.group]).reshape(values.shape)

    def by_unit(self, values: Array) -> Array:
        """Sum values (n, K) over each unit: (U, K)."""
        columns = values.reshape(len(values), -1)
        sums = [np.bincount(self.unit, column, int(self.unit.max()) + 1) for column in columns.T]
        return np.stack(sums, axis=1).astype(np.float64)


@standard_defaults
def explain(
    flow: PreferenceFlow,
    pairs: PreferencePairs,
    encoder: Encoder,
    *,
    directions: int = 2,
    contrasts: int = 3,
    terms: int = 10,
    max_outputs: int = 10_000,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Explanation:
    """Say along which directions a flow moves the outputs of given pairs, in words and with real texts.

    Better give pairs of prompts that the flow was not fitted on; how b orders those that it was is flattered.

    Args:
        flow: the flow. pairs: labelled pairs with their texts. encoder: the one that the flow was fitted with.
        directions: principal directions beside the mean displacement and b.
        contrasts: pairs of texts for each direction, each of another prompt.
        terms: contrastive terms for each end.
        max_outputs: look at so many outputs at most, of prompts drawn at random.
        resamples: of the bootstrap over prompts; over outputs, where there is one prompt only.
        seed: of the bootstrap, the folds and that draw.
        progress: show a progress bar while texts are encoded.

    Raises:
        ValueError: the embeddings do not fit the flow, or an argument is out of range.
    """
    for name, value, least in (("directions", directions, 0), ("contrasts", contrasts, 0), ("terms", terms, 0),
                               ("max_outputs", max_outputs, 4), ("resamples", resamples, 20)):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}: got {value!r}")
    kept = _some_prompts(pairs, max_outputs, seed)
    shown = pairs if kept is None else pairs.select(kept)
    encoded = shown.encode(encoder, context=flow.context_dimension > 0, progress=progress)
    if encoded.event_shape != flow.event_shape or encoded.context_dimension != flow.context_dimension:
        raise ValueError(
            f"encoder must give outputs {tuple(flow.event_shape)} and contexts of {flow.context_dimension} values, as "
            f"the flow was fitted: got {tuple(encoded.event_shape)} and {encoded.context_dimension}"
        )
    outputs = _distinct_outputs(shown, encoded)
    bootstrap = Bootstrap(int(outputs.unit.max()) + 1, resamples, seed)

    b = flow.win_probability(outputs.y, outputs.context).double().cpu().numpy()
    moved = flow.transport(outputs.y, outputs.context, mode="relabel" if flow.rounds > 1 else "single")
    scale = flow.normalizer.scale.cpu()
    displacement = ((moved.cpu() - outputs.y).flatten(1) / scale).double().numpy()
    place = outputs.centred((outputs.y.flatten(1) / scale).double().numpy())

    names, traits = _varying_traits(outputs)
    changes, fit_errors, told = _moved_traits(place, displacement, traits, outputs, seed)
    label_weight, label_value = _labels(encoded)
    accuracy, z = _accuracy(b, outputs, encoded, label_value, bootstrap)
    found = _trait_changes(
        names, traits, changes, fit_errors, told, b, label_weight * label_value, label_weight, outputs, bootstrap
    )  # fmt: skip
    length = None
    if "words" in names:
        share = _correlations(traits[:, [names.index("words")]], outputs.centred(b), outputs, bootstrap, squared=True)
        length = share[0]
    axes = _directions(
        directions, contrasts, terms, place, displacement, b, names, traits, outputs, bootstrap
    )  # fmt: skip
    return _told(flow, encoded, outputs, found, length, accuracy, z, axes, kept is not None, seed, resamples)


# -- what is looked at ------------------------------------------------------------------------------------------


def _some_prompts(pairs: PreferencePairs, limit: int, seed: int) -> list[int] | None:
    """Draw prompts, and pairs of the last one, with at most ``limit`` outputs; None if all fit."""
    groups = pairs.group or [None] * len(pairs)
    keys = [prompt_identity(prompt, group) for prompt, group in zip(pairs.prompts, groups, strict=True)]
    rows: dict[PromptIdentity, list[int]] = {}
    for number, key in enumerate(keys):
        rows.setdefault(key, []).append(number)
    sides = (pairs.chosen, pairs.rejected)
    if len({pair for side in sides for pair in zip(keys, side, strict=True)}) <= limit:
        return None
    rng = np.random.default_rng([seed, 1])
    taken: list[int] = []
    seen: set[Any] = set()
    every = list(rows.items())
    for position in rng.permutation(len(every)).tolist():
        key, numbers = every[position]
        for number in rng.permutation(numbers).tolist():
            new = {(key, pairs.chosen[number]), (key, pairs.rejected[number])} - seen
            if len(seen) + len(new) > limit:
                return sorted(taken)
            seen |= new
            taken.append(number)
    return sorted(taken)


def _distinct_outputs(pairs: PreferencePairs, encoded: EncodedPairs) -> _Outputs:
    numbers: dict[tuple[int, str], int] = {}
    group = encoded.group.tolist()
    rows, first = [], []
    for pair, (of, chosen, rejected) in enumerate(zip(group, pairs.chosen, pairs.rejected, strict=True)):
        for place, text in ((2 * pair, chosen), (2 * pair + 1, rejected)):
            number = numbers.setdefault((of, text), len(numbers))
            rows.append(number)
            if number == len(first):
                first.append(place)
    places = torch.tensor(first)
    # Prompts are numbered by their texts, so that folds and resamples do not depend on the order of the pairs.
    keys: dict[int, tuple[str, str]] = {}
    for (of, text), place in zip(numbers, first, strict=True):
        keys[of] = min(keys.get(of, (pairs.prompts[place // 2], text)), (pairs.prompts[place // 2], text))
    ranks = {of: rank for rank, of in enumerate(sorted(keys, key=lambda of: keys[of]))}
    groups = np.array([ranks[of] for of, _ in numbers], dtype=np.int64)
    unit = groups if groups.max() > 0 else np.arange(len(groups))
    return _Outputs(
        texts=[training_text(text) for _, text in numbers],  # what was encoded of each
        prompts=[pairs.prompts[place // 2] for place in first],
        group=groups,
        unit=unit,
        rows=np.array(rows),
        y=encoded.members(places).unflatten(1, encoded.event_shape),
        context=encoded.contexts_of(places // 2),
    )


def _varying_traits(outputs: _Outputs) -> tuple[list[str], Array]:
    """Give the names of the traits that vary within prompts, and them (n, F), centred there, with unit variance."""
    traits = outputs.centred(measure_traits(outputs.texts))
    spread = np.sqrt((traits**2).mean(0))
    varies = spread > 1e-6
    return [name for name, there in zip(TRAITS, varies, strict=True) if there], traits[:, varies] / spread[varies]


def _labels(encoded: EncodedPairs) -> tuple[Array, Array]:
    """Give each pair's weight and its label 2 p - 1, from -1 to 1, (N,) each."""
    count = len(encoded)
    weight = np.ones(count) if encoded.weight is None else encoded.weight.double().numpy()
    label = np.ones(count) if encoded.probability is None else 2 * encoded.probability.double().numpy() - 1
    return weight, label


def _accuracy(
    b: Array, outputs: _Outputs, encoded: EncodedPairs, label: Array, bootstrap: Bootstrap
) -> tuple[Estimate, float]:
    """Estimate the share of pairs that b orders as their labels do, and the z-score of its excess over one half."""
    first, second = outputs.rows[0::2], outputs.rows[1::2]
    weight = np.ones(len(first)) if encoded.weight is None else encoded.weight.double().numpy()
    agreement = weight * label * np.sign(b[first] - b[second])
    unit, count = outputs.unit[first], bootstrap.n
    estimate = bootstrap.ratio(
        np.bincount(unit, (weight + agreement) / 2, count), np.bincount(unit, weight, count)
    )  # fmt: skip
    assert estimate is not None
    return estimate, standard_errors(torch.from_numpy(agreement), encoded.group)


# -- traits -----------------------------------------------------------------------------------------------------


def _moved_traits(
    place: Array, displacement: Array, traits: Array, outputs: _Outputs, seed: int
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


def _trait_changes(
    names: Sequence[str],
    traits: Array,
    changes: Array,
    fit_errors: Array,
    told: Array,
    b: Array,
    label: Array,
    label_weight: Array,
    outputs: _Outputs,
    bootstrap: Bootstrap,
) -> list[TraitChange]:
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
    correlation = _correlations(traits, above, outputs, bootstrap)
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
        confirmed = len(signs) == 1 and _excludes_zero(three[2]) and abs(change) >= SMALLEST
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


def _excludes_zero(estimate: Estimate) -> bool:
    """Tell whether an interval for all traits at once excludes zero."""
    below, above = (MANY * (bound - estimate.value) for bound in (estimate.low, estimate.high))
    return estimate.high > estimate.low and (estimate.value + below) * (estimate.value + above) > 0


def _equal_length(
    traits: Array, length: Array, above: Array, b: Array, outputs: _Outputs, bootstrap: Bootstrap
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


def _correlations(
    columns: Array, with_: Array, outputs: _Outputs, bootstrap: Bootstrap, *, squared: bool = False
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
    return [interval(float(value[0, row]), samples[:, row], bootstrap.n) for row in range(columns.shape[1])]


# -- directions -------------------------------------------------------------------------------------------------


def _directions(
    count: int,
    contrasts: int,
    terms: int,
    place: Array,
    displacement: Array,
    b: Array,
    names: Sequence[str],
    traits: Array,
    outputs: _Outputs,
    bootstrap: Bootstrap,
) -> list[Direction]:
    total = float((displacement**2).sum(1).mean())
    mean = displacement.mean(0)
    covariance = place.T @ place / len(place)
    covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    length = float(np.linalg.norm(mean))
    above = outputs.centred(b)
    split = [tokens(text) for text in outputs.texts] if terms else []

    def direction(kind: str, axis: Array | None) -> Direction:
        share = moves = spreads = None
        along = above
        if axis is not None:
            discriminant = np.linalg.solve(covariance, axis)
            along, steps = place @ discriminant, displacement @ discriminant
            if float(along @ above) < 0 and kind == "principal":
                along, steps = -along, -steps
            share = (
                float((displacement @ axis).mean() ** 2 if kind == "mean" else ((displacement @ axis) ** 2).mean())
                / total
            )
            moves = float((displacement @ axis).mean()) / math.sqrt(float((place**2).sum(1).mean()))
            spreads = float((outputs.centred(steps) * along).mean() / (along**2).mean())
        spread = math.sqrt(float((along**2).mean()))
        related = []
        for name, estimate in zip(names, _correlations(traits, along, outputs, bootstrap), strict=True):
            if estimate is not None and abs(estimate.value) >= STRONG and _excludes_zero(estimate):
                related.append((TRAITS[name].more if estimate.value > 0 else TRAITS[name].less, estimate))
        related.sort(key=lambda entry: -abs(entry[1].value))
        high, low = _ends(along, outputs) if terms else ([], [])
        more, less = contrastive_terms(
            [split[row] for row in high], [split[row] for row in low], split, outputs.unit, (high, low), terms
        ) if terms else ([], [])  # fmt: skip
        return Direction(
            kind, ", ".join(words for words, _ in related[:4]), share, moves, spreads,
            _correlations(along[:, None], above, outputs, bootstrap)[0], related[:8], more, less,
            _contrasts(along / spread, b, outputs, contrasts),
        )  # fmt: skip

    found = []
    if total > 0 and length > 0:
        found.append(direction("mean", mean / length))
    if float((above**2).mean()) > 1e-12:
        found.append(direction("win", None))
    if total > 0 and count:
        rest = displacement - mean
        if length > 0:
            rest = rest - np.outer(rest @ (mean / length), mean / length)
        values, vectors = np.linalg.eigh(rest.T @ rest / len(rest))
        kept = [column for column in range(1, min(count, len(values)) + 1) if values[-column] > 1e-6 * total]
        found += [direction("principal", vectors[:, -column]) for column in kept]
    return found


def _ends(along: Array, outputs: _Outputs) -> tuple[list[int], list[int]]:
    """Give the outputs in the upper and in the lower third of their own prompt, equally many of each."""
    high: list[int] = []
    low: list[int] = []
    order = np.lexsort((along, outputs.group))
    for rows in np.split(order, np.flatnonzero(np.diff(outputs.group[order])) + 1):
        third = max(1, len(rows) // 3)
        if len(rows) >= 2:
            low += rows[:third].tolist()
            high += rows[-third:].tolist()
    return high, low


def _contrasts(along: Array, b: Array, outputs: _Outputs, count: int) -> list[Contrast]:
    """Take the texts at both ends: of the prompts where they lie furthest apart, or several of an only prompt."""
    order = np.lexsort((along, outputs.group))
    ends = []
    for rows in np.split(order, np.flatnonzero(np.diff(outputs.group[order])) + 1):
        several = count if outputs.group.max() == 0 else 1
        ends += list(zip(rows[::-1][:several].tolist(), rows[:several].tolist(), strict=True))
    ends.sort(key=lambda pair: along[pair[1]] - along[pair[0]])
    return [
        Contrast(
            outputs.prompts[high], outputs.texts[high], outputs.texts[low], float(along[high] - along[low]),
            float(b[high]), float(b[low]),
        )
        for high, low in ends[:count]
        if along[high] > along[low]
    ]  # fmt: skip


def contrastive_terms(
    high: Sequence[Sequence[str]],
    low: Sequence[Sequence[str]],
    background: Sequence[Sequence[str]],
    unit: NDArray[np.int64] | None = None,
    rows: tuple[Sequence[int], Sequence[int]] | None = None,
    count: int = 10,
) -> tuple[list[Term], list[Term]]:
    """Find the terms that set two sets of texts apart, by log-odds with an informative Dirichlet prior.

    For a term with counts y1, y2 among n1, n2 and prior a = PRIOR_TOKENS x its share of the background,
    delta = log((y1 + a) / (n1 + A - y1 - a)) - log((y2 + a) / (n2 + A - y2 - a)) with A = PRIOR_TOKENS, its variance is
    1 / (y1 + a) + 1 / (y2 + a), and terms are ordered by z = delta / sqrt(variance) (Monroe, Colaresi and Quinn
    2008, "Fightin' Words").

    Args:
        high, low: token lists of the texts at either end. background: of all texts.
        unit: (n,) the prompt of each background text. rows: which background texts ``high`` and ``low`` are. With
            both, terms of fewer than three prompts are left out, whose counts are the topics of those prompts.
        count: terms of each end.

    Returns:
        the terms of the high end and of the low end, most telling first; only those beyond three standard errors, since
        hundreds of terms are looked at.
    """
    counts: list[dict[str, int]] = [{}, {}, {}]
    for found, texts in zip(counts, (high, low, background), strict=True):
        for text in texts:
            for token in text:
                found[token] = found.get(token, 0) + 1
    prompts: dict[str, set[int]] = {}
    if unit is not None and rows is not None:
        for row in (*rows[0], *rows[1]):
            for token in set(background[row]):
                prompts.setdefault(token, set()).add(int(unit[row]))
    totals = [sum(found.values()) for found in counts]
    scored = []
    for token in counts[0].keys() | counts[1].keys():
        if prompts and len(prompts[token]) < 3:
            continue
        y1, y2 = counts[0].get(token, 0), counts[1].get(token, 0)
        prior = PRIOR_TOKENS * counts[2].get(token, 1) / max(totals[2], 1)
        odds = [
            math.log((y + prior) / max(n + PRIOR_TOKENS - y - prior, 1e-9))
            for y, n in ((y1, totals[0]), (y2, totals[1]))
        ]  # fmt: skip
        z = (odds[0] - odds[1]) / math.sqrt(1 / (y1 + prior) + 1 / (y2 + prior))
        scored.append(Term(token, z, (y1, y2)))
    scored.sort(key=lambda term: (-term.z, term.text))
    more = [term for term in scored[:count] if term.z > SHOWN]
    less = [term for term in scored[::-1][:count] if term.z < -SHOWN]
    return more, less


# -- what is said -----------------------------------------------------------------------------------------------


def _told(
    flow: PreferenceFlow,
    encoded: EncodedPairs,
    outputs: _Outputs,
    traits: list[TraitChange],
    length: Estimate | None,
    accuracy: Estimate,
    z: float,
    directions: list[Direction],
    thinned: bool,
    seed: int,
    resamples: int,
) -> Explanation:
    guarded = math.isinf(flow.guard_margin)
    confirmed = not guarded and z > CONFIRMED
    win: Mapping[str, Any] = flow.metadata.get("win") or {}
    reasons = []
    if win.get("accuracy") is not None:
        errors = "" if win.get("z") is None else f", z-score {win['z']:.1f} against chance"
        reasons.append(
            f"On prompts held out of its fit, the flow's b ordered {win['accuracy']:.1%} of pairs rightly{errors}."
        )
    reasons.append(f"It orders {accuracy.text(percent=True)} of the {len(encoded)} given pairs as their labels do.")
    if guarded:
        reasons.append("That confirms no gain, so the flow's guard keeps every output as it is.")
    elif not confirmed:
        reasons.append("The given pairs do not confirm it.")
    spoken = [trait for trait in traits if trait.confirmed] if confirmed else []
    if not confirmed:
        summary = "No confirmed direction: what moves here cannot be told from noise."
    elif spoken:
        summary = _prefers(spoken)
    else:
        summary = "Prefers some outputs, and no surface trait says which: read the texts at both ends."
    return Explanation(
        confirmed=confirmed,
        summary=summary,
        reasons=reasons,
        warnings=_warnings(flow, encoded, outputs, traits, length, confirmed, thinned),
        length_share=length,
        accuracy=accuracy,
        traits=traits,
        directions=directions if confirmed else [],
        settings={
            "pairs": len(encoded),
            "prompts": int(outputs.group.max()) + 1,
            "outputs": len(outputs.texts),
            "resamples": resamples,
            "resampled": "prompts" if outputs.group.max() > 0 else "outputs",
            "seed": seed,
            "source": flow.config.source,
            "rounds": flow.rounds,
            "encoder": flow.metadata.get("encoder"),
            "fitted_pairs": flow.metadata.get("pairs"),
        },
    )


def _prefers(spoken: list[TraitChange]) -> str:
    own = [trait for trait in spoken if not trait.with_length]
    along = [trait for trait in spoken if trait.with_length]
    said = [f"{trait.words} ({trait.picked.parts(signed=True, decimals=2)[0]} sd)" for trait in own or along]
    text = "Prefers " + ", ".join(said[:6]) + (f" and {len(said) - 6} more" if len(said) > 6 else "")
    if own and along:
        text += "; with the length come " + ", ".join(trait.words for trait in along[:4])
    return text + "."


def _warnings(
    flow: PreferenceFlow,
    encoded: EncodedPairs,
    outputs: _Outputs,
    traits: list[TraitChange],
    length: Estimate | None,
    confirmed: bool,
    thinned: bool,
) -> list[str]:
    found = []
    prompts = int(outputs.group.max()) + 1
    if confirmed and length is not None and length.value >= 0.5:
        words = next((trait.words for trait in traits if trait.name == "words"), "longer")
        found.append(
            f"Length explains most of b: {length.text(percent=True)} of its variance within prompts. This flow mostly "
            f"prefers {words} outputs; compare at equal length before trusting it."
        )
    if confirmed:
        untold = [trait for trait in traits if trait.confirmed and trait.told < 0.1]
        if untold:
            names = ", ".join(trait.name.replace("_", " ") for trait in untold[:5])
            found.append(f"The embedding hardly tells of {names}: moves in them cannot be seen in the displacement.")
        weak = [
            trait for trait in traits
            if trait.confirmed and trait.told < 0.5 and abs(trait.picked.value) < FOLLOWED * abs(trait.labelled.value)
        ]  # fmt: skip
        if weak:
            said = ", ".join(
                f"{trait.words} ({trait.picked.parts(signed=True, decimals=2)[0]} of "
                f"{trait.labelled.parts(signed=True, decimals=2)[0]} sd)"
                for trait in weak[:3]
            )
            found.append(
                f"b picks less than a third of what the labels say: {said}. It cannot prefer what the embedding does "
                "not tell; an encoder that sees length and layout, such as minilm+surface, may."
            )
    if not traits:
        found.append("No trait varies between the outputs of one prompt: only the texts can say what is preferred.")
    if prompts == 1:
        found.append(
            "All pairs belong to one prompt: intervals are over its outputs, and say nothing of other prompts."
        )
    elif prompts < 20:
        found.append(f"Only {prompts} prompts: intervals over so few are too narrow.")
    if thinned:
        found.append(f"Looked at {len(outputs.texts)} outputs of {prompts} prompts, drawn at random from all given.")
    if encoded.encoder and flow.metadata.get("encoder") and encoded.encoder != flow.metadata["encoder"]:
        found.append("The encoder describes itself otherwise than the one that the flow was fitted with.")
    return found
