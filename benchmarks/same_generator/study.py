"""Every baseline at equal calls and at equal tokens: python -m benchmarks.same_generator.study [--seeds 3].

Reads what :mod:`benchmarks.same_generator.sample` and :mod:`benchmarks.same_generator.rivals` have drawn; a rival that
was not drawn is left out. The expected score of the best of m of a prompt's samples by a rule is exact
(:func:`pfm.evaluation.best_of_curve`); between two whole numbers it is interpolated. Every prompt is tested by the fits
that have not seen it, once for every three seeds. Intervals are over prompts, and differences are paired by prompt.

Prints for each part and encoder one table of rules with calls, tokens, score and the share of the gap closed between
one draw and the oracle's pick of 8, and one table of the kinds of instruction. Fits are kept.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.data import MissingDataError
from benchmarks.core.tables import markdown_table
from benchmarks.same_generator.models import FLOWS, kept_fit, split
from benchmarks.same_generator.scored import FOLDS, PARTS, SENTIMENT, Scored, load_scored, plain_samples
from pfm._internal.files import replace_json
from pfm.evaluation import best_of_curve
from pfm.statistics import Bootstrap

__all__ = ["CALLS", "Found", "figures", "kinds", "main", "table"]

Array = NDArray[np.float64]
Rates = dict[str, dict[str, list[float]]]  # rule -> prompt, or prompt and rival -> worth of each text

CALLS = 8  # of the model for one answer
RIVALS = ("few_shot", "ratings", "rewrites")
BASE, FLOW = "best of 8 by Bradley–Terry", "best of 8 by the flow's b"
LEARNED = {
    "bradley_terry": "Bradley–Terry",
    "flow": "the flow's b",
    "shuffled": "b, labels shuffled (control)",
    "swapped": "b, labels swapped (control)",
}


@dataclass
class Found:
    """Collects what a rule reached: lists of (score, calls, tokens) by prompt."""

    rows: dict[str, list[tuple[float, float, float]]] = field(default_factory=lambda: defaultdict(list))

    def means(self, names: Sequence[str]) -> Array:
        """Return the mean over seeds (P, 3) of some prompts."""
        return np.array([np.mean(self.rows[name], axis=0) for name in names])


def _at(curve: Array, draws: float) -> float:
    """Read a curve of the best of 1, 2, ... at a number of draws, between two by both in proportion."""
    return float(np.interp(draws, np.arange(1, len(curve) + 1), curve))


def figures(row: Scored, rates: Rates, rivals: dict[str, dict[str, Scored]]) -> dict[str, tuple[float, float, float]]:
    """Return score, calls and tokens of every rule on one prompt.

    Args:
        row: the plain samples. rates: of their texts, by ``bradley_terry``, ``flow`` and, under the name of a rival
            before a colon, of the rival's. rivals: what they drew, by rival and prompt.
    """
    scores, one = row.scores, row.sample.tokens
    budget = CALLS * one
    lengths = [float(len(text)) for text in row.texts]
    found = {"one draw": (float(scores.mean()), 1.0, one)}

    def best_of(label: str, worth: Sequence[float] | Array, scored: Array = scores) -> None:
        found[f"best of {CALLS} by {label}"] = (_at(best_of_curve(worth, scored), CALLS), float(CALLS), budget)

    best_of("length, longest", lengths)
    best_of("length, shortest", [-length for length in lengths])
    for rule, label in LEARNED.items():
        if row.name in rates.get(rule, {}):
            best_of(label, rates[rule][row.name])
    if row.sample.kind == SENTIMENT:
        best_of("the labels' own judge", row.labels)
    best_of("the scores (oracle)", scores)
    rated = rivals.get("ratings", {}).get(row.name)
    if rated is not None:
        curve = best_of_curve(rated.sample.extra["log_odds"], scores[: len(rated.texts)])
        price = one + rated.sample.tokens
        found["self-rating, 8 calls"] = (_at(curve, CALLS / 2), float(CALLS), CALLS / 2 * price)
        draws = max(budget / price, 1.0)
        found["self-rating, equal tokens"] = (_at(curve, draws), 2 * draws, draws * price)
    shown = rivals.get("few_shot", {}).get(row.name)
    if shown is not None:
        price, number = shown.sample.tokens, len(shown.texts)
        found["few-shot, one draw"] = (float(shown.scores.mean()), 1.0, price)
        worth = rates.get("few_shot:flow", {}).get(row.name)
        if worth is not None:
            curve, draws = best_of_curve(worth, shown.scores), min(max(budget / price, 1.0), float(number))
            found["few-shot, then b, equal tokens"] = (_at(curve, draws), draws, draws * price)
            found[f"few-shot, then b, best of {number}"] = (float(curve[-1]), float(number), number * price)
    if row.name in rates.get("rewrites:flow", {}):
        found |= _rewritten(row, rates, rivals["rewrites"][row.name])
    return found


def _rewritten(row: Scored, rates: Rates, rewritten: Scored) -> dict[str, tuple[float, float, float]]:
    """Let b choose among the first plain samples and rewrites of the best of three of them."""
    found = {}
    calls = rewritten.sample.extra.get("rewrites", 2)
    each = rewritten.sample.prompt_tokens + rewritten.sample.completion_tokens / calls
    for label, draws, rewrites in (("rewriting, 8 calls", CALLS - calls, calls), ("rewriting, 3 draws and 1", 3, 1)):
        worth = [*rates["flow"][row.name][:draws], *rates["rewrites:flow"][row.name][:rewrites]]
        scores = np.concatenate([row.scores[:draws], rewritten.scores[:rewrites]])
        tokens = draws * row.sample.tokens + rewrites * each
        found[label] = (float(best_of_curve(worth, scores)[-1]), float(draws + rewrites), tokens)
    return found


def table(found: dict[str, Found]) -> list[list[str]]:
    """Write one line a rule: calls, tokens, score, gap closed, and what the flow's best of 8 has above it."""
    lines = [["rule", "calls", "tokens", "score", "gap closed", "flow's b minus it, points", "prompts"]]
    oracle = found[f"best of {CALLS} by the scores (oracle)"]
    for label, rows in found.items():
        names = [name for name in rows.rows if rows.rows[name]]
        score, calls, tokens = rows.means(names).T
        random, best, flow = (other.means(names)[:, 0] for other in (found["one draw"], oracle, found[FLOW]))
        bootstrap = Bootstrap(len(names))
        gap = bootstrap.ratio(score - random, best - random)
        minus = "–" if label == FLOW else bootstrap.mean(100 * (flow - score)).text(signed=True, decimals=1)
        lines.append([
            label, f"{calls.mean():.1f}", f"{tokens.mean():.0f}", bootstrap.mean(score).text(percent=True),
            "–" if gap is None else gap.text(percent=True),
            minus, str(len(names)),
        ])  # fmt: skip
    return lines


def kinds(rows: Sequence[Scored], found: dict[str, Found]) -> list[list[str]]:
    """Write one line a kind of instruction: share of answers that pass, mean score, and what choosing adds."""
    lines = [["kind", "pass", "one draw", "Bradley–Terry", "flow's b", "oracle"]]
    labels = ("one draw", BASE, FLOW, "best of 8 by the scores (oracle)")
    for kind in dict.fromkeys(row.sample.kind for row in rows):
        names = [row.name for row in rows if row.sample.kind == kind]
        passed = np.mean([(row.scores > 1 - 1e-9).mean() for row in rows if row.sample.kind == kind])
        means = [found[label].means(names)[:, 0].mean() for label in labels]
        lines.append([kind, f"{passed:.0%}", *(f"{100 * mean:.0f}%" for mean in means)])
    return lines


def _rates(train: Sequence[Scored], test: Sequence[Scored], drawn: dict[str, list[Scored]], encoder: str, seed: int,
           labels: str, folder: Path) -> Rates:  # fmt: skip
    """Fit on the training prompts, and rate all texts of the tested ones; a fit that is kept in ``folder`` is read."""
    texts = {"": [(row.name, row.sample.prompt, row.texts) for row in test]}
    texts |= {rival: [(row.name, row.sample.prompt, row.texts) for row in rows] for rival, rows in drawn.items()}
    fitted = kept_fit(train, encoder, seed, labels, folder)
    rates: Rates = defaultdict(dict)
    for rival, rows in texts.items():
        for name, prompt, answers in rows:
            for rule, worth in fitted.rate(prompt, answers).items():
                rates[f"{rival}:{rule}" if rival else rule][name] = worth.tolist()
    return rates


def measure(part: str, encoder: str, seeds: int, samples: Path, flows: Path,
            advance: Callable[[], Any]) -> tuple[list[Scored], dict[str, Found]]:  # fmt: skip
    """Test every prompt of a part once for every three seeds; baselines by seeds 0 to 2, for which they were drawn."""
    rows = plain_samples(samples, part)
    of_rival = {name: {row.name: row for row in _read(samples, part, name)} for name in RIVALS}
    found: dict[str, Found] = defaultdict(Found)
    for seed in range(seeds):
        train, test = split(rows, seed)
        rivals = of_rival if seed < FOLDS else {}
        drawn = {
            name: [rivals[name][row.name] for row in test if row.name in rivals[name]]
            for name in ("few_shot", "rewrites") if name in rivals
        }  # fmt: skip
        rates = _rates(train, test, drawn, encoder, seed, "given", flows)
        advance()
        for labels in ("shuffled", "swapped") if seed < FOLDS else ():
            rates[labels] = _rates(train, test, {}, encoder, seed, labels, flows)["flow"]
            advance()
        for row in test:
            for label, reached in figures(row, rates, rivals).items():
                found[label].rows[row.name].append(reached)
    return rows, found


def _read(samples: Path, part: str, name: str) -> list[Scored]:
    try:
        return [row for row in load_scored(samples, part, name) if row.texts]
    except MissingDataError:
        return []


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and keep them as JSON."""
    from tqdm.auto import tqdm

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_generator.study", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--samples", type=Path, default=Path("runs/same_generator/samples"))
    parser.add_argument("--out", type=Path, default=Path("runs/same_generator/study"), help="folder of the tables")
    parser.add_argument("--flows", type=Path, default=FLOWS, help="folder in which fits are kept")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--encoders", nargs="+", default=["minilm+surface", "static+surface"])
    parser.add_argument("--seeds", type=int, default=FOLDS, help="of splits and fits: three test every prompt once")
    options = parser.parse_args(arguments)
    if options.seeds < FOLDS:
        parser.error(f"--seeds must be at least {FOLDS}, so that every prompt is tested: got {options.seeds}")
    try:
        for part in options.parts:
            plain_samples(options.samples, part)
    except (MissingDataError, ValueError) as error:
        parser.error(str(error))
    fits = len(options.parts) * len(options.encoders) * (options.seeds + 2 * FOLDS)
    with tqdm(total=fits, unit="fit") as bar:
        for part in options.parts:
            for encoder in options.encoders:
                rows, found = measure(part, encoder, options.seeds, options.samples, options.flows, bar.update)
                lines = {"table": table(found), "kinds": kinds(rows, found)}
                bar.write(f"\n## {part}, {encoder}: {len(rows)} prompts, {options.seeds} seeds\n")
                for each in lines.values():
                    bar.write("\n".join(markdown_table(each)) + "\n")
                options.out.mkdir(parents=True, exist_ok=True)
                replace_json(options.out / f"table-{part}-{encoder}.json", lines)


if __name__ == "__main__":
    main()
