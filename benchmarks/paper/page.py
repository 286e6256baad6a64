"""The page: our figures of finished runs beside what is known of the paper's, as Markdown and as HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.control import plots as control_plots
from benchmarks.control import report as control_report
from benchmarks.core.runs import Run, code_notes, collect
from benchmarks.core.seeds import student_interval
from benchmarks.core.tables import markdown_table
from benchmarks.images import plots as image_plots
from benchmarks.images import report as image_report
from benchmarks.paper.known import EXPERIMENTS, QUOTED, Experiment
from benchmarks.text_autoencoder import report as text_report

__all__ = ["Section", "finished", "page", "save", "sections"]

TITLE = "The experiments of Preference Flow Matching"
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #8886; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
code { background: #8882; padding: .1rem .3rem; border-radius: 3px; }
.missing { color: #b3541e; font-weight: 600; }
"""


@dataclass
class Section:
    """Holds what is said of one experiment: paragraphs, tables of rows (the first is the header), and pictures."""

    title: str
    theirs: str
    figures: list[list[str]]
    ours: str
    missing: str | None = None
    tables: list[list[list[str]]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def finished(folders: Sequence[Path]) -> list[Run]:
    """Read the finished runs below folders; those that do not exist or hold none are left out."""
    found = [folder for folder in folders if folder.is_dir() and any(folder.rglob("metrics.json"))]
    return collect(found, None) if found else []


def sections(
    runs: Sequence[Run], pictures: Path | None = None, notes: Mapping[str, Sequence[str]] | None = None
) -> list[Section]:
    """Gather what the page says, an experiment after the other.

    Args:
        runs: of any kind; those of other experiments are left out.
        pictures: folder for the figures, None for none.
        notes: what else is to be said of an experiment, by the name of its sweep.
    """
    return [
        _section(each, [run for run in runs if run.kind == each.kind], pictures, list((notes or {}).get(each.name, ())))
        for each in EXPERIMENTS
    ]


def page(runs: Sequence[Run]) -> str:
    """Write the page in Markdown, without pictures."""
    return markdown(sections(runs))


def markdown(found: Sequence[Section]) -> str:
    """Write sections in Markdown; pictures are named by their files."""
    lines = [f"# {TITLE}", "", QUOTED, ""]
    for section in found:
        lines += [f"## {section.title}", "", section.theirs, ""]
        if len(section.figures) > 1:
            lines += [*markdown_table(section.figures), ""]
        if section.missing:
            lines += [f"Ours: **missing**, no such run in these folders. `{section.missing}`", ""]
        else:
            lines += [section.ours, ""]
        for table in section.tables:
            lines += [*markdown_table(table), ""]
        lines += [f"![{section.title}]({path.name})\n" for path in section.pictures]
        lines += [f"- {note}" for note in section.notes]
        lines += [""] if section.notes else []
    return "\n".join(lines)


def as_html(found: Sequence[Section]) -> str:
    """Write sections as one HTML file that holds its pictures; all texts are escaped."""
    body = [f"<h1>{_safe(TITLE)}</h1>", f"<p>{_safe(QUOTED)}</p>"]
    for section in found:
        body += [f"<h2>{_safe(section.title)}</h2>", f"<p>{_safe(section.theirs)}</p>"]
        if len(section.figures) > 1:
            body.append(_html_table(section.figures))
        if section.missing:
            body.append(
                f'<p><span class="missing">Ours: missing</span>, no such run in these folders. '
                f"<code>{_safe(section.missing)}</code></p>"
            )
        else:
            body.append(f"<p>{_safe(section.ours)}</p>")
        body += [_html_table(table) for table in section.tables]
        for path in section.pictures:
            data = base64.b64encode(path.read_bytes()).decode()
            body.append(f'<p><img alt="{_safe(section.title)}" src="data:image/png;base64,{data}"></p>')
        if section.notes:
            body.append("<ul>" + "".join(f"<li>{_safe(note)}</li>" for note in section.notes) + "</ul>")
    head = f'<meta charset="utf-8"><title>{_safe(TITLE)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def save(runs: Sequence[Run], path: Path, notes: Mapping[str, Sequence[str]] | None = None) -> str:
    """Write the page to ``path`` as Markdown, beside it as HTML, and the pictures; return the Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = sections(runs, path.parent, notes)
    text = markdown(found)
    path.write_text(text, encoding="utf-8")
    path.with_suffix(".html").write_text(as_html(found), encoding="utf-8")
    return text


def _section(experiment: Experiment, runs: list[Run], pictures: Path | None, notes: list[str]) -> Section:
    figures = [["theirs", "figure", "table"], *([*row] for row in experiment.figures)]
    ours = f"Ours ({experiment.measured}; ± is half of Student's 95% interval over seeds):"
    section = Section(experiment.title, experiment.theirs, figures, ours, notes=notes)
    if not runs:
        section.missing = experiment.command
        return section
    for task in sorted({run.task for run in runs}):
        some = [run for run in runs if run.task == task]
        header = [task, "seeds", "measured", *experiment.others]
        section.tables.append([header, *_rows(experiment, some)])
        section.notes += code_notes(some) if len(some) > 1 else []
    if pictures is not None:
        section.pictures = _drawn(experiment.kind, runs, pictures)
    return section


def _rows(experiment: Experiment, runs: Sequence[Run]) -> list[list[str]]:
    """Return a row for each method, best first; for text one for each family that a run compares."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for name, values in _figures(experiment, run).items():
            own = found.setdefault(name, {})
            for figure, value in values.items():
                own.setdefault(figure, []).append(value)
    ordered = sorted(found.items(), key=lambda item: -sum(item[1]["measured"]) / len(item[1]["measured"]))
    return [
        [name, str(len(own["measured"])), *(_told(own.get(figure, [])) for figure in ("measured", *experiment.others))]
        for name, own in ordered
    ]


def _figures(experiment: Experiment, run: Run) -> dict[str, dict[str, float]]:
    """Return the figures of a run's method, or of the families that it compares."""
    given = run.metrics["figures"]

    def values(stem: str, first: str) -> dict[str, float]:
        names = {"measured": first, **{name: name for name in experiment.others}}
        told = {header: given.get(f"{stem}{name}") for header, name in names.items()}
        return {header: figure["value"] for header, figure in told.items() if figure}

    if run.kind == "text_autoencoder":
        ends = ".win"
        stems = [name.removesuffix(ends) for name in given if name.endswith((" at 0.55.win", "encode and decode.win"))]
        named = {stem.removeprefix("chosen ").removesuffix(" at 0.55"): values(f"{stem}.", "win") for stem in stems}
        return {name: own for name, own in named.items() if "measured" in own}
    first = "gain" if run.kind == "control" else "right"
    return {run.label: {"measured": run.metrics["score"], **values("", first)}}


def _told(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if len(values) > 1 and len(set(values)) == 1:  # a count, such as of calls
        return f"{values[0]:g}"
    mean, half = student_interval(values)
    decimals = 3 if abs(mean) < 10 else 1
    interval = f" ± {half:.{decimals}f}" if len(values) > 1 else ", one seed"
    return f"{mean:.{decimals}f}{interval}".replace("-", "−")


def _drawn(kind: str, runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw the figures of an experiment's own report into a folder."""
    if kind == "control":
        reports = control_report.compare(runs)
        return [path for number, report in enumerate(reports)
                for path in control_plots.save_plots(report, folder, f"paper-control-{number}")]  # fmt: skip
    if kind == "text_autoencoder":
        path = folder / "paper-text.png"
        text_report.save_plot(runs, path)
        return [path]
    paths = []
    for task, some in image_report.of_task(runs).items():
        for name, draw in (("frontier", image_plots.save_frontier), ("images", image_plots.save_grid)):
            paths.append(folder / f"paper-{task}-{name}.png")
            draw(some, paths[-1])
    return paths


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_safe(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return html.escape(text)
