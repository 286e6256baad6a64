"""Figures of a fit reach a file, a function, and objects with the methods of the known trackers; none stops a fit."""

import json
import types

import pytest
import torch

import pfm
from pfm.tracking import as_tracker

CONFIG = pfm.FlowConfig(epochs=4, hidden=8, layers=1, batch_size=32)


def fit(tracker):
    rejected, chosen = torch.randn(2, 80, 2, generator=torch.Generator().manual_seed(0)).sort(0).values
    return pfm.PreferenceFlow.fit(pfm.EncodedPairs(chosen, rejected), CONFIG, progress=False, tracker=tracker)


def test_a_file_holds_the_validation_loss_by_updates(tmp_path):
    path = tmp_path / "metrics.jsonl"
    flow = fit(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    assert losses == [tuple(each) for each in flow.metadata["training"]["validation"]]
    assert rows[-1]["win/accuracy"] == pytest.approx(flow.metadata["win"]["accuracy"])


def test_tracking_does_not_change_the_fit(tmp_path):
    y = torch.zeros(3, 2)
    assert torch.equal(fit(tmp_path / "metrics.jsonl").transport(y), fit(None).transport(y))


@pytest.mark.parametrize("kind", ["log", "add_scalar", "log_metrics", "function"])
def test_each_known_tracker_gets_values_and_step(kind):
    seen = {}

    def keep(values, step):
        seen[step] = dict(values)

    trackers = {
        "log": types.SimpleNamespace(log=keep),
        "add_scalar": types.SimpleNamespace(add_scalar=lambda name, value, step: keep({name: value}, step)),
        "log_metrics": types.SimpleNamespace(log_metrics=keep),
        "function": keep,
    }
    tracker = as_tracker(trackers[kind])
    assert tracker is not None
    tracker.log({"loss": 0.5, "bad": float("nan")}, step=3)
    assert seen == {3: {"loss": 0.5}}


def test_a_tracker_that_fails_does_not_end_the_fit():
    calls = []

    def broken(values, step):
        calls.append(step)
        raise ConnectionError("no network")

    with pytest.warns(UserWarning, match="the tracker failed at step .* ConnectionError: no network"):
        flow = fit(broken)
    assert len(calls) == 1
    assert flow.metadata["training"]["updates"] > 0


def test_what_is_no_tracker_is_refused_before_the_fit(tmp_path):
    with pytest.raises(TypeError, match="tracker must have log"):
        fit(3)
    with pytest.raises(OSError, match="nowhere"):
        fit(tmp_path / "nowhere" / "metrics.jsonl")
