"""Compare answers of eight systems; GPT-4 has seen every two of them in both orders (QLoRA's tournament).

GPT-4 prefers what it reads first. Let P(a pair's answer A wins) = sigmoid(d + beta) where A is shown first and
sigmoid(d - beta) where B is, with d of the two answers and beta of the order alone. Of the pairs on which the two
verdicts name different answers, those where what was first won both times are then exp(2 beta) times as many as those
where what was second did, whatever d is; and the mean of both verdicts has no beta, to first order. So beta is
*measured* without a model, *removed* by averaging, and *estimated* by a model that knows what came first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.comparisons import Comparison, Comparisons
from benchmarks.core.data import data_folder, read_csv, read_jsonl
from benchmarks.preference.config import QloraConfig
from benchmarks.selection.selection import limited
from pfm.statistics import Bootstrap, Estimate, interval

__all__ = ["load", "order_figures"]

_SHARES = {"1": 1.0, "2": 0.0, "3": 0.5}  # of the answer shown first; -1 is a verdict that could not be read
_SHORTER_FIRST = 0.8  # of the pairs whose verdicts in one order are learned from


def load(config: QloraConfig, seed: int) -> Comparisons:
    """Join the two verdicts on each pair; pairs of which one could not be read are left out."""
    if config.orders not in ("both", "half", "one", "told"):
        raise ValueError(f"task.orders must be 'both', 'half', 'one' or 'told', got {config.orders!r}")
    single = config.orders in ("one", "told")
    folder = data_folder("qlora_tournament")
    answers = {str(row["id"]): row for row in read_jsonl(folder / "vicuna80_outputs.jsonl.gz")}
    verdicts: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for row in read_csv(folder / "vicuna80_gpt4_pairwise.csv.gz"):
        if row["verdict"] in _SHARES:
            verdicts[row["prompt_id"]][row["first"], row["second"]] = _SHARES[row["verdict"]]

    rng = np.random.default_rng([seed, 0])
    rows, both = [], []
    for group in limited(verdicts, config.limit):
        texts, found = answers[group]["outputs"], verdicts[group]
        for one, other in sorted(found):
            if one > other or (other, one) not in found or texts[one].strip() == texts[other].strip():
                continue
            shorter, longer = sorted((one, other), key=lambda name: (len(texts[name]), name))
            first, second = (shorter, longer) if rng.random() < _SHORTER_FIRST else (longer, shorter)
            ahead, behind = found[first, second], found[second, first]
            both.append((group, ahead, behind))
            rows.append(
                Comparison(
                    group, answers[group]["prompt"], texts[first], texts[second], (ahead + 1 - behind) / 2,
                    votes=1.0 if single else 2.0, lesson=ahead if single else None,
                )
            )  # fmt: skip
    if config.orders == "half":
        taught = np.random.default_rng([seed, 1]).permutation(len(rows)) < len(rows) / 2
        rows = [Comparison(**vars(row) | {"taught": bool(kept)}) for row, kept in zip(rows, taught, strict=True)]
    ends = Counter((ahead, behind) for _, ahead, behind in both)
    return Comparisons(
        rows, config.folds, seed, judge="GPT-4, both orders averaged", measured=order_figures(both),
        order_term=config.orders == "told",
        about={"orders": config.orders, "verdicts": {f"{a:g} {b:g}": count for (a, b), count in sorted(ends.items())}},
    )  # fmt: skip


def order_figures(both: list[tuple[str, float, float]]) -> dict[str, Estimate | None]:
    """Measure what order alone is worth, from (prompt, share of the first in one order, in the other).

    ``first_wins``: of the verdicts that are no ties, how many are for what was shown first. ``flips``: pairs on which
    the two verdicts name different answers. ``order_odds``: beta, in log-odds at equal answers. ``order_marginal``: the
    log-odds of the first's mean share, ties half; answers that differ much leave order no say, so it is the lower one.
    ``tied``: verdicts that are ties. Intervals are over prompts.
    """
    owner = np.unique([group for group, *_ in both], return_inverse=True)[1]
    ahead, behind = np.array([pair[1:] for pair in both]).T
    bootstrap = Bootstrap(int(owner.max()) + 1)

    def totals(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(owner, values, minlength=bootstrap.n).astype(np.float64)

    wins = totals((ahead == 1) + 0.0 + (behind == 1))
    losses = totals((ahead == 0) + 0.0 + (behind == 0))
    first = totals(((ahead == 1) & (behind == 1)) + 0.0)
    second = totals(((ahead == 0) & (behind == 0)) + 0.0)
    pairs, share = totals(np.ones(len(ahead))), totals(ahead + behind)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = 0.5 * np.log(bootstrap.sums(first) / bootstrap.sums(second))[:, 0]
        odds = interval(float(0.5 * np.log(first.sum() / second.sum())), drawn, bootstrap.n)
    drawn_share = _logit(bootstrap.sums(share) / bootstrap.sums(2 * pairs))[:, 0]
    return {
        "first_wins": bootstrap.ratio(wins, wins + losses),
        "flips": bootstrap.ratio(first + second, pairs),
        "order_odds": odds,
        "order_marginal": interval(_logit(share.sum() / (2 * pairs.sum())), drawn_share, bootstrap.n),
        "tied": bootstrap.ratio(2 * pairs - wins - losses, 2 * pairs),
    }


def _logit(share: Any) -> Any:
    return np.log(share / (1 - share))
