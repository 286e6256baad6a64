"""The clock that speeds are compared by, and what is timed: that it is the library's own work, and counted rightly."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import report
from benchmarks.core.config import FlowMethodConfig, RunConfig, SpeedConfig
from benchmarks.core.runner import run
from benchmarks.methods.flow import FlowChoice
from benchmarks.methods.plain import make as make_plain
from benchmarks.speed.clock import Race, race
from benchmarks.speed.pairs import draw_pairs
from benchmarks.speed.response import refining
from benchmarks.speed.storage import feeding, peaks, stored_pairs
from benchmarks.speed.targets import TARGETS
from benchmarks.speed.training import PausedFit, bare_products, products_of_a_row
from benchmarks.speed.transport import Exact, adaptive, alone
from benchmarks.tasks.speed import SpeedTask, load
from pfm import EncodedPairs, FlowConfig, PreferenceFlow

SMALL = FlowConfig(hidden=16, layers=1, epochs=1, batch_size=64)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pairs() -> EncodedPairs:
    return draw_pairs(1500, 12)


@pytest.fixture(scope="module")
def flow(pairs: EncodedPairs) -> PreferenceFlow:
    return PreferenceFlow.fit(pairs, SMALL, draw_pairs(300, 12, 1), False)


# -- the clock --------------------------------------------------------------------------------------------------


def multiply(size: int):
    matrix = torch.randn(size, size)

    def work(units: int) -> None:
        for _ in range(units):
            torch.mm(matrix, matrix)

    return work


def test_work_equals_itself_and_half_the_work_is_twice_as_fast():
    once = multiply(96)

    def twice(units: int) -> None:
        once(2 * units)

    found = race({"once": once, "twice": twice}, twin="once", block=0.005, readings=5)
    assert found.itself.value == pytest.approx(1, abs=0.1)
    assert found.ratio("twice", "once").value == pytest.approx(2, rel=0.15)
    assert found.units_a_second("once").value > 1.5 * found.units_a_second("twice").value


def test_waiting_costs_nothing_on_this_clock():
    work = multiply(64)

    def waiting(units: int) -> None:
        time.sleep(0.004)
        work(units)

    found = race({"work": work, "waiting": waiting}, twin="work", block=0.004, readings=3, rounds=3)
    assert found.ratio("waiting", "work").value < 1.4


def test_contestants_take_turns_in_rotating_order():
    now, order = 0.0, []

    def contestant(name: str, seconds: float):
        def work(units: int) -> None:
            nonlocal now
            order.append(name)
            now += units * seconds

        return work

    found = race(
        {"a": contestant("a", 1.0), "b": contestant("b", 4.0)}, twin="a", block=2.0, rounds=2, readings=3,
        clock=lambda: now,
    )  # fmt: skip
    turns = order[-3 * 2 * 3 :]  # after calibration
    assert turns == [*"aba", *"baa", *"aab", *"aba", *"baa", *"aab"]
    assert found.seconds["a"].shape == (3, 2)
    assert found.itself.value == 1
    assert found.ratio("b", "a").value == 4


def test_a_reading_is_a_median_of_neighbours_and_the_interval_spans_all_readings():
    seconds = {"a": np.array([[1.0, 2, 9], [1, 1, 1], [2, 2, 2]]), "b": np.array([[1.0, 1, 1], [1, 1, 1], [1, 1, 1]])}
    found = Race(seconds | {"b again": seconds["b"] * 1.2}, twin="b")
    ratio = found.ratio("a", "b")
    assert (ratio.value, ratio.low, ratio.high) == (2, 1, 2)
    assert found.itself.value == pytest.approx(1.2)
    assert not found.steady


def test_a_race_that_is_not_steady_is_run_again_and_then_says_so():
    now, turns = 0.0, 0

    def drifting(units: int) -> None:
        nonlocal now, turns
        turns += 1
        now += units * 1.1**turns

    found = race({"a": drifting, "b": drifting}, twin="a", block=0.5, rounds=1, readings=1, tries=3, clock=lambda: now)
    assert not found.steady
    # Two calibrating turns each, then three races of one round: of "a", of "b", and of "a" again.
    assert turns == 2 * 2 + 3 * 3
    with pytest.raises(ValueError, match="twin must be one of a"):
        race({"a": drifting}, twin="b")


# -- what is timed ----------------------------------------------------------------------------------------------


def test_a_paused_fit_makes_as_many_updates_of_the_library_itself_as_asked(pairs: EncodedPairs):
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(None))
    try:
        with PausedFit(pairs, draw_pairs(100, 12, 1), SMALL) as fit:
            fit(1)
            begun = len(steps)
            fit(5)
            assert len(steps) == begun + 5
            time.sleep(0.05)
            assert len(steps) == begun + 5
    finally:
        hook.remove()
    assert all(thread.name != "paused fit" for thread in threading.enumerate())


def test_a_paused_fit_says_what_went_wrong(pairs: EncodedPairs):
    other = EncodedPairs(torch.randn(20, 3), torch.randn(20, 3))
    with pytest.raises(RuntimeError) as caught, PausedFit(pairs, other, SMALL):
        pass
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ZeroDivisionError), PausedFit(pairs, draw_pairs(100, 12, 1), SMALL):
        _ = 1 / 0


def test_bare_products_are_those_of_the_network_there_and_back():
    counted = []
    original = torch.mm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch,
            "mm",
            lambda a, b, out: counted.append(a.shape[0] * a.shape[1] * b.shape[1]) or original(a, b, out=out),
        )
        bare_products(7, 6, 5, 4, 3, torch.device("cpu"))(1)
    # There, and back to the weights; to the inputs from the second layer on. 17 features of time.
    by_hand = 2 * 4 * (6 + 17 + 5) + 3 * 2 * 4 * 4 + 3 * 4 * 6
    assert products_of_a_row(6, 5, 4, 3) == by_hand
    assert sum(counted) == 7 * by_hand


def test_the_adaptive_pass_and_ours_agree_with_the_exact_one(flow: PreferenceFlow, pairs: EncodedPairs):
    y, context = pairs.rejected[:64], pairs.context
    assert context is not None
    exact = Exact.of(flow, y, context[:64])
    assert exact.error(y) == pytest.approx(1)
    assert exact.error(adaptive(flow, y, context[:64])()) < 0.02
    assert exact.error(flow.transport(y, context[:64], steps=16)) < 1e-3
    assert exact.relative_error(y) < exact.error(y)
    assert 0 <= alone(flow, y, context[:64], rows=8) < 1e-5


def test_stored_pairs_are_the_drawn_ones_and_feeding_goes_round(tmp_path: Path):
    drawn = draw_pairs(300, 12)
    with stored_pairs(300, 12) as folder:
        stored = EncodedPairs.load(folder)
        assert len(stored) == 300
        for ours, theirs in ((stored.chosen, drawn.chosen), (stored.rejected, drawn.rejected)):
            assert torch.equal(ours, theirs.half())
        feeding(stored, 64)(40)
        del stored
    assert not folder.exists()


def test_memory_of_a_fit_in_a_process_of_its_own():
    with stored_pairs(400, 12) as folder:
        found = peaks(folder, SMALL, rows=100)
    assert found["moved"] > 0
    for stage in ("start", "fit", "refine"):
        assert 0.05 < found[stage]["anonymous"] < found[stage]["resident"] < 5
    assert found["fit"]["anonymous"] > found["start"]["anonymous"]


def test_a_refinement_chooses_among_the_candidates(flow: PreferenceFlow):
    results = refining(flow, prompts=5, candidates=3)()
    assert len(results) == 5
    assert all(len(result.candidates) == 3 and math.isfinite(result.win_probability) for result in results)


# -- the task ---------------------------------------------------------------------------------------------------


def test_the_task_writes_figures_and_the_report_holds_them_to_their_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    task = SpeedConfig(
        name="speed", parts=["training", "transport", "response"], dimension=12, batches=[64], hidden=16, layers=1,
        pairs=1000, block=0.002, rounds=1, readings=2,
    )  # fmt: skip
    flow: dict[str, Any] = SMALL.to_dict()
    method = FlowMethodConfig(name="pfm", family="flow", label="Preference flow", flow=flow)
    settings = RunConfig(task=task, method=method, out=str(tmp_path), threads=1, progress=False)
    share = run(settings, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    figures, verdicts = metrics["figures"], metrics["about"]["verdicts"]
    assert metrics["kind"] == "speed"
    assert metrics["environment"]["threads"] == 1
    assert figures["transport.ratio"]["value"] > 1
    assert figures["alone.difference"]["value"] < 1e-5
    assert verdicts["memory.fit.resident"] == "not measured here"
    assert verdicts["alone.difference"] == "met"
    judged = [verdict for verdict in verdicts.values() if verdict in ("met", "missed")]
    assert share == judged.count("met") / len(judged)
    with np.load(tmp_path / "seconds.npz") as arrays:
        assert arrays["transport.dopri5"].shape == arrays["transport.dopri5 again"].shape == (2, 1)
    assert report.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {target.what} |" in printed for target in TARGETS)
    assert f"{judged.count('met')} of {len(judged)} targets met" in printed


def test_a_figure_is_judged_by_its_bound_and_not_at_all_where_the_clock_was_not_steady():
    (share,) = (target for target in TARGETS if target.name == "training.64.share")
    (error,) = (target for target in TARGETS if target.name == "transport.error")

    def figures(**values: float) -> dict[str, Any]:
        return {name.replace("_", "."): {"value": value} for name, value in values.items()}

    assert share.verdict({}) == "not measured here"
    assert share.verdict(figures(training_64_share=0.45)) == "met"
    assert share.verdict(figures(training_64_share=0.44)) == "missed"
    assert share.verdict(figures(training_64_share=0.9, training_64_itself=1.06)) == "not steady"
    assert error.verdict(figures(transport_error=0.0071)) == "missed"
    assert error.verdict(figures(transport_error=0.0069, transport_itself=1.06)) == "met"


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match=r"task\.parts must be among training, .*got trainig"):
        load(SpeedConfig(name="speed", parts=["trainig"]), 0)
    method = FlowMethodConfig(name="random", family="plain", label="")
    with pytest.raises(TypeError, match="method=pfm"):
        SpeedTask(SpeedConfig(name="speed"), 0).run(make_plain(method), None)  # pyright: ignore[reportArgumentType]
    assert FlowChoice(method).config.flow  # what the task reads of a flow's method
