"""One figure a task: are predictions as sure as they should be, and how much better are they than Bradley–Terry's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.preference.report import MethodReport, TaskReport
from pfm.statistics import Estimate

__all__ = ["save_plot"]

_COLOURS = {
    "bradley_terry": "#d55e00",
    "bradley_terry_tuned": "#e69f00",
    "bradley_terry_mlp": "#cc79a7",
    "gpm": "#56b4e9",
    "hybrid": "#009e73",
    "ensemble": "#0072b2",
}
_OTHER = "#b8b8b8"


def save_plot(report: TaskReport, path: Path) -> Path:
    """Draw one task's report into an image file, and return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.6 + 0.36 * max(len(report.methods), 8)), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.1))
    _draw_reliability(left, report)
    forests = (
        (middle, "accuracy", "accuracy, %", 100, "accuracy_gain"),
        (right, "log_loss", "log-loss, nats", 1, "loss_gain"),
    )
    for axes, name, label, scale, gain in forests:
        _draw_figures(axes, report, name, label, scale, gain)
    right.set_yticks(range(len(report.methods)), [""] * len(report.methods))
    about = report.about
    figure.suptitle(
        f"{report.title}: {about['pairs']:,} held-out comparisons of {about['prompts']} prompts, judged by "
        f"{about['judge']}; 95% intervals over prompts",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    return path


def _colour(method: MethodReport) -> str:
    return _COLOURS.get(method.name, _OTHER)


def _draw_reliability(axes: Any, report: TaskReport) -> None:
    axes.plot([0.5, 1], [0.5, 1], color="#999999", linewidth=0.8, linestyle=":")
    for method in report.methods:
        bins = method.reliability.bins
        if method.name not in _COLOURS or len(bins) < 2:  # controls, and what predicts one half always
            continue
        x, y = [each.x for each in bins], [each.outcome.value for each in bins]
        axes.plot(x, y, "o-", color=_colour(method), markersize=4, linewidth=1.4, label=method.label)
        for each in bins:
            axes.plot([each.x, each.x], [each.outcome.low, each.outcome.high], color=_colour(method), alpha=0.35)
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(min(0.38, axes.get_ylim()[0]), 1.02)
    axes.set_xlabel("predicted probability of the likelier output")
    axes.set_ylabel("share that preferred it")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    _tidy(axes)


def _draw_figures(axes: Any, report: TaskReport, name: str, label: str, scale: float, gain: str) -> None:
    """Draw each method's figure; beside it its gain over Bradley–Terry, with a star if the interval excludes 0."""
    for place, method in enumerate(reversed(report.methods)):
        estimate = method.figures[name]
        if estimate is None:
            continue
        axes.plot([scale * estimate.low, scale * estimate.high], [place, place], color=_colour(method), linewidth=2)
        axes.plot(scale * estimate.value, place, "o", color=_colour(method), markersize=7, markeredgecolor="white")
        axes.annotate(
            _said(estimate, getattr(method, gain).get("bradley_terry"), scale), (scale * estimate.value, place),
            xytext=(0, 6), textcoords="offset points", ha="center", va="bottom", fontsize=8, color="#444444",
        )  # fmt: skip
    axes.set_yticks(range(len(report.methods)), [method.label for method in reversed(report.methods)])
    axes.set_ylim(-0.6, len(report.methods) - 0.2)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{label} (gain over Bradley–Terry)")
    _tidy(axes)


def _said(estimate: Estimate, gain: Estimate | None, scale: float) -> str:
    decimals = 1 if scale > 1 else 3
    text = f"{scale * estimate.value:.{decimals}f}"
    if gain is None:
        return text
    sure = "*" if gain.low > 0 or gain.high < 0 else ""
    return f"{text} ({scale * gain.value:+.{decimals}f}{sure})".replace("-", "−")


def _tidy(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
