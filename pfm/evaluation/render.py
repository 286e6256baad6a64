"""Draw a report card: for the terminal with rich, and as one self-contained HTML page.

Texts of prompts, models and users are data: all of them pass through an escaping template or ``rich.text.Text``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from markupsafe import Markup

from pfm._internal.html import (
    LABELS_END,
    PLOT_WIDTH,
    ROW,
    Axis,
    clipped,
    common_decimals,
    dot,
    forest,
    horizontal_axis,
    label_at,
    line,
    render,
    svg,
)
from pfm.evaluation.results import Example, GroupRow, MethodRow, Results
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
    _Column("Gap closed", "random to oracle", lambda row: row.gap_closed, wide=True),
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
    tested = _tested(report)
    shown, losses = _shown(report, examples)
    return render(
        "evaluation/page.html",
        report=report,
        verdict=report.verdict,
        sign=SIGNS[report.verdict.outcome],
        tested=tested,
        budget=_budget(report),
        tiles=_tiles(report),
        columns=COLUMNS,
        methods=[(row, [_cell(report, row, column) for column in COLUMNS]) for row in report.rows],
        plots=_method_plots(report),
        length_plots=_length_plots(report),
        calibration=report.calibration,
        reliability=_reliability(report.calibration.reliability.bins) if report.calibration else None,
        gaps=_gaps(report.calibration.gaps) if report.calibration and report.calibration.gaps else None,
        group_heads=GROUP_HEADS,
        groups=_groups(report.groups),
        group_plot=_group_plot(report) if report.groups else None,
        examples=shown,
        losses=losses,
        number=_number,
        facts=_facts(report),
        notes=[*NOTES, *(f"Left out. {reason}." for reason in report.settings.get("left_out", []))],
    )


def _tiles(report: Results) -> list[tuple[str, str, str]]:
    tested, rows = _tested(report), {row.name: row for row in report.rows}
    figures = [
        ("Wins vs original", tested.win, True, False),
        ("Wins at equal length", tested.win_controlled, True, False),
        ("Gain in judge score", rows["identity"].difference, False, True),
        ("Gap closed, random to oracle", tested.gap_closed, True, False),
        ("Outputs changed", tested.changed, True, False),
    ]
    tiles: list[tuple[str, str, str]] = []
    for label, estimate, percent, signed in figures:
        value, interval = estimate.parts(percent=percent, signed=signed) if estimate else ("–", "not defined here")
        tiles.append((label, value, interval))
    return tiles


def _kind(report: Results, row: MethodRow) -> str:
    """Return the class with which the marks of a method are drawn."""
    return {"oracle": "bound", _tested(report).name: "tested"}.get(row.name, "")


def _method_plots(report: Results) -> tuple[Markup, Markup]:
    """Draw the win rate and the mean score of every method."""
    wins = [(row.label, row.win, _kind(report, row)) for row in report.rows]
    scores = [(row.label, row.score, _kind(report, row)) for row in report.rows]
    original = report.row("identity").score.value
    return (
        forest(wins, "Win rate of each method against the original, with intervals", 0.5, "even", percent=True),
        forest(scores, "Mean judge score of each method, with intervals", original, "original"),
    )


def _length_plots(report: Results) -> tuple[Markup, Markup] | None:
    """Draw win rates at equal length, and lengths; None where the effect of length cannot be separated."""
    others = [row for row in report.rows if row.name != "identity"]
    rows = [
        (row.label, row.win, row.win_controlled, _kind(report, row)) for row in others if row.win_controlled is not None
    ]
    if not rows:
        return None
    ratios = [(row.label, row.length_ratio, _kind(report, row)) for row in others]
    return _dumbbells(rows), forest(ratios, "Mean length of the picks relative to the original", 1.0, "same")


def _groups(groups: Sequence[GroupRow]) -> list[tuple[GroupRow, list[tuple[str, str]]]]:
    """Return each group with its figures under :data:`GROUP_HEADS` but the first."""
    decimals = common_decimals(group.gain for group in groups)
    return [
        (
            group,
            [
                group.win.parts(percent=True),
                group.gain.parts(signed=True, decimals=decimals),
                group.accuracy.parts(percent=True) if group.accuracy else ("–", ""),
            ],
        )
        for group in groups
    ]


def _group_plot(report: Results) -> Markup:
    rows = [(f"{clipped(g.name, 16)} ({g.prompts})", g.win, "group") for g in report.groups]
    rows.append(("All prompts", _tested(report).win, ""))
    return forest(rows, "Win rate against the original in each group of prompts", 0.5, "even", percent=True)


def _shown(report: Results, number: int) -> tuple[list[Example], bool]:
    """Return the examples to show, and whether the largest loss is among them."""
    losses = [example for example in report.examples if example.kind != "random"][:number]
    shown = [example for example in report.examples if example.kind == "random"][: number - len(losses)] + losses
    return shown, bool(losses)


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


NOTES = (
    "Prompts are resampled, not candidates, and all methods share the resamples: differences are paired.",
    "Where all prompts agree, resamples have no spread, and a share’s limit is the exact binomial one.",
    "“Random” is the exact expectation over the candidates, not one draw.",
    "Gap closed: (score − random) / (oracle − random), summed over prompts: 0% is a random candidate, 100% the oracle.",
    "“Helps” and “hurts” need an interval that excludes 50% and a sign test below 0.05.",
    "Equal length: P(win) = σ(a + b·tanh(Δ/sd Δ)) among changed answers, with Δ the difference in characters; the "
    "figure is σ(a) for the changed share and one half for the unchanged one.",
    "The outcome behind b is the share of the other candidates of the same prompt that a candidate beats.",
    "Strongest baseline and oracle are chosen on these same prompts, which favours them a little.",
)


def _facts(report: Results) -> list[tuple[str, Any]]:
    settings, verdict = report.settings, report.verdict
    lost = sum(not failure.evaluated for failure in report.failures)
    known = ("method", "prompts", "candidates", "independent_draws", "resamples", "seed", "judge", "left_out")
    return [
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


# -------------------------------------------------------------------------------------------------------- plots


def _dumbbells(rows: Sequence[tuple[str, Estimate, Estimate, str]]) -> Markup:
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
    return svg(PLOT_WIDTH, int(bottom + 26), description, Markup().join(body), data)


def _plane(x: Axis, y: Axis, x_label: str, y_label: str, percent_x: bool) -> Markup:
    """Draw the frame of a plot of y (a share) against x."""
    rows = Markup().join(
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


def _points(bins: Sequence[Bin], x: Axis, y: Axis) -> Markup:
    largest = max(b.count for b in bins)
    return Markup().join(
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


def _reliability(bins: Sequence[Bin]) -> Markup:
    """Draw observed against predicted win probability on equal axes."""
    values = [v for b in bins for v in (b.x, b.outcome.low, b.outcome.high)]
    x, y = Axis(values, 52, PLOT_WIDTH - 16, (0, 1)), Axis(values, 318, 30, (0, 1))
    diagonal = line(x(x.low), y(y.low), x(x.high), y(y.high), "reference")
    body = _plane(x, y, "predicted b", "observed win share", True) + diagonal + _points(bins, x, y)
    data = "; ".join(f"predicted {b.x:.3f}: {b.outcome.text(percent=True)} of {b.count}" for b in bins)
    return svg(PLOT_WIDTH, 364, "Observed win share against predicted win probability", body, data)


def _gaps(bins: Sequence[Bin]) -> Markup:
    """Draw the share of candidates that beat the original against their rise in b."""
    x = Axis([b.x for b in bins] + [0.0], 52, PLOT_WIDTH - 16)
    y = Axis([v for b in bins for v in (b.outcome.low, b.outcome.high)] + [0.5], 318, 30, (0, 1))
    references = line(x.start, y(0.5), x.end, y(0.5), "reference") + line(x(0), y.start, x(0), y.end, "reference")
    body = _plane(x, y, "b of the candidate − b of the original", "beats the original", False)
    data = "; ".join(f"rise {b.x:.3f}: {b.outcome.text(percent=True)} of {b.count}" for b in bins)
    description = "Share of candidates that beat the original, by their rise in b"
    return svg(PLOT_WIDTH, 364, description, body + references + _points(bins, x, y), data)
