"""How many questions a judge needs: python -m benchmarks.studies.judge_calls [--seeds 3].

QLoRA's tournament holds GPT-4's verdict on every two of eight systems' answers to 80 prompts, in both orders: 56
questions a prompt. The best answer by all of them is the reference. :class:`pfm.judges.SparingJudge` replays these
verdicts, asked by a preference model that was fitted on the other prompts (four folds). Reported are the share of
prompts with the same pick, how much of the reference's score the pick loses, the questions, and how often the model is
wrong where it decides alone. Ties of the reference count as the same pick. Intervals are over prompts.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.core.data import data_folder, read_csv, read_jsonl
from benchmarks.core.tables import markdown_table
from benchmarks.preference.config import QloraConfig
from benchmarks.studies.candidate_pools import ensemble
from benchmarks.tasks import qlora
from pfm import PreferencePairs
from pfm.encoders import encoder_from_name
from pfm.judges import Comparison, Judge, SparingJudge, Verdict
from pfm.statistics import Bootstrap

__all__ = ["RecordedJudge", "Rule", "Tournament", "main", "picks", "tournaments"]

Array = NDArray[np.float64]

SHARES = {"1": 1.0, "2": 0.0, "3": 0.5}
FOLDS = 4


@dataclass(frozen=True)
class Tournament:
    """Holds the answers to one prompt, and the verdicts on them.

    Attributes:
        group, prompt: its name and its text. answers: n different texts.
        verdicts: (n, n) share of the row's answer where it was shown first; NaN where it could not be read.
    """

    group: str
    prompt: str
    answers: list[str]
    verdicts: Array

    def scores(self) -> Array:
        """Return each answer's mean share over all pairs, both orders averaged (n,)."""
        both = (self.verdicts + 1 - self.verdicts.T) / 2
        return np.nanmean(both, axis=1)


def tournaments() -> list[Tournament]:
    """Read all prompts."""
    folder = data_folder("qlora_tournament")
    found: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for row in read_csv(folder / "vicuna80_gpt4_pairwise.csv.gz"):
        found[row["prompt_id"]][row["first"], row["second"]] = SHARES.get(row["verdict"], np.nan)
    every = []
    for row in read_jsonl(folder / "vicuna80_outputs.jsonl.gz"):
        pairs = found[str(row["id"])]
        names = sorted({name for pair in pairs for name in pair})
        texts = list(dict.fromkeys(row["outputs"][name] for name in names))
        verdicts = np.full((len(texts), len(texts)), np.nan)
        for (first, second), share in pairs.items():
            i, j = (texts.index(row["outputs"][name]) for name in (first, second))
            if i != j:
                verdicts[i, j] = share
        every.append(Tournament(str(row["id"]), row["prompt"], texts, verdicts))
    return every


class RecordedJudge(Judge):
    """Gives the verdicts that were recorded, and counts the questions.

    Args:
        every: the tournaments. open: whether it may be asked in one order only (``both_orders``).
    """

    name = "GPT-4, recorded"

    def __init__(self, every: Sequence[Tournament], *, open: bool) -> None:
        self.of = {tournament.prompt: tournament for tournament in every}
        self.asked: list[tuple[int, int]] = []  # shared with the copy that asks in one order
        if open:
            self.both_orders = True

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        shares = []
        for prompt, first, second in comparisons:
            tournament = self.of[str(prompt)]
            i, j = tournament.answers.index(first), tournament.answers.index(second)
            read = [tournament.verdicts[i, j]]
            if getattr(self, "both_orders", True):
                read.append(1 - tournament.verdicts[j, i])
            self.asked += [(i, j)] * len(read)
            shares.append(float(np.mean(read)))
        return [Verdict(0.5 if np.isnan(share) else share) for share in shares]  # unread: no evidence

    def describe(self) -> dict[str, Any]:
        return {"type": type(self).__name__}


def picks(every: Sequence[Tournament], odds: Mapping[str, Array], rule: Rule, seed: int) -> tuple[Array, float]:
    """Pick the best answer of each prompt with a model's log-odds (n, n) a prompt.

    Returns:
        (P, 5): same pick, score lost, questions, of how many, pairs left to the model; and the share of pairs that the
        model is sure of on which the judge says otherwise (NaN without any).
    """
    of = {tournament.prompt: tournament for tournament in every}
    order = {t.group: np.random.default_rng([seed, row]).permutation(len(t.answers)) for row, t in enumerate(every)}

    def probability(comparisons: Sequence[Comparison]) -> list[float]:
        found = []
        for prompt, first, second in comparisons:
            tournament = of[str(prompt)]
            i, j = tournament.answers.index(first), tournament.answers.index(second)
            value = odds[tournament.group][i, j]
            if rule.random:
                value = 1e-3 * float(order[tournament.group][i] - order[tournament.group][j])
            found.append(float(1 / (1 + np.exp(-value))))
        return found

    judge = RecordedJudge(every, open=rule.open)
    sparing = SparingJudge(judge, probability, sure=rule.sure, audit=0.0)
    rows = []
    for tournament in every:
        before, scores = len(judge.asked), tournament.scores()
        chosen, left = int((1 / (1 + np.exp(-odds[tournament.group]))).sum(1).argmax()), ()
        if not rule.alone:
            found = sparing.pick(tournament.prompt, tournament.answers)
            chosen, left = found.index, found.left
        best = np.nanmax(scores)
        asked, possible = len(judge.asked) - before, int(np.isfinite(tournament.verdicts).sum())
        rows.append((scores[chosen] >= best - 1e-9, best - scores[chosen], asked, possible, len(left)))
    audited = SparingJudge(RecordedJudge(every, open=False), probability, sure=rule.sure, audit=1.0)
    for tournament in every:
        audited.pick(tournament.prompt, tournament.answers)
    rate = audited.tally.error_rate
    return np.array(rows, dtype=np.float64), np.nan if rate is None else rate[0]


def folds(seed: int, labels: str) -> dict[str, Array]:
    """Fit on three quarters of the prompts, and give the log-odds (n, n) of the answers to the others, in turn."""
    encoder = encoder_from_name("minilm+surface", long_texts="truncate")
    rows = qlora.load(QloraConfig(name="qlora"), 0).rows
    every = tournaments()
    order = np.random.default_rng(seed).permutation([tournament.group for tournament in every])
    found: dict[str, Array] = {}
    for number in range(FOLDS):
        tested = set(order[number::FOLDS].tolist())
        lessons = [
            {"prompt": row.prompt, "chosen": (row.first, row.second)[row.share < 0.5],
             "rejected": (row.second, row.first)[row.share < 0.5], "probability": max(row.share, 1 - row.share)}
            for row in rows if row.group not in tested
        ]  # fmt: skip
        pairs = PreferencePairs.from_rows(lessons).encode(encoder, progress=False)
        model = ensemble().fit(pairs.shuffle_labels(seed) if labels == "shuffled" else pairs)
        for tournament in every:
            if tournament.group in tested:
                with torch.no_grad():
                    context = encoder.encode_prompts([tournament.prompt])[0]
                    found[tournament.group] = model.table(encoder.encode(tournament.answers), context).double().numpy()
    return found


@dataclass(frozen=True)
class Rule:
    """Says how to ask: ``alone`` not at all, ``random`` in random order, ``open`` a second time only where needed."""

    alone: bool = False
    random: bool = False
    open: bool = False
    sure: float = 1.0


RULES = {
    "the model alone": Rule(alone=True),
    "pivots in random order, both orders": Rule(random=True),
    "pivots in the model's order, both orders": Rule(),
    "the same, second order only where open": Rule(open=True),
    "the same, the model alone from 0.99 on": Rule(open=True, sure=0.99),
    "the same, from 0.95 on": Rule(open=True, sure=0.95),
    "the same, from 0.9 on": Rule(open=True, sure=0.9),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labels", nargs="+", choices=("given", "shuffled"), default=["given", "shuffled"])
    options = parser.parse_args()
    every = tournaments()
    bootstrap = Bootstrap(len(every))
    for labels in options.labels:
        odds = [folds(seed, labels) for seed in range(options.seeds)]
        lines = [
            ["rule", "same pick", "points lost", "questions of 56", "saved", "left to the model", "wrong of these"]
        ]
        for name, rule in RULES.items():
            found = [picks(every, of_seed, rule, seed) for seed, of_seed in enumerate(odds)]
            same, lost, asked, possible, left = np.mean([rows for rows, _ in found], axis=0).T
            saved = bootstrap.ratio(possible - asked, possible, (0.0, 1.0))
            lines.append([
                name, bootstrap.mean(same, (0.0, 1.0)).text(percent=True), bootstrap.mean(100 * lost).text(decimals=2),
                f"{asked.mean():.1f}", "–" if saved is None else saved.text(percent=True),
                f"{left.mean():.2f} a prompt",
                f"{np.mean([rate for _, rate in found]):.1%}" if rule.sure < 1 else "–",
            ])  # fmt: skip
        print(f"\n## qlora, labels {labels}\n", *markdown_table(lines), sep="\n", flush=True)


if __name__ == "__main__":
    main()
