"""Audit a selector: hold its picks among judged candidates against simple rules, fitted baselines and the oracle."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfm._internal.checks import check_seed, check_whole
from pfm._internal.significance import confirmed
from pfm.devices import standard_defaults
from pfm.evaluation.auditing.choices import Choices
from pfm.evaluation.auditing.reading import Columns, read_choices
from pfm.evaluation.auditing.render import page, terminal
from pfm.evaluation.auditing.results import AuditResults, AuditRow, Difference
from pfm.evaluation.auditing.rules import Method, fitted_rules, simple_rules
from pfm.evaluation.auditing.words import find_warnings, judge_selector
from pfm.evaluation.card import Card
from pfm.statistics import Array, Bootstrap

__all__ = ["Audit", "audit"]

FOLDS = 5


@dataclass
class Audit(AuditResults, Card):
    """The result of :func:`audit`: print it, save it as JSON, or as one self-contained HTML page.

    For the attributes see :class:`pfm.evaluation.auditing.results.AuditResults`.
    """

    def _page(self, **options: Any) -> str:
        return page(self)

    def _terminal(self, width: int) -> Iterator[Any]:
        return terminal(self, width)


@standard_defaults
def audit(
    rows: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    selectors: str | Sequence[str],
    *,
    scores: str | None = None,
    prompt: str = "prompt",
    group: str | None = None,
    candidates: str | None = None,
    costs: Sequence[str] | None = None,
    encoder: Any = None,
    on_bad_rows: str = "raise",
    folds: int = FOLDS,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Measure what selectors reach among judged candidates, and whether simpler rules reach it too.

    A row is a prompt with lists (``candidates``, ``scores``, a column a selector), or one candidate with a group.

    Args:
        rows: a JSONL, JSON, CSV or Parquet file, or mappings.
        selectors: columns of picks (the place of a candidate from 0, its text, or true and false) or of the selector's
            scores, higher is better. Equal best scores share the pick.
        scores: column of the judge's scores, higher is better; true and false count as 1 and 0. None: "scores" or
            "score". The judge must be none of the selectors.
        prompt: column of the prompt.
        group: column that tells prompts apart: rows of one group are resampled, and held out, together. None: "group",
            else the prompt.
        candidates: column of the texts; None finds the usual ones. Without texts, "tokens" serves as length.
        costs: columns of which less is better, such as the seconds that a candidate took. None: those of "seconds",
            "cost" and "tokens" that there are.
        encoder: of texts, or its name, for the fitted baselines mean shift and Bradley–Terry.
        on_bad_rows: "raise" stops at a bad row; "drop" counts it. Where a row is a candidate, its prompt goes too.
        folds: of prompts, for the fitted baselines.
        resamples: bootstrap resamples of the prompts.
        seed: of resamples, folds and controls.
        progress: show progress bars.

    Raises:
        ValueError: no such column, no selector, or a bad row, by its place and column.

    >>> rows = [
    ...     {"prompt": f"Task {n}", "scores": [n % 2, 1, 0], "seconds": [2, 1, 3], "verifier": [0.6, 0.5, 0.1]}
    ...     for n in range(40)
    ... ]
    >>> found = audit(rows, "verifier", progress=False)
    >>> found.findings[0].headline
    'Taking the fastest beats verifier'
    >>> round(found.row("verifier").gap_closed.value, 2), found.row("least seconds").gap_closed.value
    (0.0, 1.0)
    """
    seed = check_seed(seed)
    names = [selectors] if isinstance(selectors, str) else list(selectors or ())
    check_whole("folds", folds, 2)
    columns = Columns(names, scores, prompt, group, candidates, costs)
    if isinstance(encoder, str):
        from pfm.encoders import encoder_from_name

        encoder = encoder_from_name(encoder, on_empty="encode")
    choices, about = read_choices(rows, columns, on_bad_rows)
    methods = [Method(name, name, "selector", name, weights) for name, weights in choices.selectors.items()]
    methods += simple_rules(choices)
    taken = {method.name for method in methods[len(names) :]} | {"mean_shift", "bradley_terry", "shuffled", "oracle"}
    if clash := sorted(taken & set(names)):
        raise ValueError(f"a selector cannot have the name of a rule, {', '.join(clash)}: rename its column")
    fitted, left_out = fitted_rules(choices, encoder, folds=folds, seed=seed, progress=progress)
    methods += fitted
    permuted = choices.shuffled(methods[0].weights, seed)
    methods.append(Method("permuted", "Control: shuffled picks", "control", "picks shuffled within prompts", permuted))
    methods.append(Method("oracle", "Oracle", "bound", "the oracle", choices.best(choices.score)))
    bootstrap = Bootstrap(choices.prompts, resamples, seed)
    reached = {method.name: choices.score_of(method.weights) for method in methods}
    measured = [_measure(method, reached, names, choices, bootstrap) for method in methods]
    percent = bool(((choices.score >= 0) & (choices.score <= 1)).all())
    phrases = {method.name: method.phrase for method in methods}
    return Audit(
        findings=[judge_selector(name, measured, phrases, percent) for name in names],
        rows=measured,
        warnings=find_warnings(choices, about),
        settings={
            **about,
            "selectors": names,
            "prompts": choices.prompts,
            "sets": len(choices.size),
            "candidates": {
                "min": int(choices.size.min()), "mean": float(choices.size.mean()), "max": int(choices.size.max())
            },
            "length": "characters" if choices.text is not None else "tokens" if choices.length is not None else None,
            "encoder": None if encoder is None else _described(encoder),
            "folds": folds if fitted else None,
            "left_out": [left_out] if left_out else [],
            "percent": percent,
            "resamples": resamples,
            "seed": seed,
        },
    )  # fmt: skip


def _measure(
    method: Method, reached: Mapping[str, Array], selectors: Sequence[str], choices: Choices, bootstrap: Bootstrap
) -> AuditRow:
    """Measure one method; ``reached`` holds the mean score (P,) of every method by name."""
    score, random, oracle = reached[method.name], reached["random"], reached["oracle"]
    gap = np.where(oracle - random > 1e-12 * np.abs(oracle).max(initial=1.0), oracle - random, 0.0)
    return AuditRow(
        name=method.name,
        label=method.label,
        kind=method.kind,
        score=bootstrap.mean(score),
        gap_closed=bootstrap.ratio(score - random, gap) if gap.any() else None,
        win=choices.win(method.weights, bootstrap),
        win_controlled=choices.win_at_equal_length(method.weights, bootstrap),
        length_ratio=choices.length_ratio(method.weights, bootstrap),
        differences=[_difference(name, reached[name] - score, bootstrap) for name in selectors],
    )


def _difference(selector: str, values: Array, bootstrap: Bootstrap) -> Difference:
    import torch

    group = torch.arange(len(values))
    one_sided = [confirmed(sign * torch.from_numpy(values), group).p_value for sign in (1.0, -1.0)]
    return Difference(selector, bootstrap.mean(values), min(1.0, 2 * min(one_sided)))


def _described(encoder: Any) -> str:
    return str(encoder.describe().get("name")) if hasattr(encoder, "describe") else type(encoder).__name__
