"""Draw a report card: for the terminal with rich, and as one self-contained HTML page.

Texts of prompts, models and users are data: all of them pass through ``escape`` or ``rich.text.Text``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import sqrt
from typing import Any

from pfm._internal.html import (
    LABELS_END,
    PLOT_WIDTH,
    ROW,
    Axis,
    clipped,
    common_decimals,
    document,
    dot,
    figure,
    forest,
    horizontal_axis,
    label_at,
    line,
    svg,
)
from pfm.evaluation.results import Calibration, Example, GroupRow, MethodRow, Results
from pfm.statistics import Bin, Estimate

__all__ = ["page", "terminal"]

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


def _tested(report: Results) -> MethodRow:
    return report.row(report.settings["method"])


def _budget(report: Results) -> str:
    """Write how many candidates a prompt every method chose from."""
    sizes = report.settings["candidates"]
    if sizes["min"] == sizes["max"]:
        return f"{sizes['max']} candidates a prompt"
    return f"{sizes['min']} to {sizes['max']} candidates a prompt, {sizes['mean']:.1f} on average"


def _cell(report: Results, row: MethodRow, column: _Column) -> tuple[str, str]:
    """Return (value, interval) of a cell, every cell of a column to the same number of decimals."""
    estimate = column.value(row)
    if estimate is None or (column.signed and row is _tested(report)):
        return "–", ""
    decimals = None if column.percent else common_decimals(filter(None, map(column.value, report.rows)))
    return estimate.parts(percent=column.percent, signed=column.signed, decimals=decimals)


# ---------------------------------------------------------------------------------------------------- terminal


def terminal(report: Results, width: int) -> Iterator[Any]:
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

    decimals = common_decimals(group.gain for group in groups)
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


def _footnotes(report: Results) -> list[str]:
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


def page(report: Results, examples: int = 5) -> str:
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
    return document(title, parts)


def _banner(report: Results) -> str:
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


def _tiles(report: Results) -> str:
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


def _methods(report: Results) -> str:
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
        figure(
            "Win rate against the original",
            "Right of the line: better than the original more often than worse.",
            forest(wins, "Win rate of each method against the original, with intervals", 0.5, "even", percent=True),
        )
    }
{
        figure(
            "Mean judge score",
            "The line is the original’s score.",
            forest(scores, "Mean judge score of each method, with intervals", original, "original"),
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


def _length(report: Results) -> str:
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
        figure(
            "Win rate against the original, at equal length",
            "Ring: as measured. Dot and bar: at equal length.",
            _dumbbells(rows),
        )
    }
{
        figure(
            "Length of the pick",
            "Mean ratio to the length of the original, in characters.",
            forest(ratios, "Mean length of the picks relative to the original", 1.0, "same"),
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
        figure(
            "Predicted and observed win probability",
            "On the diagonal b is right. A dot’s size is its number of candidates.",
            _reliability(calibration.reliability.bins),
        )
    ]
    if calibration.gaps:
        figures.append(
            figure(
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


def _groups(report: Results) -> str:
    rows = [(f"{clipped(g.name, 16)} ({g.prompts})", g.win, "group") for g in report.groups]
    rows.append(("All prompts", _tested(report).win, ""))
    decimals = common_decimals(group.gain for group in report.groups)
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
    plot = forest(rows, "Win rate against the original in each group of prompts", 0.5, "even", percent=True)
    return f"""
<section>
<h2>By group of prompts</h2>
<div class="plots">
{figure("Win rate against the original", "With the number of prompts. Few prompts make wide bars.", plot)}
<div class="scroll" tabindex="0" role="region" aria-label="Figures by group"><table>
<thead><tr><th scope="col">Group</th>{heads}</tr></thead><tbody>{body}</tbody>
</table></div>
</div>
</section>"""


def _examples(report: Results, number: int) -> str:
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


def _measured(report: Results) -> str:
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
        "Equal length: P(win) = σ(a + b·tanh(Δ/sd Δ)) among changed answers, with Δ the difference in characters; the "
        "figure is σ(a) for the changed share and one half for the unchanged one.",
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


def _dumbbells(rows: Sequence[tuple[str, Estimate, Estimate, str]]) -> str:
    """Draw measured and length-controlled win rates: (label, measured, controlled, class)."""
    values = [v for _, e, c, _ in rows for v in (e.value, c.low, c.high)] + [0.5]
    axis = Axis(values, LABELS_END + 8, PLOT_WIDTH - 66, (0, 1))
    top, bottom = 22, 26 + ROW * len(rows)
    body = [horizontal_axis(axis, top, bottom, percent=True)]
    body.append(line(axis(0.5), top, axis(0.5), bottom, "reference"))
    body.append(label_at(axis(0.5), top - 7, "even", "tick", "middle"))
    for index, (label, e, c, kind) in enumerate(rows):
        y = top + ROW * (index + 0.5) + 2
        body.append(label_at(LABELS_END, y + 5, clipped(label), f"label {kind}", "end"))
        body.append(line(axis(c.low), y, axis(c.high), y, f"bar {kind}"))
        body.append(line(axis(e.value), y, axis(c.value), y, "link"))
        body.append(dot(axis(c.value), y, 6, kind, f"{label} at equal length: {c.text(percent=True)}"))
        body.append(dot(axis(e.value), y, 6, f"open {kind}", f"{label} as measured: {e.text(percent=True)}"))
        body.append(label_at(PLOT_WIDTH, y + 5, c.parts(percent=True)[0], f"value {kind}", "end"))
    data = "; ".join(
        f"{label}: {e.text(percent=True)} measured, {c.text(percent=True)} at equal length" for label, e, c, _ in rows
    )
    description = "Win rate of each method against the original, as measured and at equal length"
    return svg(PLOT_WIDTH, int(bottom + 26), description, "".join(body), data)


def _plane(x: Axis, y: Axis, x_label: str, y_label: str, percent_x: bool) -> str:
    """Draw the frame of a plot of y (a share) against x."""
    rows = "".join(
        line(x.start, y(tick), x.end, y(tick), "grid")
        + label_at(x.start - 8, y(tick) + 4, y.label(tick, True), "tick", "end")
        for tick in y.ticks
    )
    return (
        rows
        + horizontal_axis(x, y.end, y.start, percent_x)
        + label_at(x.start, y.end - 10, y_label, "tick")
        + label_at(x.end, y.start + 38, x_label, "tick", "end")
    )


def _points(bins: Sequence[Bin], x: Axis, y: Axis) -> str:
    largest = max(b.count for b in bins)
    return "".join(
        line(x(b.x), y(b.outcome.low), x(b.x), y(b.outcome.high), "bar tested")
        + dot(
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
    x, y = Axis(values, 52, PLOT_WIDTH - 16, (0, 1)), Axis(values, 318, 30, (0, 1))
    diagonal = line(x(x.low), y(y.low), x(x.high), y(y.high), "reference")
    body = _plane(x, y, "predicted b", "observed win share", True) + diagonal + _points(bins, x, y)
    data = "; ".join(f"predicted {b.x:.3f}: {b.outcome.text(percent=True)} of {b.count}" for b in bins)
    return svg(PLOT_WIDTH, 364, "Observed win share against predicted win probability", body, data)


def _gaps(bins: Sequence[Bin]) -> str:
    """Draw the share of candidates that beat the original against their rise in b."""
    x = Axis([b.x for b in bins] + [0.0], 52, PLOT_WIDTH - 16)
    y = Axis([v for b in bins for v in (b.outcome.low, b.outcome.high)] + [0.5], 318, 30, (0, 1))
    references = line(x.start, y(0.5), x.end, y(0.5), "reference") + line(x(0), y.start, x(0), y.end, "reference")
    body = _plane(x, y, "b of the candidate − b of the original", "beats the original", False)
    data = "; ".join(f"rise {b.x:.3f}: {b.outcome.text(percent=True)} of {b.count}" for b in bins)
    description = "Share of candidates that beat the original, by their rise in b"
    return svg(PLOT_WIDTH, 364, description, body + references + _points(bins, x, y), data)
