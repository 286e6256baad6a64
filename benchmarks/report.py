"""Tables and plots of finished runs: ``python -m benchmarks.report runs/text [--out DIR]``.

Every interval is the 95% interval of a nested bootstrap: seeds are drawn with replacement, and prompts within each
seed. Methods of one task and seed chose among the same candidates, so that differences between them are paired.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measures import ChoiceTable, NestedBootstrap
from benchmarks.runner import METRICS, PICKS
from pfm.statistics import Estimate

__all__ = ["MethodReport", "Run", "TaskReport", "collect", "compare", "markdown"]

BASELINES = {
    "identity": "original",
    "bradley_terry": "Bradley–Terry",
    "mean_shift": "mean shift",
}  # what differences are to


@dataclass(frozen=True)
class Run:
    """Is a finished run: its folder, what metrics.json says, and the choices."""

    folder: Path
    metrics: dict[str, Any]
    choices: ChoiceTable

    @property
    def method(self) -> str:
        """Give the name of the method."""
        return self.metrics["settings"]["method"]["name"]

    @property
    def seed(self) -> int:
        """Give the seed."""
        return self.metrics["settings"]["seed"]

    @property
    def setting(self) -> str:
        """Give all settings but method and seed, as one text: what runs must share to be compared."""
        settings = self.metrics["settings"]
        return json.dumps({name: settings[name] for name in settings if name not in ("method", "seed")})


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
        """Name the task, and its encoder."""
        return f"{self.task} ({self.settings['encoder']})"


def collect(paths: Iterable[Path]) -> list[Run]:
    """Read all finished runs below some folders; of runs with equal settings the latest counts.

    Raises:
        ValueError: there is none.
    """
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for root in paths:
        for path in root.rglob(METRICS):
            metrics = json.loads(path.read_text(encoding="utf-8"))
            known = found.get(metrics["key"])
            if known is None or known[1]["finished"] < metrics["finished"]:
                found[metrics["key"]] = (path.parent, metrics)
    if not found:
        raise ValueError(f"no finished run ({METRICS}) in {', '.join(map(str, paths))}")
    return [Run(folder, metrics, ChoiceTable.load(folder / PICKS)) for folder, metrics in found.values()]


def compare(runs: Sequence[Run]) -> list[TaskReport]:
    """Compare methods task by task.

    Raises:
        ValueError: two methods of one task and seed did not choose among the same candidates.
    """
    by_setting: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_setting[run.setting].append(run)
    return [_compare(by_setting[setting]) for setting in sorted(by_setting)]


def _compare(runs: list[Run]) -> TaskReport:
    methods: dict[str, dict[int, Run]] = defaultdict(dict)
    first: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        other = first.setdefault(run.seed, run)
        if not run.choices.same_items(other.choices):
            raise ValueError(
                f"{run.folder} and {other.folder} did not choose among the same candidates: the data or the task's "
                "code changed in between; repeat the older with force=true"
            )
        methods[run.method][run.seed] = run
    reports = [_method_report(name, methods) for name in methods]
    scores = {report.name: _value(report.figures["score"]) for report in reports}
    latest = max(runs, key=lambda run: run.metrics["finished"])
    return TaskReport(
        task=latest.metrics["settings"]["task"]["name"],
        settings=json.loads(latest.setting),
        about=latest.metrics["about"] | {"training_pairs": round(np.mean([_pairs(run) for run in runs]))},
        methods=sorted(reports, key=lambda report: -scores[report.name]),
        notes=_notes(runs, methods),
    )


def _method_report(name: str, methods: dict[str, dict[int, Run]]) -> MethodReport:
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
    means = np.sort([run.choices.score().mean() for run in runs.values()])
    cut = len(means) // 4
    return MethodReport(
        name=name,
        label=next(iter(runs.values())).metrics["settings"]["method"]["label"],
        seeds=list(runs),
        figures=figures,
        differences=differences,
        interquartile=float(means[cut : len(means) - cut].mean()),
    )


def _joined(runs: dict[int, Run], seeds: list[int]) -> tuple[ChoiceTable, NestedBootstrap]:
    tables = [runs[seed].choices for seed in seeds]
    return ChoiceTable.join(tables), _bootstrap(tuple(table.prompts for table in tables))


@cache
def _bootstrap(prompts: tuple[int, ...]) -> NestedBootstrap:
    # Methods with the same seeds have the same resamples, which is what pairs their intervals.
    return NestedBootstrap(np.repeat(np.arange(len(prompts)), prompts))


def _pairs(run: Run) -> int:
    return run.metrics["about"]["training_pairs"]


def _n(table: ChoiceTable) -> int:
    return table.scores.shape[1]


def _value(estimate: Estimate | None) -> float:
    return float("nan") if estimate is None else estimate.value


def _notes(runs: list[Run], methods: dict[str, dict[int, Run]]) -> list[str]:
    notes = []
    seeds = {run.seed for run in runs}
    for name, found in methods.items():
        if missing := sorted(seeds - set(found)):
            notes.append(f"{name} has no run of seed {', '.join(map(str, missing))}: its figures are of other splits.")
    versions = {run.metrics["environment"]["code"] for run in runs}
    if len(versions) > 1:
        notes.append(f"These runs are of {len(versions)} states of the code: {', '.join(sorted(versions))}.")
    return notes


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

    rows = [["method", about["unit"], "above random", "wins against the original", "against an independent draw",
             "at equal length", "length"]]  # fmt: skip
    pairs = [["method", *(f"minus {label}" for label in BASELINES.values()), "interquartile mean", "changed", "seeds"]]
    for method in report.methods:
        figures = method.figures
        rows.append(
            [
                method.label,
                score(figures["score"]),
                score(figures["gain"], signed=True),
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
        "In brackets 95% intervals over seeds and prompts; length is the geometric mean of the choice's over the "
        "original's.",
        "",
        *_table(rows),
        "",
        "Differences in mean score, paired by item:",
        "",
        *_table(pairs),
        "",
        *(f"Note: {note}\n" for note in report.notes),
    ]


def _table(rows: list[list[str]]) -> list[str]:
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write report.md, report.json and a plot a task; print the tables."""
    from benchmarks.plots import save_plot

    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and plots of runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, such as runs/text")
    parser.add_argument("--out", type=Path, help="where to write; default: the first of the folders")
    options = parser.parse_args(arguments)
    folder: Path = options.out or options.runs[0]
    try:
        reports = compare(collect(options.runs))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(reports)
    print(text)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    plain = json.dumps([asdict(report) for report in reports], indent=2, allow_nan=False)
    (folder / "report.json").write_text(plain + "\n", encoding="utf-8")
    for number, report in enumerate(reports):
        again = sum(earlier.task == report.task for earlier in reports[:number])
        save_plot(report, folder / f"{report.task}{f'-{again + 1}' if again else ''}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
