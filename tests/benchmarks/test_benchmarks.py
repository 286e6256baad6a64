"""The benchmark road: loaders without leaks, runs that are found again, controls that behave, a report that adds up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from support.bench_settings import configured
from support.places import ROOT, data_path

from benchmarks import report
from benchmarks.core.bench import Bench
from benchmarks.core.data import MissingDataError
from benchmarks.core.measures import ChoiceTable, SeedBootstrap
from benchmarks.core.runner import run
from benchmarks.core.runs import collect
from benchmarks.methods import make_method
from benchmarks.selection import report as selection_report
from benchmarks.selection.selection import Selection, draw_candidates, limited, one_hot, split_prompts
from benchmarks.tasks import load_task
from pfm.statistics import Bootstrap

TASKS = {"alpaca": "alpaca_eval", "arguments": "ukp_convarg", "captions": "caption_contest"}


@cache
def loaded(task: str, seed: int = 0, *overrides: str) -> Selection:
    data_path(TASKS[task])
    settings = configured(f"task={task}", "method=random", *overrides)
    return cast(Selection, load_task(settings.task, seed))


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


# -- what is asked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", ["sede=1", "task.draw=3", "method.margins=0", "method.flow.sgima=0.1", "task=alpacca", "seed=one"]
)
def test_misspelt_or_mistyped_settings_are_refused(wrong: str):
    with pytest.raises(Exception, match=wrong.split("=")[0].split(".")[-1]):
        configured("task=arguments", "method=pfm", wrong)


def test_the_key_depends_on_what_is_measured_and_on_nothing_else():
    base = ("task=arguments", "method=pfm")
    key = configured(*base).key()
    assert configured(*base, "threads=1", "progress=false", "out=elsewhere", "force=true").key() == key
    for other in ("seed=1", "encoder=surface", "task.draws=3", "method.flow.sigma=0.1", "method.by=alignment"):
        assert configured(*base, other).key() != key


def test_absent_data_are_one_line_and_exit_code_2(tmp_path: Path):
    (tmp_path / "ukp_convarg").mkdir()
    result = command(
        "-m", "task=alpaca,captions", "method=random,identity", f"out={tmp_path}/runs", PFM_DATA=str(tmp_path)
    )
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert [str(tmp_path / name) in line for name, line in zip(("alpaca_eval", "caption_contest"), lines, strict=True)]
    assert all("PFM_DATA" in line for line in lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PFM_DATA", str(tmp_path))
        with pytest.raises(MissingDataError, match=r"arguments\.jsonl\.gz"):
            load_task(configured("task=arguments", "method=random").task, 0)


def test_a_failed_run_leaves_its_error_and_does_not_stop_the_others(tmp_path: Path):
    data_path("ukp_convarg")
    result = command(
        "-m", "task=arguments", "method=random,oracle", "encoder=minilm+minilm,surface", "task.draws=2",
        f"out={tmp_path}", "progress=false",
    )  # fmt: skip
    assert result.returncode == 1
    place = {method: tmp_path / f"arguments-{method}-0" for method in ("random", "oracle")}
    for folder in place.values():
        assert (folder / "encoder=surface,task.draws=2" / "metrics.json").is_file()
        error = (folder / "encoder=minilm+minilm,task.draws=2" / "error.txt").read_text()
        assert "names a part twice" in error


# -- tasks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_stands_on_both_sides(task: str):
    data = loaded(task)
    tested = {item.prompt or item.group for item in data.items}
    assert not tested & {*data.train.prompts, *(data.train.group or [])}
    if task == "arguments":  # nor the other stance of a debate
        titles = {prompt.rsplit("?", 1)[0] for prompt in tested if "?" in prompt}
        assert not any(prompt.startswith(tuple(titles)) for prompt in data.train.prompts)
    assert len(tested) > 3
    sizes = {len(item.candidates) for item in data.items}
    assert sizes == {64 if task == "captions" else 8}
    assert all(text.strip() for item in data.items for text in item.candidates)
    assert {item.scores.shape for item in data.items} == {(next(iter(sizes)),)}


@pytest.mark.parametrize("task", TASKS)
def test_loading_is_repeatable_and_follows_the_seed(task: str):
    first, again, other = loaded(task), loaded.__wrapped__(task), loaded(task, 1)
    assert [item.candidates for item in first.items] == [item.candidates for item in again.items]
    assert list(first.train) == list(again.train)
    assert {item.group for item in first.items} != {item.group for item in other.items}


def test_draws_give_each_text_its_own_score_and_leave_one_out():
    items = draw_candidates("p", "q", list("abcdef"), range(6), candidates=4, draws=300, seed=(7,))  # pyright: ignore[reportArgumentType]
    assert all(item.scores.tolist() == [ord(text) - 97 for text in item.candidates] for item in items)
    assert all(item.independent not in item.scores for item in items)
    assert np.mean([item.scores[0] for item in items]) == pytest.approx(2.5, abs=0.4)
    assert draw_candidates("p", "q", list("abcd"), [1, 2, 3, 4], candidates=4, draws=3, seed=(7,)) == []


def test_splits_and_limits():
    names = [str(n) for n in range(30)]
    train, test = split_prompts(names, 1 / 3, 0)
    assert len(test) == 10
    assert sorted(train + test) == sorted(names)
    assert split_prompts(reversed(names), 1 / 3, 0) == (train, test)
    assert set(limited(names, 5)) < set(names)
    assert limited(names, None) == sorted(names)
    with pytest.raises(ValueError, match=r"task\.limit"):
        split_prompts(["one"], 1 / 3, 0)


def test_soft_labels_of_captions_are_as_sure_as_the_ratings():
    data = loaded("captions")
    certainty = np.array(data.train.probability)
    assert certainty.min() > 0.5
    groups = np.array(data.train.group)
    means = {name: certainty[groups == name].mean() for name in set(groups)}
    # Contests with 150 ratings a caption, against those with 20 to 30.
    assert min(means[n] for n in ("642", "648", "660") if n in means) > max(means.get(n, 0) for n in ("518", "519"))


# -- methods ----------------------------------------------------------------------------------------------------

RUNS = ("identity", "random", "longest", "oracle", "mean_shift", "bradley_terry", "pfm", "pfm_shuffled", "pfm_swapped")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every kind of method on ``arguments`` once, those that train nothing twice."""
    data_path("ukp_convarg")
    folder = tmp_path_factory.mktemp("runs")
    for method in RUNS:
        for seed in (0, 1) if method in ("random", "oracle") else (0,):
            # The choices need the win probability only; the field's network is tested elsewhere.
            more = ["method.flow.residual=false"] if method.startswith("pfm") else []
            settings = configured(
                "task=arguments", f"method={method}", f"seed={seed}", "encoder=surface", "progress=false",
                "threads=1", "task.draws=12", f"out={folder}", *more,
            )  # fmt: skip
            place = folder / f"{method}-{seed}"
            place.mkdir()
            run(settings, place)
    return folder


def score(runs: Path, method: str, seed: int = 0) -> float:
    return json.loads((runs / f"{method}-{seed}" / "metrics.json").read_text())["score"]


def test_the_flow_learns_and_its_controls_do_not(runs: Path):
    chance = score(runs, "random")
    assert score(runs, "pfm") > chance + 0.1
    assert abs(score(runs, "pfm_shuffled") - chance) < 0.03
    assert score(runs, "pfm_swapped") < chance - 0.1
    assert score(runs, "pfm") > score(runs, "bradley_terry") - 0.02


def test_the_oracle_bounds_every_method_and_random_is_the_exact_mean(runs: Path):
    scores = {method: score(runs, method) for method in RUNS}
    assert max(scores, key=lambda method: scores[method]) == "oracle"
    items = loaded("arguments", 0, "task.draws=12").items
    assert scores["random"] == pytest.approx(np.mean([item.scores.mean() for item in items]))
    assert scores["identity"] == pytest.approx(np.mean([item.scores[0] for item in items]))
    assert scores["oracle"] == pytest.approx(np.mean([item.scores.max() for item in items]))
    for method in ("identity", "random", "longest", "pfm"):
        table = ChoiceTable.load(runs / f"{method}-0" / "picks.npz")
        assert table.score().mean() == pytest.approx(scores[method])


@pytest.mark.parametrize("method", ["longest", "mean_shift", "bradley_terry", "pfm_sample"])
def test_no_method_reads_the_judge(method: str):
    data = loaded("arguments", 0, "task.draws=2")
    settings = configured("task=arguments", f"method={method}")
    if hasattr(settings.method, "flow"):
        cast(Any, settings.method).flow["residual"] = False
    blind = [type(item)(**vars(item) | {"scores": item.scores * np.nan, "independent": np.nan}) for item in data.items]
    bench, made = Bench("surface", "truncate", 0, False), make_method(settings.method)
    if made.reads_vectors:
        train = data.train.select(range(0, len(data.train), 20))
        made.fit(train.encode(bench.encoder, progress=False), bench)
    seen = made.choose(data.items, bench.encoder)
    assert np.array_equal(seen, made.choose(blind, bench.encoder))
    assert np.array_equal(seen.sum(1), np.ones(len(data.items)))


# -- runs and the report ----------------------------------------------------------------------------------------


def test_a_finished_run_is_taken_again_unless_forced(runs: Path, tmp_path: Path):
    overrides = ("task=arguments", "method=random", "seed=0", "encoder=surface", "task.draws=12", f"out={runs}")
    assert run(configured(*overrides), tmp_path) == score(runs, "random")
    assert not list(tmp_path.iterdir())
    assert run(configured(*overrides, "force=true"), tmp_path) == score(runs, "random")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "picks.npz"}


def test_metrics_hold_the_settings_and_no_text(runs: Path):
    metrics = json.loads((runs / "pfm-0" / "metrics.json").read_text())
    assert metrics["settings"]["method"]["flow"]["residual"] is False
    assert metrics["about"]["test_prompts"] == 8
    figures = metrics["figures"]
    assert figures["score"]["low"] < figures["score"]["value"] < figures["score"]["high"]
    assert figures["win"]["value"] > figures["win_controlled"]["value"] > 0.5
    with np.load(runs / "pfm-0" / "picks.npz") as arrays:
        assert arrays["index"].shape == arrays["draw"].shape
        assert set(arrays["group"]) == {item.group for item in loaded("arguments").items}
        assert not any(array.dtype.kind == "U" for name, array in arrays.items() if name != "group")


def test_the_report_adds_up(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert report.main([str(runs), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "report.md").read_text() == printed
    assert (tmp_path / "arguments.png").read_bytes().startswith(b"\x89PNG")
    (task,) = json.loads((tmp_path / "report.json").read_text())
    methods = {method["name"]: method for method in task["methods"]}
    assert task["methods"][0]["name"] == "oracle"
    for name in ("pfm", "bradley_terry", "pfm_swapped"):
        gain = methods[name]["figures"]["gain"]
        assert gain["value"] == pytest.approx(score(runs, name) - score(runs, "random"))
        assert gain["low"] <= gain["value"] <= gain["high"]
    difference = methods["pfm"]["differences"]["bradley_terry"]
    assert difference["value"] == pytest.approx(score(runs, "pfm") - score(runs, "bradley_terry"))
    # Paired: far narrower than the scores' own intervals.
    assert difference["high"] - difference["low"] < 0.7 * np.ptp(
        [methods["pfm"]["figures"]["score"][k] for k in ("low", "high")]
    )
    assert methods["oracle"]["seeds"] == [0, 1]
    assert methods["oracle"]["interquartile"] == pytest.approx((score(runs, "oracle") + score(runs, "oracle", 1)) / 2)
    assert any("pfm has no run of seed 1" in note for note in task["notes"])
    for label in ("Preference flow", "Control, labels swapped", "Oracle best-of-n"):
        assert f"| {label} |" in printed


def test_runs_on_other_candidates_are_not_compared(runs: Path):
    found = selection_report.read(collect([runs]))
    table = found[0].choices
    found[0].choices.scores.flags.writeable = True
    table.scores[0, 0] += 1
    with pytest.raises(ValueError, match="same candidates"):
        selection_report.compare(found)


def test_the_report_of_nothing_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert report.main([str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err


# -- figures ----------------------------------------------------------------------------------------------------


def table(weights: np.ndarray, scores: np.ndarray, group: list[str]) -> ChoiceTable:
    items, n = scores.shape
    lengths = np.tile(np.arange(1.0, n + 1), (items, 1))
    changed = np.tile(np.arange(n) > 0, (items, 1))
    return ChoiceTable(np.array(group), np.zeros(items, int), scores, scores[:, -1], lengths, changed, weights)


def test_figures_of_known_choices():
    scores = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    choices = table(one_hot([1, 1, 2], 3), scores, ["a", "a", "b"])
    figures = choices.measure(SeedBootstrap(np.zeros(2, int), 200))
    values = {name: None if figure is None else figure.value for name, figure in figures.items()}
    # Prompts count alike: a's two items, 1 and 0, make one half; b's makes 1.
    assert values["score"] == 0.75
    assert values["win"] == 0.75
    assert values["win_independent"] == pytest.approx((0.5 + 0.5) / 2)
    assert values["changed"] == 1
    assert values["length_ratio"] == pytest.approx(np.exp((np.log(2) + np.log(3)) / 2))


def test_the_random_pick_is_measured_in_expectation():
    scores = np.arange(6.0).reshape(2, 3)
    figures = table(np.full((2, 3), 1 / 3), scores, ["a", "b"]).measure(SeedBootstrap(np.zeros(2, int), 200))
    score, win = figures["score"], figures["win"]
    assert score is not None
    assert score.value == 2.5
    assert win is not None
    assert win.value == pytest.approx((0.5 + 1 + 1) / 3)


def test_resampled_seeds_hold_the_spread_between_seeds():
    seeds = np.repeat(np.arange(5), 100)
    rng = np.random.default_rng(0)
    noise, shift = rng.normal(size=500), np.repeat(rng.normal(size=5), 100)
    alike, apart = (SeedBootstrap(seeds).mean(values) for values in (noise, noise + shift))
    assert apart.high - apart.low > 3 * (alike.high - alike.low)
    means = (noise + shift).reshape(5, 100).mean(1)
    half = 2.776 * means.std(ddof=1) / np.sqrt(5)
    assert apart.high - apart.low == pytest.approx(2 * half, rel=0.15)
    # Of one seed the prompts are resampled, and a seed without any item counts for nothing.
    of_one, plain = SeedBootstrap(np.zeros(500, int)).mean(noise), Bootstrap(500).mean(noise)
    assert of_one.high - of_one.low == pytest.approx(plain.high - plain.low, rel=0.1)
    assert SeedBootstrap(seeds).units(seeds < 3).tolist() == [3]


def test_choices_survive_the_disk_and_tables_join_without_mixing_prompts(tmp_path: Path):
    scores = np.arange(6.0).reshape(2, 3)
    choices = table(one_hot([0, 2], 3), scores, ["a", "b"])
    choices.save(tmp_path / "picks.npz")
    again = ChoiceTable.load(tmp_path / "picks.npz")
    assert again.same_items(choices)
    assert np.array_equal(again.weights, choices.weights)
    both = ChoiceTable.join([choices, again])
    assert both.prompts == 4
    assert both.score().tolist() == [0.0, 5.0, 0.0, 5.0]
