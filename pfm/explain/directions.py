"""Directions along which a flow moves outputs, with the traits, words and texts that distinguish their ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pfm.explain.changes import correlations, excludes_zero
from pfm.explain.outputs import Array, Outputs
from pfm.explain.results import Contrast, Direction, Term
from pfm.explain.traits import TRAITS, tokens
from pfm.statistics import Bootstrap

__all__ = ["contrastive_terms", "find_directions"]

STRONG = 0.2  # correlation from which a trait names a direction

RIDGE = 0.1  # of the discriminants, in units of the mean variance

PRIOR_TOKENS = 1000.0

SHOWN = 3.0  # standard errors


def find_directions(
    count: int,
    contrasts: int,
    terms: int,
    place: Array,
    displacement: Array,
    b: Array,
    names: Sequence[str],
    traits: Array,
    outputs: Outputs,
    bootstrap: Bootstrap,
) -> list[Direction]:
    """Name the mean displacement, b and the principal directions by traits, terms and contrasts."""
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
        for name, estimate in zip(names, correlations(traits, along, outputs, bootstrap), strict=True):
            if estimate is not None and abs(estimate.value) >= STRONG and excludes_zero(estimate):
                related.append((TRAITS[name].more if estimate.value > 0 else TRAITS[name].less, estimate))
        related.sort(key=lambda entry: -abs(entry[1].value))
        high, low = _ends(along, outputs) if terms else ([], [])
        more, less = contrastive_terms(
            [split[row] for row in high], [split[row] for row in low], split, outputs.unit, (high, low), terms
        ) if terms else ([], [])  # fmt: skip
        return Direction(
            kind, ", ".join(words for words, _ in related[:4]), share, moves, spreads,
            correlations(along[:, None], above, outputs, bootstrap)[0], related[:8], more, less,
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


def _ends(along: Array, outputs: Outputs) -> tuple[list[int], list[int]]:
    """Return the outputs in the upper and in the lower third of their own prompt, equally many of each."""
    high: list[int] = []
    low: list[int] = []
    order = np.lexsort((along, outputs.group))
    for rows in np.split(order, np.flatnonzero(np.diff(outputs.group[order])) + 1):
        third = max(1, len(rows) // 3)
        if len(rows) >= 2:
            low += rows[:third].tolist()
            high += rows[-third:].tolist()
    return high, low


def _contrasts(along: Array, b: Array, outputs: Outputs, count: int) -> list[Contrast]:
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
