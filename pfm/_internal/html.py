"""Parts of a page that needs no network, no script and no font: its frame, its style, and plots as inline SVG.

Texts of prompts, models and users are data: whatever is written here passes through ``escape``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import ceil, floor, log10

from pfm.statistics import Estimate

__all__ = [
    "LABELS_END",
    "PLOT_WIDTH",
    "ROW",
    "STYLE",
    "Axis",
    "clipped",
    "common_decimals",
    "document",
    "dot",
    "figure",
    "forest",
    "horizontal_axis",
    "label_at",
    "line",
    "svg",
]


def document(title: str, parts: Sequence[str]) -> str:
    """Write a whole page of parts that are HTML already; it needs no network, no script and no font."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{"".join(parts)}
</main>
</body>
</html>
"""


def common_decimals(estimates: Iterable[Estimate]) -> int:
    """Return the decimals that suit estimates shown below each other: those of the least certain."""
    return min((e.decimals for e in estimates if e.high > e.low), default=1)


def figure(title: str, note: str, plot: str) -> str:
    """Frame a plot, which is SVG already, with a title and a note."""
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption>{plot}</figure>"


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


def svg(width: int, height: int, description: str, body: str, data: str) -> str:
    """Wrap SVG elements in a picture that is described in words; ``data`` says its figures."""
    name = "".join(letter if letter.isalnum() else "-" for letter in description)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}t {name}d">'
        f'<title id="{name}t">{escape(description)}</title><desc id="{name}d">{escape(data)}</desc>{body}</svg>'
    )


def label_at(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """Write a text at a place."""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Draw a line of a class."""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{kind}"/>'


def dot(x: float, y: float, radius: float, kind: str, tip: str) -> str:
    """Draw a dot of a class, with a text that shows on pointing at it."""
    return f'<circle cx="{x}" cy="{y}" r="{radius:.1f}" class="dot {kind}"><title>{escape(tip)}</title></circle>'


def horizontal_axis(axis: Axis, top: float, bottom: float, percent: bool) -> str:
    """Draw the ticks of a horizontal axis, with their grid."""
    return "".join(
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
) -> str:
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
    return svg(PLOT_WIDTH, int(bottom + 26), description, "".join(body), data)


def clipped(label: str, length: int = 23) -> str:
    """Cut a label to a length."""
    return label if len(label) <= length else f"{label[: length - 1].rstrip()}…"


STYLE = """
:root {
  --paper: #f6f5f2; --card: #ffffff; --ink: #1c2126; --muted: #5a636d; --rule: #dcdfe2; --grid: #e9ebed;
  --tested: #0a66b0; --other: #77808a; --bound: #9aa1a8; --bad: #b4480a; --mixed: #7b4ea3; --calm: #56606a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131619; --card: #1b1f23; --ink: #e7eaed; --muted: #a0a9b2; --rule: #343a41; --grid: #282e34;
    --tested: #62b3f2; --other: #98a2ac; --bound: #727c86; --bad: #f2964f; --mixed: #bf9ae6; --calm: #8d98a3;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1, h2, h3, h4, p, dl, dd, figure, ul { margin: 0; }
h1 { font-size: clamp(1.7rem, 1.1rem + 2.4vw, 2.6rem); line-height: 1.15; letter-spacing: -0.02em; }
h2 { font-size: 1.3rem; line-height: 1.3; letter-spacing: -0.01em; }
section, footer { margin-top: 52px; }
small { font-size: .78rem; color: var(--muted); font-weight: 400; }
.lead { color: var(--muted); max-width: 76ch; margin-top: 6px; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.verdict {
  --tone: var(--calm); padding: 26px 30px 28px; border: 1px solid var(--rule); border-radius: 10px;
  border-left: 8px solid var(--tone); background: var(--card);
  background: color-mix(in srgb, var(--tone) 8%, var(--card));
}
.verdict.helps { --tone: var(--tested); } .verdict.hurts { --tone: var(--bad); }
.verdict.mixed { --tone: var(--mixed); }
.verdict h1 { color: var(--tone); margin: 4px 0 14px; }
.verdict h1 span { font-size: .68em; vertical-align: .12em; margin-right: .15em; }
.verdict p { max-width: 74ch; font-size: 1.06rem; } .verdict p + p { margin-top: 6px; }
.verdict .over { font-size: .85rem; color: var(--muted); }
.warnings {
  margin-top: 14px; border: 1px solid var(--bad); border-radius: 10px; padding: 10px 16px; font-size: .95rem;
}
.warnings ul { padding-left: 1.1em; } .warnings li::marker { content: "! "; color: var(--bad); font-weight: 700; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 14px; margin-top: 14px; }
.tiles div {
  display: flex; flex-direction: column; justify-content: space-between; padding: 14px 18px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
}
.tiles dt { font-size: .85rem; color: var(--muted); }
.tiles dd { font-size: 1.65rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles small, td small { display: block; white-space: nowrap; }
.plots {
  display: grid; gap: 18px; margin-top: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
}
figure, .scroll, .example {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px 18px; min-width: 0;
}
figcaption { font-size: .9rem; color: var(--muted); margin-bottom: 10px; }
figcaption b { display: block; color: var(--ink); font-size: 1rem; }
svg { display: block; overflow: visible; width: 100%; height: auto; max-width: 640px; margin: 0 auto; }
svg text { font-size: 14px; fill: var(--ink); }
svg text.tick { font-size: 12.5px; fill: var(--muted); }
svg text.value { font-variant-numeric: tabular-nums; }
svg text.label.tested, svg text.value.tested { font-weight: 650; fill: var(--tested); }
svg text.bound { fill: var(--muted); }
.grid { stroke: var(--grid); } .reference { stroke: var(--ink); stroke-dasharray: 4 4; opacity: .55; }
.bar { stroke: var(--other); stroke-width: 3; stroke-linecap: round; opacity: .6; }
.bar.tested, .bar.group { stroke: var(--tested); }
.link { stroke: var(--ink); stroke-width: 1; }
.dot { fill: var(--other); stroke: var(--card); stroke-width: 1.5; } .dot.tested, .dot.group { fill: var(--tested); }
.bar.bound { stroke: var(--bound); } .dot.bound { fill: var(--card); stroke: var(--bound); stroke-width: 2; }
.dot.open { fill: var(--card); stroke: var(--other); stroke-width: 2; }
.dot.open.tested { stroke: var(--tested); }
.scroll { overflow-x: auto; margin-top: 18px; padding: 4px 0; } .plots .scroll { margin-top: 0; }
.plots th, .plots td { padding-inline: 10px; }
table {
  border-collapse: separate; border-spacing: 0; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums;
}
th, td { padding: 9px 14px; text-align: right; vertical-align: top; border-top: 1px solid var(--grid); }
thead th { border-top: 0; font-size: .85rem; font-weight: 600; line-height: 1.3; vertical-align: bottom; }
thead small { display: block; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody th { font-weight: 500; min-width: 168px; } .plots tbody th { min-width: 90px; }
tr.tested th { box-shadow: inset 4px 0 var(--tested); } tr.tested th, tr.tested td { font-weight: 650; }
.example { margin-top: 16px; }
.example header { display: flex; gap: 16px; justify-content: space-between; align-items: flex-start; }
h3 { font-size: 1rem; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
h3, .text { max-height: 20rem; overflow: auto; }
h4 { font-size: .85rem; font-weight: 600; }
.chip { flex: none; font-size: .82rem; font-weight: 600; border: 1px solid; border-radius: 99px; padding: 1px 11px; }
.better { color: var(--tested); } .worse { color: var(--bad); } .equal { color: var(--calm); }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 14px 26px; margin-top: 12px; }
.sides > div { min-width: 0; border-top: 3px solid var(--rule); padding-top: 8px; }
.sides > div + div { border-color: var(--tested); }
.figures { font-size: .82rem; color: var(--muted); font-variant-numeric: tabular-nums; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 6px; }
footer { border-top: 1px solid var(--rule); padding-top: 26px; font-size: .93rem; }
footer h3 { margin-top: 18px; } footer ul { padding-left: 1.2em; color: var(--muted); margin-top: 10px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 8px 28px; margin-top: 12px; }
.facts dt { color: var(--muted); font-size: .85rem; } .facts dd { overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 14px 12px 40px; } .verdict { padding: 18px 18px 20px; } section, footer { margin-top: 36px; }
  .sides { grid-template-columns: 1fr; } figure { padding: 14px 10px; } .facts { grid-template-columns: 1fr; }
  svg text { font-size: 15px; } svg text.tick { font-size: 14px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; } .tiles div { padding: 10px 14px; }
}
@media print {
  :root {
    --paper: #fff; --card: #fff; --ink: #000; --muted: #444; --rule: #bbb; --grid: #ddd; --tested: #0a66b0;
    --other: #666; --bound: #999; --bad: #b4480a; --mixed: #7b4ea3; --calm: #444;
  }
  body { font-size: 11pt; } main { max-width: none; padding: 0; }
  figure, .example, .tiles div, tr { break-inside: avoid; } h2 { break-after: avoid; }
  h3, .text { max-height: none; overflow: visible; } .scroll { overflow: visible; }
  .tiles { grid-template-columns: repeat(5, 1fr); gap: 6px; } .tiles div { padding: 8px 10px; }
  .plots { grid-template-columns: 1fr 1fr; } tbody th { min-width: 0; } th, td { padding: 4px 5px; }
  table, thead th { font-size: 8pt; } td small, th small { font-size: 6.5pt; }
}
"""
