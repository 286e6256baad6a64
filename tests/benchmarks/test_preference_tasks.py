"""Tasks that compare outputs: no prompt on both sides, figures that are what they say, cycles without a reward."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.bench_settings import configured
from support.places import data_path

from benchmarks import report
from benchmarks.core.bench import Bench
from benchmarks.core.comparisons import Comparison, Comparisons, deal_folds
from benchmarks.core.runner import run
from benchmarks.core.runs import collect
from benchmarks.methods import make_method
from benchmarks.preference import report as preference_report
from benchmarks.preference.measures import PredictionTable
from benchmarks.tasks import load_task
from benchmarks.tasks.cycle_text import kinds
from benchmarks.tasks.qlora import order_figures
from pfm import EncodedPairs
from pfm.encoders import SurfaceEncoder
from pfm.preferences import BradleyTerry, PreferenceEnsemble, PreferenceModel, ViewPreference, load
from pfm.statistics import Bootstrap, Estimate

pytestmark = pytest.mark.slow

TASKS = {
    "cycle_text": "alpaca_eval",
    "cycle_text-dominant": "alpaca_eval",
    "cycle_text-critics": "rt_polarity",
    "cycle_text-critics-dominant": "rt_polarity",
    "pandalm": "pandalm_test",
    "llmbar": "llmbar",
    "arguments_votes": "ukp_convarg",
    "qlora": "qlora_tournament",
    "qlora-one": "qlora_tournament",
    "qlora-half": "qlora_tournament",
    "qlora-told": "qlora_tournament",
}
SURFACE = Bench("surface", "truncate", 0, False)


@cache
def loaded(task: str, seed: int = 0, *overrides: str) -> Comparisons:
    data_path(TASKS[task])
    shorter = ["task.longest=800"] if task.startswith("cycle_text") else []
    settings = configured(f"task={task}", "method=bradley_terry", *shorter, *overrides)
    return cast(Comparisons, load_task(settings.task, seed))


def method(name: str, *overrides: str) -> Any:
    return make_method(configured("task=llmbar", f"method={name}", *overrides).method)


def value(figures: dict[str, Estimate | None], name: str) -> float:
    estimate = figures[name]
    assert estimate is not None, name
    return estimate.value


# -- tasks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_comparisons_are_sound_and_a_prompt_is_held_out_whole(task: str):
    data = loaded(task)
    assert len(data.rows) > 200
    assert all(row.first.strip() and row.first.strip() != row.second.strip() for row in data.rows)
    assert all(0 <= row.share <= 1 and row.votes > 0 for row in data.rows)
    fold = data.fold()
    for names in ([row.group for row in data.rows], [row.unit or row.group for row in data.rows]):
        assert len(set(zip(names, fold.tolist(), strict=True))) == len(set(names))
    prompts = {row.group: row.prompt for row in data.rows}
    assert len(set(prompts.values())) == len(prompts), "one prompt under two names could stand on both sides"
    assert set(fold.tolist()) == set(range(3))
    assert not np.array_equal(fold, loaded(task, 1).fold())


def test_folds_hold_as_many_units_each_and_depend_on_the_seed_alone():
    units = [str(number % 23) for number in range(300)]
    fold = deal_folds(units, 4, 0)
    assert sorted(len({unit for unit, f in zip(units, fold, strict=True) if f == k}) for k in range(4)) == [5, 6, 6, 6]
    assert np.array_equal(deal_folds(units[::-1], 4, 0)[::-1], fold)
    assert not np.array_equal(deal_folds(units, 4, 1), fold)
    with pytest.raises(ValueError, match=r"task\.folds must be between 2 and the 3 prompts"):
        deal_folds(["a", "b", "c"], 4, 0)


def test_debates_are_held_out_with_both_stances():
    data = loaded("arguments_votes")
    stances = {(row.unit, row.group) for row in data.rows}
    assert len({unit for unit, _ in stances}) < len(stances)
    assert 0.05 < np.mean([row.share == 0.5 for row in data.rows]) < 0.2
    hard = loaded("arguments_votes", 0, "task.soft=false")
    assert {row.lesson for row in hard.rows} == {0.0, 0.5, 1.0}
    assert [row.share for row in hard.rows] == [row.share for row in data.rows]


def test_kinds_are_the_features_that_stand_out():
    texts = ["why? " * 9, "well! " * 9, "a, b; c - d, e; " * 4, "plain words only here"]
    features = SurfaceEncoder().encode(texts).double().numpy()
    found = kinds(features, ["questions", "exclamations", "punctuation"], 0.5)
    assert found.tolist()[:3] == [0, 1, 2]
    assert set(kinds(features, ["questions", "exclamations", "punctuation"], 9.0)) == {-1}
    with pytest.raises(ValueError, match="no surface feature 'charm'"):
        kinds(features, ["charm"], 0.5)


def test_each_kind_beats_the_next_and_every_prompt_has_as_many_of_each():
    for task, own in (("cycle_text", 3), ("cycle_text-critics", 3), ("cycle_text-critics-dominant", 4)):
        data = loaded(task)
        criteria = data.about["criteria"]
        assert len(criteria) == own
        wins: dict[str, dict[str, int]] = {}
        for row in data.rows:
            if row.part == "cycle":
                winner, loser = (row.first, row.second) if row.share == 1 else (row.second, row.first)
                record = wins.setdefault(row.group, {})
                record[winner], record[loser] = record.get(winner, 0) + 1, record.get(loser, 0) - 1
        # A text of a kind beats the next kind's as often as it loses to those of the one before.
        assert all(set(record.values()) == {0} for record in wins.values())
        assert len(wins) > 30


# -- position ---------------------------------------------------------------------------------------------------


def test_what_order_is_worth_is_measured_whatever_the_answers_are_worth():
    rng = np.random.default_rng(0)
    beta, difference = 0.8, 2 * rng.normal(size=40_000)
    odds = np.stack([difference + beta, beta - difference])
    ahead, behind = (rng.random(odds.shape) < 1 / (1 + np.exp(-odds))).astype(float)
    groups = rng.integers(400, size=len(ahead)).astype(str)
    figures = order_figures(list(zip(groups, ahead.tolist(), behind.tolist(), strict=True)))
    measured = figures["order_odds"]
    assert measured is not None
    assert measured.low < beta < measured.high
    assert measured.high - measured.low < 0.15
    assert 0.3 < value(figures, "order_marginal") < 0.7 * beta
    assert value(figures, "tied") == 0


def position_task(term: bool, beta: float = 1.5, prompts: int = 40) -> Comparisons:
    """Compare texts of which the longer is better, by verdicts in one order; the shorter is mostly shown first."""
    rng = np.random.default_rng(3)
    rows = []
    for prompt in range(prompts):
        for _ in range(30):
            few = int(rng.integers(2, 60))
            many = few + int(rng.integers(1, 30))
            shorter, longer = (" ".join(rng.permutation(["now", "so", "it", "goes"])) + " yes" * n for n in (few, many))
            gap = 1.5 * np.log(many / few)
            first, second, d = (shorter, longer, -gap) if rng.random() < 0.8 else (longer, shorter, gap)
            truth, said = (1 / (1 + np.exp(-odds)) for odds in (d, d + beta))
            rows.append(Comparison(str(prompt), None, first, second, float(truth), lesson=float(rng.random() < said)))
    return Comparisons(rows, 3, 0, judge="a rule", order_term=term)


def test_a_model_that_is_told_the_order_estimates_its_worth_and_predicts_better_without_it():
    told, blind = (position_task(term).run(method("bradley_terry"), SURFACE) for term in (True, False))
    assert value(told.figures, "order_term") == pytest.approx(1.5, abs=0.35)
    assert value(told.figures, "excess") < 0.02
    assert value(blind.figures, "excess") > 2 * value(told.figures, "excess") + 0.02
    assert "order_term" not in blind.figures


def test_gpt4_prefers_what_it_reads_first():
    figures = loaded("qlora").measured
    first, odds = figures["first_wins"], figures["order_odds"]
    assert first is not None
    assert first.low > 0.55
    assert odds is not None
    assert odds.low > 0.5
    # Both orders averaged, the verdicts favour no place; in one order they do.
    both, one = (loaded(task).rows for task in ("qlora", "qlora-one"))
    assert np.mean([row.share for row in both]) < 0.5
    assert np.mean([cast(float, row.lesson) - row.share for row in one]) > 0.08
    half = [row for row in loaded("qlora-half").rows if row.taught]
    assert sum(row.votes for row in half) == pytest.approx(sum(row.votes for row in one), abs=2)


# -- figures ----------------------------------------------------------------------------------------------------


def predictions(share: list[float], logit: list[float], group: list[str] | None = None) -> PredictionTable:
    count = len(share)
    names = np.array(group or [str(n) for n in range(count)])
    return PredictionTable(names, np.full(count, ""), np.array(share), np.array(logit), np.zeros(count, int))


def test_figures_of_known_predictions():
    table = predictions([1.0, 0.0, 0.6, 0.5, 1.0], [2.0, 1.0, 0.0, 3.0, 0.0])
    figures = table.measure(Bootstrap(5))
    assert value(figures, "accuracy") == (1 + 0 + 0.5 + 0.5) / 4  # the tie is not counted
    p = 1 / (1 + np.exp(-table.logit))
    expected = -(table.share * np.log(p) + (1 - table.share) * np.log(1 - p))
    assert value(figures, "log_loss") == pytest.approx(expected.mean())
    entropy = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4)) + np.log(2)
    assert value(figures, "excess") == pytest.approx(expected.mean() - entropy / 5)
    best = predictions([0.2, 0.7], [float(np.log(0.25)), float(np.log(7 / 3))]).measure(Bootstrap(2))
    assert value(best, "excess") == pytest.approx(0, abs=1e-12)


def test_calibration_tells_calibrated_from_too_sure():
    rng = np.random.default_rng(0)
    logit = rng.normal(size=6000)
    share = (rng.random(6000) < 1 / (1 + np.exp(-logit))).astype(float)
    group = [str(n // 10) for n in range(6000)]
    honest, sure = (
        predictions(share.tolist(), (scale * logit).tolist(), group).measure(Bootstrap(600)) for scale in (1, 3)
    )
    chance = honest["ece_chance"]
    assert chance is not None
    assert value(honest, "ece") < chance.high
    assert value(honest, "slope") == pytest.approx(1, abs=0.15)
    assert value(sure, "ece") > 0.1
    assert value(sure, "slope") < 0.8
    assert value(sure, "accuracy") == value(honest, "accuracy")


def test_a_prompt_of_several_seeds_is_resampled_as_one():
    rng = np.random.default_rng(0)
    table = predictions((rng.random(200) < 0.5).astype(float).tolist(), [1.0] * 200)
    once, five = (PredictionTable.join([table] * copies).measure(Bootstrap(200))["accuracy"] for copies in (1, 5))
    assert once is not None
    assert five is not None
    assert (five.low, five.value, five.high) == pytest.approx((once.low, once.value, once.high))


# -- methods ----------------------------------------------------------------------------------------------------


def test_held_out_labels_do_not_reach_the_predictions():
    data = loaded("llmbar")
    fold = data.fold()
    turned = [
        replace(row, share=1 - row.share) if part == 0 else row for row, part in zip(data.rows, fold, strict=True)
    ]
    seen: list[np.ndarray] = []

    class Recording:
        """Passes comparisons on, and keeps what was answered."""

        def __init__(self) -> None:
            self.model = method("bradley_terry")
            self.answers: list[np.ndarray] = []

        def learn(self, train: Any, bench: Bench) -> dict[str, Any]:
            return self.model.learn(train, bench)

        def compare(self, y: torch.Tensor, other: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
            answer = self.model.compare(y, other, context)
            self.answers.append(answer.numpy())
            return answer

    for rows in (data.rows, turned):
        recording = Recording()
        replace(data, rows=rows).run(recording, SURFACE)
        seen.append(recording.answers[0])
        others = recording.answers[1]
        seen.append(others)
    assert np.array_equal(seen[0], seen[2])
    assert not np.allclose(seen[1], seen[3])


def test_methods_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="does not compare outputs"):
        loaded("llmbar").run(method("random"), SURFACE)
    with pytest.raises(ValueError, match=r"method\.model must be one of .*BradleyTerry"):
        method("bradley_terry_tuned", "method.model=Oracle")
    with pytest.raises(ValueError, match=r"method\.labels must be"):
        method("bradley_terry_tuned", "method.labels=made")


def test_no_reward_orders_a_cycle():
    outcome = loaded("cycle_text").run(method("bradley_terry"), SURFACE)
    assert value(outcome.figures, "accuracy") == pytest.approx(0.5, abs=0.03)
    dominant = loaded("cycle_text-dominant").run(method("bradley_terry"), SURFACE)
    assert value(dominant.figures, "accuracy.cycle") < 0.6
    assert value(dominant.figures, "accuracy.dominant") > 0.95


def test_planes_order_a_cycle_that_no_reward_can():
    cycle = loaded("cycle_text")
    found = cycle.run(method("gpm", "++method.options.hidden=0"), SURFACE)
    assert value(found.figures, "accuracy") > 0.8
    assert value(found.figures, "log_loss") < 0.5


def test_a_view_is_fitted_on_its_columns_and_few_pairs_trust_it(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    y, other = (torch.randn(400, 203, generator=generator) for _ in range(2))
    taste = torch.cat([torch.zeros(200), torch.tensor([1.0, -1.0, 0.5])])
    first = (torch.rand(400, generator=generator) < torch.sigmoid((y - other) @ taste))[:, None]
    pairs = EncodedPairs(torch.where(first, y, other), torch.where(first, other, y))
    train, unseen = pairs.select(torch.arange(150)), pairs.select(torch.arange(150, 400))
    view = ViewPreference(BradleyTerry(1e-3), start=-3).fit(train)

    def right(model: PreferenceModel) -> float:
        return float((model.score(unseen.chosen, unseen.rejected) > 0).double().mean())

    assert right(view) > right(BradleyTerry(1e-3).fit(train)) + 0.05
    blind = y.clone()
    blind[:, :200] = 0
    assert torch.equal(view.score(y, other), view.score(blind, other))
    assert torch.equal(load(view.save(tmp_path)).score(y, other), view.score(y, other))
    committee = PreferenceEnsemble([BradleyTerry(1e-3), ViewPreference(BradleyTerry(1e-3), start=-3)]).fit(train)
    assert right(committee) > right(view) - 0.03
    assert committee.found["weights"][1] > committee.found["weights"][0]
    with pytest.raises(ValueError, match="leave none of 203 columns"):
        ViewPreference(BradleyTerry(), start=203).fit(train)
    with pytest.raises(ValueError, match="start must be a whole number"):
        ViewPreference(BradleyTerry(), start=0.5)  # pyright: ignore[reportArgumentType]


# -- runs and the report ----------------------------------------------------------------------------------------

RUNS = {
    "bradley_terry": (0, 1),
    "bradley_terry_tuned": (0, 1),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_path("pandalm_test")
    folder = tmp_path_factory.mktemp("runs")
    for name, seeds in RUNS.items():
        for seed in seeds:
            settings = configured(
                "task=pandalm", f"method={name}", f"seed={seed}", "encoder=surface", "progress=false", "threads=1",
                f"out={folder}",
            )  # fmt: skip
            place = folder / f"{name}-{seed}"
            place.mkdir()
            run(settings, place)
    return folder


def test_the_report_adds_up(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert report.main([str(runs), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "pandalm.png").read_bytes().startswith(b"\x89PNG")
    (task,) = json.loads((tmp_path / "report.json").read_text())
    methods = {each["name"]: each for each in task["methods"]}
    for name, seeds in RUNS.items():
        tables = [PredictionTable.load(runs / f"{name}-{seed}" / "predictions.npz") for seed in seeds]
        found = methods[name]["figures"]["log_loss"]
        assert found["value"] == pytest.approx(np.mean([table.loss().mean() for table in tables]))
        assert found["low"] < found["value"] < found["high"]
        metrics = json.loads((runs / f"{name}-{seeds[0]}" / "metrics.json").read_text())
        assert metrics["score"] == pytest.approx(-tables[0].loss().mean())
    gain = methods["bradley_terry_tuned"]["loss_gain"]["bradley_terry"]
    losses = {name: methods[name]["figures"]["log_loss"] for name in RUNS}
    assert gain["value"] == pytest.approx(losses["bradley_terry"]["value"] - losses["bradley_terry_tuned"]["value"])
    # Paired: narrower than the losses' own intervals.
    assert gain["high"] - gain["low"] < losses["bradley_terry"]["high"] - losses["bradley_terry"]["low"]
    assert "| Bradley–Terry best-of-n |" in printed
    assert "164 prompts" in printed


def test_runs_on_other_comparisons_are_not_compared(runs: Path):
    found = preference_report.read(collect([runs]))
    found[0].predictions.share.flags.writeable = True
    found[0].predictions.share[0] = 0.123
    with pytest.raises(ValueError, match="same comparisons"):
        preference_report.compare(found)
