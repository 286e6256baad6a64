"""Tables as text for people and as a file for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.core.runs import Run

__all__ = ["markdown_table", "save_parquet"]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Write rows, the first of which is the header, as lines of Markdown; all columns but the first align right."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]


def save_parquet(runs: Iterable[Run], path: Path) -> None:
    """Write one row for every figure of every run.

    Columns: kind, task, method, label, seed, figure, value, low, high (null where a figure is undefined), key (of
    the run's settings), code (of the state of the code), finished (ISO 8601, UTC).
    """
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, pa.DataType] = dict.fromkeys(("kind", "task", "method", "label"), pa.string())
    columns |= {"seed": pa.int64(), "figure": pa.string()}
    columns |= dict.fromkeys(("value", "low", "high"), pa.float64())
    columns |= dict.fromkeys(("key", "code", "finished"), pa.string())
    rows = [
        {
            "kind": run.kind, "task": run.task, "method": run.method, "label": run.label, "seed": run.seed,
            "figure": name, **(found or {}),
            "key": run.metrics["key"], "code": run.metrics["environment"]["code"], "finished": run.metrics["finished"],
        }
        for run in sorted(runs, key=lambda run: (run.kind, run.task, run.method, run.seed))
        for name, found in run.metrics["figures"].items()
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows, schema=pa.schema(columns)), path, compression="zstd")
