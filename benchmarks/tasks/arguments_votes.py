"""Predict how five people's votes are shared between two arguments of an unseen debate (UKPConvArg1)."""

from __future__ import annotations

import numpy as np

from benchmarks.core.comparisons import Comparison, Comparisons
from benchmarks.core.data import data_folder, read_csv, read_jsonl
from benchmarks.preference.config import ArgumentsVotesConfig
from benchmarks.selection.selection import limited

__all__ = ["load"]


def load(config: ArgumentsVotesConfig, seed: int) -> Comparisons:
    """Read the vote shares, undecided votes half; both stances of a debate are held out together."""
    folder = data_folder("ukp_convarg")
    arguments = {(row["topic"], row["arg_id"]): row for row in read_jsonl(folder / "arguments.jsonl.gz")}
    found = read_csv(folder / "pairs.csv.gz")
    kept = set(limited({row["topic"] for row in found}, config.limit))
    rows = []
    for row in found:
        first, second = (arguments[row["topic"], row[name]] for name in ("a1", "a2"))
        votes, against, undecided = (int(row[name]) for name in ("votes_a1", "votes_a2", "votes_equal"))
        total = votes + against + undecided
        if row["topic"] not in kept or first["text"].strip() == second["text"].strip() or not total:
            continue
        share = (votes + undecided / 2) / total
        agreed = "agreed" if max(votes, against) >= 0.8 * total else "disputed"
        rows.append(
            Comparison(
                row["topic"], f"{first['title']} {first['stance']}", first["text"], second["text"], share,
                votes=float(total), part=agreed, unit=first["title"],
                lesson=None if config.soft else float(np.heaviside(share - 0.5, 0.5)),
            )
        )  # fmt: skip
    about = {"labels": "shares" if config.soft else "majority"}
    return Comparisons(rows, config.folds, seed, judge="votes of about five people", about=about)
