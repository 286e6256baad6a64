"""Tables of control: what refined policies earn beyond the same reference's deterministic mode.

Figures are means over the test episodes of all seeds, with 95% intervals from 2000 resamples of seeds, or of episodes
within them: they hold what other data would change as well as what other starts would. Differences are paired: all
methods of a seed learn from the same pairs and play from the same starts.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.control.references import normalised_score
from benchmarks.core.measures import SeedBootstrap
from benchmarks.core.runs import Run, code_notes
from benchmarks.core.tables import markdown_table
from pfm.statistics import Estimate

__all__ = ["FLOW", "ControlReport", "Reached", "ahead", "compare", "markdown", "reached", "shown"]

Array = NDArray[np.float64]
FLOW = "flow"  # the method that others are held against, on the same pairs
_CONTROLS = ("flow_shuffled", "flow_swapped")  # without a choice on episodes, which knows more than labels
_FREE = ("pairs", "limit")  # settings of a task over which curves are drawn


@dataclass(frozen=True)
class Reached:
    """What one method reached with one number of pairs, over all of its seeds.

    ``returns``, ``gain`` over the deterministic reference, ``lead``: how far the flow of equal data is ahead of it,
    None where there is none. ``error`` of the gain: its standard error over seeds. ``d4rl``: the
    normalised return. ``segment_gain``: of single segments, in reward, and ``myopic_gain`` without what follows them.
    """

    name: str
    label: str
    pairs: int
    seeds: list[int]
    episodes: int
    returns: Estimate
    gain: Estimate
    error: float
    lead: Estimate | None
    d4rl: Estimate | None
    segment_gain: Estimate | None
    myopic_gain: Estimate | None
    runs: list[Run]

    @property
    def relabelled(self) -> bool:
        """Tell whether its labels were collected in more than one round."""
        return self._setting("label_rounds", 1) > 1

    @property
    def flow(self) -> bool:
        """Tell whether it is a flow with the labels as given."""
        return self._setting("family", "") == "control.flow" and not self.control

    @property
    def oracle(self) -> bool:
        """Tell whether the simulator was asked while it acted."""
        return self._setting("by", "") == "oracle"

    @property
    def control(self) -> bool:
        """Tell whether it learned from wrong labels, on purpose."""
        tossed = self.runs[0].metrics["settings"]["task"].get("teacher") == "coin"
        return tossed or self._setting("labels", "given") != "given"

    def _setting(self, name: str, otherwise: Any) -> Any:
        return self.runs[0].metrics["settings"]["method"].get(name, otherwise)


@dataclass(frozen=True)
class ControlReport:
    """One environment under one setting: methods at the largest number of pairs, and at every number of pairs."""

    task: str
    settings: dict[str, Any]
    about: dict[str, Any]
    methods: list[Reached]
    curves: dict[str, list[Reached]]
    notes: list[str]

    @property
    def title(self) -> str:
        """Name the environment, the segments' length, and the teacher unless it is the one that never errs."""
        told = self.settings.get("teacher", "oracle")
        by = "" if told == "oracle" else ", answers by a coin" if told == "coin" else f", the {told} teacher"
        return f"{self.settings['environment']}, segments of {self.settings['length']}{by}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""

        def plain(found: Reached) -> dict[str, Any]:
            values = {name: value for name, value in vars(found).items() if name != "runs"}
            return {name: vars(value) if isinstance(value, Estimate) else value for name, value in values.items()}

        return {
            "kind": "control",
            "task": self.task,
            "settings": self.settings,
            "about": self.about,
            "methods": [plain(found) for found in self.methods],
            "curves": {name: [plain(found) for found in curve] for name, curve in self.curves.items()},
            "notes": self.notes,
        }


def compare(runs: Sequence[Run]) -> list[ControlReport]:
    """Compare methods environment by environment, and setting by setting."""
    by_setting: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        settings = {name: value for name, value in run.metrics["settings"]["task"].items() if name not in _FREE}
        by_setting[json.dumps(settings)].append(run)
    return [_compare(by_setting[setting]) for setting in sorted(by_setting)]


def _compare(runs: list[Run]) -> ControlReport:
    most = max(_pairs(run) for run in runs)
    by_cell: dict[tuple[str, int], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        by_cell[run.method, _pairs(run)].append(run)
    cells = {cell: reached(found, by_cell.get((FLOW, cell[1]), [])) for cell, found in by_cell.items()}
    methods = sorted((found for (_, pairs), found in cells.items() if pairs == most), key=lambda f: -f.gain.value)
    curves = {
        name: curve for name in dict.fromkeys(name for name, _ in by_cell) if len(curve := _curve(name, by_cell)) > 1
    }
    latest = max((run for run in runs if _pairs(run) == most), key=lambda run: run.metrics["finished"])
    return ControlReport(
        task=latest.task,
        settings=latest.metrics["settings"]["task"],
        about=latest.metrics["about"],
        methods=methods,
        curves=curves,
        notes=code_notes([run for found in methods if not found.oracle for run in found.runs]),
    )


def _pairs(run: Run) -> int:
    settings = run.metrics["settings"]["task"]
    return settings["pairs"] if settings["limit"] is None else min(settings["limit"], settings["pairs"])


def _load(run: Run) -> dict[str, Array]:
    with np.load(run.arrays, allow_pickle=False) as found:
        return dict(found)


def _curve(name: str, by_cell: dict[tuple[str, int], list[Run]]) -> list[Reached]:
    """Return what one method reached by number of pairs, over the seeds that were run at every number."""
    cells = {pairs: runs for (method, pairs), runs in sorted(by_cell.items()) if method == name}
    common = set.intersection(*({run.seed for run in runs} for runs in cells.values()))
    if not common:
        return []
    return [
        reached(
            [run for run in runs if run.seed in common],
            [run for run in by_cell.get((FLOW, pairs), []) if run.seed in common],
        )
        for pairs, runs in cells.items()
    ]


def reached(runs: list[Run], flows: list[Run]) -> Reached:
    """Join the runs of one method, a seed each; ``flows`` are those of the flow that it is held against."""
    arrays = [_load(run) for run in runs]
    seed = np.concatenate([np.full(len(each["returns"]), run.seed) for run, each in zip(runs, arrays, strict=True)])
    returns = np.concatenate([each["returns"] for each in arrays])
    gains = returns - np.concatenate([each["reference"] for each in arrays])
    bootstrap = _bootstrap(seed)
    mean = bootstrap.mean(returns)
    settings = runs[0].metrics["settings"]["task"]
    d4rl = None
    if settings["d4rl"] is not None:
        d4rl = Estimate(*(normalised_score(value, settings["d4rl"]) for value in (mean.value, mean.low, mean.high)))
    lead = None if runs[0].method == FLOW else _ahead(flows, runs)

    def segments(name: str) -> Estimate | None:
        if any(name not in each for each in arrays):
            return None
        owner = np.concatenate([np.full(len(e[name]), run.seed) for run, e in zip(runs, arrays, strict=True)])
        return _bootstrap(owner).mean(np.concatenate([each[name] for each in arrays]))

    return Reached(
        name=runs[0].method,
        label=runs[0].label,
        pairs=_pairs(runs[0]),
        seeds=[run.seed for run in runs],
        episodes=len(returns),
        returns=mean,
        gain=bootstrap.mean(gains),
        error=_error(bootstrap, gains),
        lead=lead,
        d4rl=d4rl,
        segment_gain=segments("segment_gain"),
        myopic_gain=segments("segment_return_gain"),
        runs=runs,
    )


def ahead(ours: Reached, theirs: Reached) -> Estimate | None:
    """Return how far one method is ahead of another, paired; None where seeds of theirs are not among ours."""
    return _ahead(ours.runs, theirs.runs)


def _ahead(ours: list[Run], theirs: list[Run]) -> Estimate | None:
    by_seed = {run.seed: run for run in ours}
    if not theirs or any(run.seed not in by_seed for run in theirs):
        return None
    differences, seeds = [], []
    for run in theirs:
        one, other = _load(by_seed[run.seed])["returns"], _load(run)["returns"]
        shared = min(len(one), len(other))
        differences.append(one[:shared] - other[:shared])
        seeds.append(np.full(shared, run.seed))
    return _bootstrap(np.concatenate(seeds)).mean(np.concatenate(differences))


def _bootstrap(seed: NDArray[np.int64]) -> SeedBootstrap:
    """Resample seeds (the episodes of a single one); equal layouts share their resamples."""
    return _resampled(tuple(seed.tolist()))


@lru_cache(maxsize=64)
def _resampled(seed: tuple[int, ...]) -> SeedBootstrap:
    return SeedBootstrap(np.array(seed))


def _error(bootstrap: SeedBootstrap, values: Array) -> float:
    ones = np.ones(len(values))
    units = int(bootstrap.units(ones)[0])
    return float((bootstrap.sums(values) / bootstrap.sums(ones)).std()) * math.sqrt(units / max(units - 1, 1))


# -- what it looks like ---------------------------------------------------------------------------------------------


def markdown(reports: Sequence[ControlReport]) -> str:
    """Write the tables of all environments, first what they come to."""
    lines = ["## Control", "", *_summary(reports), ""]
    return "\n".join([*lines, *(line for report in reports for line in _section(report))])


def _summary(reports: Sequence[ControlReport]) -> list[str]:
    """Hold the flow against the best other method on the same pairs; and the best flow of all against the best other.

    Which of several flows, or of several others, is the best is decided on the same episodes: its figure is a little
    flattered on either side.
    """
    head = (
        "environment", "H", "pairs", "reference", "flow's gain", "± standard error", "best other, same pairs",
        "flow's lead", "best flow of all", "gain", "best other of all", "lead", "shuffled", "swapped",
    )  # fmt: skip
    rows: list[list[str]] = [list(head)]
    for report in reports:
        by_name = {found.name: found for found in report.methods}
        flow, plain = by_name.get(FLOW), by_name.get("reference")
        if flow is None:
            continue
        # Of fewer seeds, a method could be the best by the data that it was spared.
        complete = [found for found in report.methods if set(found.seeds) >= set(flow.seeds)]
        others = [f for f in complete if not (f.flow or f.control or f.oracle or f.name == "reference")]
        once = [found for found in others if not found.relabelled]
        flows = [found for found in complete if found.flow]
        best, best_once, best_flow = (max(part, key=_gain, default=None) for part in (others, once, flows))
        rows.append(
            [
                report.settings["environment"],
                str(report.settings["length"]),
                str(flow.pairs),
                "–" if plain is None else plain.returns.text(),
                _in_errors(flow),
                f"{flow.error:.3g}",
                "–" if best_once is None else best_once.label,
                "–" if best_once is None else shown(ahead(flow, best_once), signed=True),
                "–" if best_flow is None else best_flow.label,
                "–" if best_flow is None else _in_errors(best_flow),
                "–" if best is None else best.label,
                "–" if best is None or best_flow is None else shown(ahead(best_flow, best), signed=True),
                *(_in_errors(by_name[name]) if name in by_name else "–" for name in _CONTROLS),
            ]
        )
    if len(rows) == 1:
        return [f"No run of method=control/{FLOW}, which is held against the others here."]
    return [
        *markdown_table(rows),
        "",
        "Gains are over the same reference's deterministic mode, in brackets in standard errors. Leads are paired, "
        "with 95% intervals. Flows of all kinds, and others of all kinds, include those with several rounds of labels; "
        "those of fewer seeds than the flow are left out here.",
    ]


def _gain(found: Reached) -> float:
    return found.gain.value


def _in_errors(found: Reached) -> str:
    ratio = found.gain.value / found.error if found.error > 0 else 0.0
    return f"{found.gain.value:+.4g} ({ratio:+.1f})".replace("-", "−")


def _section(report: ControlReport) -> list[str]:
    settings, about = report.settings, report.about
    seeds = sorted({seed for found in report.methods for seed in found.seeds})
    room = "" if about.get("best") is None else f" A better policy of the same environment earns {about['best']:.0f}."
    statistics = about["statistics"]
    columns = ["method", "return", "gain", "flow's lead", "segment gain", "without what follows"]
    normalised = any(found.d4rl is not None for found in report.methods)
    rows = [[*columns, *(["D4RL"] if normalised else []), "seeds", "episodes"]]
    for found in report.methods:
        cells = [shown(found.returns), shown(found.gain, signed=True), shown(found.lead, signed=True),
                 shown(found.segment_gain, signed=True), shown(found.myopic_gain, signed=True)]  # fmt: skip
        cells += [shown(found.d4rl)] if normalised else []
        rows.append([found.label, *cells, str(len(found.seeds)), str(found.episodes)])
    lines = [
        f"### {report.title}",
        "",
        f"{_asked(report)}; labels by the {settings['teacher']} teacher, who counts {settings['continuation']} further "
        f"steps of the reference; {len(seeds)} seeds of data. "
        f"Labels that a segment's own return would give agree with these in {100 * statistics['return_accuracy']:.0f}%."
        f"{room} Gains are over the same reference's deterministic mode, from the same starts; 95% intervals over "
        "seeds and episodes.",
        "",
        *markdown_table(rows),
        "",
    ]
    if report.curves:
        sizes = sorted({found.pairs for curve in report.curves.values() for found in curve})
        table = [["gain with pairs", *(f"{size:,}" for size in sizes)]]
        for curve in sorted(report.curves.values(), key=lambda curve: -curve[-1].gain.value):
            by_size = {found.pairs: found for found in curve}
            table.append(
                [curve[0].label, *(shown(by_size[s].gain, signed=True) if s in by_size else "–" for s in sizes)]
            )
        lines += [*markdown_table(table), ""]
    return lines + [f"Note: {note}\n" for note in report.notes]


def _asked(report: ControlReport) -> str:
    """Say what was compared; the task's pairs are comparisons, of which several can be of one state."""
    settings, about = report.settings, report.about
    compared = f"{about['labels']:,} pairs of segments of {settings['length']} steps"
    if settings["members"] > 2:
        compared += f", among {settings['members']} from each of {about['pairs']:,} states"
    return compared


def shown(estimate: Estimate | None, **style: Any) -> str:
    """Write an estimate, a dash for none."""
    if estimate is None:
        return "–"
    nothing = max(abs(estimate.low), abs(estimate.high)) < 1e-5  # what restoring a state rounds to
    return "0" if nothing else estimate.text(**style)
