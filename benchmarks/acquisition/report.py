"""Win rate against labels: what choosing the pairs to label is worth against drawing them at random."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core.runner import ARRAYS
from benchmarks.core.runs import Run
from benchmarks.core.seeds import student_interval

__all__ = ["Curve", "compare", "markdown", "save_plot"]


@dataclass(frozen=True)
class Curve:
    """Holds one method's win rates, mean over seeds, and their difference to random choice on the same seeds.

    ``labels`` (L,); ``win``, ``half`` (L,) mean and half of its 95% interval over seeds; ``gain``, ``gain_half`` of the
    difference, and ``area``, ``area_half`` of its mean over L; None without runs of random choice.
    """

    data: str
    method: str
    label: str
    seeds: int
    labels: list[int]
    win: list[float]
    half: list[float]
    gain: list[float] | None
    gain_half: list[float] | None
    area: float | None
    area_half: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"kind": "acquisition", **asdict(self)}


def compare(runs: Sequence[Run]) -> list[Curve]:
    """Join the runs of each data set and method over seeds, paired with random choice by seed."""
    found: dict[tuple[str, str], dict[int, tuple[list[int], np.ndarray]]] = defaultdict(dict)
    names: dict[str, str] = {}
    for run in runs:
        settings = run.metrics["settings"]
        with np.load(run.folder / ARRAYS["acquisition"], allow_pickle=False) as arrays:
            labels, win = arrays["labels"].tolist(), arrays["win"].mean(1)
        encoder = settings["encoder"]
        found[f"{settings['task']['data']}, {encoder}", settings["method"]["name"]][settings["seed"]] = labels, win
        names[settings["method"]["name"]] = settings["method"]["label"]
    curves = []
    for (data, method), seeds in sorted(found.items()):
        labels = next(iter(seeds.values()))[0]
        wins = np.stack([win for _, win in seeds.values()])
        control = found.get((data, "acquire_random"), {})
        both = [seed for seed in seeds if seed in control]
        gains = np.stack([seeds[seed][1] - control[seed][1] for seed in both]) if both else None
        win = [student_interval(column) for column in wins.T]
        gain = None if gains is None else [student_interval(column) for column in gains.T]
        area = None if gains is None else student_interval(gains.mean(1).tolist())
        curves.append(
            Curve(
                data,
                method,
                names[method],
                len(seeds),
                labels,
                [m for m, _ in win],
                [h for _, h in win],
                None if gain is None else [m for m, _ in gain],
                None if gain is None else [h for _, h in gain],
                None if area is None else area[0],
                None if area is None else area[1],
            )
        )
    return curves


def markdown(curves: Sequence[Curve]) -> str:
    """Write a table for each data set: win rates by labels, and the mean gain on random choice."""
    parts = []
    for data in dict.fromkeys(curve.data for curve in curves):
        some = [curve for curve in curves if curve.data == data]
        labels = some[0].labels
        parts.append(f"## Which pair to label next: {data}\n")
        parts.append("Win rate against the original (%), ± half of the 95% interval over seeds.\n")
        parts.append("| method | seeds | " + " | ".join(f"{n} labels" for n in labels) + " | mean gain on random |")
        parts.append("|---" * (len(labels) + 3) + "|")
        for curve in some:
            cells = [f"{100 * w:.1f} ± {100 * h:.1f}" for w, h in zip(curve.win, curve.half, strict=True)]
            gain = "–"
            if curve.area is not None and curve.area_half is not None and curve.method != "acquire_random":
                gain = f"{100 * curve.area:+.1f} ± {100 * curve.area_half:.1f}"
            parts.append(f"| {curve.label} | {curve.seeds} | {' | '.join(cells)} | {gain} |")
        parts.append("")
    return "\n".join(parts)


def save_plot(curves: Sequence[Curve], path: Path) -> None:
    """Draw win rate against labels, one line a method, shaded with the interval over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for curve in curves:
        colour = "#77808a" if curve.method == "acquire_random" else None
        (line,) = axes.plot(curve.labels, [100 * w for w in curve.win], marker="o", label=curve.label, color=colour)
        low, high = ([100 * (w + s * h) for w, h in zip(curve.win, curve.half, strict=True)] for s in (-1, 1))
        axes.fill_between(curve.labels, low, high, alpha=0.12, color=line.get_color())
    axes.set(xscale="log", xlabel="labels", ylabel="wins against the original (%)", title=curves[0].data)
    axes.set_xticks(curves[0].labels, [str(n) for n in curves[0].labels])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)
