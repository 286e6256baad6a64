"""The benchmark of control: settings that load, methods that learn from labels and not noise, tables that add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.bench_settings import configured

from benchmarks import report
from benchmarks.control import references
from benchmarks.control.animation import side_by_side
from benchmarks.control.report import compare, markdown
from benchmarks.control.rewards import RewardEnsemble
from benchmarks.control.task import ControlTask
from benchmarks.core.config import RunConfig
from benchmarks.core.runner import find_result, run
from benchmarks.core.runs import collect
from benchmarks.core.schemas import choices
from benchmarks.methods import make_method
from benchmarks.tasks import load_task
from pfm import EncodedPairs

pytestmark = pytest.mark.slow

SMALL = {
    "task.pairs": 300,
    "task.episodes": 24,
    "task.validation": 8,
    "task.states": 30,
    "task.best": "null",
    "progress": "false",
    "threads": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pendulum's reference has been made already: it damps, and pushes too little upright."""
    folder = tmp_path_factory.mktemp("pbrl")
    meta = {"algo": "none", "env": "Pendulum-v1", "hidden_activation": "tanh", "output": "clip"}
    path = folder / "policies" / "sac_Pendulum-v1_early.npz"
    path.parent.mkdir()
    # Small weights keep tanh near the identity: torque = -6 sin - 0.6 speed, which is too weak to swing up.
    np.savez(
        path, W0=np.array([[0, 0.01, 0], [0, 0, 0.01]], np.float32), b0=np.zeros(2, np.float32),
        W1=np.array([[-600, -60]], np.float32), b1=np.zeros(1, np.float32), meta=np.array(json.dumps(meta)),
    )  # fmt: skip
    return folder


def settings(folder: Path, method: str, **changes: Any) -> RunConfig:
    """Give a small run on the pendulum in array code."""
    if method.startswith("flow"):
        changes = {
            "method.flow.hidden": 32,
            "method.flow.epochs": 10,
            "method.rounds": "[1,2]",
            "method.flow.layers": 2,
        } | changes
    return configured(
        "task=pbrl/pendulum", f"method=control/{method}", **{**SMALL, "task.folder": folder, "out": folder, **changes}
    )


@pytest.fixture(scope="module")
def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """What a few methods reach on the same small data."""
    found = {}
    for method in ("reference", "flow", "flow_shuffled", "mean_shift_network"):
        config = settings(folder, method)
        place = folder / method
        place.mkdir()
        run(config, place)
        found[method] = json.loads((place / "metrics.json").read_text())
    return found


def test_references_are_trained_in_the_environment_of_their_task():
    tasks = [name for name in choices("task") if name.startswith("pbrl/")]
    assert len(tasks) == 5
    for name in tasks:
        task = cast(Any, configured(f"task={name}", "method=control/reference").task)
        recipe = references.RECIPES.get(task.reference)
        assert recipe is None or recipe.environment == task.environment


def test_the_written_out_slope_is_the_gradient_of_the_reward():
    generator = torch.Generator().manual_seed(0)
    y, seen = torch.randn(400, 2, generator=generator), torch.randn(200, 3, generator=generator)
    state = torch.arange(200)
    score = (y * seen[:, :2].repeat_interleave(2, 0)).sum(1).view(-1, 2)
    first = (score[:, 0] > score[:, 1]).long()
    pairs = EncodedPairs.from_table(y, 2 * state + 1 - first, 2 * state + first, contexts=seen, context_index=state)
    reward = RewardEnsemble(2)
    assert reward.fit(pairs)["confirmed"] == 2
    at = y[:7].clone().requires_grad_(True)
    (wanted,) = torch.autograd.grad(reward.reward(at, seen[:7]).sum(), at)
    torch.testing.assert_close(reward.slope(y[:7], seen[:7]), wanted, rtol=1e-4, atol=1e-5)
    noise = RewardEnsemble(3)
    assert noise.fit(pairs.shuffle_labels(1))["confirmed"] < 2
    assert not noise.reward(y[:7], seen[:7]).any()
    assert not noise.slope(y[:7], seen[:7]).any()


def test_the_reference_gains_nothing_over_itself(finished: dict[str, dict[str, Any]]):
    figures = finished["reference"]["figures"]
    assert figures["gain"] == {"value": 0, "low": 0, "high": 0}
    assert abs(figures["segment_gain"]["value"]) < 1e-3  # what was collected is what is measured


def test_labels_are_what_is_learned_from(finished: dict[str, dict[str, Any]]):
    gain = {name: found["figures"]["gain"] for name, found in finished.items()}
    assert gain["flow"]["low"] > 0
    assert gain["flow_shuffled"]["low"] <= 0 < gain["flow"]["value"]
    assert gain["flow_shuffled"]["value"] < 0.5 * gain["flow"]["value"]


def test_methods_share_data_and_starts(folder: Path, finished: dict[str, dict[str, Any]]):
    counts = {found["about"]["labels"] for found in finished.values()}
    assert len(counts) == 1
    assert len(list((folder / "data" / "Pendulum-v1").iterdir())) == 1
    references = [np.load(folder / name / "returns.npz")["reference"] for name in finished]
    for each in references[1:]:
        np.testing.assert_array_equal(each, references[0])


def test_fewer_pairs_are_the_first_of_more(folder: Path, finished: dict[str, dict[str, Any]]):
    whole, few = (
        cast(ControlTask, load_task(settings(folder, "flow", **changes).task, 0)).segments()
        for changes in ({}, {"task.limit": 100})
    )
    seen = np.concatenate([part.observation for part in few])
    assert len(seen) == 100
    rows = {row.tobytes() for part in whole for row in part.observation}
    assert all(row.tobytes() in rows for row in seen)


def test_rounds_ask_for_as_many_labels_each(folder: Path, tmp_path: Path):
    config = settings(folder, "mean_shift_network", **{"method.label_rounds": 3, "task.members": 3})
    run(config, tmp_path)
    rounds = json.loads((tmp_path / "metrics.json").read_text())["notes"]["label_rounds"]
    assert len(rounds) == 3
    asked = [found["labels"] for found in rounds]
    assert sum(asked) <= 300  # of which a tenth is held out
    assert sum(asked) >= 240
    assert max(asked) - min(asked) <= 3


def test_the_report_adds_up(folder: Path, finished: dict[str, dict[str, Any]], tmp_path: Path):
    assert report.main([str(folder), "--out", str(tmp_path)]) == 0
    runs = [each for each in collect([folder]) if each.kind == "control"]
    (found,) = compare(runs)
    by_name = {each.name: each for each in found.methods}
    flow, shift = by_name["flow"], by_name["mean_shift_network"]
    assert flow.gain.value == pytest.approx(finished["flow"]["figures"]["gain"]["value"])
    assert shift.lead is not None
    assert shift.lead.value == pytest.approx(flow.gain.value - shift.gain.value)
    text = (tmp_path / "report.md").read_text()
    assert "Pendulum-v1" in text
    assert "Control, labels shuffled" in text
    assert (tmp_path / "pbrl-pendulum-gain.png").stat().st_size > 5000
    assert (tmp_path / "report.parquet").is_file()
    assert "No run of method=control/flow" in markdown(compare([each for each in runs if each.method != "flow"]))


def test_runs_are_found_again(folder: Path, finished: dict[str, dict[str, Any]]):
    assert find_result(folder, settings(folder, "flow").key()) == folder / "flow" / "metrics.json"
    assert find_result(folder, settings(folder, "flow", seed=1).key()) is None


def test_an_unknown_reference_says_what_there_is(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "rl_policies").mkdir(exist_ok=True)
    monkeypatch.setenv("PFM_DATA", str(folder))
    with pytest.raises(ValueError, match=r"nobody.*a2c_Reacher-v5"):
        references.load_reference("nobody", folder)


def test_methods_of_other_tasks_are_refused(folder: Path):
    config = configured("task=pbrl/pendulum", "method=random", **{**SMALL, "task.folder": folder, "out": folder})
    task = load_task(config.task, 0)
    with pytest.raises(TypeError, match="gives no policies"):
        task.run(make_method(config.method), cast(Any, None))


def test_animations_show_both_to_the_end(tmp_path: Path):
    from PIL import Image

    frames = [np.full((220, 220, 3), shade, np.uint8) for shade in (0, 90, 180)]
    path = tmp_path / "both.gif"
    side_by_side([(frames, [0.0, 1.0, 2.0]), (frames[:2], [0.0, 5.0])], ["reference", "flow"], path)
    with Image.open(path) as image:
        assert image.size == (440, 250)
        image.seek(getattr(image, "n_frames", 1) - 1)
        last = np.asarray(image.convert("L"))
    assert abs(int(last[200, 100]) - 180) < 8  # the longer one, at its end
    assert abs(int(last[200, 320]) - 90) < 8  # the shorter one, where it ended


def test_answers_by_a_coin_are_of_the_same_segments_and_teach_no_method(folder: Path, tmp_path: Path):
    config = settings(folder, "mean_shift_network", **{"task.teacher": "coin", "method.strengths": "[1.0]"})
    run(config, tmp_path)
    told = cast(ControlTask, load_task(settings(folder, "flow").task, 0)).segments()[0]
    coin = cast(ControlTask, load_task(config.task, 0)).segments()[0]
    np.testing.assert_array_equal(told.actions, coin.actions)
    agree = (told.label == coin.label).mean()
    assert 0.35 < agree < 0.65
