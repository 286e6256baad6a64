"""What a family of methods reaches if one may choose within it, seed by seed, by what held-out episodes earned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.control.report import ControlReport, Reached, ahead, reached, shown
from benchmarks.core.runs import Run
from benchmarks.core.tables import markdown_table
from pfm.statistics import Estimate

__all__ = ["FAMILIES", "Family", "families", "markdown"]

FLOWS = "flows"
FAMILIES = {  # of one round of labels; about as many settings in each of the first two
    FLOWS: ("flow_select", "flow_best_of_guided"),
    "reward-gradient ascent": ("ascent", "ascent_ensemble", "ascent_straight", "ascent_select"),
    "mean shifts": ("mean_shift", "mean_shift_network"),
    "cloned policies": ("clone_winners_residual", "clone_winners", "clone_all", "cpl", "dpo", "regression"),
    "Bradley–Terry best of 8": ("best_of",),
}


@dataclass(frozen=True)
class Family:
    """What a family reached with so many ``settings`` tried on validation episodes; ``lead`` of the flows on it."""

    name: str
    settings: int
    reached: Reached
    lead: Estimate | None


def families(report: ControlReport) -> list[Family]:
    """Choose within every family, seed by seed; [] where the flows were not run.

    A seed counts if every method of the family was run on it, so that no seed chooses among more than another.
    """
    by_name = {found.name: {run.seed: run for run in found.runs} for found in report.methods}
    chosen: dict[str, list[Run]] = {}
    for name, members in FAMILIES.items():
        ran = [by_name[member] for member in members if member in by_name]
        seeds = sorted(set.intersection(*(set(runs) for runs in ran))) if ran else []
        if seeds:
            chosen[name] = [max((runs[seed] for runs in ran), key=_validated) for seed in seeds]
    if FLOWS not in chosen:
        return []
    flows = reached(chosen[FLOWS], [])
    found = []
    for name, runs in chosen.items():
        result = flows if name == FLOWS else reached(runs, [])
        tried = sum(
            len(by_name[member][runs[0].seed].metrics["notes"].get("tried") or [None])
            for member in FAMILIES[name] if member in by_name
        )  # fmt: skip
        found.append(Family(name, tried, result, None if name == FLOWS else ahead(flows, result)))
    return sorted(found, key=lambda family: -family.reached.gain.value)


def markdown(reports: Sequence[ControlReport]) -> list[str]:
    """Write the lines of one table over all environments."""
    rows = [["task", "family", "gain", "the flows' lead", "settings", "seeds"]]
    for report in reports:
        for family in families(report):
            found = family.reached
            rows.append([
                report.title, family.name, shown(found.gain, signed=True),
                shown(family.lead, signed=True), str(family.settings), str(len(found.seeds)),
            ])  # fmt: skip
    if len(rows) == 1:
        return []
    return [
        *markdown_table(rows),
        "",
        "Of each family the method and setting that earned most in a seed's validation episodes, measured in that "
        "seed's test episodes; standing still is counted among the settings of each method.",
    ]


def _validated(run: Run) -> float:
    tried = run.metrics["notes"].get("tried") or []
    return max((setting["return"] for setting in tried), default=float("-inf"))
