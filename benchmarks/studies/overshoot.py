"""When more candidates are worse: python -m benchmarks.studies.overshoot [--tasks arguments alpaca captions].

The true score of best of n by b for n up to 64 (or as many candidates as a prompt has), alone and with attackers among
the candidates (:mod:`benchmarks.studies.candidate_pools`): padded answers, which are long and bad, and constant ones,
which are the same for every prompt. Then what is chosen on validation prompts: the number of candidates and the
strength of a draw in proportion to b^strength, both measured on the other half. Intervals are over prompts.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.tables import markdown_table
from benchmarks.studies.candidate_pools import Pool, load_pools, study_options
from pfm.evaluation import Selecting, best_of_curve, choose_selection
from pfm.statistics import Bootstrap

__all__ = ["KINDS", "curves", "main"]

Array = NDArray[np.float64]

SIZES = (1, 2, 4, 8, 16, 32, 64)
MOST = 256  # candidates of a prompt that are kept: the curve is exact in all of them
KINDS = {"no attackers": (0,), "padded": (0, 1), "constant": (0, 2), "both": (0, 1, 2)}


def _part(pool: Pool, kinds: Sequence[int]) -> tuple[Array, Array]:
    """Return b and scores of some kinds, the attackers in the share that they have of the whole pool."""
    real = np.flatnonzero(pool.kind == 0)
    kept = real if len(real) <= MOST else np.random.default_rng(0).permutation(real)[:MOST]
    places = [kept]
    for kind in kinds[1:]:
        attackers = np.flatnonzero(pool.kind == kind)
        places.append(attackers[: max(1, round(len(attackers) * len(kept) / len(real)))])
    rows = np.concatenate(places)
    return 1 / (1 + np.exp(-pool.log_odds[rows])), pool.scores[rows]


def curves(pools: Sequence[Pool], kinds: Sequence[int]) -> dict[str, Array]:
    """Return the score of best of each of ``SIZES`` for each prompt; beyond its candidates, that of all of them."""
    found = {}
    for pool in pools:
        curve = best_of_curve(*_part(pool, kinds))
        found[pool.group] = np.array([curve[min(size, len(curve)) - 1] for size in SIZES])
    return found


def _chosen(pools: Sequence[Pool], kinds: Sequence[int]) -> Selecting:
    b, scores = zip(*[_part(pool, kinds) for pool in pools], strict=True)
    return choose_selection(b, scores, sizes=SIZES)


def main() -> None:
    """Print one table for each task."""
    options = study_options(__doc__)
    for task in options.tasks:
        lines = [
            ["candidates", *(f"best of {size}" for size in SIZES), "chosen: n, strength", "chosen minus best of most"]
        ]
        for labels in options.labels:
            every = [load_pools(task, seed, labels, options.out) for seed in range(options.seeds)]
            for name, kinds in KINDS.items():
                rows: dict[str, list[Array]] = defaultdict(list)
                for pools in every:
                    for group, curve in curves(pools, kinds).items():
                        rows[group].append(curve)
                mean = np.array([np.mean(found, axis=0) for found in rows.values()])
                bootstrap = Bootstrap(len(mean))
                chosen = [_chosen(pools, kinds) for pools in every]
                told = "; ".join(f"{c.n}, {'∞' if math.isinf(c.strength) else f'{c.strength:g}'}" for c in chosen)
                gain = chosen[0].gain.text(signed=True, decimals=3)
                label = name + ("" if labels == "given" else f", labels {labels}")
                lines.append([label, *(bootstrap.mean(column).text(decimals=3) for column in mean.T), told, gain])
        print(f"\n## {task}\n", *markdown_table(lines), sep="\n", flush=True)
        (options.out / f"overshoot-{task}.json").write_text(json.dumps(lines, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
