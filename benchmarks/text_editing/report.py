"""Tables of ``task=text_editing``: every setting's win rate, content and perplexity, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.core.runs import Run
from benchmarks.core.seeds import figure_values
from benchmarks.core.tables import markdown_table

__all__ = ["markdown", "save_plot"]

FIGURES = ("win", "gain", "cosine", "same", "perplexity")
FAMILIES = {
    "flow": "#0072b2",
    "flow best-of-8": "#56b4e9",
    "flow rejected": "#009e73",
    "flow best-of-8 gradient": "#cc79a7",
    "ascent": "#d55e00",
    "mean shift": "#8c8c8c",
    "few-shot": "#e69f00",
}


def markdown(runs: Sequence[Run]) -> str:
    """Write one section for each kind of editor."""
    lines: list[str] = []
    for editor in sorted({run.metrics["about"]["editor"] for run in runs}):
        lines += _section(editor, [run for run in runs if run.metrics["about"]["editor"] == editor])
    return "\n".join(lines)


def _section(editor: str, runs: Sequence[Run]) -> list[str]:
    about = runs[0].metrics["about"]
    rows = [["setting", *FIGURES]]
    rows += [[name, *(_cell(runs, f"{name}.{figure}") for figure in FIGURES)] for name in _settings(runs[0])]
    rows += [[f"best of {n} of the reference", _cell(runs, f"best of {n}.win"), *["–"] * 4] for n in (2, 8)]
    accuracy = np.mean([run.metrics["about"]["independent_accuracy"] for run in runs])
    return [
        f"## text_editing ({editor})",
        "",
        f"{len(runs)} seeds of {about['drafts']} drafts, {about['samples']} samples a draft, guidance "
        f"{about['guidance']:g}, rounds {about.get('rounds', 1)}; few-shot: the base model rewrites the draft, shown "
        f"{about.get('few_shot', 0)} pairs. Each cell is the mean "
        "over seeds; with several seeds ± is half of the 95% interval over them by Student's t, with one it is that "
        "over drafts. win: against an independent sentence by the judge on words, which tells "
        f"{accuracy:.0%} of held-out "
        "sentences' sides. Controls (copy, permuted, shuffled, swapped) are read out without the guard on b.",
        "",
        *markdown_table(rows),
        "",
    ]


def save_plot(runs: Sequence[Run], path: Path) -> None:
    """Draw win rate against content for every method, as a curve over its strength."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for family, colour in FAMILIES.items():
        names = [name for name in _settings(runs[0]) if _family(name) == family]
        points = sorted((_mean(runs, f"{name}.cosine"), _mean(runs, f"{name}.win")) for name in names)
        if points:  # task.settings may leave a family out; ways to choose among rewrites are no curve
            style = "s" if family == "few-shot" else "o-"
            axes.plot(*zip(*points, strict=True), style, color=colour, label=family, markersize=4)
    if "copy" in _settings(runs[0]):
        copy = (_mean(runs, "copy.cosine"), _mean(runs, "copy.win"))
        axes.plot(*copy, "k*", markersize=10, label="copy")
    for n in (2, 8):
        axes.axhline(_mean(runs, f"best of {n}.win"), color="#b8b8b8", linestyle=":")
        axes.text(
            0.01, _mean(runs, f"best of {n}.win"), f"best of {n}", transform=axes.get_yaxis_transform(), va="bottom"
        )
    axes.set(xlabel="cosine of edit and draft", ylabel="win rate against an independent sentence")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def _settings(run: Run) -> list[str]:
    return [name.removesuffix(".cosine") for name in run.metrics["figures"] if name.endswith(".cosine")]


def _family(name: str) -> str:
    return "few-shot" if name.startswith("few-shot") else name.rpartition(" ")[0]


def _mean(runs: Sequence[Run], name: str) -> float:
    return float(np.mean(figure_values(runs, name)))


def _cell(runs: Sequence[Run], name: str) -> str:
    from scipy.stats import t

    values = figure_values(runs, name)
    if not values:
        return "–"
    if len(values) == 1:
        figure = next(run.metrics["figures"][name] for run in runs if run.metrics["figures"].get(name))
        half = (figure["high"] - figure["low"]) / 2
    else:
        half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    decimals = 1 if abs(np.mean(values)) >= 10 else 3
    return f"{np.mean(values):.{decimals}f} ± {half:.{decimals}f}".replace("-", "−")
