"""Compare answers of five small models; three people have labelled each pair (PandaLM's test set)."""

from __future__ import annotations

import json

from benchmarks.core.comparisons import Comparison, Comparisons
from benchmarks.core.data import MissingDataError, data_folder
from benchmarks.preference.config import ComparisonsConfig
from benchmarks.selection.selection import limited

__all__ = ["load"]

_SHARES = {0: 0.5, 1: 1.0, 2: 0.0}  # of the first response


def load(config: ComparisonsConfig, seed: int) -> Comparisons:
    """Read the shares of three labels, ties half; a prompt is the instruction with its input."""
    path = data_folder("pandalm_test") / "testset-v1.json"
    if not path.is_file():
        raise MissingDataError(f"no benchmark data at {path}: the file is missing from its folder")
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        prompt = "\n".join(filter(None, (row["instruction"].strip(), (row["input"] or "").strip())))
        first, second = (str(row[name]).strip() for name in ("response1", "response2"))  # a few are "true", unquoted
        if first and second and first != second:
            labels = [_SHARES[row[f"annotator{number}"]] for number in (1, 2, 3)]
            agreed = "agreed" if len(set(labels)) == 1 else "disputed"
            rows.append(Comparison(prompt, prompt, first, second, sum(labels) / 3, votes=3.0, part=agreed))
    kept = set(limited({row.group for row in rows}, config.limit))
    names = {group: str(number) for number, group in enumerate(sorted(kept))}
    rows = [Comparison(**vars(row) | {"group": names[row.group]}) for row in rows if row.group in kept]
    return Comparisons(rows, config.folds, seed, judge="three people")
