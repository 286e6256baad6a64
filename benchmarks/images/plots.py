"""Figures of ``task=mnist``: frontiers over strengths, and images before and after."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.runs import Run
from benchmarks.core.seeds import figure_values
from benchmarks.images.report import by_method, settings

__all__ = ["save_frontier", "save_grid"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c8c8c", "#000000")
MARKERS = "osD^vP*X"
GRID_COLUMNS = 2  # images of each digit


def save_frontier(runs: Sequence[Run], path: Path) -> None:
    """Draw the independent judge against diversity and against the distance moved: a curve for every method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 5.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    curves = {
        name: own
        for name, own in by_method(runs).items()
        if len(settings(own[0])) > 1 and not own[0].label.startswith("Control")
    }
    for number, own in enumerate(curves.values()):
        names = [name for name in settings(own[0]) if all(name in settings(run) for run in own)]
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3],
        }
        for part, some in enumerate(_by_threshold(names)):
            for axes, against in zip(panels, ("diversity", "moved"), strict=True):
                x, y = (
                    [float(np.mean(figure_values(own, f"{name}.{figure}"))) for name in some]
                    for figure in (against, "right")
                )
                label = None if part else own[0].label
                axes.plot(x, y, markersize=4, linewidth=1.2, label=label, **style)
    for own in by_method(runs).values():
        if own[0].metrics["settings"]["method"]["name"] == "reference":
            panels[0].plot(1, float(np.mean(figure_values(own, "right"))), "k*", markersize=11, label=own[0].label)
            panels[1].plot(0, float(np.mean(figure_values(own, "right"))), "k*", markersize=11)
    panels[0].set(
        xlabel="diversity within a digit, relative to the generator's", ylabel="right digit, independent judge"
    )
    panels[1].set(xlabel="root mean square change of a pixel")
    panels[0].invert_xaxis()
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _by_threshold(names: Sequence[str]) -> list[list[str]]:
    """Group settings by the threshold above which draws stay: strengths of one threshold are one curve."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(" keep ")[2], []).append(name)
    return list(groups.values())


def save_grid(runs: Sequence[Run], path: Path) -> None:
    """Draw the same draws before, and after each method at its chosen setting, of the first seed there is."""
    from matplotlib.figure import Figure

    rows: list[tuple[str, NDArray[np.uint8]]] = []
    seed = min(run.seed for run in runs)
    for own in by_method(runs).values():
        run = next((run for run in own if run.seed == seed), None)
        if run is None or not run.arrays.is_file():
            continue
        with np.load(run.arrays, allow_pickle=False) as arrays:
            if not rows:
                rows.append(("Before", arrays["before"]))
            rows.append((f"{run.label}, {run.metrics['about']['chosen']}", arrays["after"]))
    shown = rows[:1] + [row for row in rows[1:] if row[0].startswith(("Flow", "Gradient", "Best", "Control"))]
    if not shown:
        return
    per_digit = len(shown[0][1]) // 10
    columns = [digit * per_digit + place for digit in range(10) for place in range(min(GRID_COLUMNS, per_digit))]
    figure = Figure(figsize=(0.44 * len(columns) + 4.4, 0.52 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for place, (name, images) in zip(axes, shown, strict=True):
        place.imshow(np.concatenate([images[number] for number in columns], axis=1), cmap="gray", vmin=0, vmax=255)
        place.set_xticks([])
        place.set_yticks([])
        place.set_ylabel(textwrap.fill(name, 48), rotation=0, ha="right", va="center", fontsize=8)
        for side in place.spines.values():
            side.set_visible(False)
    figure.savefig(path, dpi=120)
