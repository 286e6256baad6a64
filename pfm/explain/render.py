"""Draw an explanation: for the terminal with rich, and as one self-contained HTML page.

Texts of prompts and outputs, and terms taken from them, are data: all of them pass through ``escape`` or
``rich.text.Text``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from pfm._internal.html import document, figure, forest
from pfm.explain.results import Contrast, Direction, Results, Term, TraitChange
from pfm.explain.traits import TRAITS
from pfm.statistics import Estimate

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
    """Give (value, interval) under each of :data:`HEADS`."""
    changes = (trait.picked, trait.moved, trait.labelled, trait.at_equal_length, trait.correlation)
    return [("–", "") if change is None else change.parts(signed=True, decimals=2) for change in changes]


def _about(direction: Direction) -> str:
    """Say what the flow does along a direction."""
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
            title="\nChanges in standard deviations between the answers to one prompt",
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
    parts = [_banner(found), _tiles(found)]
    if found.confirmed:
        parts += [_traits(found.traits), *map(_direction, found.directions)]
    parts.append(_measured(found))
    return document("What does this flow prefer?", [f"<style>{STYLE}</style>", *parts])


def _banner(found: Results) -> str:
    reasons = "".join(f"<p>{escape(reason)}</p>" for reason in found.reasons)
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in found.warnings)
    return f"""
<header class="verdict {"helps" if found.confirmed else "no-evidence"}">
<p class="over">What does this flow prefer?</p>
<h1>{escape(found.summary)}</h1>
{reasons}
</header>
{f'<aside class="warnings" aria-label="Warnings"><ul>{warnings}</ul></aside>' if warnings else ""}"""


def _tiles(found: Results) -> str:
    settings = found.settings
    figures: list[tuple[str, str, str]] = [("Pairs ordered as labelled", *found.accuracy.parts(percent=True))]
    if found.length_share is not None:
        figures.append(("Of b explained by length", *found.length_share.parts(percent=True)))
    figures += [
        ("Outputs looked at", f"{settings['outputs']:,}", f"of {settings['prompts']:,} prompts"),
        ("Fitted on", f"{settings['fitted_pairs'] or 0:,}", "pairs"),
    ]
    tiles = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in figures)
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _traits(traits: Sequence[TraitChange]) -> str:
    if not traits:
        return ""
    plotted = traits[:PLOTTED]

    def plot(title: str, note: str, attribute: str, description: str) -> str:
        rows: list[tuple[str, Estimate, str]] = [
            (trait.words, getattr(trait, attribute), "tested" if trait.confirmed else "") for trait in plotted
        ]
        return figure(title, note, forest(rows, description, 0.0, "no change"))

    heads = "".join(f'<th scope="col">{head}</th>' for head in (*HEADS, "Told by the embedding"))
    body = "".join(
        f"<tr{' class=' + chr(34) + 'tested' + chr(34) if trait.confirmed else ''}>"
        f'<th scope="row">{escape(trait.words)}<small>{escape(TRAITS[trait.name].measure)}</small></th>'
        + "".join(f"<td>{value}<small>{span}</small></td>" for value, span in _figures(trait))
        + f"<td>{trait.told:.0%}</td></tr>"
        for trait in traits
    )
    return f"""
<section>
<h2>What changes</h2>
<p class="lead">In standard deviations between the answers to one prompt, with 95% intervals. Blue: confirmed, because
the labels, b and the displacement agree and the labels’ interval, widened for the number of traits, excludes zero.</p>
<div class="plots">
{
        plot(
            "Picked by b",
            "When real outputs are chosen with probability ∝ b.",
            "picked",
            "Change of each trait picked by b",
        )
    }
{
        plot(
            "Moved by the flow",
            "By regression on the embedding; errs towards zero.",
            "moved",
            "Change of each trait by the displacement",
        )
    }
</div>
<details><summary>All {len(traits)} traits, with their measures</summary>
<div class="scroll" tabindex="0" role="region" aria-label="All traits"><table>
<caption class="hidden">All traits that vary, with 95% intervals</caption>
<thead><tr><th scope="col">Trait</th>{heads}</tr></thead><tbody>{body}</tbody>
</table></div>
</details>
</section>"""


def _direction(direction: Direction) -> str:
    related = "".join(
        f'<span class="chip calm">{escape(words)} <b>{abs(estimate.value):.2f}</b></span>'
        for words, estimate in direction.traits
    )
    ends = [("More of these words", direction.more, "better"), ("Less of these words", direction.less, "worse")]
    words = "".join(
        f'<div><h4>{head}</h4><p class="terms">{_terms(terms, kind)}</p></div>' for head, terms, kind in ends
    )
    traits = f'<p class="terms">{related}</p>' if related else ""
    return f"""
<section>
<h2>{KINDS[direction.kind]}: {escape(direction.name or "no trait stands out")}</h2>
<p class="lead">{escape(_about(direction))}{" Traits with their correlation:" if related else ""}</p>
{traits}
<div class="example"><div class="sides flipped">{words}</div></div>
{"".join(map(_contrast, direction.contrasts))}
</section>"""


def _terms(terms: Sequence[Term], kind: str) -> str:
    return (
        "".join(
            f'<span class="chip {kind}" title="{term.counts[0]} times at the far end, {term.counts[1]} at the near">'
            f"{escape(term.text)} <b>{abs(term.z):.1f}</b></span>"
            for term in terms
        )
        or "<small>None beyond chance.</small>"
    )


def _contrast(contrast: Contrast) -> str:
    sides = [
        ("Far end", contrast.high, contrast.high_probability),
        ("Near end", contrast.low, contrast.low_probability),
    ]
    columns = "".join(
        f'<div><h4>{name}</h4><p class="figures">b {b:.2f}</p>'
        f'<div class="text" tabindex="0" role="region" aria-label="{name} text">{escape(_cut(text))}</div></div>'
        for name, text, b in sides
    )
    return f"""
<article class="example">
<header><h3>{escape(_cut(contrast.prompt) or "(no prompt)")}</h3>
<span class="chip calm">{contrast.gap:.1f} sd apart</span></header>
<div class="sides flipped">{columns}</div>
</article>"""


def _cut(text: str) -> str:
    return text if len(text) <= CLIPPED else f"{text[:CLIPPED].rstrip()} … ({len(text):,} characters)"


def _measured(found: Results) -> str:
    settings = found.settings
    encoder = settings.get("encoder") or {}
    facts = [
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
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    notes = [
        "Everything is told within prompts: what sets an answer apart from other answers to its own prompt.",
        "Picked by b: Cov(b, trait) / E[b], what choosing real outputs with probability ∝ b changes. With "
        "p₁ = 2·π·b it is the aim of one pass.",
        "Moved by the flow: a ridge regression of the trait on the embedding, fitted on other prompts, applied to "
        "T(y) − y. What the embedding does not tell of a trait is missing from it.",
        "In the labels: half the difference between chosen and rejected outputs of the given pairs.",
        "At equal length: what is left of “picked by b” after a regression of both on the log of the length.",
        "Words: log-odds with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008) between the upper and "
        "the lower third of each prompt’s outputs; the figure is in standard errors. Words of fewer than three prompts "
        "are left out, and those below three, which chance brings among so many.",
        "On pairs that the flow was fitted on, the share of pairs ordered as labelled is flattered.",
    ]
    return f"""
<footer>
<h2>How this was measured</h2>
<dl class="facts">{listed}</dl>
<ul>{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>
</footer>"""


STYLE = """
.terms { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 10px; }
.terms .chip b { font-weight: 400; opacity: .75; font-size: .76rem; }
details { margin-top: 18px; } summary { cursor: pointer; color: var(--tested); }
.calm { color: var(--calm); }
.verdict h1 { font-size: clamp(1.4rem, 1rem + 1.6vw, 2rem); }
tbody th small { display: block; white-space: normal; max-width: 30ch; }
tbody tr:not(.tested) th, tbody tr:not(.tested) td { color: var(--muted); }
.sides.flipped > div { border-color: var(--tested); }
.sides.flipped > div + div { border-color: var(--rule); }
"""
