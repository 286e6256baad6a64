"""Stopping rules: the mathematics of the threshold, the calibration and its refusals, and draws in waves."""

from __future__ import annotations

import asyncio
import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from support.letters import LetterEncoder, LinearFlow

from pfm.errors import BudgetError
from pfm.generators import Draw
from pfm.generators.base import GeneratesTexts
from pfm.refiner import Refinement, Stopping, calibrate, wrap
from pfm.refiner.calibration import Replays, thresholds
from pfm.refiner.stopping import Spend

GRID = (np.arange(4000) + 0.5) / 4000
UNIFORM = tuple((np.log(GRID) - np.log1p(-GRID)).tolist())  # sigmoid(r) is uniform


def known_level(waves: Any = 1, price: float = 0.01, max_n: int = 16, **more: Any) -> Stopping:
    """Return the rule for draws whose b is their quantile."""
    return Stopping(8, max_n, waves, price, 0.0, math.inf, UNIFORM, **more)


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("price", [0.001, 0.01, 2 / 81, 0.2])
def test_the_threshold_of_single_uniform_draws_is_one_minus_the_root_of_twice_the_price(price):
    u = 1 / (1 + math.exp(-known_level().threshold(1, 1, price)))
    assert u == pytest.approx(1 - math.sqrt(2 * price), abs=1e-3)


@pytest.mark.parametrize("wave", [1, 2, 4])
def test_the_gain_of_a_wave_is_that_of_its_maximum_over_the_best(wave):
    for t in (0.1, 0.5, 0.9):  # E[(max of w uniforms - t)+] = 1 - t - (1 - t^(w + 1)) / (w + 1)
        exact = 1 - t - (1 - t ** (wave + 1)) / (wave + 1)
        assert known_level().gain(math.log(t / (1 - t)), 3, wave) == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("wave", [1, 2, 4])
def test_the_threshold_is_the_inverse_of_the_gain_and_falls_with_the_price(wave):
    rule = Stopping(8, 16, wave, 0.01, 0.3, 2.0, tuple(np.sort(np.random.default_rng(0).normal(size=50)).tolist()))
    found = [rule.threshold(3, wave, price) for price in (0.001, 0.01, 0.05)]
    for price, lead in zip((0.001, 0.01, 0.05), found, strict=True):
        assert rule.gain(lead, 3, wave) == pytest.approx(wave * price, abs=1e-9)
    assert found == sorted(found, reverse=True)
    assert rule.threshold(3, wave, 10.0) == -math.inf  # never worth it
    assert rule.gain(rule.threshold(3, wave, 0.0), 3, wave) == pytest.approx(0, abs=1e-12)


def replayed_uniform(rule: Stopping, replays: int = 20_000) -> list[float]:
    """Return score, draws and waves of a rule whose price is known, on uniform draws."""
    u = np.random.default_rng(1).random((1, replays, rule.max_n))
    odds = np.log(u) - np.log1p(-u)
    best = np.maximum.accumulate(u, axis=2)
    lead = np.maximum.accumulate(odds, axis=2)
    pool = Replays(best, lead, odds, odds, np.array([rule.max_n - 1]), [odds[0, 0]], np.array([0.5]))
    return pool.stopped(pool.surplus(rule), thresholds(rule, rule.price))[0].tolist()


def test_single_draws_reach_the_quantile_of_best_of_n_with_half_of_n_plus_one_draws():
    # 1 - sqrt(2 price) = (n - 1) / (n + 1), the threshold above which uniform draws have the mean n / (n + 1)
    score, draws, rounds = replayed_uniform(known_level(price=2 / 81, max_n=20))
    missed = (7 / 9) ** 20  # the share that the cap ends
    assert score == pytest.approx((1 - missed) * 8 / 9 + missed * 7 / 9 * 20 / 21, abs=0.004)
    assert draws == rounds == pytest.approx(4.5 * (1 - missed), abs=0.05)  # (n + 1) / 2


def test_capped_at_twice_n_it_reaches_almost_the_same():
    score, draws, _ = replayed_uniform(known_level(price=2 / 81))
    assert score == pytest.approx(0.886, abs=0.003)  # best of 8: 8 / 9 = 0.889
    assert draws == pytest.approx(4.43, abs=0.06)


def test_calibrated_on_uniform_draws_it_saves_what_theory_says():
    rng = np.random.default_rng(0)
    b = [rng.random(64) for _ in range(40)]
    single = calibrate(b, b, waves=1, replays=100)
    assert single.refusal is None
    assert single.evidence["draws"] == pytest.approx(4.6, abs=0.35)  # 4.55 in the limit
    assert abs(single.evidence["difference"][0]) < 0.01
    pairs = calibrate(b, b, waves=2, replays=100)
    assert single.evidence["draws"] < pairs.evidence["draws"] < 5.4
    assert pairs.evidence["rounds"] < 2.8 < single.evidence["rounds"]


def test_rows_of_one_prompt_are_one_observation():
    rng = np.random.default_rng(0)
    b = [rng.random(24) for _ in range(20)]
    scores = [values + rng.normal(size=24) for values in b]
    names = list("abcdefghijklmnopqrst")

    def width(times: int, prompts: list[str] | None) -> float:
        found = calibrate(b * times, scores * times, replays=40, prompts=prompts).evidence
        assert found["prompts"] == (20 if prompts else 20 * times)
        return found["gain"][2] - found["gain"][1]

    once = width(1, None)
    assert width(1, names) == once
    assert width(9, names * 9) == pytest.approx(once, rel=0.2)
    assert width(9, None) < once / 2
    three = calibrate(b * 2, scores * 2, prompts=["a", "b", "c", "a"] * 10)
    assert "3 held-out prompts" in str(three.refusal)


# -- the level of b ---------------------------------------------------------------------------------------------------


def shifted(shift: float, seed: int = 0, prompts: int = 60) -> tuple[list[Any], list[Any]]:
    """Return b and scores of prompts where b is right up to a level of its own."""
    rng = np.random.default_rng(seed)
    quality = [rng.normal(size=40) for _ in range(prompts)]
    b = [1 / (1 + np.exp(-(q + shift * rng.normal()))) for q in quality]
    return b, quality


def test_the_prior_is_the_ratio_of_the_variances_within_and_between_prompts():
    assert calibrate(*shifted(0.0), replays=20).prior > 50
    assert calibrate(*shifted(1.0), replays=20).prior == pytest.approx(1, abs=0.4)
    assert calibrate(*shifted(2.0), replays=20).prior == pytest.approx(0.25, abs=0.12)


def test_the_prior_of_the_spread_is_large_where_prompts_spread_alike_and_small_where_they_do_not():
    rng = np.random.default_rng(4)
    alike, uneven = [], []
    for _ in range(80):
        quality = rng.normal(size=60)
        alike.append(1 / (1 + np.exp(-quality)))
        uneven.append(1 / (1 + np.exp(-quality * np.sqrt(8 / rng.chisquare(8)))))
    assert calibrate(alike, alike, replays=20).spread_prior > 40
    assert calibrate(uneven, uneven, replays=20).spread_prior == pytest.approx(8, abs=4)


def test_the_lead_shrinks_level_and_spread_towards_their_means():
    rule = Stopping(8, 16, (1,), 0.01, -1.0, 2.0, (-1.0, 1.0), spread=2.0, spread_prior=3.0)
    values = np.array([0.5, 1.5, -0.5])
    mean, squares = values.mean(), ((values - values.mean()) ** 2).sum()
    level = (2 * -1 + values.sum()) / 5
    variance = (3 * 4 + squares + 2 * 3 / 5 * (mean + 1) ** 2) / 6  # normal-inverse-chi-squared, its posterior scale
    assert rule.lead(1.5, mean, squares, 3) == pytest.approx((1.5 - level) * 2 / np.sqrt(variance))


def test_learning_the_level_saves_draws_where_trusting_it_does_not():
    learned, trusted = (calibrate(*shifted(1.0), waves=1, replays=60, prior=prior) for prior in (None, math.inf))
    assert learned.evidence["draws"] < trusted.evidence["draws"] - 0.5


# -- when the rule is refused -----------------------------------------------------------------------------------------


def test_a_b_that_knows_nothing_falls_back_to_the_fixed_number():
    rng = np.random.default_rng(3)
    b, scores = ([rng.random(40) for _ in range(40)] for _ in range(2))
    rule = calibrate(b, scores, replays=40)
    assert rule.refusal is not None
    assert "no gain of 8 draws" in rule.refusal
    plan = rule.plan()
    assert (plan.first, plan.decide([5.0] * 8, 8).ended) == (8, "fixed n")


def test_a_b_that_is_wrong_way_round_falls_back():
    b, quality = shifted(0.0)
    assert calibrate([1 - values for values in b], quality, replays=40).refusal is not None


def test_a_b_that_is_sure_where_draws_pay_and_unsure_where_they_do_not_saves_nothing():
    # One half of the prompts: b is right, spread widely, and stops early. The other half: noise about one half, where
    # every draw is in vain.
    rng = np.random.default_rng(5)
    b, scores = [], []
    for row in range(60):
        quality = rng.normal(size=40)
        told = 3 * quality if row % 2 else 0.3 * rng.normal(size=40)
        b.append(1 / (1 + np.exp(-told)))
        scores.append(quality)
    rule = calibrate(b, scores, replays=60)
    assert rule.refusal is not None or rule.evidence["draws"] > 7


def test_too_few_prompts_or_candidates_fall_back_and_say_so():
    b = [np.linspace(0.1, 0.9, 20)] * 3
    assert "3 held-out prompts" in str(calibrate(b, b).refusal)
    short = calibrate([np.full(5, 0.5)] * 20, [np.zeros(5)] * 20)
    assert "0 held-out prompts with at least 8" in str(short.refusal)
    assert short.evidence["prompts_with_too_few_candidates"] == 20
    assert calibrate([], []).refusal is not None


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (([[0.5]], [[1.0], [2.0]]), {}, "equally many"),
        (([[0.5, 0.5]], [[1.0]]), {}, "prompt 0: got 2 probabilities for 1"),
        (([[0.5]], [[math.nan]]), {}, "finite"),
        (([[1.5]], [[1.0]]), {}, r"b must be in \[0, 1\]"),
        (([], []), {"n": 0}, "n must be"),
        (([], []), {"n": 20}, "max_n must be a whole number of at least 20"),
        (([], []), {"waves": []}, "waves must be"),
        (([], []), {"waves": [1, 0]}, "waves must be"),
        (([], []), {"loss": 1.0}, r"loss must lie in \[0, 1\)"),
        (([], []), {"prior": -1.0}, "prior must be"),
        (([], []), {"spread_prior": -1.0}, "spread_prior must be"),
    ],
)
def test_what_cannot_be_calibrated_is_said(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        calibrate(*arguments, **settings)


# -- saved, and asked for ---------------------------------------------------------------------------------------------


def test_a_rule_survives_its_file_and_damage_is_said(tmp_path):
    rule = calibrate(*shifted(0.5), replays=20)
    path = rule.save(tmp_path)
    assert path.name == "stopping.json"
    assert Stopping.load(tmp_path) == rule
    assert Stopping.from_dict(known_level().to_dict()) == known_level()  # an infinite prior
    for text, message in (
        ("{", "stopping.json"),
        ("[]", "not a stopping rule"),
        (json.dumps({"kind": "pfm stopping rule"}), "needs n, max_n"),
        (json.dumps(rule.to_dict() | {"residuals": [1, 0]}), "rising order"),
        (json.dumps(rule.to_dict() | {"n": "8"}), "whole number"),
        (json.dumps(rule.to_dict() | {"price": None}), "price must be a number"),
        (json.dumps(rule.to_dict() | {"residuals": None}), "damaged"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Stopping.load(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        -0.1,
        math.nan,
        10**400,
        "0.1",
        True,
        [1],
        {"token": None},
        {"token": -1},
        {"word": 1},
        {},
        {"draw": 1, "token": 1},
    ],
)
def test_what_is_no_price_is_said(wrong):
    with pytest.raises(ValueError, match="spend must"):
        Spend.read(wrong)


def test_a_higher_price_stops_earlier_and_a_token_has_its_price():
    rule = known_level()
    odds = [0.0, 0.4]
    assert rule.plan(spend=0.0).decide(odds, 2).more == 1
    assert rule.plan(spend=0.5).decide(odds, 2).ended == "good enough"
    assert rule.plan(spend={"token": 1e-4}).decide(odds, 2, tokens=20).more == 1
    assert rule.plan(spend={"token": 1e-4}).decide(odds, 2, tokens=20_000).ended == "good enough"
    assert rule.plan(spend={"token": 1e-4}).decide(odds, 2, tokens=300).price == pytest.approx(0.03)


def test_waves_follow_their_sizes_up_to_the_cap():
    plan = known_level(waves=[1, 1, 2, 4]).plan(max_n=11)
    asked, sizes = plan.first, [plan.first]
    while more := plan.next_wave(asked):
        asked, sizes = asked + more, [*sizes, more]
    assert sizes == [1, 1, 2, 4, 3]
    assert plan.decide([0.0], 11).ended == "cap"
    assert plan.decide([math.nan], 1).more == 1
    assert plan.decide([0.7] * 8, 8).ended == "all the same"


# -- the refiner ------------------------------------------------------------------------------------------------------

RULE = Stopping(4, 8, (2,), 0.02, -1.0, 4.0, tuple(np.linspace(-2, 4, 50).tolist()))


class Letters(GeneratesTexts):
    """Draws numbered texts with more or fewer letters a; may fail or be interrupted at a given sample."""

    def __init__(self, fails: dict[tuple[str, int], BaseException] | None = None, usage: int | None = None) -> None:
        self.fails = fails or {}
        self.usage = usage
        self.asked: list[tuple[str, int, int]] = []

    def draws(self, prompts, n, *, start=None):
        for prompt, first in zip(prompts, start or [0] * len(prompts), strict=True):
            draw = Draw(calls=1, usage={} if self.usage is None else {"completion_tokens": self.usage * n})
            self.asked.append((prompt, first, n))
            for number in range(first, first + n):
                error = self.fails.get((prompt, number))
                if isinstance(error, KeyboardInterrupt):
                    raise error
                if error is not None:
                    draw.fail(error)
                    break
                few = random.Random(f"{prompt} {number}").choice([0, 0, 0, 1, 1, 2, 3])
                draw.add([f"{number} x{'a' * few}"], n)
            yield draw.close()


def auto(generator: Any, **options: Any):
    return wrap(generator, LinearFlow(), encoder=LetterEncoder(), n="auto", stopping=RULE, **options)


PROMPTS = [f"prompt {number}" for number in range(40)]


def test_auto_draws_until_the_best_is_good_enough_and_says_how_many():
    generator = Letters()
    results = auto(generator).batch(PROMPTS, progress=False)
    whole = wrap(Letters(), LinearFlow(), encoder=LetterEncoder(), n=8).batch(PROMPTS, progress=False)
    counts = [len(result.candidates) for result in results]
    assert set(counts) > {2, 8}  # some stop at once, some at the cap
    for result, full, count in zip(results, whole, counts, strict=True):
        assert result.candidates == full.candidates[:count]  # the same samples, each once
        assert result.spent is not None
        assert result.spent["draws"] == count
        assert result.spent["waves"] == count / 2
        assert result.text == result.candidates[int(np.argmax(result.probabilities))]
        assert f"{count} draws of at most 8: {result.spent['ended']}" in result.reason
        assert (result.spent["ended"] == "cap") == (count == 8)
        if result.spent["ended"] == "good enough":
            assert result.spent["expected_gain"] <= result.spent["price"]
        assert Refinement.from_dict(result.to_dict()) == result
    assert sum(n for _, _, n in generator.asked) == sum(counts)


def test_the_encoder_sees_each_candidate_once():
    encoder = LetterEncoder()
    wrap(Letters(), LinearFlow(), encoder=encoder, n="auto", stopping=RULE).batch(PROMPTS, progress=False)
    texts = [text for batch in encoder.encoded for text in batch]
    assert len(texts) == len(set(texts))


def test_abatch_and_single_calls_do_the_same():
    alone = [auto(Letters())(prompt).candidates for prompt in PROMPTS[:5]]
    together = asyncio.run(auto(Letters()).abatch(PROMPTS[:5], progress=False))
    assert [result.candidates for result in together] == alone


def test_dearer_tokens_mean_fewer_draws_also_where_nobody_counts_them():
    def spent(usage, spend):
        results = auto(Letters(usage=usage), spend=spend).batch(PROMPTS, progress=False)
        return sum(result.spent["draws"] for result in results if result.spent)

    assert spent(10, {"token": 1e-4}) > spent(10, {"token": 1e-2})
    assert spent(None, {"token": 1e-4}) > spent(None, {"token": 1e-1})
    assert spent(None, 0.0) > spent(None, 1.0) == 2 * len(PROMPTS)


def test_a_refused_rule_takes_the_fixed_number_at_once():
    generator = Letters()
    rule = Stopping(4, 8, (2,), 0.0, 0.0, 0.0, (0.0,), refusal="b knows nothing")
    results = wrap(generator, LinearFlow(), encoder=LetterEncoder(), n="auto", stopping=rule).batch(
        PROMPTS, progress=False
    )
    assert {len(result.candidates) for result in results} == {4}
    assert {n for _, _, n in generator.asked} == {4}
    assert all("fixed n" in result.reason for result in results)


def test_a_failure_in_a_wave_keeps_the_best_so_far_with_the_error():
    late = next(result for result in auto(Letters()).batch(PROMPTS, progress=False) if len(result.candidates) > 4)
    prompt = str(late.prompt)
    results = auto(Letters({(prompt, 3): BudgetError("the budget of max_calls=9 is spent")})).batch(
        PROMPTS, progress=False
    )
    found = results[PROMPTS.index(prompt)]
    assert found.candidates == late.candidates[:3]
    assert found.text == found.candidates[int(np.argmax(found.probabilities))]
    assert found.error is not None
    assert "max_calls=9" in found.error
    assert found.spent is not None
    assert found.spent["ended"] == "failed"
    assert sum(result.error is not None for result in results) == 1


def test_an_interrupt_in_a_wave_loses_nothing_that_was_drawn():
    late = next(result for result in auto(Letters()).batch(PROMPTS, progress=False) if len(result.candidates) > 4)
    kept: list[Refinement] = []
    with pytest.raises(KeyboardInterrupt) as caught:
        auto(Letters({(str(late.prompt), 4): KeyboardInterrupt()})).batch(
            PROMPTS, progress=False, on_result=kept.append
        )
    partial: Any = caught.value.partial  # pyright: ignore[reportAttributeAccessIssue]
    assert kept == partial
    assert len(partial) >= 32  # all prompts of the portion
    found = partial[PROMPTS.index(str(late.prompt))]
    assert found.candidates == late.candidates[:4]
    assert found.spent["ended"] == "interrupted"
    assert not math.isnan(found.win_probability)
    assert "KeyboardInterrupt" in found.error
    done = [result for result in partial if result.error is None]
    assert done
    assert all(result.spent["ended"] in ("good enough", "cap", "all the same") for result in done)


def test_a_failing_encoder_hands_over_what_is_drawn():
    class Breaks(LetterEncoder):
        def encode(self, texts, *, progress=False):
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory") as caught:
        wrap(Letters(), LinearFlow(), encoder=Breaks(), n="auto", stopping=RULE).batch(PROMPTS, progress=False)
    partial: Any = caught.value.partial  # pyright: ignore[reportAttributeAccessIssue]
    assert [len(result.candidates) for result in partial] == [2] * 32
    assert all("no memory" in result.error for result in partial)


def test_the_same_text_again_and_again_ends_at_the_fixed_number():
    results = auto(lambda prompt: "x").batch(["one", "two"], progress=False)
    assert [result.spent["draws"] for result in results if result.spent] == [4, 4]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": "auto"}, ValueError, "needs a calibrated stopping rule"),
        ({"n": "Auto", "stopping": RULE}, TypeError, 'n must be an integer or "auto"'),
        ({"n": 8, "max_n": 9}, ValueError, 'max_n belong to n="auto"'),
        ({"n": 8, "spend": 1}, ValueError, 'spend belong to n="auto"'),
        ({"n": "auto", "stopping": {"n": 8}}, TypeError, "stopping must be"),
        ({"n": "auto", "stopping": RULE, "by": "sample"}, ValueError, "stops by the best win probability"),
        ({"n": "auto", "stopping": RULE, "max_n": 0}, ValueError, "at least 1"),
        ({"n": "auto", "stopping": RULE, "spend": -1}, ValueError, "spend must"),
    ],
)
def test_wrap_refuses_what_does_not_go_with_auto(options, error, message):
    with pytest.raises(error, match=message):
        wrap(lambda prompt: "x", LinearFlow(), encoder=LetterEncoder(), **options)


def test_the_refiner_calibrates_from_outputs_and_their_scores():
    refiner = wrap(Letters(), LinearFlow(), encoder=LetterEncoder(), n=24)
    outputs = refiner.candidates(PROMPTS, 24)
    scores = [[float(text.count("a")) for text in row] for row in outputs]
    rule = refiner.calibrate(outputs, PROMPTS, scores, n=4, max_n=8)
    assert rule.refusal is None
    assert rule.evidence["draws"] < 4
    shuffled = [random.Random(row).sample(found, len(found)) for row, found in enumerate(scores)]
    assert refiner.calibrate(outputs, PROMPTS, shuffled, n=4, max_n=8).refusal is not None
    with pytest.raises(ValueError, match=r"scores\[0\] must hold one"):
        refiner.calibrate(outputs, PROMPTS, [row[1:] for row in scores])
    with pytest.raises(ValueError, match="equally many"):
        refiner.calibrate(outputs, PROMPTS[1:], scores)


def test_outputs_that_are_arrays_are_drawn_in_waves_too():
    class Arrays:
        dimension = 6

        def encode(self, outputs, *, progress=False):
            return torch.stack([torch.as_tensor(output, dtype=torch.float32) for output in outputs])

        def accepts(self, output):
            return isinstance(output, np.ndarray)

        def describe(self):
            return {"name": "arrays"}

    rng = np.random.default_rng(0)
    refiner = wrap(lambda prompt: [rng.normal(size=6)], LinearFlow(), encoder=Arrays(), n="auto", stopping=RULE)
    results = refiner.batch(["a", "b", "c"], progress=False)
    assert all(2 <= len(result.candidates) <= 8 for result in results)
