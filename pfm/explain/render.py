"""Draw an explanation: for the terminal with rich, and as one self-contained HTML page.

Texts of prompts and outputs, and terms taken from them, are data: all of them pass through an escaping template or
``rich.text.Text``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from pfm._internal.html import forest, render
from pfm.explain.results import Direction, Results, TraitChange
from pfm.explain.traits import TRAITS

__all__ = ["page", "terminal"]

PLOTTED = 12
WIDE = 100  # characters from which there is room for a fourth column
IN_TERMINAL = 10
CLIPPED = 1500  # characters of a text that are shown
HEADS = ("Picked by b", "Moved by the flow", "In the labels", "At equal length", "Correlation with b")
KINDS = {
    "mean": "Where the flow moves outputs on average",
    "win": "What the win probability b picks",
    "principal": "Along another axis of the displacement",
}


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _figures(trait: TraitChange) -> list[tuple[str, str]]:
    """Return (value, interval) under each of :data:`HEADS`, in the direction of the trait's words."""
    changes = (trait.picked, trait.moved, trait.labelled, trait.at_equal_length, trait.correlation)
    towards = map(trait.towards, changes)
    return [("–", "") if change is None else change.parts(signed=True, decimals=2) for change in towards]


def _about(direction: Direction) -> str:
    """Describe what the flow does along a direction."""
    said = []
    if direction.share is not None:
        said.append(f"{direction.share:.0%} of the mean square displacement lies along it.")
    if direction.kind == "mean" and direction.moves is not None:
        said.append(f"Outputs move {direction.moves:.2f} times as far as the answers to a prompt lie from their mean.")
    if direction.spreads is not None and abs(direction.spreads) >= 0.05:
        way = "draws outputs together" if direction.spreads < 0 else "drives outputs apart"
        said.append(f"The flow {way} along it (slope {direction.spreads:+.2f}).")
    if direction.kind != "win" and direction.correlation is not None:
        said.append(f"Correlation with b: {direction.correlation.text(signed=True, decimals=2)}.")
    return " ".join(said).replace("-", "−")


# ---------------------------------------------------------------------------------------------------- terminal


def terminal(found: Results, width: int) -> Iterator[Any]:
    """Yield rich renderables for a console of the given width in characters."""
    from rich.box import ROUNDED, SIMPLE_HEAD
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    colour = "bright_blue" if found.confirmed else "white"
    yield Panel(
        Text.assemble((found.summary, f"bold {colour}"), "\n\n", "\n".join(found.reasons)),
        title=Text("What this flow prefers", style=f"bold {colour}"),
        title_align="left",
        border_style=colour,
        box=ROUNDED,
        padding=(1, 2),
    )
    for warning in found.warnings:
        yield Text(f"! {warning}", style="yellow")
    if not found.confirmed:
        return
    if found.traits:
        table = Table(
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            title="\nChanges towards each trait, in standard deviations between the answers to one prompt",
            title_justify="left",
        )
        table.add_column("Trait", min_width=16)
        columns = 4 if width >= WIDE else 3
        for head in HEADS[:columns]:
            table.add_column("\n".join(head.rsplit(" ", 1)), justify="right", no_wrap=True)
        for trait in found.traits[:IN_TERMINAL]:
            style = "bold" if trait.confirmed else "dim"
            cells = (Text.assemble((value, style), "\n", (span, "dim")) for value, span in _figures(trait)[:columns])
            table.add_row(Text(trait.words, style=style), *cells)
        yield table
        yield Text("Bold: confirmed by the labels.", style="dim")
    for direction in found.directions:
        if direction.kind == "principal":
            continue
        yield Text(f"\n{KINDS[direction.kind]}: {direction.name or 'no trait stands out'}", style="bold")
        yield Text(_about(direction), style="dim")
        for sign, terms in (("+", direction.more), ("−", direction.less)):
            if terms:
                yield Text(f"  {sign} {', '.join(term.text for term in terms)}")


# --------------------------------------------------------------------------------------------------------- page


def page(found: Results) -> str:
    """Write the explanation as one HTML page."""
    return render(
        "explain/page.html",
        found=found,
        tiles=_tiles(found),
        plots=_trait_plots(found.traits[:PLOTTED]) if found.confirmed and found.traits else None,
        heads=(*HEADS, "Told by the embedding"),
        traits=[(trait, TRAITS[trait.name].measure, _figures(trait)) for trait in found.traits],
        kinds=KINDS,
        about=_about,
        cut=_cut,
        facts=_facts(found),
        notes=NOTES,
    )


def _tiles(found: Results) -> list[tuple[str, str, str]]:
    settings = found.settings
    figures: list[tuple[str, str, str]] = [("Pairs ordered as labelled", *found.accuracy.parts(percent=True))]
    if found.length_share is not None:
        figures.append(("Of b explained by length", *found.length_share.parts(percent=True)))
    return [
        *figures,
        ("Outputs looked at", f"{settings['outputs']:,}", f"of {settings['prompts']:,} prompts"),
        ("Fitted on", f"{settings['fitted_pairs'] or 0:,}", "pairs"),
    ]


def _trait_plots(traits: Sequence[TraitChange]) -> tuple[Markup, Markup]:
    """Draw what b picks, and what the flow moves, of each trait."""
    kinds = ["tested" if trait.confirmed else "" for trait in traits]
    picked, moved = (
        [
            (trait.words, trait.towards(change) or change, kind)
            for trait, change, kind in zip(traits, changes, kinds, strict=True)
        ]
        for changes in ([trait.picked for trait in traits], [trait.moved for trait in traits])
    )
    return (
        forest(picked, "Change of each trait picked by b", 0.0, "no change"),
        forest(moved, "Change of each trait by the displacement", 0.0, "no change"),
    )


def _cut(text: str) -> str:
    return text if len(text) <= CLIPPED else f"{text[:CLIPPED].rstrip()} … ({len(text):,} characters)"


def _facts(found: Results) -> list[tuple[str, str]]:
    settings = found.settings
    encoder = settings.get("encoder") or {}
    return [
        (
            "Looked at",
            f"{settings['outputs']:,} outputs in {settings['pairs']:,} pairs of {settings['prompts']:,} prompts",
        ),
        (
            "Intervals",
            f"95%, bootstrap over {settings['resampled']}, {settings['resamples']} resamples, seed {settings['seed']}",
        ),
        ("Flow", f"source {settings['source']}, {settings['rounds']} round{'s' * (settings['rounds'] > 1)}"),
        ("Encoder", str(encoder.get("name") or encoder.get("type") or "not named")),
    ]


NOTES = (
    "All comparisons are within prompts: an answer against the other answers to its own prompt.",
    "Picked by b: Cov(b, trait) / E[b], what choosing real outputs with probability ∝ b changes. With "
    "p₁ = 2·π·b it is the aim of one pass.",
    "Moved by the flow: a ridge regression of the trait on the embedding, fitted on other prompts, applied to "
    "T(y) − y. The part of a trait that the embedding does not predict is missing from it.",
    "In the labels: half the difference between chosen and rejected outputs of the given pairs.",
    "At equal length: what is left of “picked by b” after a regression of both on the log of the length.",
    "Words: log-odds with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008) between the upper and "
    "the lower third of each prompt’s outputs; the figure is in standard errors. Words of fewer than three prompts "
    "are left out, and those below three, which chance brings among so many.",
    "On pairs that the flow was fitted on, the share of pairs ordered as labelled is flattered.",
)
