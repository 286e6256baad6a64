"""The report card tells the truth: closed forms, controls in which nothing or the contrary must show, a real road."""

import os
import time
from typing import TypeVar

import numpy as np
import pytest
import torch

from pfm.data import EncodedPairs
from pfm.encoders import SurfaceEncoder
from pfm.evaluation import Failure, Report, Scored, evaluate
from pfm.flow import PreferenceFlow
from pfm.refiner import Refinement, wrap
from pfm.statistics import Estimate

T = TypeVar("T")


def known(value: T | None) -> T:
    assert value is not None
    return value


def text(name, length=20):
    return f"{name:>6} ".ljust(length, "x")


def quality_rows(n=200, m=6, skill=0.9, seed=0, length=0.0, probabilities=True):
    """Rows whose judge scores are quality (+ length); the picks "pfm" and "weak" see the quality through noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(n):
        quality, sizes = rng.normal(size=m), rng.integers(20, 200, size=m)
        seen = skill * quality + np.sqrt(1 - skill**2) * rng.normal(size=m)
        if length:  # what is seen is the length alone
            seen = sizes + rng.normal(size=m)
        rows.append(
            Scored(
                prompt=f"prompt {prompt}",
                candidates=[text(f"{prompt}/{k}", size) for k, size in enumerate(sizes)],
                scores=quality + length * (sizes - 110) / 50,
                picks={"weak": int(rng.integers(m)), "pfm": int(seen.argmax())},
                probabilities=1 / (1 + np.exp(-seen / max(1, seen.std()))) if probabilities else None,
                independent=float(rng.normal()),
                group=("even", "odd")[prompt % 2],
            )
        )
    return rows


def with_scores(rows, change):
    return [
        Scored(
            r.prompt, r.candidates, change(np.asarray(r.scores)), r.picks, r.original, r.probabilities, None, r.group
        )
        for r in rows
    ]


@pytest.fixture(scope="module")
def report():
    return Report.from_scored(quality_rows(), resamples=500)


# ---- closed forms


def test_random_is_the_exact_expectation():
    rows = quality_rows(n=40)
    random = Report.from_scored(rows, resamples=200).row("random")
    scores = np.array([r.scores for r in rows])
    assert random.score.value == pytest.approx(scores.mean())
    wins = (np.sign(scores - scores[:, :1]) + 1) / 2
    assert random.win.value == pytest.approx(wins.mean())
    draws = np.array([r.independent for r in rows])[:, None]
    assert known(random.win_independent).value == pytest.approx((scores > draws).mean())
    assert random.changed.value == pytest.approx(5 / 6)
    assert random.score.low < random.score.value < random.score.high


def test_identity_and_oracle_bound_the_methods(report):
    identity, oracle = report.row("identity"), report.row("oracle")
    assert identity.win == identity.win_controlled == Estimate(0.5, 0.5, 0.5)
    assert identity.changed.value == known(identity.oracle_share).value == 0
    assert identity.length_ratio.value == known(oracle.oracle_share).value == 1
    for row in report.rows:
        assert oracle.score.value >= row.score.value
        assert oracle.win.value >= row.win.value
        assert row.difference.value == pytest.approx(report.row("pfm").score.value - row.score.value)
    gain = report.row("pfm").score.value - identity.score.value
    assert known(report.row("pfm").oracle_share).value == pytest.approx(
        gain / (oracle.score.value - identity.score.value)
    )


def test_order_of_rows_and_settings(report):
    assert [row.name for row in report.rows] == ["identity", "random", "longest", "weak", "pfm", "oracle"]
    assert report.settings["prompts"] == report.settings["independent_draws"] == 200
    assert report.settings["candidates"] == {"min": 6, "mean": 6, "max": 6}


def test_longest_and_oracle_keep_the_original_among_equals():
    row = Scored("", ["aaaa", "bbbb", "cccc"], [1, 1, 1], {"pfm": 2}, original=1)
    report = Report.from_scored([row, row], resamples=20)
    assert report.row("longest").changed.value == report.row("oracle").changed.value == 0
    assert report.row("pfm").changed.value == 1
    assert report.row("pfm").oracle_share is None


def test_a_text_cannot_win_against_itself():
    row = Scored("", ["same", "same", "other"], [0.1, 0.9, 0.5], {"pfm": 1})
    report = Report.from_scored([row] * 40, resamples=20)
    assert report.row("pfm").win.value == 0.5
    assert report.row("pfm").changed.value == 0
    assert report.verdict.outcome == "no evidence"


def test_exchanging_original_and_pick_mirrors_every_comparison():
    rows = quality_rows(n=120, m=2, skill=0.5)
    swapped = [
        Scored(r.prompt, r.candidates, r.scores, {"weak": 0, "pfm": r.original}, r.picks["pfm"], r.probabilities)
        for r in rows
    ]
    there = Report.from_scored(rows, resamples=300).row("pfm")
    back = Report.from_scored(swapped, resamples=300)
    assert back.row("pfm").win.value == pytest.approx(1 - there.win.value)
    assert back.row("pfm").win.low == pytest.approx(1 - there.win.high)
    assert known(back.row("pfm").win_controlled).value == pytest.approx(1 - known(there.win_controlled).value, abs=1e-6)
    assert back.row("identity").score.value == pytest.approx(there.score.value)


def test_candidates_of_different_number_and_order_of_prompts_do_not_matter():
    rows = quality_rows(n=30, m=5) + quality_rows(n=20, m=3, seed=1)
    straight, shuffled = (Report.from_scored(part, resamples=50) for part in (rows, rows[::-1]))
    for one, other in zip(straight.rows, shuffled.rows, strict=True):
        assert one.score.value == pytest.approx(other.score.value)
        assert one.length_ratio.value == pytest.approx(other.length_ratio.value)
    assert known(straight.calibration).reliability.measured_ece == pytest.approx(
        known(shuffled.calibration).reliability.measured_ece
    )
    assert straight.settings["candidates"] == {"min": 3, "mean": 4.2, "max": 5}


# ---- verdicts


def test_a_flow_that_helps_is_said_to_help(report):
    verdict = report.verdict
    assert (verdict.outcome, verdict.headline) == ("helps", "The flow helps")
    assert report.row("pfm").win.text(percent=True) in verdict.sentences[0]
    assert "ahead of the strongest baseline" in verdict.sentences[1]
    assert "at equal length it still wins" in verdict.text.lower()
    assert verdict.wins + verdict.losses + verdict.ties == 200
    assert verdict.p_value < 1e-6
    assert verdict.warnings == []


def test_a_flow_that_hurts_is_said_to_hurt():
    report = Report.from_scored(with_scores(quality_rows(), np.negative), resamples=300)
    verdict = report.verdict
    assert (verdict.outcome, verdict.headline) == ("hurts", "The flow hurts")
    assert "does better: difference in mean judge score −" in verdict.sentences[1]
    assert any("Even a random candidate does better" in sentence for sentence in verdict.sentences)
    assert "point the wrong way" in known(report.calibration).sentence


def test_shuffled_judge_scores_show_no_evidence():
    rows, rng = quality_rows(n=60, m=4), np.random.default_rng(0)
    reports = [Report.from_scored(with_scores(rows, rng.permutation), resamples=100) for _ in range(80)]
    outcomes = [report.verdict.outcome for report in reports]
    assert outcomes.count("no evidence") >= 74  # the level is 5%
    assert "No evidence that the flow helps" in {report.verdict.headline for report in reports}
    accuracies = [known(known(report.calibration).accuracy).value for report in reports]
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.02)
    assert not any(known(report.calibration).reliability.within_noise for report in reports)


def test_a_gain_by_length_alone_is_named():
    report = Report.from_scored(quality_rows(n=300, length=1.0), resamples=300)
    assert report.row("pfm").win.low > 0.6
    assert known(report.row("pfm").win_controlled).low < 0.5
    assert report.verdict.outcome == "helps"
    assert "only by length" in report.verdict.headline
    assert any("At equal length the gain vanishes" in sentence for sentence in report.verdict.sentences)


def test_a_better_baseline_stands_in_the_headline():
    rows = quality_rows(skill=0.5)
    for row in rows:
        row.picks["bradley_terry"] = int(np.argmax(row.scores))
    verdict = Report.from_scored(rows, resamples=300).verdict
    assert verdict.headline == "The flow helps, but Bradley–Terry best-of-n does better"
    assert verdict.sentences[1].startswith("Bradley–Terry best-of-n does better: difference")


def test_an_equal_baseline_is_said_to_do_as_well():
    rows = quality_rows()
    for row in rows:
        row.picks["mean_shift"] = row.picks["pfm"]
    verdict = Report.from_scored(rows, resamples=100).verdict
    assert verdict.headline == "The flow helps"
    assert verdict.sentences[1].startswith("Mean shift does as well")


@pytest.mark.parametrize(("prompts", "outcome"), [(5, "no evidence"), (6, "helps")])
def test_few_prompts_must_pass_the_exact_test(prompts, outcome):
    row = Scored("", ["worse", "better"], [0, 1], {"pfm": 1})
    report = Report.from_scored([row] * prompts, resamples=50)
    win = report.row("pfm").win
    assert (win.value, win.high) == (1, 1)
    assert win.low == pytest.approx(0.025 ** (1 / prompts))  # the bootstrap alone would say 1
    assert report.verdict.outcome == outcome
    assert f"Only {prompts} prompts" in report.verdict.warnings[0]


def test_no_evidence_with_every_prompt_won_says_why_in_the_headline():
    row = Scored("", ["much worse", "better"], [0, 3], {"mean_shift": 1, "pfm": 1})
    verdict = Report.from_scored([row] * 4, resamples=50).verdict
    assert verdict.outcome == "no evidence"
    assert verdict.headline == "Too few prompts to tell whether the flow helps, and it is no better than mean shift"
    assert verdict.sentences[0] == (
        "It wins 100.0% [39.8, 100.0] against the original (4 prompts: 4 better, 0 worse, 0 equal); so few confirm "
        "nothing (sign test p = 0.12); it changes the mean judge score by +3.0 [+3.0, +3.0]."
    )


def test_wins_that_cost_more_than_they_bring_are_mixed_evidence():
    win = Scored("", ["original", "pick"], [0.0, 0.1], {"pfm": 1})
    loss = Scored("", ["original", "pick"], [0.0, -9.0], {"pfm": 1})
    verdict = Report.from_scored([win] * 80 + [loss] * 20, resamples=200).verdict
    assert verdict.outcome == "mixed"
    assert "yet it changes the mean judge score by −1.7" in verdict.sentences[0]


def test_equal_candidates_are_warned_of():
    same = Scored("", ["one", "one"], [0.3, 0.3], {"pfm": 0}, probabilities=[0.5, 0.5])
    report = Report.from_scored([same] * 40, resamples=20)
    assert report.verdict.headline == "The flow changed nothing"
    assert any("At 40 of 40 prompts all candidates are the same text" in w for w in report.verdict.warnings)
    blind = Scored("", ["one", "two"], [0.3, 0.3], {"pfm": 1})
    assert any("the same score" in w for w in Report.from_scored([blind] * 40, resamples=20).verdict.warnings)


def test_another_method_can_be_the_one_under_test():
    report = Report.from_scored(quality_rows(), method="weak", resamples=100)
    assert report.verdict.headline == "No evidence that weak helps"
    assert report.row("weak").difference.value == 0


# ---- calibration, groups, examples


def test_calibrated_probabilities_are_recognised_and_distorted_ones_not():
    rng = np.random.default_rng(0)
    rows, over = [], []
    for _ in range(400):
        seen = rng.normal(size=8)
        quality = 0.5 * seen + np.sqrt(0.75) * rng.normal(size=8)
        # P(quality > that of a fresh draw | seen): the difference is normal with mean seen / 2, variance 3/4 + 1
        b = torch.special.ndtr(torch.tensor(0.5 * seen / np.sqrt(1.75))).numpy()
        rows.append(Scored("", [text(k) for k in range(8)], quality, {"pfm": int(b.argmax())}, 0, b))
        sure = 1 / (1 + (1 / b - 1) ** 3)
        over.append(Scored("", [text(k) for k in range(8)], quality, {"pfm": int(b.argmax())}, 0, sure))
    good, bad = (known(Report.from_scored(part, resamples=300).calibration) for part in (rows, over))
    assert good.reliability.within_noise
    assert "calibrated as far as these data can tell" in good.sentence
    assert not bad.reliability.within_noise
    assert "overconfident" in bad.sentence
    assert good.accuracy == bad.accuracy  # the order is the same
    assert good.gaps[0].outcome.value < 0.35 < 0.65 < good.gaps[-1].outcome.value


def test_groups_are_measured_apart():
    rows = quality_rows()
    for row in rows:
        if row.group == "odd":
            row.scores = -np.asarray(row.scores)
    even, odd = Report.from_scored(rows, resamples=200).groups
    assert (even.name, even.prompts, odd.name, odd.prompts) == ("even", 100, "odd", 100)
    assert even.win.low > 0.5 > odd.win.high
    assert even.gain.low > 0 > odd.gain.high
    assert known(even.accuracy).low > 0.5 > known(odd.accuracy).high


def test_examples_are_random_changes_and_the_largest_loss():
    rows = quality_rows(skill=0.2)
    report = Report.from_scored(rows, examples=6, resamples=20)
    assert [e.kind for e in report.examples] == ["random"] * 5 + ["largest loss"]
    assert all(e.original != e.refined for e in report.examples)
    losses = [r.scores[r.picks["pfm"]] - r.scores[0] for r in rows]
    assert report.examples[-1].refined_score - report.examples[-1].original_score == pytest.approx(min(losses))
    assert report.examples == Report.from_scored(rows, examples=6, resamples=20).examples


def test_without_probabilities_there_is_no_calibration():
    report = Report.from_scored(quality_rows(n=40, probabilities=False), resamples=20)
    assert report.calibration is None
    assert report.groups[0].accuracy is None


# ---- rows that are refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0]}, r"row 1: scores must be \(2,\)"),
        ({"scores": [1.0, float("nan")]}, "row 1: scores must be finite"),
        ({"picks": {"pfm": 2}}, "row 1: pfm must index its 2 candidates: got 2"),
        ({"original": -1}, "row 1: original must index"),
        ({"probabilities": [0.5, 1.5]}, "row 1: probabilities must lie between 0 and 1"),
        ({"probabilities": [0.5]}, r"row 1: probabilities must be \(2,\)"),
        ({"independent": float("inf")}, "row 1: independent must be finite"),
        ({"candidates": [], "scores": []}, "row 1 has no candidates"),
        ({"picks": {"other": 0}}, "row 1 has picks of"),
    ],
)
def test_a_bad_row_is_named(change, message):
    good = {"prompt": "p", "candidates": ["a", "b"], "scores": [0, 1], "picks": {"pfm": 1}}
    with pytest.raises(ValueError, match=message):
        Report.from_scored([Scored(**good), Scored(**(good | change))])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "rows is empty"),
        ([Scored("", ["a"], [0], {"pfm": 0})], {"method": "other"}, "method 'other' has no picks"),
        ([Scored("", ["a"], [0], {"pfm": 0, "oracle": 0})], {}, "picks holds oracle"),
        ([Scored("", ["a"], [0], {"pfm": 0})], {"baselines": ["best"]}, "baselines holds unknown names best"),
    ],
)
def test_bad_arguments_of_from_scored(rows, options, message):
    with pytest.raises(ValueError, match=message):
        Report.from_scored(rows, **options)


def test_unknown_method_is_named(report):
    with pytest.raises(KeyError, match="no method 'nothing'"):
        report.row("nothing")


# ---- evaluate


def record(candidates, index=0, error=None, probabilities=None, prompt="p"):
    return Refinement(
        prompt=prompt,
        text=candidates[index] if candidates else "",
        original=candidates[0] if candidates else "",
        candidates=candidates,
        win_probability=0.5,
        probabilities=[0.5] * len(candidates) if probabilities is None else probabilities,
        index=index if candidates else -1,
        changed=index > 0,
        reason="",
        seconds=0.0,
        calls=1,
        error=error,
    )


def count_words(prompt, responses):
    return [len(response.split()) for response in responses]


def test_failures_are_counted_and_listed():
    records = [record(["a", "a b"], 1, prompt=f"prompt {n}") for n in range(3)]
    records += [record([], error="GenerationError: timeout"), record([])]
    records.append(record(["a", "b c"], error="2 of 3 candidates", probabilities=[float("nan")] * 2))
    report = evaluate(records, judge=count_words, resamples=20, progress=False)
    assert report.failures == [
        Failure(3, "GenerationError: timeout", False),
        Failure(4, "no candidates", False),
        Failure(5, "2 of 3 candidates", True),
    ]
    assert report.settings["prompts"] == 4
    assert "2 of 6 prompts failed and are not in the figures." in report.verdict.warnings
    assert known(report.calibration).prompts == 3  # the one that the flow could not judge is not in it
    with pytest.raises(ValueError, match="no prompt could be evaluated: all 2 failed, the first with: timeout"):
        evaluate([record([], error="timeout")] * 2, judge=count_words, progress=False)


def test_scores_may_stand_in_for_a_judge():
    records = [record(["a", "b b"], 1), record(["c c", "d"], 0)]
    scores = [count_words("p", r.candidates) for r in records]
    by_scores = evaluate(records, scores=scores, resamples=20, progress=False)
    by_judge = evaluate(records, judge=count_words, resamples=20, progress=False)
    assert by_scores.rows == by_judge.rows
    assert by_judge.settings["judge"] == "count_words"
    assert by_judge.row("pfm").win_independent is None
    assert any("independent draw" in reason for reason in by_judge.settings["left_out"])
    assert any("Mean shift and Bradley–Terry" in reason for reason in by_judge.settings["left_out"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "judge must give one number a response: at prompt 1 there are 2 responses"),
        ([1.0, float("nan")], "at prompt 1, response 1 got nan"),
        (["good", "bad"], "judge must give numbers: at prompt 1"),
        (None, "at prompt 1"),
    ],
)
def test_a_judge_that_answers_badly_is_named_with_its_prompt(answer, message):
    def judge(prompt, responses):
        return answer if prompt == "second" else [0.0, 1.0]

    records = [record(["a", "b"]), record(["a", "b"], prompt="second")]
    with pytest.raises(ValueError, match=message):
        evaluate(records, judge=judge, progress=False)


def test_an_error_of_the_judge_says_at_which_prompt():
    def judge(prompt, responses):
        raise OSError("no connection")

    with pytest.raises(OSError, match="no connection") as caught:
        evaluate([record(["a", "b"])], judge=judge, progress=False)
    assert "prompt 0" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "either judge or scores"),
        ({"judge": count_words, "scores": [[1, 2]]}, ValueError, "either judge or scores"),
        ({"judge": count_words, "groups": ["a", "b"]}, ValueError, "groups must have one entry a prompt: got 2 for 1"),
        ({"scores": [[1, 2], [1, 2]]}, ValueError, "scores must have one entry a prompt"),
        ({"scores": [[1, 2, 3]]}, ValueError, "scores must give one number a response: at prompt 0"),
        ({"judge": count_words, "prompts": ["p"]}, ValueError, "prompts goes with a refiner"),
        ({"judge": count_words, "methods": ["best"]}, ValueError, "unknown names best"),
        ({"judge": count_words, "methods": ["mean_shift"]}, ValueError, "give training and encoder"),
        ({"judge": count_words, "encoder": SurfaceEncoder()}, ValueError, "training and encoder go together"),
    ],
)
def test_bad_arguments_of_evaluate(options, error, message):
    with pytest.raises(error, match=message):
        evaluate([record(["a", "b"])], progress=False, **options)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "records is empty"),
        ("text", TypeError, "must be a Refiner or a sequence of Refinement: got str"),
        ([{"prompt": "p"}], TypeError, "record 0 must be a Refinement: got dict without"),
    ],
)
def test_bad_sources_of_evaluate(source, error, message):
    with pytest.raises(error, match=message):
        evaluate(source, judge=count_words, progress=False)


def test_an_original_outside_the_candidates_is_refused():
    bad = record(["a", "b"])
    bad.original = "elsewhere"
    with pytest.raises(ValueError, match="record 0: its original is not among its candidates"):
        evaluate([bad], judge=count_words, progress=False)


def test_methods_choose_the_baselines_that_are_shown():
    report = evaluate(
        [record(["a", "b b"], 1)] * 2, judge=count_words, methods=["random"], progress=False, resamples=20
    )
    assert [row.name for row in report.rows] == ["identity", "random", "pfm"]


def test_settings_of_a_report_are_handed_on():
    records = [record(["a", "b b"], n % 2) for n in range(12)]
    report = evaluate(records, judge=count_words, resamples=30, seed=5, progress=False)
    rows = [Scored("p", r.candidates, count_words("p", r.candidates), {"pfm": r.index}, 0, [0.5, 0.5]) for r in records]
    same = Report.from_scored(rows, resamples=30, seed=5)
    assert report.rows == same.rows
    assert (report.settings["resamples"], report.settings["seed"]) == (30, 5)
    defaults = evaluate(records, judge=count_words, progress=False).settings
    assert (defaults["resamples"], defaults["seed"]) == (2000, 0)


def test_groups_are_those_of_the_prompts_that_remain():
    records = [record([]), record(["a", "b b"], 1), record(["a", "b b"])]
    report = evaluate(records, judge=count_words, groups=[0, 1, 2], resamples=20, progress=False)
    assert [(group.name, group.win.value) for group in report.groups] == [("1", 1.0), ("2", 0.5)]
    assert evaluate(records, judge=count_words, resamples=20, progress=False).groups == []


def test_scores_belong_to_the_record_at_their_place():
    records = [record([]), record(["a", "b"], 1), record(["a", "b"], 1)]
    report = evaluate(records, scores=[[], [0.0, 1.0], [1.0, 0.0]], resamples=20, progress=False)
    assert report.row("pfm").score.value == 0.5
    assert report.row("oracle").score.value == 1
    assert report.settings["judge"] == "scores given by the caller"


@pytest.mark.parametrize(("reasoning", "judged"), [(None, 1.0), ("strip", 1.0), ("keep", 3.0)])
def test_the_answer_after_hidden_reasoning_is_judged(reasoning, judged):
    seen = []

    def judge(prompt, responses):
        seen.extend(responses)
        return count_words(prompt, responses)

    records = [record(["<think>is it?</think>Yes", "No"])] * 2
    report = evaluate(records, judge=judge, reasoning=reasoning, resamples=20, progress=False)
    assert report.row("identity").score.value == judged - (reasoning == "keep")  # "<think>is", "it?</think>Yes"
    assert seen[0] == ("<think>is it?</think>Yes" if reasoning == "keep" else "Yes")


def test_a_judge_that_leaves_pairs_to_a_model_is_warned_of():
    class Judge:
        name = "own"

        def __init__(self, sure):
            self.sure = sure

        def __call__(self, prompt, responses):
            return count_words(prompt, responses)

    def warned(sure):
        report = evaluate([record(["a", "b b"], 1)] * 3, judge=Judge(sure), resamples=20, progress=False)
        assert report.settings["judge"] == "own"
        return [w for w in report.verdict.warnings if w.startswith("The judge leaves pairs to a preference model")]

    assert warned(1.0) == []
    assert [warning.partition(":")[2] for warning in warned(0.9)] == [
        " figures flatter any flow that shares it. Use sure=1."
    ]


def test_a_judge_is_named_by_its_name_else_its_function_else_its_class():
    class Counting:
        def __call__(self, prompt, responses):
            return count_words(prompt, responses)

    for judge, name in ((Counting(), "Counting"), (count_words, "count_words")):
        assert evaluate([record(["a"])], judge=judge, resamples=20, progress=False).settings["judge"] == name


@pytest.mark.skipif("TQDM_DISABLE" in os.environ, reason="progress bars are switched off")
def test_progress_is_shown_unless_it_is_not_wanted(capsys):
    evaluate([record(["a", "b"])] * 3, judge=count_words, resamples=20, progress=False)
    assert capsys.readouterr().err == ""
    evaluate([record(["a", "b"])] * 3, judge=count_words, resamples=20)
    shown = capsys.readouterr().err
    assert "Judging" in shown
    assert "3/3" in shown
    assert "prompt/s" in shown


class Drafts:
    """A refiner whose candidates and further draws are given."""

    def __init__(self, records, draws):
        self.records, self.draws, self.asked, self.shown = records, draws, [], []

    def batch(self, prompts, *, progress):
        self.shown.append(progress)
        return self.records

    def candidates(self, prompts, count):
        self.asked.append((list(prompts), count))
        return self.draws


def test_the_further_draw_is_judged_and_no_method_can_pick_it():
    drafts = Drafts(
        [record(["a", "b b"], 1, prompt="p"), record([]), record(["a", "b b"], prompt="q")],
        [["<think>of it</think>c c c"], [""]],
    )
    report = evaluate(drafts, ["p", "failed", "q"], judge=count_words, resamples=20, progress=False)
    assert drafts.asked == [(["p", "q"], 1)]
    assert drafts.shown == [False]
    assert report.row("oracle").score.value == 2  # not 3
    assert known(report.row("pfm").win_independent).value == 0.5  # "b b" loses to "c c c", "a" wins against ""
    assert known(report.row("oracle").win_independent).value == 0.5
    assert report.settings["independent_draws"] == 2


@pytest.mark.parametrize(("reasoning", "won"), [("strip", 1.0), ("keep", 0.0)])
def test_the_further_draw_is_judged_as_the_candidates_are(reasoning, won):
    drafts = Drafts([record(["a", "b b"], 1, prompt="p")] * 2, [["<think>x y z</think>c"]] * 2)
    report = evaluate(drafts, ["p", "p"], judge=count_words, reasoning=reasoning, resamples=20, progress=False)
    assert known(report.row("pfm").win_independent).value == won


def test_a_draw_that_equals_the_original_is_independent_where_another_does_not():
    two = [record(["a", "b"], prompt="p"), record(["a", "b"], prompt="q")]
    for draws, count in (([["a"], ["c"]], 2), ([["a"], ["a"]], 0), ([["a", "c"], []], 0), ([["c"], []], 1)):
        report = evaluate(Drafts(two, draws), ["p", "q"], judge=count_words, resamples=20, progress=False)
        assert report.settings["independent_draws"] == count
        assert any("repeats its first draw" in reason for reason in report.settings["left_out"]) == (count == 0)
    # A generator that knows one answer does repeat itself, and its draws are independent all the same.
    one = [record(["a", "a"], prompt="p"), record(["a", "a"], prompt="q")]
    report = evaluate(Drafts(one, [["a"], ["a"]]), ["p", "q"], judge=count_words, resamples=20, progress=False)
    assert report.settings["independent_draws"] == 2


def test_a_refiner_that_gives_too_few_draws_is_named():
    drafts = Drafts([record(["a", "b"]), record(["a", "b"])], [["c"]])
    with pytest.raises(ValueError, match=r"refiner\.candidates gave 1 lists for 2 prompts"):
        evaluate(drafts, ["p", "q"], judge=count_words, progress=False)


# ---- the whole road, with real parts


class Replies:
    """A frozen generator: sentences of random politeness."""

    def __init__(self, repeat=False):
        self.rng, self.repeat = np.random.default_rng(0), repeat

    def __call__(self, prompt, n=1):
        rng = np.random.default_rng(0) if self.repeat else self.rng
        words = ["yes", "no", "perhaps", "later", "here", "there"]
        marks = [".", "!", "?", "…"]
        return [
            " ".join(rng.choice(words, size=6)).capitalize() + rng.choice(marks) * int(rng.integers(1, 4))
            for _ in range(n)
        ]


def calm(prompt, responses):
    """Prefers few exclamation marks, with a little noise that depends on the text alone."""
    return [-r.count("!") + 0.01 * (sum(map(ord, r)) % 7) for r in responses]


@pytest.fixture(scope="module")
def training():
    generator, encoder = Replies(), SurfaceEncoder()
    pairs = [generator("", n=2) for _ in range(300)]
    ordered = [sorted(pair, key=lambda reply: calm("", [reply])[0]) for pair in pairs]
    rejected, chosen = (encoder.encode(list(side)) for side in zip(*ordered, strict=True))
    return EncodedPairs(chosen, rejected, encoder=encoder.describe())


@pytest.fixture(scope="module")
def flow(training):
    return PreferenceFlow.fit(training, {"residual": False}, progress=False)


def test_a_real_refiner_is_measured_beside_every_baseline(training, flow):
    encoder = SurfaceEncoder()
    refiner = wrap(Replies(), flow, encoder=encoder, n=6, margin=0.0)
    prompts = [f"question {k}" for k in range(60)]
    report = evaluate(
        refiner,
        prompts,
        judge=calm,
        training=training,
        encoder=encoder,
        groups=[k % 3 for k in range(60)],
        resamples=200,
        progress=False,
    )
    names = [row.name for row in report.rows]
    assert names == ["identity", "random", "longest", "mean_shift", "bradley_terry", "pfm", "oracle"]
    assert report.settings["left_out"] == []
    assert report.settings["independent_draws"] == 60
    assert report.verdict.outcome == "helps"
    assert known(report.row("pfm").win_independent).low > 0.5
    assert report.row("bradley_terry").difference.value < 1
    assert [g.name for g in report.groups] == ["0", "1", "2"]
    assert known(known(report.calibration).accuracy).low > 0.6


def test_vector_baselines_turn_round_with_their_labels(training):
    generator, encoder = Replies(), SurfaceEncoder()
    records = [record(generator("", n=5)) for _ in range(60)]

    def gains(pairs):
        report = evaluate(records, judge=calm, training=pairs, encoder=encoder, resamples=20, progress=False)
        original = report.row("identity").score.value
        return [report.row(name).score.value - original for name in ("mean_shift", "bradley_terry")]

    assert min(gains(training)) > 0.3
    assert max(gains(training.swap())) < -0.3
    opposite = EncodedPairs(training.rejected, training.chosen, probability=torch.zeros(len(training)))
    assert gains(opposite)[0] == pytest.approx(gains(training)[0])


def test_linear_baselines_need_no_prompt_and_no_other_baseline(training):
    """Within a prompt a linear term in its context cancels: contexts change no pick, and no prompt is encoded."""

    class Outputs(SurfaceEncoder):
        def encode_prompts(self, texts, *, progress=False):
            raise AssertionError("no prompt is to be encoded")

    context = torch.randn(len(training), 3, generator=torch.Generator().manual_seed(0))
    told = EncodedPairs(training.chosen, training.rejected, context)
    generator = Replies()
    records = [record(["Cut off <think>", *generator("", n=4)]), record(generator("", n=3)), record(["", "Yes!"])]
    options = {"judge": calm, "encoder": Outputs(), "resamples": 20, "progress": False}
    plain = evaluate(records, training=training, **options)
    for names in (["mean_shift", "bradley_terry"], ["mean_shift"], ["bradley_terry"]):
        report = evaluate(records, training=told, methods=names, **options)
        assert [row.name for row in report.rows] == ["identity", *names, "pfm"]
        assert all(report.row(name) == plain.row(name) for name in names)


def test_an_encoder_of_another_dimension_is_refused(training):
    class Other(SurfaceEncoder):
        def encode(self, texts, *, progress=False):
            return super().encode(texts)[:, :3]

    with pytest.raises(ValueError, match="encoder gives 3 values an output"):
        evaluate([record(["a b", "c d"])], judge=calm, training=training, encoder=Other(), progress=False)


def test_a_generator_that_repeats_itself_gives_no_independent_draw(flow):
    refiner = wrap(Replies(repeat=True), flow, encoder=SurfaceEncoder(), n=4)
    report = evaluate(refiner, ["p", "q"], judge=calm, resamples=20, progress=False)
    assert report.row("pfm").win_independent is None
    assert any("repeats its first draw" in reason for reason in report.settings["left_out"])


def test_a_refiner_needs_prompts(flow):
    refiner = wrap(Replies(), flow, encoder=SurfaceEncoder())
    for prompts in (None, [], "one"):
        with pytest.raises(ValueError, match="prompts"):
            evaluate(refiner, prompts, judge=calm, progress=False)
    with pytest.raises(ValueError, match="scores needs records"):
        evaluate(refiner, ["p"], scores=[[1.0]], progress=False)


def test_500_prompts_of_64_candidates_take_seconds():
    rows = quality_rows(n=500, m=64)
    start = time.process_time()
    Report.from_scored(rows, resamples=2000)
    assert time.process_time() - start < 6
