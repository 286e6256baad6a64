"""Tables and figures of finished runs, of every kind that there is.

Writes report.md, report.json, report.parquet (one row a run and figure) and the figures of every task. Runs of one
method under different settings, such as ``method.label_rounds=5``, have rows of their own.

    python -m benchmarks.report runs/text
    python -m benchmarks.report runs/pbrl --seeds 0 1 2 --out tables     # without the runs of other seeds
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.acquisition import report as acquisition_report
from benchmarks.control import families as control_families
from benchmarks.control import plots as control_plots
from benchmarks.control import report as control_report
from benchmarks.core.runs import Run, collect
from benchmarks.core.tables import save_parquet
from benchmarks.images import plots as image_plots
from benchmarks.images import report as image_report
from benchmarks.laws import plots as law_plots
from benchmarks.laws import report as law_report
from benchmarks.preference import noise_report
from benchmarks.preference import plots as preference_plots
from benchmarks.preference import report as preference_report
from benchmarks.selection import plots as selection_plots
from benchmarks.selection import report as selection_report
from benchmarks.speed import report as speed_report
from benchmarks.text_autoencoder import report as text_autoencoder_report
from benchmarks.text_editing import report as text_editing_report

__all__ = ["KINDS", "main"]

Written = tuple[str, list[dict[str, Any]]]  # Markdown, and JSON values


def _selection(runs: Sequence[Run], folder: Path) -> Written:
    choices = selection_report.read(runs)
    reports, noise = selection_report.compare(choices), noise_report.costs(choices)
    for name, report in zip(_names(reports), reports, strict=True):
        selection_plots.save_plot(report, folder / f"{name}.png")
    described = [{"kind": "selection", **asdict(report)} for report in reports]
    described += [{"kind": "noise", **asdict(cost)} for cost in noise]
    return selection_report.markdown(reports) + "\n" * bool(noise) + noise_report.markdown(noise), described


def _law(runs: Sequence[Run], folder: Path) -> Written:
    reports = law_report.compare(runs)
    for name, report in zip(_names(reports), reports, strict=True):
        law_plots.save_plots(report, folder, name)
    return law_report.markdown(reports), [report.to_dict() for report in reports]


def _preference(runs: Sequence[Run], folder: Path) -> Written:
    reports = preference_report.compare(preference_report.read(runs))
    for name, report in zip(_names(reports), reports, strict=True):
        preference_plots.save_plot(report, folder / f"{name}.png")
    return preference_report.markdown(reports), [{"kind": "preference", **asdict(report)} for report in reports]


def _control(runs: Sequence[Run], folder: Path) -> Written:
    reports = control_report.compare(runs)
    for name, report in zip(_names(reports), reports, strict=True):
        control_plots.save_plots(report, folder, name)
    lines = [control_report.markdown(reports), "### Families of methods", "", *control_families.markdown(reports), ""]
    return "\n".join(lines), [report.to_dict() for report in reports]


def _acquisition(runs: Sequence[Run], folder: Path) -> Written:
    curves = acquisition_report.compare(runs)
    for number, data in enumerate(dict.fromkeys(curve.data for curve in curves), 1):
        some = [curve for curve in curves if curve.data == data]
        acquisition_report.save_plot(some, folder / f"acquisition-{number}.png")
    return acquisition_report.markdown(curves), [curve.to_dict() for curve in curves]


def _speed(runs: Sequence[Run], folder: Path) -> Written:
    return speed_report.markdown(runs), [{"kind": "speed", **run.metrics} for run in runs]


def _text_editing(runs: Sequence[Run], folder: Path) -> Written:
    text_editing_report.save_plot(runs, folder / "text_editing.png")
    return text_editing_report.markdown(runs), [{"kind": "text_editing", **run.metrics} for run in runs]


def _text_autoencoder(runs: Sequence[Run], folder: Path) -> Written:
    text_autoencoder_report.save_plot(runs, folder / "imdb.png")
    return text_autoencoder_report.markdown(runs), [{"kind": "text_autoencoder", **run.metrics} for run in runs]


def _images(runs: Sequence[Run], folder: Path) -> Written:
    for task, some in image_report.of_task(runs).items():
        image_plots.save_frontier(some, folder / f"{task}.png")
        image_plots.save_grid(some, folder / f"{task}-images.png")
    return image_report.markdown(runs), [{"kind": "images", **run.metrics} for run in runs]


KINDS: dict[str, Callable[[Sequence[Run], Path], Written]] = {
    "selection": _selection,
    "preference": _preference,
    "law": _law,
    "control": _control,
    "acquisition": _acquisition,
    "speed": _speed,
    "text_editing": _text_editing,
    "images": _images,
    "text_autoencoder": _text_autoencoder,
}


def _names(reports: Sequence[Any]) -> list[str]:
    """Name the reports' files by their tasks, numbered where a task stands there under several settings."""
    tasks = [report.task for report in reports]
    return [f"{task}-{tasks[:n].count(task) + 1}" if tasks[:n].count(task) else task for n, task in enumerate(tasks)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the reports, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, such as runs/text")
    parser.add_argument("--out", type=Path, help="where to write; default: the first of the folders")
    parser.add_argument("--seeds", nargs="+", type=int, help="read the runs of these seeds only")
    options = parser.parse_args(arguments)
    folder: Path = options.out or options.runs[0]
    try:
        runs = collect(options.runs, options.seeds)
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
