"""The report card: made of judged candidates, printed, and saved as JSON or as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pfm._internal.checks import check_shape
from pfm.evaluation.candidates import COMPUTED, Candidates, by_group, calibrate, measure, pick_examples
from pfm.evaluation.card import Card
from pfm.evaluation.render import page, terminal
from pfm.evaluation.results import Failure, Results, Scored
from pfm.evaluation.verdict import find_warnings, judge_method

__all__ = ["Report"]


@dataclass
class Report(Results, Card):
    """The report card: print it, save it as JSON, or as one self-contained HTML page.

    For the attributes see :class:`pfm.evaluation.results.Results`.
    """

    @classmethod
    def from_scored(
        cls,
        rows: Sequence[Scored],
        *,
        method: str = "pfm",
        baselines: Sequence[str] = COMPUTED,
        failures: Sequence[Failure] = (),
        settings: Mapping[str, Any] | None = None,
        examples: int = 20,
        resamples: int = 2000,
        seed: int = 0,
    ) -> Report:
        """Compare the picks of all methods on judged candidates.

        Args:
            rows: one ``Scored`` a prompt, all with picks of the same methods. Several rows of one prompt are resampled
                together.
            method: the method under test, one of the picks.
            baselines: which of "random", "longest", "oracle" to show; the original ("identity") is always
                shown.
            failures: prompts that could not be evaluated, or only in part; listed in the report.
            settings: further JSON values to state in the report, such as the judge's name.
            examples: how many before/after examples to keep, drawn at random from the changed prompts.
            resamples: bootstrap resamples of the prompts.
            seed: seed of resamples and examples.

        Raises:
            ValueError: no rows, a row with inconsistent shapes or values out of range, or an unknown
                method.
        """
        rows = [_checked(row, number) for number, row in enumerate(rows)]
        methods = _method_order(rows, method, baselines)
        table = Candidates(rows)
        bootstrap = table.bootstrap(resamples, seed)
        measured = [measure(name, table, method, bootstrap) for name in methods]
        sizes = [len(row.candidates) for row in rows]
        return cls(
            rows=measured,
            verdict=judge_method(measured, table, method, find_warnings(table, failures)),
            calibration=calibrate(rows, bootstrap),
            groups=by_group(rows, method, resamples, seed),
            failures=list(failures),
            settings={
                "method": method,
                "prompts": table.prompts,
                "candidates": {"min": min(sizes), "mean": sum(sizes) / len(sizes), "max": max(sizes)},
                "independent_draws": sum(row.independent is not None for row in rows),
                "resamples": resamples,
                "seed": seed,
                **(settings or {}),
            },
            examples=pick_examples(rows, method, examples, seed),
        )

    def save_html(self, path: str | Path, examples: int = 5) -> Path:
        """Write the report as one HTML page that needs no network and no scripts, and return the path."""
        return self._write_html(path, examples=examples)

    def _page(self, **options: Any) -> str:
        return page(self, **options)

    def _terminal(self, width: int) -> Iterator[Any]:
        return terminal(self, width)


def _checked(row: Scored, number: int) -> Scored:
    """Return the row with arrays in place, or say what is wrong with it."""
    n = len(row.candidates)
    scores = np.asarray(row.scores, dtype=np.float64)
    if n == 0:
        raise ValueError(f"row {number} has no candidates")
    check_shape(f"row {number}: scores", scores, (n,), "one a candidate")
    if not np.isfinite(scores).all():
        raise ValueError(f"row {number}: scores must be finite: got {scores[~np.isfinite(scores)][0]}")
    for name, index in {"original": row.original, **row.picks}.items():
        if not 0 <= index < n:
            raise ValueError(f"row {number}: {name} must index its {n} candidates: got {index}")
    probabilities = row.probabilities
    if probabilities is not None:
        probabilities = np.asarray(probabilities, dtype=np.float64)
        check_shape(f"row {number}: probabilities", probabilities, (n,), "one a candidate")
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError(f"row {number}: probabilities must lie between 0 and 1")
    if row.independent is not None and not np.isfinite(row.independent):
        raise ValueError(f"row {number}: independent must be finite or None: got {row.independent}")
    return Scored(
        row.prompt,
        row.candidates,
        scores,
        row.picks,
        row.original,
        probabilities,
        row.independent,
        row.group,
    )


def _method_order(rows: Sequence[Scored], method: str, baselines: Sequence[str]) -> list[str]:
    if not rows:
        raise ValueError("rows is empty: nothing to evaluate")
    picked = list(rows[0].picks)
    for number, row in enumerate(rows):
        if set(row.picks) != set(picked):
            raise ValueError(f"row {number} has picks of {sorted(row.picks)}, row 0 of {sorted(picked)}: give all")
    taken = sorted(set(picked) & {"identity", *COMPUTED})
    if taken:
        raise ValueError(f"picks holds {', '.join(taken)}: the report computes these itself, leave them out")
    if method not in picked:
        raise ValueError(f"method {method!r} has no picks: rows pick by {', '.join(sorted(picked)) or 'nothing'}")
    unknown = sorted(set(baselines) - set(COMPUTED))
    if unknown:
        raise ValueError(f"baselines holds unknown names {', '.join(unknown)}: choose from {', '.join(COMPUTED)}")
    before, after = ([name for name in group if name in baselines] for group in (("random", "longest"), ("oracle",)))
    return ["identity", *before, *(name for name in picked if name != method), method, *after]
