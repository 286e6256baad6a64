"""Tables of what wrong labels cost: the same method on clean and on partly flipped labels, paired by item and seed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.core.measures import ChoiceTable, SeedBootstrap
from benchmarks.core.tables import markdown_table
from benchmarks.selection.report import ChoiceRun
from pfm.statistics import Estimate

__all__ = ["PLAIN", "NoiseCost", "costs", "markdown"]

PLAIN = {
    "bradley_terry_robust": "bradley_terry",
    "bradley_terry_known": "bradley_terry",
    "bradley_terry_unbiased": "bradley_terry",
    "memorising_robust": "memorising",
    "pfm_robust": "pfm",
}  # whose labels are corrected, and the same without


@dataclass(frozen=True)
class NoiseCost:
    """Holds what a method loses to a share of wrong labels.

    ``clean`` is the plain method's mean score on clean labels, and ``loss`` that minus this method's, on the same
    items. ``share`` is the loss relative to the plain method's on the same wrong labels; None for the plain method
    itself, and without wrong labels. ``loss_wins`` is the loss in the share of items won against the original.
    """

    task: str
    percent: bool
    flips: float
    method: str
    label: str
    seeds: int
    clean: Estimate
    loss: Estimate
    share: Estimate | None
    loss_wins: Estimate


def costs(runs: Sequence[ChoiceRun]) -> list[NoiseCost]:
    """Compare every method that has a plain one, and the plain ones, on clean and on partly wrong labels."""
    found: dict[str, dict[tuple[float, str], dict[int, ChoiceRun]]] = defaultdict(lambda: defaultdict(dict))
    for run in sorted(runs, key=lambda run: run.seed):
        setting = json.loads(run.setting)
        flips = float(setting.pop("flips", 0.0))
        found[json.dumps(setting)][flips, run.method][run.seed] = run
    return [cost for setting in sorted(found) for cost in _costs(found[setting])]


def _costs(runs: dict[tuple[float, str], dict[int, ChoiceRun]]) -> list[NoiseCost]:
    rates = sorted({flips for flips, _ in runs})
    if rates[-1] == 0:
        return []
    made = []
    for plain in dict.fromkeys(PLAIN.values()):
        family = [plain, *(name for name, of in PLAIN.items() if of == plain)]
        for flips in rates:
            made += [_cost(runs, plain, flips, name) for name in family if (flips, name) != (0.0, plain)]
    return [cost for cost in made if cost is not None]


def _cost(runs: dict[tuple[float, str], dict[int, ChoiceRun]], plain: str, flips: float, name: str) -> NoiseCost | None:
    clean, struck, ours = (runs.get(key, {}) for key in ((0.0, plain), (flips, plain), (flips, name)))
    seeds = [seed for seed in ours if seed in clean and seed in struck]
    if not seeds:
        return None
    tables = [ChoiceTable.join([part[seed].choices for seed in seeds]) for part in (clean, struck, ours)]
    sizes = [clean[seed].choices.prompts for seed in seeds]
    bootstrap = SeedBootstrap(np.repeat(np.arange(len(seeds)), sizes))
    best, plain_score, score = (table.score() for table in tables)
    wins = [_wins(table) for table in tables]
    run = ours[seeds[0]]
    return NoiseCost(
        task=run.task,
        percent=bool(run.metrics["about"]["percent"]),
        flips=flips,
        method=name,
        label=run.label,
        seeds=len(seeds),
        clean=bootstrap.mean(best),
        loss=bootstrap.mean(best - score),
        share=bootstrap.ratio(best - score, best - plain_score) if flips and name != plain else None,
        loss_wins=bootstrap.mean(wins[0] - wins[2]),
    )


def _wins(table: ChoiceTable) -> np.ndarray:
    won = np.where(table.changed, 0.5 * (1 + np.sign(table.scores - table.scores[:, :1])), 0.5)
    return table.by_prompt(won)


def markdown(found: Sequence[NoiseCost]) -> str:
    """Write one table a task; nothing if no run had wrong labels."""
    lines: list[str] = []
    for task in dict.fromkeys(cost.task for cost in found):
        rows = [["wrong labels", "method", "clean labels", "loses", "loses in wins against the original",
                 "of what the plain fit loses", "seeds"]]  # fmt: skip
        for cost in found:
            if cost.task == task:
                options = {"percent": cost.percent, "decimals": 1 if cost.percent else 4}
                share = "–" if cost.share is None else cost.share.text(percent=True, decimals=0)
                rows.append(
                    [
                        f"{cost.flips:.0%}",
                        cost.label,
                        cost.clean.text(**options),
                        cost.loss.text(signed=True, **options),
                        cost.loss_wins.text(percent=True, signed=True),
                        share,
                        str(cost.seeds),
                    ]
                )
        lines += [
            f"## What wrong labels cost: {task}",
            "",
            "A share of the training labels is flipped at random. Each row is paired, item by item, with the "
            "plain method on clean labels, whose score stands in the third column; positive is a loss. In brackets 95% "
            "intervals over seeds.",
            "",
            *markdown_table(rows),
            "",
        ]
    return "\n".join(lines)
