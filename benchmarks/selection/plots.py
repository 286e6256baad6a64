"""One figure a task: the methods in order, and what of their gain goes with length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.selection.report import MethodReport, TaskReport
from pfm.statistics import Estimate

__all__ = ["save_plot"]

_FLOW, _CONTROL, _BASELINE, _BOUND = "#0072b2", "#b8b8b8", "#d55e00", "#333333"
_BOUNDS = ("identity", "random", "oracle")


def save_plot(report: TaskReport, path: Path) -> Path:
    """Draw one task's report into an image file, and return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.6 + 0.36 * max(len(report.methods), 8)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    scale = 100 if report.about["percent"] else 1
    _draw_scores(left, report, scale)
    _draw_lengths(right, report, scale)
    seeds = {seed for method in report.methods for seed in method.seeds}
    figure.suptitle(
        f"{report.title}: {report.about['candidates']} candidates, judged by {report.about['judge']}; "
        f"{len(seeds)} seeds, 95% intervals over seeds and prompts",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    return path


def _color(method: MethodReport) -> str:
    if method.label.startswith("Control"):
        return _CONTROL
    if method.name.startswith("pfm"):
        return _FLOW
    return _BOUND if method.name in _BOUNDS else _BASELINE


def _draw_scores(axes: Any, report: TaskReport, scale: float) -> None:
    for place, method in enumerate(reversed(report.methods)):
        score = method.figures["score"]
        if score is not None:
            _interval(axes, score, place, _color(method), scale)
            text = f"{scale * score.value:.{1 if scale > 1 else 3}f}"
            axes.annotate(
                text, (scale * score.value, place), xytext=(0, 6), textcoords="offset points",
                ha="center", va="bottom", fontsize=8, color=_color(method) if _color(method) != _CONTROL else "#777777",
            )  # fmt: skip
    axes.set_yticks(range(len(report.methods)), [method.label for method in reversed(report.methods)])
    axes.set_ylim(-0.6, len(report.methods) - 0.3)
    axes.set_xlabel(f"{report.about['unit']}{', %' if scale > 1 else ''}")
    _tidy(axes)
    axes.tick_params(axis="y", length=0)


def _interval(axes: Any, estimate: Estimate, place: float, color: str, scale: float) -> None:
    axes.plot(
        [scale * estimate.low, scale * estimate.high], [place, place], color=color, linewidth=2, solid_capstyle="butt"
    )
    axes.plot(scale * estimate.value, place, "o", color=color, markersize=7, markeredgecolor="white")


def _draw_lengths(axes: Any, report: TaskReport, scale: float) -> None:
    points = []
    for method in report.methods:
        gain, ratio = method.figures["gain"], method.figures["length_ratio"]
        color = _color(method)
        # Only what could be put to use: the oracle and swapped labels would stretch the axes for all others.
        if gain is None or ratio is None or color == _CONTROL or method.name == "oracle":
            continue
        x, y = ratio.value, scale * gain.value
        axes.plot([x, x], [scale * gain.low, scale * gain.high], color=color, linewidth=1.2)
        axes.plot([ratio.low, ratio.high], [y, y], color=color, linewidth=1.2)
        axes.plot(x, y, "o", color=color, markersize=6, markeredgecolor="white")
        points.append((y, x, method.label, color))
    axes.axhline(0, color="#999999", linewidth=0.8, linestyle=":")
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    ticks = [tick for tick in (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20) if _inside(tick, axes.get_xlim())]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("length against the original's (geometric mean, log scale)")
    axes.set_ylabel(f"gain over a random candidate{', points' if scale > 1 else ''}")
    _tidy(axes)
    _label(axes, sorted(points))


def _inside(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _label(axes: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Write names at the right edge, far enough apart to read, each with a line to its point."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    space = (high - low) / 18
    places = np.array([y for y, *_ in points])
    for _ in range(200):  # neighbours push each other apart
        gaps = np.diff(places)
        push = np.maximum(space - gaps, 0) / 2
        if push.max(initial=0) < 1e-3 * space:
            break
        places[:-1] -= push
        places[1:] += push
    places += max(low - places[0], 0) if len(places) else 0
    line = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5), "shrinkB": 4}
    for (y, x, label, color), place in zip(points, places, strict=True):
        axes.annotate(
            label, (x, y), xytext=(1.03, (place - low) / (high - low)), textcoords="axes fraction",
            va="center", fontsize=8, color=color, annotation_clip=False,
            arrowprops=line | {"color": color},
        )  # fmt: skip


def _tidy(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
