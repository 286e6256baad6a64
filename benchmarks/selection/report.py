"""Tables of choices among judged candidates.

Every interval is a 95% interval from resampled seeds, each with all of its prompts; of a single seed, from resampled
prompts. Methods of one task and seed chose among the same candidates, so that differences between them are paired.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.core.measures import ChoiceTable, SeedBootstrap, interquartile_mean
from benchmarks.core.runs import Run, code_notes, grouped
from benchmarks.core.tables import markdown_table
from pfm.statistics import Estimate

__all__ = ["ChoiceRun", "MethodReport", "TaskReport", "compare", "markdown", "read"]

BASELINES = {
    "identity": "original",
    "bradley_terry": "Bradley–Terry",
    "mean_shift": "mean shift",
}  # what differences are to


@dataclass(frozen=True)
class ChoiceRun(Run):
    """A finished run with its choices."""

    choices: ChoiceTable


@dataclass(frozen=True)
class MethodReport:
    """What one method reached over all of its seeds.

    ``figures`` are those of :meth:`ChoiceTable.measure` and ``gain``, the mean score above that of a random
    candidate. ``differences`` are mean scores minus a baseline's on the same items, by the baseline's name.
    ``interquartile`` is the mean of the seeds' mean scores without the highest and the lowest quarter.
    """

    name: str
    label: str
    seeds: list[int]
    figures: dict[str, Estimate | None]
    differences: dict[str, Estimate]
    interquartile: float


@dataclass(frozen=True)
class TaskReport:
    """The methods on one task under one setting, from the highest mean score to the lowest."""

    task: str
    settings: dict[str, Any]
    about: dict[str, Any]
    methods: list[MethodReport]
    notes: list[str]

    @property
    def title(self) -> str:
        """Name the task, its encoder, and how many labels were flipped, if any."""
        flips = self.settings.get("flips")
        return f"{self.task} ({self.settings['encoder']}{f', {flips:.0%} of the labels wrong' if flips else ''})"


def read(runs: Iterable[Run]) -> list[ChoiceRun]:
    """Read what each run chose."""
    return [ChoiceRun(run.folder, run.metrics, ChoiceTable.load(run.arrays), variant=run.variant) for run in runs]


def compare(runs: Sequence[ChoiceRun]) -> list[TaskReport]:
    """Compare methods task by task.

    Raises:
        ValueError: two methods of one task and seed did not choose among the same candidates.
    """
    alike = grouped(runs, lambda run, other: run.choices.same_items(other.choices), "choose among the same candidates")
    return [_compare(methods) for methods in alike]


def _compare(methods: dict[str, dict[int, ChoiceRun]]) -> TaskReport:
    runs = [run for of in methods.values() for run in of.values()]
    reports = [_method_report(name, methods) for name in methods]
    scores = {report.name: _value(report.figures["score"]) for report in reports}
    latest = max(runs, key=lambda run: run.metrics["finished"])
    return TaskReport(
        task=latest.metrics["settings"]["task"]["name"],
        settings=json.loads(latest.setting),
        about=latest.metrics["about"] | {"training_pairs": round(np.mean([_pairs(run) for run in runs]))},
        methods=sorted(reports, key=lambda report: -scores[report.name]),
        notes=code_notes(runs),
    )


def _method_report(name: str, methods: dict[str, dict[int, ChoiceRun]]) -> MethodReport:
    runs = methods[name]
    table, bootstrap = _joined(runs, list(runs))
    figures = table.measure(bootstrap)
    figures["gain"] = bootstrap.mean(table.score() - table.choosing(np.full_like(table.weights, 1 / _n(table))).score())
    differences = {}
    for baseline in BASELINES:
        shared = [seed for seed in runs if seed in methods.get(baseline, {})]
        if shared and name != baseline:
            ours, paired = _joined(runs, shared)
            theirs, _ = _joined(methods[baseline], shared)
            differences[baseline] = paired.mean(ours.score() - theirs.score())
    return MethodReport(
        name=name,
        label=next(iter(runs.values())).label,
        seeds=list(runs),
        figures=figures,
        differences=differences,
        interquartile=interquartile_mean(np.array([run.choices.score().mean() for run in runs.values()])),
    )


def _joined(runs: dict[int, ChoiceRun], seeds: list[int]) -> tuple[ChoiceTable, SeedBootstrap]:
    tables = [runs[seed].choices for seed in seeds]
    return ChoiceTable.join(tables), _bootstrap(tuple(table.prompts for table in tables))


@cache
def _bootstrap(prompts: tuple[int, ...]) -> SeedBootstrap:
    # Methods with the same seeds have the same resamples, which is what pairs their intervals.
    return SeedBootstrap(np.repeat(np.arange(len(prompts)), prompts))


def _pairs(run: ChoiceRun) -> int:
    return run.metrics["about"]["training_pairs"]


def _n(table: ChoiceTable) -> int:
    return table.scores.shape[1]


def _value(estimate: Estimate | None) -> float:
    return float("nan") if estimate is None else estimate.value


# -- what it looks like -----------------------------------------------------------------------------------------


def markdown(reports: Sequence[TaskReport]) -> str:
    """Write the tables of all tasks."""
    return "\n".join(line for report in reports for line in _section(report))


def _section(report: TaskReport) -> list[str]:
    about, percent = report.about, report.about["percent"]
    seeds = sorted({seed for method in report.methods for seed in method.seeds})
    decimals = 1 if percent else 3

    def shown(estimate: Estimate | None, **options: Any) -> str:
        return "–" if estimate is None else estimate.text(**options)

    def score(estimate: Estimate | None, signed: bool = False) -> str:
        return shown(estimate, percent=percent, decimals=decimals, signed=signed)

    rows = [["method", about["unit"], "above random", "gap closed", "wins against the original",
             "against an independent draw", "at equal length", "length"]]  # fmt: skip
    pairs = [["method", *(f"minus {label}" for label in BASELINES.values()), "interquartile mean", "changed", "seeds"]]
    for method in report.methods:
        figures = method.figures
        rows.append(
            [
                method.label,
                score(figures["score"]),
                score(figures["gain"], signed=True),
                shown(figures["gap_closed"], percent=True),
                *(shown(figures[name], percent=True) for name in ("win", "win_independent", "win_controlled")),
                f"× {_value(figures['length_ratio']):.2f}",
            ]
        )
        middle = f"{100 * method.interquartile:.1f}%" if percent else f"{method.interquartile:.3f}"
        pairs.append(
            [
                method.label,
                *(score(method.differences.get(name), signed=True) for name in BASELINES),
                middle,
                f"{100 * _value(figures['changed']):.0f}%",
                str(len(method.seeds)),
            ]
        )
    return [
        f"## {report.title}",
        "",
        f"Judge: {about['judge']}. {about['candidates']} candidates, {about['test_prompts']} test prompts and "
        f"{about['test_items']} items a seed, {len(seeds)} seeds, about {about['training_pairs']:,} training pairs. "
        "In brackets 95% intervals over seeds; length is the geometric mean of the choice's over the "
        "original's. Gap closed: the share of the way from a random candidate to the judge's own pick.",
        "",
        *markdown_table(rows),
        "",
        "Differences in mean score, paired by item:",
        "",
        *markdown_table(pairs),
        "",
        *(f"Note: {note}\n" for note in report.notes),
    ]
