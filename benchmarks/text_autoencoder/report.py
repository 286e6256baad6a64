"""Tables and figures of ``task=imdb``: every family at its chosen setting, all settings, and sentences to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.core.runs import Run, code_notes
from benchmarks.core.seeds import figure_interval, figure_values
from benchmarks.core.tables import markdown_table
from benchmarks.text_autoencoder.frontier import equal_content
from benchmarks.text_autoencoder.moves import FAMILIES, encode_decode, family_of

__all__ = ["markdown", "save_plot", "settings"]

FIGURES = ("win", "gain", "labelled", "cosine", "same", "perplexity")
COLOURS = ("#56b4e9", "#0072b2", "#009e73", "#000000", "#cc79a7", "#d55e00", "#8c8c8c", "#e69f00")
SHOWN = 6


def settings(run: Run) -> list[str]:
    """Return the names of a run's settings, as it measured them, without those that repeat a chosen one."""
    names = [name.removesuffix(".cosine") for name in run.metrics["figures"] if name.endswith(".cosine")]
    return [name for name in names if not name.startswith("chosen ")]


def markdown(runs: Sequence[Run]) -> str:
    """Write the section."""
    runs = sorted(runs, key=lambda run: run.seed)
    about = runs[0].metrics["about"]
    chosen = [["family", "at least", "setting", *FIGURES]]
    for name in about["chosen"]:
        family, _, least = name.removeprefix("chosen ").rpartition(" at ")
        some = [run for run in runs if run.metrics["about"]["chosen"].get(name)]
        told = " / ".join(dict.fromkeys(str(run.metrics["about"]["chosen"][name]).split(": ")[1] for run in some))
        cells = [_cell(some, f"{name}.{figure}") for figure in FIGURES]
        chosen.append([family, least, told or "none keeps so much", *cells])
    every = [["setting", *FIGURES]]
    every += [[name, *(_cell(runs, f"{name}.{figure}") for figure in FIGURES)] for name in settings(runs[0])]
    others = [name.removesuffix(".win") for name in runs[0].metrics["figures"] if name.endswith("other sentences.win")]
    every += [[name, _cell(runs, f"{name}.win"), *["–"] * (len(FIGURES) - 1)] for name in others]
    return "\n".join(
        [
            "## imdb",
            "",
            f"{len(runs)} {'seeds' if len(runs) > 1 else 'seed'} of {about['drafts']} drafts. ± is half of the 95% "
            "interval over seeds (Student's), with one seed over drafts. win: against an independent sentence by the "
            f"judge on words, with {_about(runs, 'accuracy_independent'):.1%} accuracy on held-out sentences. "
            "gain: in that judge's log-odds over encode and decode. labelled: log-odds by the judge of the preferences "
            f"({_about(runs, 'accuracy_labelling'):.1%}). cosine: of MiniLM, output and draft. same: outputs that "
            "equal those of encode and decode (there: the draft). perplexity: by SmolLM2 on the first "
            f"{about['rated']} outputs. Transport {_about(runs, 'transport_milliseconds'):.2g} ms and decoding "
            f"{_about(runs, 'decode_milliseconds'):.2g} ms a sentence (CPU time of one thread).",
            "",
            "Chosen on validation sentences by the labelling judge, among settings with at least so large a cosine:",
            "",
            *markdown_table(chosen),
            "",
            *equal_content(runs),
            "",
            "Every setting:",
            "",
            *markdown_table(every),
            "",
            *_examples(runs[0]),
            *code_notes(runs),
            "",
        ]
    )


def _examples(run: Run) -> list[str]:
    notes, about = run.metrics["notes"], run.metrics["about"]
    names = [about["chosen"].get(f"chosen {family} at {min(_leasts(run)):g}") for family in FAMILIES]
    shown = [encode_decode, *(name for name in names if name)]
    lines = [f"Sentences of seed {run.seed}, each family at the setting chosen for the smaller cosine:", ""]
    for place, draft in enumerate(notes["drafts"][:SHOWN]):
        rows = [["", "text"], ["draft", draft], *([name, notes["examples"][name][place]] for name in shown)]
        lines += [*markdown_table(rows), ""]
    return lines


def _leasts(run: Run) -> list[float]:
    return [float(name.rpartition(" at ")[2]) for name in run.metrics["about"]["chosen"]]


def save_plot(runs: Sequence[Run], path: Path) -> None:
    """Draw win rate against content and against perplexity: a curve over the strength for every family."""
    from matplotlib.figure import Figure

    rated = all(f"{encode_decode}.perplexity" in run.metrics["figures"] for run in runs)
    figure = Figure(figsize=(10.5 if rated else 6.8, 4.4), layout="constrained")
    panels = figure.subplots(1, 2 if rated else 1, sharey=True, squeeze=False)[0]
    against = (("cosine", "cosine of output and draft"), ("perplexity", "perplexity by SmolLM2"))
    for axes, (column, label) in zip(panels, against, strict=False):
        for family, colour in zip(FAMILIES, COLOURS, strict=True):
            names = [name for name in settings(runs[0]) if family_of(name) == family]
            x, y = ([_mean(runs, f"{name}.{figure}") for name in names] for figure in (column, "win"))
            style = "o--" if family == FAMILIES[-1] else "o-"
            axes.plot(x, y, style, color=colour, label=family, markersize=4, linewidth=1.2)
        control = _mean(runs, f"{encode_decode}.{column}"), _mean(runs, f"{encode_decode}.win")
        axes.plot(*control, "k*", markersize=10, label=encode_decode)
        axes.set_xlabel(label)
        for n in (2, 8):
            height = _mean(runs, f"best of {n} other sentences.win")
            axes.axhline(height, color="#b8b8b8", linestyle=":", zorder=0)
            if axes is panels[0]:
                axes.annotate(f"best of {n} other sentences", (0.01, height), xycoords=("axes fraction", "data"),
                              va="bottom", fontsize=7, color="#707070")  # fmt: skip
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("win rate against an independent sentence")
    panels[0].invert_xaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _mean(runs: Sequence[Run], name: str) -> float:
    return float(np.mean(figure_values(runs, name)))


def _about(runs: Sequence[Run], name: str) -> float:
    return float(np.mean([run.metrics["about"][name] for run in runs]))


def _cell(runs: Sequence[Run], name: str) -> str:
    found = figure_interval(runs, name)
    if found is None:
        return "–"
    mean, half = found
    decimals = 0 if name.endswith("perplexity") else 3
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}".replace("-", "−")
