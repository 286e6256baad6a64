"""Tables of ``task=mnist`` and ``task=digits``: every method at the setting chosen for it, and over its strengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.core.runs import Run, code_notes
from benchmarks.core.seeds import figure_interval
from benchmarks.core.tables import markdown_table

__all__ = ["by_method", "cell", "markdown", "of_task", "settings"]

COLUMNS = ("right", "labelled", "third", "diversity", "precision", "recall", "frechet", "moved", "calls")
FRONTIER = ("right", "labelled", "diversity", "precision", "moved")


def of_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each task."""
    return {task: [run for run in runs if run.task == task] for task in sorted({run.task for run in runs})}


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method, best mean score first, seeds in order."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        found.setdefault(run.method, []).append(run)
    return dict(sorted(found.items(), key=lambda item: -sum(r.metrics["score"] for r in item[1]) / len(item[1])))


def settings(run: Run) -> list[str]:
    """Return the names of a run's settings, as it measured them."""
    return [name.removesuffix(".right") for name in run.metrics["figures"] if name.endswith(".right")]


def cell(runs: Sequence[Run], figure: str) -> str:
    """Write a figure's mean over seeds with Student's 95% interval; of one seed with its interval over draws."""
    found = figure_interval(runs, figure)
    if found is None:
        return "–"
    mean, half = found
    decimals = 1 if figure.endswith("frechet") else 3
    if figure.endswith("calls"):
        return f"{mean:.0f}"
    if half == 0:
        return f"{mean:.{decimals}f}"
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}"


def markdown(runs: Sequence[Run]) -> str:
    """Write a section for each task."""
    lines: list[str] = []
    for task, some in of_task(runs).items():
        lines += _section(task, some)
    return "\n".join(lines)


def _section(task: str, runs: Sequence[Run]) -> list[str]:
    about: dict[str, Any] = runs[0].metrics["about"]
    judges = ", ".join(f"{name} {share:.1%}" for name, share in about["accuracies"].items())
    rows = [["method", "seeds", "setting", *COLUMNS]]
    for own in by_method(runs).values():
        chosen = " / ".join(dict.fromkeys(run.metrics["about"]["chosen"] for run in own))
        rows.append([own[0].label, str(len(own)), chosen, *(cell(own, name) for name in COLUMNS)])
    frontier = [["method", "setting", *FRONTIER]]
    for own in by_method(runs).values():
        shared = [name for name in settings(own[0]) if all(name in settings(run) for run in own)]
        if len(shared) > 1:
            frontier += [
                [own[0].label, name, *(cell(own, f"{name}.{figure}") for figure in FRONTIER)] for name in shared
            ]
    return [
        f"## {task}",
        "",
        f"Generator after {about['generator']['updates']} updates: mean probability of the right digit "
        f"{about['generator']['quality']:.3f} by the labelling judge. Accuracy on real test images: {judges}. "
        f"{about['sets']} sets of {about['candidates']} draws to learn from, {about['tested']} draws tested. ± is half "
        "of the 95% interval over seeds (Student's), with one seed that over draws. right, labelled, third: "
        "mean probability of the right digit by the independent judge, the labelling one and the one on gradients. "
        "diversity: within a digit, relative to the generator's. moved: root mean square change of a pixel. The "
        "setting was chosen on validation draws by the labelling judge, under limits on diversity and precision.",
        "",
        *markdown_table(rows),
        "",
        "Every setting:",
        "",
        *markdown_table(frontier),
        "",
        *code_notes(runs),
        "",
    ]
