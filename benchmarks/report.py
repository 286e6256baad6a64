"""Tables and figures of finished runs: ``python -m benchmarks.report runs/text [--out DIR]``.

Reads runs of every kind that :data:`KINDS` knows, and writes report.md, report.json, report.parquet (one row a run
and figure) and the figures of every task.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import law_plots, law_report, selection_plots, selection_report, speed_report
from benchmarks.runs import Run, collect
from benchmarks.tables import save_parquet

__all__ = ["KINDS", "main"]

Written = tuple[str, list[dict[str, Any]]]  # Markdown, and JSON values


def _selection(runs: Sequence[Run], folder: Path) -> Written:
    reports = selection_report.compare(selection_report.read(runs))
    for name, report in zip(_names(reports), reports, strict=True):
        selection_plots.save_plot(report, folder / f"{name}.png")
    return selection_report.markdown(reports), [{"kind": "selection", **asdict(report)} for report in reports]


def _law(runs: Sequence[Run], folder: Path) -> Written:
    reports = law_report.compare(runs)
    for name, report in zip(_names(reports), reports, strict=True):
        law_plots.save_plots(report, folder, name)
    return law_report.markdown(reports), [report.to_dict() for report in reports]


def _speed(runs: Sequence[Run], folder: Path) -> Written:
    return speed_report.markdown(runs), [{"kind": "speed", **run.metrics} for run in runs]


KINDS: dict[str, Callable[[Sequence[Run], Path], Written]] = {"selection": _selection, "law": _law, "speed": _speed}


def _names(reports: Sequence[Any]) -> list[str]:
    """Name the reports' files by their tasks, numbered where a task stands there under several settings."""
    tasks = [report.task for report in reports]
    return [f"{task}-{tasks[:n].count(task) + 1}" if tasks[:n].count(task) else task for n, task in enumerate(tasks)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the reports, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and plots of runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, such as runs/text")
    parser.add_argument("--out", type=Path, help="where to write; default: the first of the folders")
    options = parser.parse_args(arguments)
    folder: Path = options.out or options.runs[0]
    try:
        runs = collect(options.runs)
        folder.mkdir(parents=True, exist_ok=True)
        texts, values = [], []
        for kind, write in KINDS.items():
            if found := [run for run in runs if run.kind == kind]:
                text, plain = write(found, folder)
                texts.append(text)
                values += plain
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if others := sorted({run.kind for run in runs} - set(KINDS)):
        texts.append(f"Runs of kind {', '.join(others)} have no tables here.")
    text = "\n".join(texts)
    print(text)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    save_parquet(runs, folder / "report.parquet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
