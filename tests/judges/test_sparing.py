"""A judge that is asked less often: pivots, one order, sure pairs and their audit; and recorded verdicts of GPT-4."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import numpy as np
import pytest
from support.letters import LetterEncoder, LinearFlow

from pfm.errors import GenerationError
from pfm.judges import Comparison, Judge, LLMJudge, ScriptedJudge, SparingJudge, Verdict, pair_probability

TEXTS = ["a", "bbb", "cc", "ddddd", "eeee", "ffffffff", "gggggg", "hhhhhhh"]
LONGER = ScriptedJudge(lambda prompt, text: len(text))


def guess(right: float):
    """Return a model that favours the longer text with probability ``right``; below one half it is wrong."""
    return lambda pairs: [right if len(pair.first) > len(pair.second) else 1 - right for pair in pairs]


class Leaning(Judge):
    """Prefers the longer text, and what is shown in one place where the lengths differ by less than two."""

    name = "leaning"

    def __init__(self, lean: str = "first") -> None:
        self.lean, self.both_orders, self.questions = lean, True, [0]

    def compare(self, comparisons):
        found = []
        for prompt, first, second in comparisons:
            shares = [self._one(first, second)]
            if self.both_orders:
                shares.append(1 - self._one(second, first))
            self.questions[0] += len(shares)
            found.append(Verdict(float(np.mean(shares))))
            assert prompt
        return found

    def _one(self, first: str, second: str) -> float:
        if abs(len(first) - len(second)) >= 2:
            return float(len(first) > len(second))
        return float(self.lean == "first")

    def describe(self):
        return {"type": "Leaning"}


@pytest.mark.parametrize("right", [0.5, 0.8, 0.2])
def test_pivots_find_the_best_with_one_comparison_less_than_there_are_texts(right):
    for order in range(20):
        texts = random.Random(order).sample(TEXTS, len(TEXTS))
        judge = SparingJudge(LONGER, guess(right))
        found = judge.pick("p", texts)
        assert texts[found.index] == "ffffffff"
        assert judge.tally.pairs == judge.tally.questions == 7
        assert not found.left


def test_one_text_and_equal_texts_need_no_question():
    judge = SparingJudge(LONGER, guess(0.7))
    assert judge.pick("p", ["only"]).index == 0
    assert judge.pick("p", ["same", "same "]).index == 0 or judge.tally.pairs
    assert judge.pick("p", ["same", "same", "same"]).index == 0
    with pytest.raises(ValueError, match="at least one text"):
        judge.pick("p", [])


@pytest.mark.parametrize("lean", ["first", "second"])
def test_the_second_order_is_asked_for_only_where_it_can_turn_the_verdict(lean):
    pairs = [Comparison(f"p{n}", *pair) for n, pair in enumerate(itertools.permutations(TEXTS, 2))]
    plain, leaning = Leaning(lean), Leaning(lean)
    judge = SparingJudge(leaning, guess(0.7))
    expected, found = plain.compare(pairs), judge.compare(pairs)
    assert [verdict.probability for verdict in found] == [verdict.probability for verdict in expected]
    assert leaning.questions[0] == judge.tally.questions < 0.75 * plain.questions[0]


def test_a_model_that_is_wrong_costs_questions_and_no_verdict():
    pairs = [Comparison("p", *pair) for pair in itertools.combinations(TEXTS, 2)]
    costs = []
    for right in (0.7, 0.3):
        leaning = Leaning()
        found = SparingJudge(leaning, guess(right)).compare(pairs)
        assert [v.probability for v in found] == [v.probability for v in Leaning().compare(pairs)]
        costs.append(leaning.questions[0])
    assert costs[0] < costs[1]


def test_sure_pairs_are_left_to_the_model_and_audits_count_its_errors():
    pairs = [Comparison(f"p{n}", "x" * n, "y" * (n + 1)) for n in range(1, 401)]
    wrong = SparingJudge(LONGER, guess(0.05), sure=0.9, audit=0.25)
    found = wrong.compare(pairs)
    tally = wrong.tally
    assert tally.left + tally.audited == 400
    assert 60 < tally.audited < 140
    assert tally.wrong == tally.audited
    assert sum(verdict.by_model for verdict in found) == tally.left
    assert tally.error_rate is not None
    assert tally.error_rate[0] == 1
    assert 0.9 < tally.error_rate[1] < 1
    right = SparingJudge(LONGER, guess(0.95), sure=0.9, audit=0.25)
    right.compare(pairs)
    assert (right.tally.wrong, right.tally.audited) == (0, tally.audited)  # the same pairs, by their texts
    assert SparingJudge(LONGER, guess(0.95), sure=0.9, audit=0.0).tally.error_rate is None
    never = SparingJudge(LONGER, guess(0.99), sure=1.0)
    never.compare(pairs)
    assert never.tally.left == 0


def test_labels_are_the_judges_alone():
    rows = [{"prompt": f"p{n}", "candidates": TEXTS[:4]} for n in range(5)]
    judge = SparingJudge(
        LONGER, lambda pairs: [0.99 if "a" in pair[1:] else 0.6 for pair in pairs], sure=0.9, audit=0.0
    )
    labelled = judge.label(rows)
    assert len(labelled) == 5 * 3
    assert all("a" not in (row["chosen"], row["rejected"]) for row in labelled)


def test_what_the_model_cannot_say_and_what_the_judge_does_not():
    odd = SparingJudge(LONGER, lambda pairs: [float("nan")] * len(pairs), sure=0.6)
    assert odd.pick("p", TEXTS).index == 5
    with pytest.raises(ValueError, match="one number a comparison"):
        SparingJudge(LONGER, lambda pairs: [0.5]).pick("p", TEXTS)
    silent = LLMJudge(lambda prompt: "I cannot say.")
    with pytest.raises(GenerationError, match="no verdict"):
        SparingJudge(silent, guess(0.5)).pick("p", TEXTS)
    assert not SparingJudge(silent, guess(0.5)).compare([Comparison("p", "a", "b")] * 20)[-1].given
    wrong: list[dict[str, Any]] = [{"sure": 0.5}, {"sure": 1.1}, {"audit": -0.1}]
    for settings in wrong:
        with pytest.raises(ValueError, match="must be a"):
            SparingJudge(LONGER, guess(0.5), **settings)
    with pytest.raises(TypeError, match="compare"):
        SparingJudge(lambda prompt, texts: [1.0], guess(0.5))  # pyright: ignore[reportArgumentType]


def test_a_language_model_is_asked_in_one_order_with_the_same_tally():
    def model(prompt: str) -> str:
        a, b = (prompt.index(text) if text in prompt else 10**9 for text in ("the better", "the worse"))
        return "VERDICT: A" if a < b else "VERDICT: B"

    inner = LLMJudge(model)
    judge = SparingJudge(inner, lambda pairs: [0.8 if "better" in pair.first else 0.2 for pair in pairs])
    verdicts = judge.compare([Comparison(f"p{n}", "the better", "the worse") for n in range(30)])
    assert [verdict.probability for verdict in verdicts] == [1.0] * 30
    assert judge.tally.questions == inner.tally.calls == 2 * 8 + 22
    assert inner.both_orders  # its own way is as it was
    judge.reasoning = "keep"
    assert inner.reasoning == "keep"
    json.dumps(judge.describe())


def test_the_flows_b_gives_the_probability_of_a_pair():
    probability = pair_probability(LinearFlow(), LetterEncoder())
    pairs = [
        Comparison("p", "xa", "x"),
        Comparison("p", "x", "xa"),
        Comparison("p", "xa", "ya"),
        Comparison("p", " ", "x"),
    ]
    found = probability(pairs)
    assert found[0] == pytest.approx(1 / (1 + np.exp(-2)))  # its log-odds are 2 a letter a
    assert found[0] + found[1] == pytest.approx(1)
    assert found[2:] == pytest.approx([0.5, 0.5])
    assert probability([]) == []
