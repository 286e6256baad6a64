"""Tastes over real answers: python -m benchmarks.studies.tastes --out runs/tastes (needs PFM_DATA).

Answers of weak generators to real prompts, and three criteria of them: GPT-4's preference, brevity, and a formal manner
measured on the surface of the text. Simulated raters hold one criterion each and err in one vote of ten; what they hold
is hidden. Prompts are split, and everything is judged on test prompts by the criteria themselves.

Measured, for several seeds:

- groups: does EM find who holds what; the gain in log loss on the raters' held-out votes over one model of all raters,
  and the same with the raters' names shuffled;
- few votes: how a new rater's test pairs are ordered after 1 to 20 votes, by the adapted mixture, by one model of all,
  by a model of these votes alone, and by the model of its criterion (what knowing the criterion would give);
- composition: flows fitted for each criterion alone, and choices among candidates by their composed b: what every
  weighting reaches by each criterion, and what those do that were best for the worst-off criterion and on average on
  the other half of the test prompts, beside one flow fitted on all raters' votes.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.config import AlpacaConfig
from benchmarks.tasks.alpaca import load
from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.encoders import SurfaceEncoder, encoder_from_name
from pfm.flow.composition import Composition, simplex
from pfm.preferences import BradleyTerry
from pfm.tastes import TasteMixture

__all__ = ["CRITERIA", "Answers", "main", "measure"]

logger = logging.getLogger(__name__)

CRITERIA = ("GPT-4", "brevity", "formality")
RATERS, VOTES, ERRORS = 60, 40, 0.1
NEW_RATERS, FEW = 30, (1, 5, 10, 20)
PAIRS_A_CRITERION = 2400
CANDIDATES = 8
LATTICE, COARSE = 21, 6  # values of a weight, in choices and in transports
MOVED = 256


@dataclass(frozen=True)
class Answers:
    """Holds the answers of some prompts: vectors (M, D), prompt (M,) and each criterion's values (M, 3)."""

    vectors: Tensor
    prompt: NDArray[np.int64]
    values: NDArray[np.float64]

    def pairs(self, count: int, criterion: NDArray[np.int64], rng: np.random.Generator, errors: float) -> EncodedPairs:
        """Draw ``count`` pairs of two answers of one prompt, each labelled by its own ``criterion`` (count,)."""
        first, second = self._two(count, criterion, rng)
        rows = np.arange(count)
        better = self.values[first, criterion[rows]] > self.values[second, criterion[rows]]
        better ^= rng.random(count) < errors
        chosen, rejected = np.where(better, first, second), np.where(better, second, first)
        return EncodedPairs.from_table(
            self.vectors,
            torch.from_numpy(chosen),
            torch.from_numpy(rejected),
            group=torch.from_numpy(self.prompt[first]),
        )

    def _two(
        self, count: int, criterion: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        members = [np.flatnonzero(self.prompt == name) for name in np.unique(self.prompt)]
        first, second = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for row in range(count):
            while True:
                one, other = rng.choice(members[rng.integers(len(members))], 2, replace=False)
                if self.values[one, criterion[row]] != self.values[other, criterion[row]]:
                    break
            first[row], second[row] = one, other
        return first, second


def load_answers(seed: int) -> tuple[Answers, Answers, dict[str, Any]]:
    """Load training and test answers, encoded."""
    task = load(AlpacaConfig("alpaca", candidates=CANDIDATES), seed)
    encoder = encoder_from_name("minilm+surface", long_texts="truncate")
    train = [
        (entry.prompt, text, float(score))
        for entry in task.train.candidates
        for text, score in zip(entry.texts, entry.scores, strict=True)
    ]
    test = [
        (item.prompt, text, float(score))
        for item in task.items
        for text, score in zip(item.candidates, item.scores, strict=True)
    ]
    sets = [_answers(rows, encoder) for rows in (train, test)]
    spread = sets[0].values.std(0)
    scaled = [Answers(part.vectors, part.prompt, part.values / spread) for part in sets]
    return scaled[0], scaled[1], {"encoder": encoder.describe()}


def _answers(rows: Sequence[tuple[Any, str, float]], encoder: Any) -> Answers:
    texts = [text for _, text, _ in rows]
    surface = SurfaceEncoder()
    measured = surface.encode(texts).numpy().astype(np.float64)
    column = {name: measured[:, place] for place, name in enumerate(surface.feature_names)}
    informal = column["first_person"] + column["second_person"] + column["exclamations"] + column["questions"]
    names = {name: number for number, name in enumerate(dict.fromkeys(prompt for prompt, _, _ in rows))}
    values = np.stack(
        [np.array([score for _, _, score in rows]), -column["words"], column["word_length"] - informal], axis=1
    )
    return Answers(
        encoder.encode(texts, progress=False).float(), np.array([names[prompt] for prompt, _, _ in rows]), values
    )


def measure(seed: int, progress: bool = False) -> dict[str, Any]:
    """Measure everything for one seed; JSON values."""
    train, test, _ = load_answers(seed)
    rng = np.random.default_rng(seed)
    return {
        "seed": seed,
        **_groups_and_few_votes(train, test, rng, seed),
        **_compositions(train, test, rng, seed, progress),
    }


# -- groups and few votes --------------------------------------------------------------------------------------------


def _groups_and_few_votes(train: Answers, test: Answers, rng: np.random.Generator, seed: int) -> dict[str, Any]:
    def component() -> BradleyTerry:
        return BradleyTerry(1e-3)

    holds = np.arange(RATERS) % len(CRITERIA)
    raters = np.repeat(np.arange(RATERS), VOTES)
    votes = train.pairs(len(raters), holds[raters], rng, ERRORS)
    mixture = TasteMixture(len(CRITERIA), component, seed=seed).fit(votes, torch.from_numpy(raters))
    shuffled = TasteMixture(len(CRITERIA), component, seed=seed, confirm=False).fit(votes, rng.permutation(raters))
    pooled = component().fit(votes)
    known = TasteMixture.of_groups(votes, holds[raters], component=component)
    judged = {
        number: test.pairs(1500, np.full(1500, number), rng, 0.0).gather(torch.arange(1500))
        for number in range(len(CRITERIA))
    }

    def right(model: Any, number: int) -> float:
        batch = judged[number]
        return float((model.score(batch.chosen, batch.rejected) > 0).double().mean())

    curve: dict[str, Any] = {name: {str(n): [] for n in FEW} for name in ("adapted", "alone")}
    for rater in range(NEW_RATERS):
        number = rater % len(CRITERIA)
        own = train.pairs(max(FEW), np.full(max(FEW), number), rng, ERRORS)
        for count in FEW:
            few = own.select(torch.arange(count))
            curve["adapted"][str(count)].append(right(mixture.adapt(few), number))
            curve["alone"][str(count)].append(right(component().fit(few), number))
    curve = {name: {n: float(np.mean(found)) for n, found in by.items()} for name, by in curve.items()}
    return {
        "groups": {
            "tastes": len(mixture.models),
            "agreement": _agreement(mixture, holds),
            "gain": mixture.found["gain"], "z": mixture.found["z"],
            "gain_shuffled": shuffled.found["gain"], "z_shuffled": shuffled.found["z"],
            "prior": list(mixture.prior),
        },
        "few_votes": {
            **curve,
            "pooled": float(np.mean([right(pooled, number) for number in range(len(CRITERIA))])),
            "known": float(np.mean([right(known.models[number], number) for number in range(len(CRITERIA))])),
        },
    }  # fmt: skip


def _agreement(mixture: TasteMixture, holds: NDArray[np.int64]) -> float:
    """Return the share of raters in whose taste their criterion is the commonest, chance about 0.4."""
    found = mixture.responsibilities.argmax(1).numpy()
    right = sum(np.bincount(holds[found == taste]).max(initial=0) for taste in range(len(mixture.models)))
    return float(right / len(holds))


# -- composition -----------------------------------------------------------------------------------------------------


def _compositions(train: Answers, test: Answers, rng: np.random.Generator, seed: int, progress: bool) -> dict[str, Any]:
    config = FlowConfig(residual=False, seed=seed)
    parts = [
        train.pairs(PAIRS_A_CRITERION, np.full(PAIRS_A_CRITERION, number), rng, ERRORS)
        for number in range(len(CRITERIA))
    ]
    flows = [PreferenceFlow.fit(part, config, progress=progress) for part in parts]
    mixed = np.arange(PAIRS_A_CRITERION * len(CRITERIA)) % len(CRITERIA)  # as many votes as the others have together
    pooled = PreferenceFlow.fit(train.pairs(len(mixed), mixed, rng, ERRORS), config, progress=progress)
    composed = Composition(flows, torch.full((len(CRITERIA),), 1 / len(CRITERIA)), CRITERIA)
    lattice, coarse = simplex(len(CRITERIA), LATTICE), simplex(len(CRITERIA), COARSE)
    each = torch.stack([flow.win_probability(test.vectors) for flow in flows], dim=1)
    reached = np.stack([_chosen(test, each @ weights) for weights in lattice])  # (weightings, prompts, criteria)
    # How far the displacements of held-out answers are the weighted sums of what the flows do alone.
    some = test.vectors[:MOVED]
    moved = composed.transport(some) - some
    parts_moved = torch.stack([flow.transport(some) - some for flow in flows]).mean(0)
    # Judges of moved vectors, for which there is no text: reward models of the criteria, from test prompts.
    judges = [BradleyTerry(1e-3).fit(test.pairs(2000, np.full(2000, n), rng, 0.0)) for n in range(len(CRITERIA))]
    against = test.vectors[torch.from_numpy(rng.permutation(len(test.vectors))[:512])]
    traded = composed.trade_off(
        some, weights=coarse,
        judges=[lambda y, context, judge=judge: judge.win_probability(y, against) for judge in judges],
    )  # fmt: skip
    return {
        "criteria": list(CRITERIA),
        "weights": lattice.tolist(),
        "selection": reached.mean(1).tolist(),
        "maxmin": _elsewhere(reached, lambda means: means.min(1)),
        "average": _elsewhere(reached, lambda means: means.mean(1)),
        "pooled": _chosen(test, pooled.win_probability(test.vectors)).mean(0).tolist(),
        "oracle": [_chosen(test, torch.from_numpy(test.values[:, n])).mean(0)[n].item() for n in range(len(CRITERIA))],
        "transport_weights": coarse.tolist(),
        "transport": traded.win.tolist(),
        "transport_pooled": [float(judge.win_probability(pooled.transport(some), against).mean()) for judge in judges],
        "sum_of_parts_error": float((moved - parts_moved).norm() / parts_moved.norm()),
    }  # fmt: skip


def _elsewhere(
    reached: NDArray[np.float64], merit: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> list[float]:
    """Choose the weighting of most merit on every other prompt, and give what it reaches (3,) on those between."""
    found = []
    for half in (0, 1):
        best = int(merit(reached[:, half::2].mean(1)).argmax())
        found.append(reached[best, 1 - half :: 2].mean(0))
    return np.mean(found, axis=0).tolist()


def _chosen(test: Answers, score: Tensor) -> NDArray[np.float64]:
    """Choose by the largest score within each prompt; give the share (prompts, 3) of its other answers then beaten."""
    shares = []
    for name in np.unique(test.prompt):
        members = np.flatnonzero(test.prompt == name)
        best = members[int(score[torch.from_numpy(members)].argmax())]
        others = members[members != best]
        difference = test.values[best] - test.values[others]
        shares.append((0.5 + 0.5 * np.sign(difference)).mean(0))
    return np.stack(shares)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what the weightings of every two criteria reach, means over seeds, with the pooled flow beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    weights = np.array(results[0]["weights"])
    reached = np.mean([result["selection"] for result in results], axis=0)
    pooled = np.mean([result["pooled"] for result in results], axis=0)
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), constrained_layout=True)
    for axes, (one, other) in zip(panels, ((0, 1), (0, 2), (1, 2)), strict=True):
        axes.plot(reached[:, one], reached[:, other], ".", color="0.7", label="all weightings")
        edge = np.flatnonzero(weights[:, [one, other]].sum(1) > 1 - 1e-6)
        edge = edge[np.argsort(weights[edge, one])]
        axes.plot(reached[edge, one], reached[edge, other], "o-", markersize=4, label="these two only")
        axes.plot(pooled[one], pooled[other], "x", color="tab:red", label="one flow of all raters")
        best = reached.min(1).argmax()
        axes.plot(reached[best, one], reached[best, other], "s", color="black", fillstyle="none", label="MaxMin")
        axes.axhline(0.5, color="0.9", zorder=0)
        axes.axvline(0.5, color="0.9", zorder=0)
        axes.set_xlabel(f"answers beaten by {CRITERIA[one]}")
        axes.set_ylabel(f"answers beaten by {CRITERIA[other]}")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def summary(results: Sequence[dict[str, Any]]) -> str:
    """Write the figures as a few lines, means over seeds with their range."""

    def over(*path: Any) -> str:
        values = []
        for result in results:
            found: Any = result
            for key in path:
                found = found[key]
            values.append(float(found))
        return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    reached = np.array([result["selection"] for result in results]).mean(0)
    pooled = np.array([result["pooled"] for result in results]).mean(0)
    maxmin, average = (np.array([result[name] for result in results]).mean(0) for name in ("maxmin", "average"))
    weights = results[0]["weights"]
    lines = [
        f"{len(results)} seeds",
        f"raters whose taste EM found      {over('groups', 'agreement')}",
        f"gain in held-out log loss        {over('groups', 'gain')}, shuffled names {over('groups', 'gain_shuffled')}",
        f"pairs of a new rater, pooled     {over('few_votes', 'pooled')}",
        *(
            f"  {count:>2} votes: adapted {over('few_votes', 'adapted', str(count))}, alone "
            f"{over('few_votes', 'alone', str(count))}"
            for count in FEW
        ),
        f"  criterion known                {over('few_votes', 'known')}",
        "answers beaten by " + ", ".join(CRITERIA),
        *(
            f"  {name:<28} {np.round(row, 3).tolist()}, worst {min(row):.3f}, average {np.mean(row):.3f}"
            for name, row in (
                ("one flow of all raters", pooled),
                *((f"{CRITERIA[n]} alone", reached[weights.index(np.eye(3)[n].tolist())]) for n in range(3)),
                ("weights best for the worst", maxmin),
                ("weights best on average", average),
            )
        ),
        f"composed displacement against the sum of its parts, relative error {over('sum_of_parts_error')}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure all seeds and write results.json, summary.txt and trade_off.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tastes"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = [measure(seed) for seed in range(arguments.seeds)]
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = summary(results)
    (arguments.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    plot(results, arguments.out / "trade_off.png")
    print(text)


if __name__ == "__main__":
    main()
