"""Refine arguments in a debate; five people have voted on nearly every pair of a stance's arguments (UKPConvArg1)."""

from __future__ import annotations

from collections import defaultdict

from benchmarks.core.config import ArgumentsConfig
from benchmarks.core.data import data_folder, read_csv, read_jsonl
from benchmarks.selection.selection import Selection, draw_candidates, limited, split_prompts
from pfm import PreferencePairs

__all__ = ["load"]


def load(config: ArgumentsConfig, seed: int) -> Selection:
    """Split by debate: both stances of one are on the same side, as one side's arguments answer the other's.

    The judge's score of an argument is its share of all human votes on it, undecided ones half.
    """
    folder = data_folder("ukp_convarg")
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    prompts: dict[str, str] = {}
    debates: dict[str, str] = {}
    for row in read_jsonl(folder / "arguments.jsonl.gz"):
        texts[row["topic"]][row["arg_id"]] = row["text"]
        prompts[row["topic"]] = f"{row['title']} {row['stance']}"
        debates[row["topic"]] = row["title"]
    votes: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in read_csv(folder / "pairs.csv.gz"):
        votes[row["topic"]].append(row)

    stances = limited(texts, config.limit)
    _, tested = split_prompts([debates[stance] for stance in stances], config.test_share, seed)
    train = [stance for stance in stances if debates[stance] not in tested]
    pairs = PreferencePairs.from_votes(
        {
            "prompt": prompts[stance],
            "a": texts[stance][row["a1"]],
            "b": texts[stance][row["a2"]],
            "votes_a": row["votes_a1"],
            "votes_b": row["votes_a2"],
            "votes_tie": row["votes_equal"],
        }
        for stance in train
        for row in votes[stance]
        if texts[stance][row["a1"]].strip() != texts[stance][row["a2"]].strip()  # people repeat each other
    )
    items = []
    for number, stance in enumerate(stances):
        if debates[stance] in tested:
            shares = _vote_shares(votes[stance])
            items += draw_candidates(
                stance, prompts[stance], [texts[stance][name] for name in shares], list(shares.values()),
                candidates=config.candidates, draws=config.draws, seed=(seed, number),
            )  # fmt: skip
    return Selection(pairs, items, judge="human votes", unit="votes won in the debate", percent=True)


def _vote_shares(rows: list[dict[str, str]]) -> dict[str, float]:
    """Return each argument's share of the votes on it."""
    won: dict[str, float] = defaultdict(float)
    cast: dict[str, float] = defaultdict(float)
    for row in rows:
        first, second, undecided = (int(row[name]) for name in ("votes_a1", "votes_a2", "votes_equal"))
        for name, own in ((row["a1"], first), (row["a2"], second)):
            won[name] += own + undecided / 2
            cast[name] += first + second + undecided
    return {name: won[name] / cast[name] for name in sorted(won)}
