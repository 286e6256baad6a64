"""Tables of methods that move draws of a distribution whose rounds are known exactly.

A figure is the interquartile mean over seeds, with a 95% interval from 2000 resamples of the seeds; of a single seed,
the run's own figure and interval, over its draws.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.core.measures import interquartile_mean
from benchmarks.core.runs import Run, code_notes, common_setting
from benchmarks.core.tables import markdown_table
from pfm.statistics import Estimate, interval

__all__ = ["LawMethod", "LawReport", "compare", "markdown"]

_RESAMPLES = 2000
Figures = dict[str, Estimate | None]


@dataclass(frozen=True)
class LawMethod:
    """What one method reached over all of its seeds.

    ``figures`` are those of its target distribution, that of the last of ``rounds``; ``by_round`` those of every round.
    ``runs`` are its finished runs.
    """

    name: str
    label: str
    seeds: list[int]
    rounds: list[int]
    figures: Figures
    by_round: dict[int, Figures]
    runs: list[Run]

    @property
    def title(self) -> str:
        """Name the method, and the round it aims at where that is not the first."""
        return self.label if self.rounds[-1] == 1 else f"{self.label} (round {self.rounds[-1]})"

    def value(self, name: str) -> float:
        """Return a figure, NaN where it is undefined."""
        found = self.figures.get(name)
        return float("nan") if found is None else found.value


@dataclass(frozen=True)
class LawReport:
    """The methods on one task under one setting, from the closest to its target distribution to the farthest."""

    task: str
    settings: dict[str, Any]
    about: dict[str, Any]
    methods: list[LawMethod]
    notes: list[str]

    @property
    def floor(self) -> Figures:
        """Return what exact draws of the first round score, as figures."""
        for method in self.methods:
            found = method.by_round.get(1)
            if found is not None:
                return {name.removesuffix("_floor"): value for name, value in found.items() if name.endswith("_floor")}
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""

        def plain(figures: Figures) -> dict[str, Any]:
            return {name: None if found is None else vars(found) for name, found in figures.items()}

        return {
            "kind": "law",
            "task": self.task,
            "settings": self.settings,
            "about": self.about,
            "floor": plain(self.floor),
            "methods": [
                {
                    "name": method.name,
                    "label": method.label,
                    "seeds": method.seeds,
                    "figures": plain(method.figures),
                    "rounds": {str(number): plain(found) for number, found in method.by_round.items()},
                }
                for method in self.methods
            ],
            "notes": self.notes,
        }


def compare(runs: Sequence[Run]) -> list[LawReport]:
    """Compare methods task by task."""
    by_setting: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_setting[common_setting(run, ["task"])].append(run)
    return [_compare(by_setting[setting]) for setting in sorted(by_setting)]


def _compare(runs: list[Run]) -> LawReport:
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        by_method[run.method].append(run)
    methods = [_method(name, found) for name, found in by_method.items()]
    latest = max(runs, key=lambda run: run.metrics["finished"])
    return LawReport(
        task=latest.task,
        settings=latest.metrics["settings"]["task"],
        about=latest.metrics["about"],
        methods=sorted(methods, key=lambda method: method.value("sliced_wasserstein_ratio")),
        notes=code_notes(runs),
    )


def _method(name: str, runs: list[Run]) -> LawMethod:
    found = {key: _over_seeds([run.metrics["figures"].get(key) for run in runs]) for key in runs[0].metrics["figures"]}
    figures = {key: value for key, value in found.items() if not key.startswith("round_")}
    rounds: list[int] = runs[0].metrics["about"]["rounds"]
    by_round = {
        number: {
            key.removeprefix(f"round_{number}."): value
            for key, value in found.items()
            if key.startswith(f"round_{number}.")
        }
        for number in rounds
    }
    return LawMethod(
        name=name,
        label=runs[0].label,
        seeds=[run.seed for run in runs],
        rounds=rounds,
        figures=figures,
        by_round=by_round if any(by_round.values()) else {rounds[0]: figures},
        runs=runs,
    )


def _over_seeds(found: Iterable[dict[str, float] | None]) -> Estimate | None:
    present = [Estimate(**one) for one in found if one is not None]
    if len(present) <= 1:
        return present[0] if present else None
    values = np.array([one.value for one in present])
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    return interval(float(interquartile_mean(values)), interquartile_mean(values[drawn]), len(values))


# -- what it looks like ---------------------------------------------------------------------------------------------

_COLUMNS = (
    ("sliced_wasserstein_ratio", "sliced W2 ÷ floor", {"decimals": 2}),
    ("energy_distance_ratio", "energy ÷ floor", {"decimals": 2}),
    ("kolmogorov_smirnov", "KS", {"decimals": 3}),
    ("off_support", "off support", {"percent": True, "decimals": 2}),
    ("reward", "E[r]", {"decimals": 3}),
    ("gain_share", "of the exact gain", {"percent": True}),
    ("win", "wins against the reference", {"percent": True}),
    ("diversity", "diversity", {"decimals": 3}),
)


def markdown(reports: Sequence[LawReport]) -> str:
    """Write the tables of all tasks."""
    return "\n".join(line for report in reports for line in _section(report))


def _section(report: LawReport) -> list[str]:
    about, floor = report.about, report.floor
    columns = [column for column in _COLUMNS if any(method.figures.get(column[0]) for method in report.methods)]
    rows = [["method", *(title for _, title, _ in columns), "labels", "draws", "evaluations", "seeds"]]
    rows += [
        [
            method.title,
            *(_shown(method.figures.get(name), **style) for name, _, style in columns),
            *(_count(method.value(name)) for name in ("labels", "draws", "evaluations")),
            str(len(method.seeds)),
        ]
        for method in report.methods
    ]
    exact = floor | {"sliced_wasserstein_ratio": Estimate(1, 1, 1), "energy_distance_ratio": Estimate(1, 1, 1)}
    rows.append(
        [
            "**Exact draws of round 1**",
            *("1" if "ratio" in name else _shown(exact.get(name), **style) for name, _, style in columns),
            "0", "2", "–", "",
        ]
    )  # fmt: skip
    seeds = sorted({seed for method in report.methods for seed in method.seeds})
    distances = ", ".join(
        f"{title} {_shown(floor.get(name))}"
        for name, title in (("sliced_wasserstein", "sliced W2"), ("energy_distance", "energy"))
    )
    lines = [
        f"## {report.task}",
        "",
        f"{about['pairs']:,} pairs; every figure from {about['draws']} sets of {about['samples']:,} outputs, distances "
        f"to {about['draws']} sets of exact draws each; {len(seeds)} seed{'s' * (len(seeds) > 1)}. Interquartile means "
        f"over seeds and 95% intervals. Distances between exact draws, the floor: {distances}.{_exact_line(about)}",
        "",
        *markdown_table(rows),
        "",
    ]
    if any(method.rounds != [1] for method in report.methods):
        lines += ["Round by round, each against the exact distribution of that round:", "", *_rounds(report), ""]
    return lines + [f"Note: {note}\n" for note in report.notes]


def _rounds(report: LawReport) -> list[str]:
    reward = report.about["exact"]["reward"] is not None
    name = "reward" if reward else "win"
    style: dict[str, Any] = {"decimals": 3} if reward else {"percent": True}
    rows = [["method", "round", "E[r]" if reward else "wins", "exact", "difference", "sliced W2 ÷ floor",
             "off support", "diversity", "exact"]]  # fmt: skip
    for method in report.methods:
        for number, figures in method.by_round.items():
            if method.rounds == [1]:
                continue
            exact = method.runs[0].metrics["about"]["exact"][name][number]
            ours = figures[name]
            rows.append(
                [
                    method.label,
                    str(number),
                    _shown(ours, **style),
                    _shown(Estimate(exact, exact, exact), **style),
                    "–" if ours is None or not exact else f"{100 * (ours.value / exact - 1):+.1f}%".replace("-", "−"),
                    _shown(figures["sliced_wasserstein_ratio"], decimals=2),
                    _shown(figures["off_support"], percent=True, decimals=2),
                    _shown(figures["diversity"], decimals=3),
                    _shown(figures["diversity_floor"], decimals=3),
                ]
            )
    return markdown_table(rows)


def _exact_line(about: dict[str, Any]) -> str:
    reward, win = about["exact"]["reward"], about["exact"]["win"]
    text = f" An exact draw of round 1 wins {100 * win[1]:.1f}% against the reference"
    return (
        f"{text}."
        if reward is None
        else f"{text}; its E[r] is {reward[1]:.3f}, the reference's {round(reward[0], 3) + 0.0:.3f}."
    )


def _shown(estimate: Estimate | None, **style: Any) -> str:
    if estimate is None:
        return "–"
    value, around = estimate.parts(**style)
    return value if estimate.low == estimate.high else f"{value} {around}"


def _count(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:,.0f}"
