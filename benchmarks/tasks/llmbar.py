"""Compare two answers, of which one follows the instruction better by an objective label (LLMBar, and sets it has)."""

from __future__ import annotations

from benchmarks.core.comparisons import Comparison, Comparisons
from benchmarks.core.data import data_folder, read_jsonl
from benchmarks.preference.config import ComparisonsConfig
from benchmarks.selection.selection import limited

__all__ = ["load"]


def load(config: ComparisonsConfig, seed: int) -> Comparisons:
    """Read the pairs, each with its subset as its part."""
    found = [
        row
        for row in read_jsonl(data_folder("llmbar") / "llmbar.jsonl.gz")
        if row["output_1"].strip() and row["output_2"].strip() and row["output_1"].strip() != row["output_2"].strip()
    ]
    kept = set(limited({row["input"] for row in found}, config.limit))
    names = {prompt: str(number) for number, prompt in enumerate(sorted(kept))}
    rows = [
        Comparison(
            names[row["input"]], row["input"], row["output_1"], row["output_2"], float(int(row["label"]) == 1),
            part=row["subset"].rsplit("/", 1)[-1],
        )
        for row in found
        if row["input"] in kept
    ]  # fmt: skip
    return Comparisons(rows, config.folds, seed, judge="people, by whether the instruction is followed")
