"""Rows of counted votes for two responses, and the rows of pairs they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pfm.data.checks import optional_number, require, response
from pfm.data.errors import BadRows, PreferenceDataError, show
from pfm.data.readers import NumberedRows

__all__ = ["vote_counts", "vote_prior", "vote_rows"]


def vote_rows(
    rows: NumberedRows, bad: BadRows, place: str, *, soft: bool, weight: str, ties: str, prior: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Turn rows of vote counts into rows with chosen, rejected, weight and (if ``soft``) probability."""
    for number, row in rows:
        where = place.format(n=number, i=number - 1)
        try:
            votes_a, votes_b, votes_tie = vote_counts(row)
            a, b = response(row, "a"), response(row, "b")
        except PreferenceDataError as error:
            bad.meet(error, where)
            continue
        if votes_a == votes_b and ties == "drop":
            bad.dropped["tie"] += 1
            continue
        pair = {name: value for name, value in row.items() if name not in _VOTE_COLUMNS}
        pair["chosen"], pair["rejected"] = (a, b) if votes_a >= votes_b else (b, a)
        total = votes_a + votes_b + votes_tie
        shared = 1 + max(total - 1, 0) / (2 * prior + 1)
        worth = {"total": total, "one": 1.0, "margin": abs(votes_a - votes_b), "effective": total / shared}
        pair["weight"] = worth[weight]
        if soft:
            pair["probability"] = (max(votes_a, votes_b) + votes_tie / 2 + prior) / (total + 2 * prior)
        yield number, pair


def vote_counts(row: Any) -> tuple[float, float, float]:
    """Return the votes for a, for b, and undecided ones, of a row that must have some."""
    if not isinstance(row, Mapping):
        raise PreferenceDataError(f"got {show(row)}; expected an object with columns", reason="wrong type")
    require(row, "votes_a")
    require(row, "votes_b")
    a, b, tie = (optional_number(row, name) or 0.0 for name in ("votes_a", "votes_b", "votes_tie"))
    if not a + b + tie:
        raise PreferenceDataError("nobody voted; expected at least one vote", reason="no votes")
    return a, b, tie


_VOTE_COLUMNS = {"a", "b", "votes_a", "votes_b", "votes_tie", "weight", "probability", "chosen", "rejected"}


def vote_prior(rows: Sequence[Any]) -> float:
    """Fit the prior to the valid rows; the others are reported where rows are read."""
    from pfm.data.votes import fit_prior

    counts = []
    for row in rows:
        try:
            counts.append(vote_counts(row))
        except PreferenceDataError:
            continue
    decided = any(one or two for one, two, _ in counts)
    return fit_prior(*zip(*counts, strict=True)) if decided else 0.0
