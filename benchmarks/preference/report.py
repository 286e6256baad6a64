"""Tables of predicted comparisons.

The seeds of a task deal the same prompts into other folds, so that a prompt is what is resampled: with all of its
comparisons, of all seeds. Methods of one task predicted the same comparisons from the same folds, and differences
between them are paired.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.core.runs import Run, code_notes, grouped
from benchmarks.core.tables import markdown_table
from benchmarks.preference.measures import PredictionTable
from pfm.statistics import Bootstrap, Estimate, Reliability

__all__ = ["MethodReport", "PredictionRun", "TaskReport", "compare", "markdown", "read"]

BASELINES = {"bradley_terry": "Bradley–Terry", "bradley_terry_tuned": "tuned Bradley–Terry"}  # what differences are to


@dataclass(frozen=True)
class PredictionRun(Run):
    """A finished run with its predictions."""

    predictions: PredictionTable


@dataclass(frozen=True)
class MethodReport:
    """What one method reached over all of its seeds.

    ``figures`` are those of :meth:`PredictionTable.measure`, over all seeds' predictions, and those that the method
    alone has (of which low and high are the lowest and the highest of any seed). ``accuracy_gain`` and ``loss_gain``
    are differences to a baseline, by its name: accuracy minus the baseline's, and the baseline's log-loss minus the
    method's, so that above 0 is better in both. ``seed_spread`` is the standard deviation of the seeds' log-losses.
    """

    name: str
    label: str
    seeds: list[int]
    figures: dict[str, Estimate | None]
    accuracy_gain: dict[str, Estimate | None]
    loss_gain: dict[str, Estimate | None]
    seed_spread: float
    reliability: Reliability


@dataclass(frozen=True)
class TaskReport:
    """The methods on one task under one setting, from the lowest log-loss to the highest; ``measured``: of the data."""

    task: str
    settings: dict[str, Any]
    about: dict[str, Any]
    measured: dict[str, Estimate | None]
    methods: list[MethodReport]
    notes: list[str]

    @property
    def title(self) -> str:
        """Name the task, and its encoder."""
        return f"{self.task} ({self.settings['encoder']})"


def read(runs: Iterable[Run]) -> list[PredictionRun]:
    """Read what each run predicted."""
    return [
        PredictionRun(run.folder, run.metrics, PredictionTable.load(run.arrays), variant=run.variant) for run in runs
    ]


def compare(runs: Sequence[PredictionRun]) -> list[TaskReport]:
    """Compare methods task by task.

    Raises:
        ValueError: two methods of one task and seed did not predict the same comparisons.
    """
    alike = grouped(
        runs, lambda run, other: run.predictions.same_comparisons(other.predictions), "predict the same comparisons"
    )
    return [_compare(methods) for methods in alike]


def _compare(methods: dict[str, dict[int, PredictionRun]]) -> TaskReport:
    runs = [run for of in methods.values() for run in of.values()]
    reports = [_method_report(name, methods) for name in methods]
    losses = {report.name: _value(report.figures["log_loss"]) for report in reports}
    latest = max(runs, key=lambda run: run.metrics["finished"])
    measured = {name: _estimate(latest.metrics["figures"][name]) for name in latest.metrics["about"]["measured"]}
    return TaskReport(
        task=latest.task,
        settings=json.loads(latest.setting),
        about=latest.metrics["about"],
        measured=measured,
        methods=sorted(reports, key=lambda report: losses[report.name]),
        notes=code_notes(runs),
    )


def _method_report(name: str, methods: dict[str, dict[int, PredictionRun]]) -> MethodReport:
    runs = methods[name]
    table = PredictionTable.join([run.predictions for run in runs.values()])
    bootstrap = _bootstrap(table.prompts)
    figures = table.measure(bootstrap)
    measured = next(iter(runs.values())).metrics["about"]["measured"]
    for own in next(iter(runs.values())).metrics["figures"]:
        if own not in figures and own not in measured:
            found = [run.metrics["figures"][own] for run in runs.values()]
            figures[own] = Estimate(
                float(np.mean([each["value"] for each in found])), min(each["low"] for each in found),
                max(each["high"] for each in found),
            )  # fmt: skip
    accuracy, loss = {}, {}
    for baseline in BASELINES:
        shared = [seed for seed in runs if seed in methods.get(baseline, {})]
        if shared and name != baseline:
            ours = PredictionTable.join([runs[seed].predictions for seed in shared])
            theirs = PredictionTable.join([methods[baseline][seed].predictions for seed in shared])
            accuracy[baseline] = ours.ratio(bootstrap, ours.right() - theirs.right(), ours.decided)
            loss[baseline] = ours.ratio(bootstrap, theirs.loss() - ours.loss())
    return MethodReport(
        name=name,
        label=next(iter(runs.values())).label,
        seeds=list(runs),
        figures=figures,
        accuracy_gain=accuracy,
        loss_gain=loss,
        seed_spread=float(np.std([run.predictions.loss().mean() for run in runs.values()])),
        reliability=table.reliability(bootstrap),
    )


@cache
def _bootstrap(prompts: int) -> Bootstrap:
    return Bootstrap(prompts)  # the same resamples for all methods, which is what pairs their intervals


def _estimate(found: dict[str, float] | None) -> Estimate | None:
    return None if found is None else Estimate(**found)


def _value(estimate: Estimate | None) -> float:
    return float("nan") if estimate is None else estimate.value


# -- what it looks like -----------------------------------------------------------------------------------------

_MEASURED = {
    "first_wins": ("Of the verdicts that are no ties, {} are for the answer shown first", {"percent": True}),
    "flips": ("on {} of the pairs the two orders' verdicts name different answers", {"percent": True}),
    "tied": ("{} of the verdicts are ties", {"percent": True}),
    "order_odds": ("what is shown first gains {} in log-odds at equal answers", {"decimals": 2}),
    "order_marginal": ("and {} on average over answers", {"decimals": 2}),
}


def markdown(reports: Sequence[TaskReport]) -> str:
    """Write the tables of all tasks."""
    return "\n".join(line for report in reports for line in _section(report))


def _section(report: TaskReport) -> list[str]:
    about = report.about
    seeds = sorted({seed for method in report.methods for seed in method.seeds})
    rows = [["method", "accuracy", "log-loss", "ECE", "of a calibrated one", "slope", "seeds"]]
    differences = [["method", *(f"{figure} against {label}" for label in BASELINES.values()
                                for figure in ("accuracy", "log-loss"))]]  # fmt: skip
    parts = sorted({name.split(".", 1)[1] for method in report.methods for name in method.figures if "." in name})
    split = [["accuracy", *parts]]
    for method in report.methods:
        figures = method.figures
        chance = figures["ece_chance"]
        rows.append(
            [
                method.label,
                _shown(figures["accuracy"], percent=True),
                _shown(figures["log_loss"], decimals=3),
                _shown(figures["ece"], decimals=3),
                "–" if chance is None else f"{chance.value:.3f}, at most {chance.high:.3f}",
                _shown(figures["slope"], decimals=2),
                str(len(method.seeds)),
            ]
        )
        cells = [method.label]
        for baseline in BASELINES:
            cells.append(_shown(method.accuracy_gain.get(baseline), percent=True, signed=True))
            cells.append(_shown(method.loss_gain.get(baseline), decimals=3, signed=True))
        differences.append(cells)
        split.append([method.label, *(_shown(figures.get(f"accuracy.{part}"), percent=True) for part in parts)])
    measured = [
        text.format(estimate.text(**options))
        for name, (text, options) in _MEASURED.items()
        if (estimate := report.measured.get(name)) is not None
    ]
    terms = [
        f"{method.label} {term.text(decimals=2)}"
        for method in report.methods
        if (term := method.figures.get("order_term")) is not None
    ]
    return [
        f"## {report.title}",
        "",
        f"Judge: {about['judge']}. {about['pairs']:,} comparisons of {about['prompts']} prompts, each predicted by a "
        f"fit on the other {about['folds'] - 1} of {about['folds']} folds (about {about['training_pairs']:,} pairs); "
        f"{about['ties']:.0%} ties; {len(seeds)} seeds. In brackets 95% intervals over prompts.",
        "",
        *([f"{'; '.join(measured)}.", ""] if measured else []),
        *([f"Worth of being shown first, as fitted, over folds and seeds: {'; '.join(terms)}.", ""] if terms else []),
        *markdown_table(rows),
        "",
        "Gains, paired by comparison; above 0 the method is better:",
        "",
        *markdown_table(differences),
        "",
        *([*markdown_table(split), ""] if parts else []),
        *(f"Note: {note}\n" for note in report.notes),
    ]


def _shown(estimate: Estimate | None, **options: Any) -> str:
    return "–" if estimate is None else estimate.text(**options)
