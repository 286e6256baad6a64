"""Tables of ``task=speed``: every target beside what was measured, and the figures without a target."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.core.runs import Run
from benchmarks.core.tables import markdown_table
from benchmarks.speed.targets import TARGETS, Target
from pfm.statistics import Estimate

__all__ = ["markdown"]


def markdown(runs: Sequence[Run]) -> str:
    """Write a section for every run."""
    return "\n".join(line for run in runs for line in _section(run))


def _section(run: Run) -> list[str]:
    about, figures, code = run.metrics["about"], run.metrics["figures"], run.metrics["environment"]["code"]
    rows = [["what", "target", "measured", "verdict"]]
    rows += [[target.what, _bound(target), _figure(target, figures), target.verdict(figures)] for target in TARGETS]
    judged = [row[-1] for row in rows[1:] if row[-1] in ("met", "missed")]
    known = {target.name for target in TARGETS}
    others = [["figure", "value"]]
    others += [[name, Estimate(**value).text()] for name, value in figures.items() if name not in known and value]
    without = [] if about["torchcfm"] else ["torchcfm was not there: make peers, and run with .venv-peers/bin/python."]
    if not about["reduced_precision"]:
        without.append("This processor multiplies no bfloat16 matrices: reduced precision is not measured.")
    return [
        f"## speed ({about['processor']}, one thread)",
        "",
        f"{judged.count('met')} of {len(judged)} targets met; code {code}. Ratios are of processor time, in one "
        f"process and in turns: the median of {about['readings']} readings, in brackets the lowest and the highest; a "
        f"reading is the median of {about['rounds']} ratios. Errors are against float64. The large set has "
        f"{about['large']:,} pairs, mapped from disk as float16.",
        "",
        *markdown_table(rows),
        "",
        *(f"Note: {note}\n" for note in without),
        "Without targets; `itself` is a contestant against itself, what the clock cannot tell apart:",
        "",
        *markdown_table(others),
        "",
    ]


def _bound(target: Target) -> str:
    bound = target.low if target.low is not None else target.high
    sign = "≥" if target.low is not None else "≤"
    return f"{sign} {100 * (bound or 0):g}%" if target.percent else f"{sign} {bound:g}{target.unit}"


def _figure(target: Target, figures: dict[str, dict[str, float] | None]) -> str:
    found = figures.get(target.name)
    if found is None:
        return "–"
    if found["low"] == found["high"]:
        return f"{found['value']:.2g}{target.unit}"
    return Estimate(**found).text(percent=target.percent, decimals=1 if target.percent else 2) + target.unit
