"""Draw a report card: for the terminal with rich, and as one self-contained HTML page.

The page needs no network, no script and no font; its plots are inline SVG. Texts of prompts, models and users are
data: all of them pass through ``escape`` or ``rich.text.Text``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10, sqrt
from typing import TYPE_CHECKING, Any

from pfm.statistics import Bin, Estimate

if TYPE_CHECKING:
    from pfm.evaluation import Calibration, Example, GroupRow, MethodRow, Report

SIGNS = {"helps": "▲", "hurts": "▼", "mixed": "◆", "no evidence": "●"}  # colour must not be the only sign


@dataclass(frozen=True)
class _Column:
    """A column of the table of methods."""

    head: str
    note: str
    value: Callable[[MethodRow], Estimate | None]
    percent: bool = True
    signed: bool = False
    wide: bool = False  # shown where there is room


COLUMNS = [
    _Column("Wins vs original", "ties half", lambda row: row.win),
    _Column("At equal length", "wins vs original", lambda row: row.win_controlled),
    _Column("Wins vs fresh draw", "no method’s pick", lambda row: row.win_independent, wide=True),
    _Column("Judge score", "mean", lambda row: row.score, percent=False),
    _Column("Tested ahead by", "mean score, paired", lambda row: row.difference, percent=False, signed=True),
    _Column("Of oracle’s gain", "in mean score", lambda row: row.oracle_share, wide=True),
    _Column("Changed", "share of outputs", lambda row: row.changed, wide=True),
    _Column("Length ratio", "to the original", lambda row: row.length_ratio, percent=False, wide=True),
]
WIDE = 150  # characters that the whole table of methods needs
GROUP_HEADS = ("Prompts", "Wins vs original", "Gain in score", "Pairs b orders right")


def _tested(report: Report) -> MethodRow:
    return report.row(report.settings["method"])


def _budget(report: Report) -> str:
    """Write how many candidates a prompt every method chose from."""
    sizes = report.settings["candidates"]
    if sizes["min"] == sizes["max"]:
        return f"{sizes['max']} candidates a prompt"
    return f"{sizes['min']} to {sizes['max']} candidates a prompt, {sizes['mean']:.1f} on average"


def _cell(report: Report, row: MethodRow, column: _Column) -> tuple[str, str]:
    """Return (value, interval) of a cell, every cell of a column to the same number of decimals."""
    estimate = column.value(row)
    if estimate is None or (column.signed and row is _tested(report)):
        return "–", ""
    decimals = None if column.percent else _decimals(filter(None, map(column.value, report.rows)))
    return estimate.parts(percent=column.percent, signed=column.signed, decimals=decimals)


def _decimals(estimates: Iterable[Estimate]) -> int:
    """Return the decimals that suit estimates shown below each other: those of the least certain."""
    return min((e.decimals for e in estimates if e.high > e.low), default=1)


# ---------------------------------------------------------------------------------------------------- terminal


def terminal(report: Report, width: int) -> Iterator[Any]:
    """Yield rich renderables for a console of the given width in characters."""
    from rich.box import ROUNDED, SIMPLE_HEAD
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    colour = {"helps": "bright_blue", "hurts": "dark_orange", "mixed": "magenta"}.get(report.verdict.outcome, "white")
    yield Panel(
        Text("\n".join(report.verdict.sentences)),
        title=Text(f"{SIGNS[report.verdict.outcome]} {report.verdict.headline}", style=f"bold {colour}"),
        title_align="left",
        border_style=colour,
        box=ROUNDED,
        padding=(1, 2),
    )
    for warning in report.verdict.warnings:
        yield Text(f"! {warning}", style="yellow")
    yield Text()

    columns = [column for column in COLUMNS if width >= WIDE or not column.wide]
    title = f"All methods at the same {_budget(report)}"
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left")
    table.add_column("Method", min_width=13)
    for column in columns:
        table.add_column("\n".join(column.head.rsplit(" ", 1)), justify="right", no_wrap=True)
    for row in report.rows:
        style = "bold" if row is _tested(report) else ""
        cells = [_cell(report, row, column) for column in columns]
        table.add_row(
            Text(row.label, style=style),
            *(_two_lines(cell, style) for cell in cells),
        )
    yield table

    if report.groups:
        yield _groups_table(report.groups)
    if report.calibration:
        yield Text(f"\n{report.calibration.sentence}")
    yield Text("\n".join(["", *_footnotes(report)]), style="dim")


def _groups_table(groups: Sequence[GroupRow]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    decimals = _decimals(group.gain for group in groups)
    title = "\nBy group of prompts"
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left")
    table.add_column("Group")
    for head in GROUP_HEADS:
        table.add_column("\n".join(head.rsplit(" ", 1)), justify="right", no_wrap=True)
    for group in groups:
        table.add_row(
            Text(group.name),
            str(group.prompts),
            _two_lines(group.win.parts(percent=True)),
            _two_lines(group.gain.parts(signed=True, decimals=decimals)),
            _two_lines(group.accuracy.parts(percent=True) if group.accuracy else ("–", "")),
        )
    return table


def _two_lines(cell: tuple[str, str], style: str = "") -> Any:
    from rich.text import Text

    return Text.assemble((cell[0], style), "\n", (cell[1], "dim"))


def _footnotes(report: Report) -> list[str]:
    settings = report.settings
    notes = [
        f"{settings['prompts']} prompts, {_budget(report)}; judge: {settings.get('judge', 'not named')}; "
        f"95% intervals from {settings['resamples']} resamples of the prompts, seed {settings['seed']}."
    ]
    notes += [f"Left out. {reason}." for reason in settings.get("left_out", [])]
    notes += [
        f"Prompt {failure.prompt}: {failure.error}"
        + (" (evaluated on what it gave)" if failure.evaluated else " (not evaluated)")
        for failure in report.failures[:5]
    ]
    if len(report.failures) > 5:
        notes.append(f"… and {len(report.failures) - 5} more errors, in the JSON report.")
    return notes


# --------------------------------------------------------------------------------------------------------- page


def page(report: Report, examples: int = 5) -> str:
    """Write the report as one HTML page with up to ``examples`` before/after examples."""
    title = f"{report.verdict.headline} · Report card"
    parts = [
        _banner(report),
        _tiles(report),
        _methods(report),
        _length(report),
        _believed(report.calibration) if report.calibration else "",
        _groups(report) if report.groups else "",
        _examples(report, examples),
        _measured(report),
    ]
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


def _banner(report: Report) -> str:
    verdict = report.verdict
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict.sentences)
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in verdict.warnings)
    return f"""
<header class="verdict {escape(verdict.outcome.replace(" ", "-"))}">
<p class="over">Report card · {escape(_tested(report).label)}</p>
<h1><span aria-hidden="true">{SIGNS[verdict.outcome]}</span> {escape(report.verdict.headline)}</h1>
{sentences}
</header>
{f'<aside class="warnings" aria-label="Warnings"><ul>{warnings}</ul></aside>' if warnings else ""}"""


def _tiles(report: Report) -> str:
    tested, rows = _tested(report), {row.name: row for row in report.rows}
    figures = [
        ("Wins vs original", tested.win, True, False),
        ("Wins at equal length", tested.win_controlled, True, False),
        ("Gain in judge score", rows["identity"].difference, False, True),
        ("Of the oracle’s gain", tested.oracle_share, True, False),
        ("Outputs changed", tested.changed, True, False),
    ]
    tiles = []
    for label, estimate, percent, signed in figures:
        value, interval = estimate.parts(percent=percent, signed=signed) if estimate else ("–", "not defined here")
        tiles.append(f"<div><dt>{label}</dt><dd>{value}<small>{interval}</small></dd></div>")
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _methods(report: Report) -> str:
    tested = _tested(report)
    kinds = {tested.name: "tested", "oracle": "bound"}
    wins = [(row.label, row.win, kinds.get(row.name, "")) for row in report.rows]
    scores = [(row.label, row.score, kinds.get(row.name, "")) for row in report.rows]
    original = report.row("identity").score.value
    heads = "".join(f'<th scope="col">{column.head}<small>{column.note}</small></th>' for column in COLUMNS)
    body = []
    for row in report.rows:
        cells = "".join("<td>{}<small>{}</small></td>".format(*_cell(report, row, column)) for column in COLUMNS)
        kind = ' class="tested"' if row is tested else ""
        body.append(f'<tr{kind}><th scope="row">{escape(row.label)}</th>{cells}</tr>')
    return f"""
<section>
<h2>Every method, choosing from the same {escape(_budget(report))}</h2>
<p class="lead">Dots are estimates, bars 95% intervals over prompts. The oracle picks by the judge itself: no method can
pass it.</p>
<div class="plots">
{
        _figure(
            "Win rate against the original",
            "Right of the line: better than the original more often than worse.",
            _forest(wins, "Win rate of each method against the original, with intervals", 0.5, "even", percent=True),
        )
    }
{
        _figure(
            "Mean judge score",
            "The line is the original’s score.",
            _forest(scores, "Mean judge score of each method, with intervals", original, "original"),
        )
    }
</div>
<div class="scroll" tabindex="0" role="region" aria-label="All figures by method">
<table>
<caption class="hidden">All figures by method, with 95% intervals</caption>
<thead><tr><th scope="col">Method</th>{heads}</tr></thead>
<tbody>{"".join(body)}</tbody>
</table>
</div>
</section>"""


def _length(report: Report) -> str:
    tested = _tested(report)
    kinds = {tested.name: "tested", "oracle": "bound"}
    rows = [
        (row.label, row.win, row.win_controlled, kinds.get(row.name, ""))
        for row in report.rows
        if row.name != "identity" and row.win_controlled is not None
    ]
    if not rows:
        return ""
    ratios = [(row.label, row.length_ratio, kinds.get(row.name, "")) for row in report.rows if row.name != "identity"]
    return f"""
<section>
<h2>Is it only length?</h2>
<p class="lead">Judges often favour longer answers. A gain that is gone between outputs of equal length is a gain in
length alone.</p>
<div class="plots">
{
        _figure(
            "Win rate against the original, at equal length",
            "Ring: as measured. Dot and bar: at equal length.",
            _dumbbells(rows),
        )
    }
{
        _figure(
            "Length of the pick",
            "Mean ratio to the length of the original, in characters.",
            _forest(ratios, "Mean length of the picks relative to the original", 1.0, "same"),
        )
    }
</div>
</section>"""


def _believed(calibration: Calibration) -> str:
    accuracy = ""
    if calibration.accuracy:
        accuracy = (
            f" Of two candidates of one prompt that the judge scores differently, b orders "
            f"{calibration.accuracy.text(percent=True)} right (a coin: 50%)."
        )
    figures = [
        _figure(
            "Predicted and observed win probability",
            "On the diagonal b is right. A dot’s size is its number of candidates.",
            _reliability(calibration.reliability.bins),
        )
    ]
    if calibration.gaps:
        figures.append(
            _figure(
                "What a rise in b is worth",
                "All candidates beside the original, by how much higher their b is.",
                _gaps(calibration.gaps),
            )
        )
    return f"""
<section>
<h2>Can the win probabilities be believed?</h2>
<p class="lead">{escape(calibration.sentence)}{escape(accuracy)}</p>
<div class="plots">{"".join(figures)}</div>
</section>"""


def _groups(report: Report) -> str:
    rows = [(f"{_clipped(g.name, 16)} ({g.prompts})", g.win, "group") for g in report.groups]
    rows.append(("All prompts", _tested(report).win, ""))
    decimals = _decimals(group.gain for group in report.groups)
    body = "".join(
        f'<tr><th scope="row">{escape(g.name)}</th><td>{g.prompts}</td>'
        + "".join(
            "<td>{}<small>{}</small></td>".format(*parts)
            for parts in (
                g.win.parts(percent=True),
                g.gain.parts(signed=True, decimals=decimals),
                g.accuracy.parts(percent=True) if g.accuracy else ("–", ""),
            )
        )
        + "</tr>"
        for g in report.groups
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in GROUP_HEADS)
    plot = _forest(rows, "Win rate against the original in each group of prompts", 0.5, "even", percent=True)
    return f"""
<section>
<h2>By group of prompts</h2>
<div class="plots">
{_figure("Win rate against the original", "With the number of prompts. Few prompts make wide bars.", plot)}
<div class="scroll" tabindex="0" role="region" aria-label="Figures by group"><table>
<thead><tr><th scope="col">Group</th>{heads}</tr></thead><tbody>{body}</tbody>
</table></div>
</div>
</section>"""


def _examples(report: Report, number: int) -> str:
    losses = [example for example in report.examples if example.kind != "random"][:number]
    shown = [example for example in report.examples if example.kind == "random"][: number - len(losses)] + losses
    if not shown:
        return ""
    drawn = "Drawn at random from the changed outputs" + (", and the largest loss of all." if losses else ".")
    return f"""
<section>
<h2>Before and after</h2>
<p class="lead">{drawn}</p>
{"".join(_example(example) for example in shown)}
</section>"""


def _example(example: Example) -> str:
    gain = example.refined_score - example.original_score
    kind, sign = ("better", "▲") if gain > 0 else ("worse", "▼") if gain < 0 else ("equal", "●")
    label = "" if example.kind == "random" else f"{example.kind} · "
    sides = [
        ("Original", example.original, example.original_score, example.original_probability),
        ("Refined", example.refined, example.refined_score, example.refined_probability),
    ]
    columns = "".join(
        f'<div><h4>{name}</h4><p class="figures">judge {_number(score)}'
        + (f" · b {b:.2f}" if b is not None else "")
        + f'</p><div class="text" tabindex="0" role="region" aria-label="{name} text">{escape(text)}</div></div>'
        for name, text, score, b in sides
    )
    return f"""
<article class="example">
<header><h3>{escape(example.prompt)}</h3>
<span class="chip {kind}">{escape(label)}<span aria-hidden="true">{sign}</span> {kind}</span></header>
<div class="sides">{columns}</div>
</article>"""


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _measured(report: Report) -> str:
    settings, verdict = report.settings, report.verdict
    lost = sum(not failure.evaluated for failure in report.failures)
    known = ("method", "prompts", "candidates", "independent_draws", "resamples", "seed", "judge", "left_out")
    facts = [
        ("Judge", settings.get("judge", "not named")),
        ("Prompts", f"{settings['prompts']} evaluated, {lost} failed"),
        ("Budget", f"{_budget(report)}, the same for every method"),
        ("Fresh draws", f"{settings['independent_draws']} of {settings['prompts']} prompts"),
        (
            "Against the original",
            f"{verdict.wins} better, {verdict.losses} worse, {verdict.ties} equal; "
            f"exact sign test p = {verdict.p_value:.2g}",
        ),
        ("Intervals", f"95%, percentile bootstrap, {settings['resamples']} resamples, seed {settings['seed']}"),
        *((key.replace("_", " ").capitalize(), value) for key, value in settings.items() if key not in known),
    ]
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts)
    notes = [
        "Prompts are resampled, not candidates, and all methods share the resamples: differences are paired.",
        "“Random” is the exact expectation over the candidates, not one draw.",
        "“Helps” and “hurts” need an interval that excludes 50% and a sign test below 0.05.",
        "Equal length: P(win) = σ(a + b·tanh(Δ/sd Δ)) with Δ the difference in characters; the figure is σ(a).",
        "The outcome behind b is the share of the other candidates of the same prompt that a candidate beats.",
        "Strongest baseline and oracle are chosen on these same prompts, which favours them a little.",
        *(f"Left out. {reason}." for reason in settings.get("left_out", [])),
    ]
    failures = "".join(
        f"<li>Prompt {failure.prompt}: {escape(failure.error)}"
        + (" (evaluated on the candidates it gave)" if failure.evaluated else " (not evaluated)")
        + "</li>"
        for failure in report.failures[:50]
    )
    if len(report.failures) > 50:
        failures += f"<li>… and {len(report.failures) - 50} more, in the JSON report</li>"
    return f"""
<footer>
<h2>How this was measured</h2>
<dl class="facts">{listed}</dl>
<ul>{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>
{f"<h3>Errors</h3><ul>{failures}</ul>" if failures else ""}
</footer>"""


# -------------------------------------------------------------------------------------------------------- plots


def _figure(title: str, note: str, plot: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption>{plot}</figure>"


class _Axis:
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


def _svg(width: int, height: int, description: str, body: str, data: str) -> str:
    name = "".join(letter if letter.isalnum() else "-" for letter in description)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}t {name}d">'
        f'<title id="{name}t">{escape(description)}</title><desc id="{name}d">{escape(data)}</desc>{body}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{kind}"/>'


def _dot(x: float, y: float, radius: float, kind: str, tip: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius:.1f}" class="dot {kind}"><title>{escape(tip)}</title></circle>'


def _horizontal_axis(axis: _Axis, top: float, bottom: float, percent: bool) -> str:
    return "".join(
        _line(axis(tick), top, axis(tick), bottom, "grid")
        + _text(axis(tick), bottom + 18, axis.label(tick, percent), "tick", "middle")
        for tick in axis.ticks
    )


LABELS_END, PLOT_WIDTH, ROW = 182, 540, 32


def _forest(
    rows: Sequence[tuple[str, Estimate, str]],
    description: str,
    reference: float,
    reference_label: str,
    percent: bool = False,
) -> str:
    """Draw estimates with intervals, one row each: (label, estimate, class)."""
    values = [v for _, e, _ in rows for v in (e.low, e.high)] + [reference]
    axis = _Axis(values, LABELS_END + 8, PLOT_WIDTH - 66, (0, 1) if percent else None)
    decimals = None if percent else _decimals(e for _, e, _ in rows)
    top, bottom = 22, 26 + ROW * len(rows)
    body = [_horizontal_axis(axis, top, bottom, percent)]
    body.append(_line(axis(reference), top, axis(reference), bottom, "reference"))
    body.append(_text(axis(reference), top - 7, reference_label, "tick", "middle"))
    for index, (label, e, kind) in enumerate(rows):
        y, (value, interval) = top + ROW * (index + 0.5) + 2, e.parts(percent=percent, decimals=decimals)
        body.append(_text(LABELS_END, y + 5, _clipped(label), f"label {kind}", "end"))
        body.append(_line(axis(e.low), y, axis(e.high), y, f"bar {kind}"))
        body.append(_dot(axis(e.value), y, 6, kind, f"{label}: {value} {interval}"))
        body.append(_text(PLOT_WIDTH, y + 5, value, f"value {kind}", "end"))
    data = "; ".join(f"{label}: {e.text(percent=percent)}" for label, e, _ in rows)
    return _svg(PLOT_WIDTH, int(bottom + 26), description, "".join(body), data)


def _dumbbells(rows: Sequence[tuple[str, Estimate, Estimate, str]]) -> str:
    """Draw measured and length-controlled win rates: (label, measured, controlled, class)."""
    values = [v for _, e, c, _ in rows for v in (e.value, c.low, c.high)] + [0.5]
    axis = _Axis(values, LABELS_END + 8, PLOT_WIDTH - 66, (0, 1))
    top, bottom = 22, 26 + ROW * len(rows)
    body = [_horizontal_axis(axis, top, bottom, percent=True)]
    body.append(_line(axis(0.5), top, axis(0.5), bottom, "reference"))
    body.append(_text(axis(0.5), top - 7, "even", "tick", "middle"))
    for index, (label, e, c, kind) in enumerate(rows):
        y = top + ROW * (index + 0.5) + 2
        body.append(_text(LABELS_END, y + 5, _clipped(label), f"label {kind}", "end"))
        body.append(_line(axis(c.low), y, axis(c.high), y, f"bar {kind}"))
        body.append(_line(axis(e.value), y, axis(c.value), y, "link"))
        body.append(_dot(axis(c.value), y, 6, kind, f"{label} at equal length: {c.text(percent=True)}"))
        body.append(_dot(axis(e.value), y, 6, f"open {kind}", f"{label} as measured: {e.text(percent=True)}"))
        body.append(_text(PLOT_WIDTH, y + 5, c.parts(percent=True)[0], f"value {kind}", "end"))
    data = "; ".join(
        f"{label}: {e.text(percent=True)} measured, {c.text(percent=True)} at equal length" for label, e, c, _ in rows
    )
    description = "Win rate of each method against the original, as measured and at equal length"
    return _svg(PLOT_WIDTH, int(bottom + 26), description, "".join(body), data)


def _clipped(label: str, length: int = 23) -> str:
    return label if len(label) <= length else f"{label[: length - 1].rstrip()}…"


def _plane(x: _Axis, y: _Axis, x_label: str, y_label: str, percent_x: bool) -> str:
    """Draw the frame of a plot of y (a share) against x."""
    rows = "".join(
        _line(x.start, y(tick), x.end, y(tick), "grid")
        + _text(x.start - 8, y(tick) + 4, y.label(tick, True), "tick", "end")
        for tick in y.ticks
    )
    return (
        rows
        + _horizontal_axis(x, y.end, y.start, percent_x)
        + _text(x.start, y.end - 10, y_label, "tick")
        + _text(x.end, y.start + 38, x_label, "tick", "end")
    )


def _points(bins: Sequence[Bin], x: _Axis, y: _Axis) -> str:
    largest = max(b.count for b in bins)
    return "".join(
        _line(x(b.x), y(b.outcome.low), x(b.x), y(b.outcome.high), "bar tested")
        + _dot(
            x(b.x),
            y(b.outcome.value),
            2 + 4 * sqrt(b.count / largest),
            "tested",
            f"{b.x:.3f} → {b.outcome.text(percent=True)}, {b.count} candidates",
        )
        for b in bins
    )


def _reliability(bins: Sequence[Bin]) -> str:
    """Draw observed against predicted win probability on equal axes."""
    values = [v for b in bins for v in (b.x, b.outcome.low, b.outcome.high)]
    x, y = _Axis(values, 52, PLOT_WIDTH - 16, (0, 1)), _Axis(values, 318, 30, (0, 1))
    diagonal = _line(x(x.low), y(y.low), x(x.high), y(y.high), "reference")
    body = _plane(x, y, "predicted b", "observed win share", True) + diagonal + _points(bins, x, y)
    data = "; ".join(f"predicted {b.x:.3f}: {b.outcome.text(percent=True)} of {b.count}" for b in bins)
    return _svg(PLOT_WIDTH, 364, "Observed win share against predicted win probability", body, data)


def _gaps(bins: Sequence[Bin]) -> str:
    """Draw the share of candidates that beat the original against their rise in b."""
    x = _Axis([b.x for b in bins] + [0.0], 52, PLOT_WIDTH - 16)
    y = _Axis([v for b in bins for v in (b.outcome.low, b.outcome.high)] + [0.5], 318, 30, (0, 1))
    references = _line(x.start, y(0.5), x.end, y(0.5), "reference") + _line(x(0), y.start, x(0), y.end, "reference")
    body = _plane(x, y, "b of the candidate − b of the original", "beats the original", False)
    data = "; ".join(f"rise {b.x:.3f}: {b.outcome.text(percent=True)} of {b.count}" for b in bins)
    description = "Share of candidates that beat the original, by their rise in b"
    return _svg(PLOT_WIDTH, 364, description, body + references + _points(bins, x, y), data)


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
