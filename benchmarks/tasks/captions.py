"""Refine captions of a cartoon contest; people have rated them funny, somewhat funny or unfunny (New Yorker)."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.config import CaptionsConfig
from benchmarks.core.data import data_folder, read_csv
from benchmarks.selection.selection import Selection, draw_candidates, limited, split_prompts
from pfm import PreferencePairs

__all__ = ["load"]

_VALUES = np.array([3.0, 2.0, 1.0])  # of funny, somewhat funny, unfunny
_SAMPLE = 0  # seed of which captions are kept, and not the run's: the cached embeddings serve every run


@dataclass(frozen=True)
class _Contest:
    """Holds the captions of one cartoon: texts, ratings (n, 3), and the mean ratings' standard errors (n,)."""

    texts: list[str]
    scores: NDArray[np.float64]
    errors: NDArray[np.float64]


def load(config: CaptionsConfig, seed: int) -> Selection:
    """Split by contest, all rounds of one joined; train on pairs with soft labels from the ratings' precision.

    A caption needs ``min_ratings``: twenty ratings tell about as much of it (their mean has the error 0.1, and true
    qualities spread by 0.09 in a contest) as of those who happened to rate it; fewer would judge by chance. A
    contest with less than ``captions`` such captions is left out: it has rated only its best ones so often. There is
    no prompt to read, since the cartoons are not among the data.
    """
    contests = _read(config)
    names = limited(contests, config.limit)
    train, test = split_prompts(names, config.test_share, seed)
    rows = [row for name in train for row in _pairs(name, contests[name], config.pairs, seed)]
    items = [
        item
        for name in test
        for item in draw_candidates(
            name, None, contests[name].texts, contests[name].scores.tolist(),
            candidates=config.candidates, draws=config.draws, seed=(seed, int(name)),
        )
    ]  # fmt: skip
    return Selection(
        PreferencePairs.from_rows(rows),
        items,
        judge="human ratings from 1 (unfunny) to 3 (funny)",
        unit="mean rating",
        percent=False,
    )


def _read(config: CaptionsConfig) -> dict[str, _Contest]:
    counts: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for row in read_csv(data_folder("caption_contest") / "captions.csv.gz"):
        text = row["caption"].strip()
        if text:
            # "508-round1_summary_RoundRobin" and "508-round2_…" rate captions of one contest.
            ratings = counts[row["contest"][:3]].setdefault(text, [0, 0, 0])
            for place, name in enumerate(("funny", "somewhat_funny", "unfunny")):
                ratings[place] += int(row[name])
    contests = {}
    for name, rated in counts.items():
        texts = sorted(text for text, ratings in rated.items() if sum(ratings) >= config.min_ratings)
        if len(texts) < config.captions:
            continue
        order = np.random.default_rng([_SAMPLE, int(name)]).permutation(len(texts))[: config.captions]
        texts = [texts[i] for i in order]
        table = np.array([rated[text] for text in texts], dtype=np.float64)
        total = table.sum(1)
        scores = table @ _VALUES / total
        # One variance for the whole contest: five ratings tell little about their own.
        variance = float((table @ _VALUES**2 / total - scores**2) @ total / (total - 1).sum())
        contests[name] = _Contest(texts, scores, np.sqrt(variance / total))
    return contests


def _pairs(name: str, contest: _Contest, count: int, seed: int) -> list[dict[str, Any]]:
    """Draw pairs whose difference exceeds its standard error, labelled with the probability that it is real.

    True qualities are taken as normal in the contest, with the spread that the ratings' errors leave; the label
    is then the posterior probability that the difference has the sign that was seen.
    """
    rng = np.random.default_rng([seed, int(name)])
    first, second = (rng.integers(len(contest.texts), size=20 * count) for _ in range(2))
    noise = contest.errors[first] ** 2 + contest.errors[second] ** 2
    difference = contest.scores[first] - contest.scores[second]
    kept = np.flatnonzero(np.abs(difference) > np.sqrt(noise))[:count]
    spread = 2 * max(contest.scores.var() - float((contest.errors**2).mean()), 1e-4)
    rows = []
    for i in kept:
        better, worse = (first[i], second[i]) if difference[i] > 0 else (second[i], first[i])
        z = abs(difference[i]) * math.sqrt(spread / (noise[i] * (spread + noise[i])))
        rows.append(
            {
                "prompt": "",
                "chosen": contest.texts[better],
                "rejected": contest.texts[worse],
                "probability": (1 + math.erf(z / math.sqrt(2))) / 2,
                "group": name,
            }
        )
    return rows
