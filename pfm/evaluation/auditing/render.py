"""Draw an audit: for the terminal with rich, and as one self-contained HTML page.

Names of columns and files are data: all of them pass through an escaping template or ``rich.text.Text``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from pfm._internal.html import clipped, common_decimals, forest, render
from pfm.evaluation.auditing.results import AuditResults, AuditRow
from pfm.statistics import Estimate

__all__ = ["page", "terminal"]

#: By outcome: a sign (colour must not be the only one), the page's class, the terminal's colour.
TONES = {
    "ahead": ("▲", "helps", "bright_blue"),
    "behind": ("▼", "hurts", "dark_orange"),
    "indistinguishable": ("●", "calm", "white"),
    "nothing to choose": ("●", "calm", "white"),
}
KINDS = {"selector": "tested", "bound": "bound"}
WIDE = 130  # characters that the whole table needs
PLOTTED = 3  # selectors whose differences are drawn
NOTES = (
    "Gap closed: (score − random) / (oracle − random), summed over prompts; 0% is a random candidate, 100% the judge’s "
    "own pick.",
    "Prompts are resampled, not candidates, and all methods share the resamples: differences are paired.",
    "“Ahead” and “behind” need a 95% interval that excludes 0, and a two-sided test over prompts below 0.05.",
    "Random is the exact expectation over the candidates; candidates with equal best values share the pick.",
    "Wins: share of the other candidates of its prompt that a pick beats, ties half. At equal length: the same from "
    "P(win) = σ(a + b·tanh(Δ/sd Δ)) at Δ = 0, with Δ the difference in length.",
    "Fitted baselines score each prompt by a model fitted on other prompts, with penalties chosen on others still.",
    "Controls are means: of 20 permutations of the first selector’s picks within prompts, and of 20 Bradley–Terry fits "
    "on random labels, each of which is a random direction.",
    "The strongest rule is chosen on these same prompts, which favours it a little.",
)


def _columns(audit: AuditResults, wide: bool) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each column of the table: its head, and (value, interval) a row."""
    percent = audit.settings["percent"]

    def column(head: str, values: list[Estimate | None], **options: Any) -> tuple[str, list[tuple[str, str]]]:
        if not options.get("percent"):
            options["decimals"] = common_decimals(filter(None, values))
        return head, [("–", "") if value is None else value.parts(**options) for value in values]

    rows = audit.rows
    columns = [
        column("Gap closed", [row.gap_closed for row in rows], percent=True),
        column("Judge score", [row.score for row in rows], percent=percent),
    ]
    for name in audit.settings["selectors"] if wide else audit.settings["selectors"][:1]:
        values = [None if row.name == name else row.difference(name).value for row in rows]
        columns.append(column(f"{clipped(name, 18)} ahead by", values, percent=percent, signed=True))
    if wide:
        columns += [
            column("Wins vs others", [row.win for row in rows], percent=True),
            column("At equal length", [row.win_controlled for row in rows], percent=True),
            column("Length ratio", [row.length_ratio for row in rows]),
        ]
    return columns


def _budget(audit: AuditResults) -> str:
    sizes = audit.settings["candidates"]
    if sizes["min"] == sizes["max"]:
        return f"{sizes['max']} candidate{'s' * (sizes['max'] > 1)} a prompt"
    return f"{sizes['min']} to {sizes['max']} candidates a prompt, {sizes['mean']:.1f} on average"


def _source(audit: AuditResults) -> str:
    settings = audit.settings
    sets = f" ({settings['sets']} sets of candidates)" if settings["sets"] != settings["prompts"] else ""
    return f"{settings['prompts']} prompts{sets}, {_budget(audit)}"


def terminal(audit: AuditResults, width: int) -> Iterator[Any]:
    """Yield rich renderables for a console of the given width in characters."""
    from rich.box import ROUNDED, SIMPLE_HEAD
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    for finding in audit.findings:
        sign, _, colour = TONES[finding.outcome]
        yield Panel(
            Text("\n".join(finding.sentences)),
            title=Text(f"{sign} {finding.headline}", style=f"bold {colour}"),
            title_align="left",
            border_style=colour,
            box=ROUNDED,
            padding=(1, 2),
        )
    for warning in audit.warnings:
        yield Text(f"! {warning}", style="yellow")
    yield Text()
    columns = _columns(audit, width >= WIDE)
    title = f"All methods on the same candidates: {_source(audit)}"
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left")
    table.add_column("Method", min_width=16)
    for head, _ in columns:
        table.add_column(Text("\n".join(head.rsplit(" ", 1))), justify="right", no_wrap=True)
    for number, row in enumerate(audit.rows):
        style = {"selector": "bold", "control": "dim"}.get(row.kind, "")
        cells = [values[number] for _, values in columns]
        table.add_row(
            Text(row.label, style=style), *(Text.assemble((value, style), "\n", (low, "dim")) for value, low in cells)
        )
    yield table
    notes = [
        f"Judge: {audit.settings['judge']} of {audit.settings['source']}; 95% intervals from "
        f"{audit.settings['resamples']} resamples of the prompts, seed {audit.settings['seed']}.",
        *(f"Left out. {reason}." for reason in audit.settings["left_out"]),
    ]
    yield Text("\n".join(["", *notes]), style="dim")


def page(audit: AuditResults) -> str:
    """Write the audit as one HTML page."""
    columns = _columns(audit, True)
    settings = audit.settings
    facts = [
        ("Judge", f"{settings['judge']} of {settings['source']}"),
        ("Prompts", _source(audit)),
        ("Rows", settings["layout"]),
        ("Length", f"in {settings['length']}" if settings["length"] else "not known: no texts and no tokens"),
        ("Encoder", settings["encoder"] or "none: nothing fitted"),
        ("Intervals", f"95%, percentile bootstrap, {settings['resamples']} resamples, seed {settings['seed']}"),
    ]
    return render(
        "evaluation/auditing/page.html",
        audit=audit,
        findings=[(finding, *TONES[finding.outcome][:2]) for finding in audit.findings],
        tiles=_tiles(audit),
        source=_source(audit),
        heads=[head for head, _ in columns],
        rows=[(row, [values[number] for _, values in columns]) for number, row in enumerate(audit.rows)],
        plots=_plots(audit),
        differences=_differences(audit),
        facts=facts,
        notes=[*NOTES, *(f"Left out. {reason}." for reason in settings["left_out"])],
    )


def _tiles(audit: AuditResults) -> list[tuple[str, str, str]]:
    """Show the first selector's score beside random, the strongest simple rule and the oracle."""
    percent, name = audit.settings["percent"], audit.settings["selectors"][0]
    tested, oracle = audit.row(name), audit.row("oracle")
    rules = [row for row in audit.rows if row.kind == "rule"]
    best = max(rules, key=lambda row: row.score.value)
    tiles = [("Gap closed", *(tested.gap_closed.parts(percent=True) if tested.gap_closed else ("–", "no gap")))]
    shown = [(clipped(name, 28), tested), (f"{best.label}: strongest rule", best), ("Oracle", oracle)]
    if best.name != "random":
        shown.insert(0, ("Random candidate", audit.row("random")))
    decimals = common_decimals(row.score for _, row in shown)
    for label, row in shown:
        tiles.append((label, *row.score.parts(percent=percent, decimals=None if percent else decimals)))
    return tiles


def _mark(row: AuditRow) -> str:
    return KINDS.get(row.kind, "")


def _plots(audit: AuditResults) -> tuple[Markup | None, Markup]:
    percent = audit.settings["percent"]
    closed = [(row.label, row.gap_closed, _mark(row)) for row in audit.rows if row.gap_closed is not None]
    scores = [(row.label, row.score, _mark(row)) for row in audit.rows]
    return (
        forest([(label, _in_percent(e), mark) for label, e, mark in closed],
               "Share of the gap from random to oracle closed, in percent", 0.0, "random") if closed else None,
        forest(scores, "Mean judge score of each method", audit.row("random").score.value, "random", percent=percent),
    )  # fmt: skip


def _differences(audit: AuditResults) -> list[tuple[str, Markup]]:
    """Draw how far each selector is ahead of every other method, paired."""
    percent = audit.settings["percent"]
    found: list[tuple[str, Markup]] = []
    for name in audit.settings["selectors"][:PLOTTED]:
        rows = [
            (row.label, _in_percent(row.difference(name).value) if percent else row.difference(name).value, "group")
            for row in audit.rows
            if row.name != name and row.kind != "bound"
        ]
        what = f"Mean score of {name} minus that of each method{', in points' if percent else ''}"
        found.append((name, forest(rows, what, 0.0, "equal")))
    return found


def _in_percent(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)
