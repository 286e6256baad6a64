"""Figures of methods on laws: where outputs come to lie, the field, the ways of single draws, and what is traded.

Each figure reads what runs have kept in ``draws.npz``, of every method the run with the lowest seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.laws.report import LawMethod, LawReport
from benchmarks.tasks.line import Line

__all__ = ["save_plots"]

_FLOW, _CONTROL, _BASELINE, _BOUND = "#0072b2", "#8c8c8c", "#d55e00", "#222222"
_BOUNDS = ("law_identity", "law_oracle")
# What is shown first where not every method has a place.
_FIRST = ("flow_reference", "flow_rejected", "flow_gated", "flow_ot", "flow_c2ot", "flow_across", "flow_shuffled",
          "flow_relabel", "flow_reapply", "flow_swapped")  # fmt: skip
_LINES = ("flow_reference", "flow_c2ot", "flow_across", "flow_rejected", "flow_ot", "flow_independent")
_PANELS, _COLUMNS, _ROWS = 10, 8, 3
_INK, _FAINT, _LIGHT = "#333333", "#b8b8b8", "#e6e6e6"

Arrays = dict[str, NDArray[Any]]


def save_plots(report: LawReport, folder: Path, name: str) -> list[Path]:
    """Draw one task's figures into image files ``<name>-<figure>.png``, and return their paths."""
    arrays = {method.name: _load(method) for method in report.methods}
    low, high = report.about["box"]
    line = next(iter(arrays.values()))["reference"].shape[-1] == 1
    figures: dict[str, Callable[[], Any]] = {
        "outputs": lambda: (_line_outputs if line else _outputs)(report, arrays, low, high),
        "tradeoff": lambda: _tradeoff(report),
    }
    if any("path" in found for found in arrays.values()):
        figures["field"] = lambda: (_line_field if line else _field)(report, arrays, low, high)
        figures["trajectories"] = lambda: (_line_paths if line else _paths)(report, arrays, low, high)
    paths = []
    for kind, draw in figures.items():
        paths.append(folder / f"{name}-{kind}.png")
        draw().savefig(paths[-1], dpi=130)
    return paths


def _load(method: LawMethod) -> Arrays:
    run = min(method.runs, key=lambda run: run.seed)
    with np.load(run.arrays, allow_pickle=False) as found:
        return dict(found)


def _ordered(report: LawReport, first: Sequence[str], most: int, fits: Callable[[str], bool]) -> list[LawMethod]:
    """Choose methods: those of ``first`` in their order, then the rest in the report's."""
    by_name = {method.name: method for method in report.methods if fits(method.name)}
    names = [name for name in first if name in by_name] + [name for name in by_name if name not in first]
    return [by_name[name] for name in names[:most]]


def _color(method: LawMethod) -> str:
    if method.label.startswith("Control"):
        return _CONTROL
    if method.name.startswith("flow"):
        return _FLOW
    return _BOUND if method.name in _BOUNDS else _BASELINE


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)


def _says(method: LawMethod) -> str:
    """Say in a line how close a method comes."""
    off = 100 * method.value("off_support")
    return f"{method.value('sliced_wasserstein_ratio'):.2f} × floor, {off:.1f}% off support"


# -- where outputs come to lie --------------------------------------------------------------------------------------


def _outputs(report: LawReport, arrays: dict[str, Arrays], low: float, high: float) -> Any:
    groups = len(next(iter(arrays.values()))["reference"])
    shown = _ordered(report, _FIRST, _PANELS if groups == 1 else _COLUMNS - 2, lambda name: name not in _BOUNDS)
    some = arrays[(shown or report.methods)[0].name]
    contexts = some.get("context")
    if groups == 1:
        columns = min(6, 2 + len(shown))
        rows = -(-(2 + len(shown)) // columns)
        figure = _figure(2.15 * columns, 2.45 * rows + 0.4)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()[:, None]
    else:
        figure = _figure(1.75 * (2 + len(shown)), 1.75 * groups + 0.9)
        panels = figure.subplots(groups, 2 + len(shown), squeeze=False).T
    for number, panel in enumerate(panels):
        for group, axes in enumerate(panel):
            _square(axes, low, high)
            if number >= 2 + len(shown):
                axes.set_visible(False)
                continue
            if number < 2:
                _shade(axes, some["density"][number, group], low, high)
                _dots(axes, some[("reference", "exact")[number]][group], _INK)
                heading = ("Reference", "Exact target distribution")[number]
            else:
                method = shown[number - 2]
                found = arrays[method.name]
                _contours(axes, found["density"][1, group], low, high)
                _dots(axes, found["moved"][-1, group], _color(method))
                heading = f"{_wrapped(method.title)}\n{_says(method)}"
            if contexts is not None:
                _arrow(axes, contexts[group], high)
            if group == 0:
                axes.set_title(heading, fontsize=7, color=_INK)
    _title(figure, f"{report.task}: draws and densities" + ("; a row a context (arrow)" if groups > 1 else ""))
    return figure


def _line_outputs(report: LawReport, arrays: dict[str, Arrays], low: float, high: float) -> Any:
    shown = _ordered(report, _FIRST, _PANELS, lambda name: name not in _BOUNDS)
    columns = min(4, 2 + len(shown))
    rows = -(-(2 + len(shown)) // columns)
    figure = _figure(2.9 * columns, 1.9 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    bins = np.linspace(low - 0.1, high + 0.1, 49)
    some = arrays[(shown or report.methods)[0].name]
    for number, axes in enumerate(panels):
        if number >= 2 + len(shown):
            axes.set_visible(False)
            continue
        method = shown[number - 2] if number >= 2 else None
        found = some if method is None else arrays[method.name]
        draws = found[("reference", "exact")[number]][0] if method is None else found["moved"][-1, 0]
        axes.hist(draws[:, 0], bins, density=True, color=_FAINT if method is None else _color(method), alpha=0.6)
        density = found["density"][0 if number == 0 else 1, 0].astype(float)
        places = low + (high - low) * (np.arange(len(density)) + 0.5) / len(density)
        axes.plot(places, density, color=_INK, linewidth=1.3)
        heading = ("Reference", "Exact target distribution")[number] if method is None else method.title
        axes.set_title(heading + ("" if method is None else f"\n{_says(method)}"), fontsize=8, color=_INK)
        axes.set_yticks([])
        _tidy(axes, grid=False)
    _title(figure, f"{report.task}: histograms of draws, and the exact density of what each aims at")
    return figure


# -- the field ------------------------------------------------------------------------------------------------------


def _primary(report: LawReport, arrays: dict[str, Arrays]) -> LawMethod:
    return _ordered(report, _LINES, 1, lambda name: "path" in arrays[name])[0]


def _field(report: LawReport, arrays: dict[str, Arrays], low: float, high: float) -> Any:
    method = _primary(report, arrays)
    found = arrays[method.name]
    groups, contexts = found["states"].shape[1], found.get("context")
    figure = _figure(3.4 * 3, 3.4 * groups + 0.6)
    panels = figure.subplots(groups, 3, squeeze=False)
    places, longest = found["places"], np.quantile(np.linalg.norm(found["velocity"], axis=-1), 0.9)
    for group in range(groups):
        for moment, axes in enumerate(panels[group]):
            states, velocity = found["states"][moment, group], found["velocity"][moment, group]
            _square(axes, low, high)
            axes.plot(*states.T, ".", color=_FLOW, markersize=3.2, markeredgewidth=0, alpha=0.5, zorder=1)
            near = np.linalg.norm(places[:, None] - states[None], axis=2).min(1) < 0.7 * (high - low) / 16
            length = np.linalg.norm(velocity, axis=1, keepdims=True)
            cut = velocity * np.minimum(1, longest / np.maximum(length, 1e-9))
            for chosen, color in ((~near, _LIGHT), (near, _INK)):
                axes.quiver(
                    *places[chosen].T, *cut[chosen].T, color=color, angles="xy", width=0.004,
                    scale_units="xy", scale=0.8 * longest / ((high - low) / 17), pivot="tail", zorder=2,
                )  # fmt: skip
            if group == 0:
                axes.set_title(f"t = {('0', '½', '1')[moment]}", fontsize=9, color=_INK)
            if contexts is not None:
                _arrow(axes, contexts[group], high)
    _title(
        figure,
        f"{report.task}: the field of “{method.label}” and the distribution it has carried the reference to; "
        "light arrows lie off the draws",
    )
    return figure


def _line_field(report: LawReport, arrays: dict[str, Arrays], low: float, high: float) -> Any:
    law = Line()
    shown = _ordered(report, ("flow_reference", "flow_rejected"), 2, lambda name: "path" in arrays[name])
    figure = _figure(10.5, 2.7 * len(shown) + 0.5)
    panels = figure.subplots(len(shown), 3, squeeze=False, sharex=True, sharey="row")
    bins = np.linspace(low, high, 33)
    for row, method in zip(panels, shown, strict=True):
        found = arrays[method.name]
        for moment, axes in enumerate(row):
            count, edges = np.histogram(found["states"][moment, 0, :, 0], bins, density=True)
            places, velocity = found["places"][:, 0], found["velocity"][moment, 0, :, 0]
            axes.plot(places, velocity, color=_color(method), linewidth=2, label="learned field")
            exact = {"flow_reference": law.reference_velocity, "flow_rejected": law.rejected_velocity}.get(method.name)
            if exact is not None:
                fine = torch.linspace(0, 1, 401)
                axes.plot(fine, exact(moment / 2, fine), "--", color=_INK, linewidth=1.2, label="exact field")
            axes.stairs(count / 10, edges, fill=True, color=_LIGHT, zorder=0, label="density ÷ 10")
            axes.set_title(f"{method.label}, t = {('0', '½', '1')[moment]}", fontsize=8, color=_INK)
            axes.legend(fontsize=7, frameon=False)
            _tidy(axes)
        row[0].set_ylabel("v(t, y)")
    for axes in panels[-1]:
        axes.set_xlabel("y")
    _title(figure, f"{report.task}: the field at three times, over the density of what it has carried")
    return figure


# -- the ways of single draws ---------------------------------------------------------------------------------------


def _paths(report: LawReport, arrays: dict[str, Arrays], low: float, high: float) -> Any:
    groups = len(next(iter(arrays.values()))["reference"])
    shown = _ordered(report, _LINES, 4 if groups == 1 else _ROWS, lambda name: "path" in arrays[name])
    if groups == 1:
        figure = _figure(3.2 * len(shown), 3.7)
        panels = figure.subplots(1, len(shown), squeeze=False).T
    else:
        figure = _figure(3.0 * groups, 3.1 * len(shown) + 0.5)
        panels = figure.subplots(len(shown), groups, squeeze=False)
    for method, panel in zip(shown, panels, strict=True):
        found = arrays[method.name]
        for group, axes in enumerate(panel):
            _square(axes, low, high)
            _contours(axes, found["density"][1, group], low, high)
            drawn = _ways(axes, found["path"][:, group])
            if "context" in found:
                _arrow(axes, found["context"][group], high)
            if group == 0:
                axes.set_title(method.label, fontsize=9, color=_INK, loc="left")
    bar = figure.colorbar(drawn, ax=panels.ravel().tolist(), shrink=0.6, aspect=30, pad=0.01)
    bar.set_label("t", rotation=0)
    bar.outline.set_visible(False)
    _title(
        figure, f"{report.task}: from reference draws (grey) to outputs (dark), over contours of the exact distribution"
    )
    return figure


def _ways(axes: Any, path: NDArray[np.floating]) -> Any:
    """Draw ways (T, m, 2), coloured by time."""
    from matplotlib.collections import LineCollection

    pieces = np.stack([path[:-1], path[1:]], axis=2)  # (T - 1, m, 2, 2)
    times = np.repeat(np.arange(len(pieces)) / (len(pieces) - 1), path.shape[1])
    lines = LineCollection(list(pieces.reshape(-1, 2, 2)), array=times, cmap="viridis", linewidths=0.8, alpha=0.9)
    axes.add_collection(lines)
    axes.plot(*path[0].T, "o", color=_FAINT, markersize=2.2, markeredgewidth=0, zorder=3)
    axes.plot(*path[-1].T, "o", color=_INK, markersize=2.4, markeredgewidth=0, zorder=4)
    return lines


def _line_paths(report: LawReport, arrays: dict[str, Arrays], low: float, high: float) -> Any:
    shown = _ordered(report, _LINES, 3, lambda name: "path" in arrays[name])
    figure = _figure(4.4 * len(shown), 6.2)
    panels = figure.subplots(2, len(shown), squeeze=False)
    u = np.linspace(0, 1, 300)
    for method, (upper, lower) in zip(shown, panels.T, strict=True):
        path, times = arrays[method.name]["path"][:, 0, :, 0], arrays[method.name]["times"]
        order = np.argsort(path[0])[:: max(1, path.shape[1] // 60)]
        upper.plot(times, path[:, order], color=_color(method), linewidth=0.7, alpha=0.7)
        upper.set_xlabel("t")
        upper.set_ylabel("y")
        upper.set_title(method.label, fontsize=9, color=_INK)
        rejected = method.name in ("flow_rejected", "flow_gated")
        exact, text = (np.sqrt(1 - (1 - u) ** 2), "√(1 − (1 − u)²)") if rejected else (np.sqrt(u), "√u")
        lower.plot(u, u, ":", color=_FAINT, linewidth=1)
        lower.plot(u, exact, "--", color=_INK, linewidth=1.2, label=f"exact, {text}", zorder=3)
        lower.plot(path[0], path[-1], "o", color=_color(method), markersize=3, label="learned")
        lower.set_xlabel("reference draw u")
        lower.set_ylabel("output")
        lower.legend(fontsize=8, frameon=False)
        for axes in (upper, lower):
            _tidy(axes)
    _title(figure, f"{report.task}: ways of single draws, and the map that they make")
    return figure


# -- what is traded -------------------------------------------------------------------------------------------------


def _tradeoff(report: LawReport) -> Any:
    """Draw win rate against diversity against evaluations, and the distance to the target distribution."""
    methods = report.methods
    figure = _figure(12.5, max(4.2, 1.4 + 0.27 * len(methods)))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    exact = report.floor.get("diversity")
    scale = 1.0 if exact is None else exact.value
    points: list[tuple[float, float, str, str]] = []
    left.axhline(50, color=_FAINT, linewidth=0.8, linestyle=":")
    left.axvline(1, color=_FAINT, linewidth=0.8, linestyle=":")
    for number, method in enumerate(methods, 1):
        win, spread = method.figures["win"], method.figures["diversity"]
        if win is None or spread is None:
            continue
        color, x, y = _color(method), spread.value / scale, 100 * win.value
        left.plot([x, x], [100 * win.low, 100 * win.high], color=color, linewidth=1)
        left.plot([spread.low / scale, spread.high / scale], [y, y], color=color, linewidth=1)
        left.scatter(x, y, s=_area(method.value("evaluations")), color=color, alpha=0.75, edgecolor="white", zorder=3)
        points.append((x, y, str(number), color))
    left.set_xlabel("diversity, against that of exact draws of round 1")
    left.set_ylabel("wins against an independent reference draw, %")
    for evaluations in (1, 8, 64):
        left.scatter([], [], s=_area(evaluations), color=_FAINT, edgecolor="white", label=f"{evaluations}")
    left.scatter([], [], s=_area(float("nan")), color=_FAINT, edgecolor="white", label="no network")
    left.legend(title="evaluations", fontsize=8, title_fontsize=8, frameon=False, labelspacing=0.8, loc="best")
    _tidy(left)
    _number(left, points)
    for place, method in enumerate(reversed(methods)):
        ratio = method.figures["sliced_wasserstein_ratio"]
        if ratio is None:
            continue
        color = _color(method)
        right.plot([ratio.low, ratio.high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        right.plot(ratio.value, place, "o", color=color, markersize=6, markeredgecolor="white")
        right.annotate(
            f"{ratio.value:.2f}", (ratio.high, place), xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=8, color=color,
        )  # fmt: skip
    right.axvline(1, color=_INK, linewidth=0.8, linestyle=":")
    right.set_xscale("log")
    top = max(method.value("sliced_wasserstein_ratio") for method in methods)
    right.set_xlim(0.8, max(2.0, 1.5 * top))
    ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if tick <= 1.5 * top]
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    right.set_yticks(
        range(len(methods)), [f"{method.title}  {len(methods) - n}" for n, method in enumerate(reversed(methods))]
    )
    right.set_ylim(-0.6, len(methods) - 0.4)
    right.tick_params(axis="y", length=0, labelsize=8)
    right.set_xlabel("sliced Wasserstein to the target distribution ÷ floor (log scale)")
    _tidy(right)
    seeds = {seed for method in methods for seed in method.seeds}
    _title(figure, f"{report.task}: what is gained at which diversity and cost; {len(seeds)} seeds, 95% intervals")
    return figure


def _number(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names beside points, each on the side where points and names before it leave most room."""
    size = np.array([430.0, 290.0])  # of the panel, about, in points
    low, high = np.array([axes.get_xlim(), axes.get_ylim()]).T
    at = np.array([((x, y) - low) / (high - low) * size for x, y, *_ in points])
    angles = np.arange(8) * np.pi / 4 + np.pi / 4
    offsets = 11 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    taken = list(at)
    for place, (x, y, text, color) in zip(at, points, strict=True):
        others = np.array([other for other in taken if other is not place])
        room = np.linalg.norm(place + offsets[:, None] - others, axis=2).min(1) if len(others) else np.ones(8)
        best = offsets[int(np.argmax(np.minimum(room, 14)))]
        taken.append(place + best)
        axes.annotate(
            text, (x, y), xytext=tuple(best), textcoords="offset points", ha="center", va="center",
            fontsize=8, color=color, zorder=4,
        )  # fmt: skip


def _area(evaluations: float) -> float:
    return 18.0 if np.isnan(evaluations) else 30 + 28 * np.log2(1 + evaluations)


# -- shared ---------------------------------------------------------------------------------------------------------


def _square(axes: Any, low: float, high: float) -> None:
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_LIGHT)


def _cells(density: NDArray[np.floating]) -> NDArray[np.float64]:
    side = round(len(density) ** 0.5)
    return density.reshape(side, side).T.astype(np.float64)  # the second coordinate upwards


def _shade(axes: Any, density: NDArray[np.floating], low: float, high: float) -> None:
    axes.imshow(_cells(density), extent=(low, high, low, high), origin="lower", cmap="Blues", interpolation="bilinear")


def _contours(axes: Any, density: NDArray[np.floating], low: float, high: float) -> None:
    cells = _cells(density)
    middles = low + (high - low) * (np.arange(len(cells)) + 0.5) / len(cells)
    levels = cells.max() * np.array([0.05, 0.5])
    axes.contour(middles, middles, cells, levels=levels, colors=_FAINT, linewidths=0.6, zorder=1)


def _dots(axes: Any, draws: NDArray[np.floating], color: str) -> None:
    axes.plot(*draws.T, ".", color=color, markersize=1.6, markeredgewidth=0, alpha=0.45, zorder=2)


def _arrow(axes: Any, context: NDArray[np.floating], high: float) -> None:
    tip = 0.36 * high * context / np.linalg.norm(context)
    axes.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "-|>", "color": "#cc3311", "linewidth": 1.4})


def _wrapped(text: str) -> str:
    from textwrap import fill

    return fill(text, 28)


def _tidy(axes: Any, *, grid: bool = True) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    if grid:
        axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
