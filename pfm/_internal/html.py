"""Pages that need no network, no script and no font: their templates, and plots as inline SVG.

Texts of prompts, models and users are data: templates and :class:`markupsafe.Markup` escape whatever is filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from math import ceil, floor, log10
from typing import Any

from markupsafe import Markup

from pfm.statistics import Estimate

__all__ = [
    "LABELS_END",
    "PLOT_WIDTH",
    "ROW",
    "Axis",
    "clipped",
    "common_decimals",
    "dot",
    "forest",
    "horizontal_axis",
    "label_at",
    "line",
    "render",
    "svg",
]


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("pfm", ""),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """Write a whole page by a template, named by its path within the package; values are escaped where they stand."""
    return _environment().get_template(template).render(**values)


def common_decimals(estimates: Iterable[Estimate]) -> int:
    """Return the decimals that suit estimates shown below each other: those of the least certain."""
    return min((e.decimals for e in estimates if e.high > e.low), default=1)


class Axis:
    """A linear scale from data to pixels with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, limits: tuple[float, float] | None = None):
        low, high = min(values), max(values)
        span = high - low or abs(high) or 1.0
        low, high = low - 0.04 * span, high + 0.04 * span
        if limits:
            low, high = max(limits[0], low), min(limits[1], high)
        step = 10 ** floor(log10((high - low) / 4))
        step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * step) <= 7)
        self.low, self.high, self.start, self.end = low, high, start, end
        self.ticks = [k * step for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]
        self.decimals = max(0, next(d for d in range(12) if abs(round(step, d) - step) < 1e-9 * step))

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def label(self, tick: float, percent: bool) -> str:
        written = f"{100 * tick:.{max(0, self.decimals - 2)}f}%" if percent else f"{tick + 0.0:.{self.decimals}f}"
        return written.replace("-", "−")


def svg(width: int, height: int, description: str, body: Markup, data: str) -> Markup:
    """Wrap SVG elements in a picture that is described in words; ``data`` says its figures."""
    name = "".join(letter if letter.isalnum() else "-" for letter in description)
    return Markup(
        '<svg viewBox="0 0 {0} {1}" role="img" aria-labelledby="{2}t {2}d">'
        '<title id="{2}t">{3}</title><desc id="{2}d">{4}</desc>{5}</svg>'
    ).format(width, height, name, description, data, body)


def label_at(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> Markup:
    """Write a text at a place."""
    return Markup('<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>').format(x, y, kind, anchor, text)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """Draw a line of a class."""
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(x1, y1, x2, y2, kind)


def dot(x: float, y: float, radius: float, kind: str, tip: str) -> Markup:
    """Draw a dot of a class, with a text that shows on pointing at it."""
    circle = '<circle cx="{}" cy="{}" r="{:.1f}" class="dot {}"><title>{}</title></circle>'
    return Markup(circle).format(x, y, radius, kind, tip)


def horizontal_axis(axis: Axis, top: float, bottom: float, percent: bool) -> Markup:
    """Draw the ticks of a horizontal axis, with their grid."""
    return Markup().join(
        line(axis(tick), top, axis(tick), bottom, "grid")
        + label_at(axis(tick), bottom + 18, axis.label(tick, percent), "tick", "middle")
        for tick in axis.ticks
    )


LABELS_END, PLOT_WIDTH, ROW = 182, 540, 32


def forest(
    rows: Sequence[tuple[str, Estimate, str]],
    description: str,
    reference: float,
    reference_label: str,
    percent: bool = False,
) -> Markup:
    """Draw estimates with intervals, one row each: (label, estimate, class)."""
    values = [v for _, e, _ in rows for v in (e.low, e.high)] + [reference]
    axis = Axis(values, LABELS_END + 8, PLOT_WIDTH - 66, (0, 1) if percent else None)
    decimals = None if percent else common_decimals(e for _, e, _ in rows)
    top, bottom = 22, 26 + ROW * len(rows)
    body = [horizontal_axis(axis, top, bottom, percent)]
    body.append(line(axis(reference), top, axis(reference), bottom, "reference"))
    body.append(label_at(axis(reference), top - 7, reference_label, "tick", "middle"))
    for index, (label, e, kind) in enumerate(rows):
        y, (value, interval) = top + ROW * (index + 0.5) + 2, e.parts(percent=percent, decimals=decimals)
        body.append(label_at(LABELS_END, y + 5, clipped(label), f"label {kind}", "end"))
        body.append(line(axis(e.low), y, axis(e.high), y, f"bar {kind}"))
        body.append(dot(axis(e.value), y, 6, kind, f"{label}: {value} {interval}"))
        body.append(label_at(PLOT_WIDTH, y + 5, value, f"value {kind}", "end"))
    data = "; ".join(f"{label}: {e.text(percent=percent)}" for label, e, _ in rows)
    return svg(PLOT_WIDTH, int(bottom + 26), description, Markup().join(body), data)


def clipped(label: str, length: int = 23) -> str:
    """Cut a label to a length."""
    return label if len(label) <= length else f"{label[: length - 1].rstrip()}…"
