"""Figures of control: learning curves over pairs, and what methods gain at the largest number of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks.control.report import FLOW, ControlReport, Reached

__all__ = ["save_plots"]

_FLOW, _CONTROL, _BASELINE, _BOUND, _INK = "#0072b2", "#8c8c8c", "#d55e00", "#222222", "#333333"
_COLORS = {  # of methods, the same in every environment
    FLOW: _FLOW, "flow_best_of": "#56b4e9", "flow_best_of_select": "#003f5c", "ascent": "#e69f00",
    "ascent_ensemble": "#d55e00", "mean_shift": "#882255", "mean_shift_network": "#cc79a7", "best_of": "#009e73",
    "clone_winners_residual": "#999933", "dpo": "#661100", "cpl": "#117733",
}  # fmt: skip
_OTHERS = ("#aa4499", "#44aa99", "#ddcc77", "#332288")


def save_plots(report: ControlReport, folder: Path, name: str) -> list[Path]:
    """Draw one environment's figures into ``<name>-gain.png`` and, where pairs vary, ``<name>-pairs.png``."""
    paths = [folder / f"{name}-gain.png"]
    _gains(report).savefig(paths[0], dpi=130)
    if report.curves:
        paths.append(folder / f"{name}-pairs.png")
        _curves(report).savefig(paths[-1], dpi=130)
    return paths


def _gains(report: ControlReport) -> Any:
    methods = list(reversed(report.methods))
    figure = _figure(7.5, 0.9 + 0.27 * len(methods))
    axes = figure.subplots()
    for place, found in enumerate(methods):
        axes.plot([found.gain.low, found.gain.high], [place, place], color=_color(found), linewidth=2)
        axes.plot(found.gain.value, place, "o", color=_color(found), markersize=6, markeredgecolor="white")
    axes.axvline(0, color=_INK, linewidth=0.8, linestyle=":")
    most = max(len(found.seeds) for found in methods)
    axes.set_yticks(range(len(methods)), [_named(found, most) for found in methods])
    axes.set_xlabel("gain in episode return over the reference")
    _finish(axes, figure, f"{report.title}, {methods[-1].pairs:,} pairs")
    return figure


def _curves(report: ControlReport) -> Any:
    figure = _figure(8.5, 4.4)
    axes = figure.subplots()
    others = itertools.cycle(_OTHERS)
    for name, curve in report.curves.items():
        color = _CONTROL if curve[0].control else _COLORS.get(name) or next(others)
        x, width = [found.pairs for found in curve], 2.6 if curve[0].flow else 1.3
        axes.plot(x, [found.gain.value for found in curve], "o-", color=color, linewidth=width, markersize=4,
                  label=curve[0].label)  # fmt: skip
        if curve[0].flow:
            axes.fill_between(
                x, [f.gain.low for f in curve], [f.gain.high for f in curve], color=color, alpha=0.15, linewidth=0
            )
    axes.axhline(0, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    sizes = sorted({found.pairs for curve in report.curves.values() for found in curve})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("labelled pairs")
    axes.set_ylabel("gain in episode return")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _finish(axes, figure, report.title)
    return figure


def _named(found: Reached, most: int) -> str:
    """Return a method's label, and its number of seeds where others have more."""
    count = len(found.seeds)
    return found.label if count == most else f"{found.label} ({count} seed{'s' * (count > 1)})"


def _color(found: Reached) -> str:
    if found.control:
        return _CONTROL
    if found.flow:
        return _FLOW
    return _BOUND if found.oracle or found.name == "reference" else _BASELINE


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Any, figure: Any, title: str) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
