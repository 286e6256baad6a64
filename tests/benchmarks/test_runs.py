"""Finished runs on disk: which count, and which are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.core.runs import code_notes, collect
from benchmarks.core.schemas import method_settings


def written(root: Path, seed: int, hour: int, *, name: str = "walk", **settings: Any) -> None:
    method = {"name": name, "label": name.title(), "flow": {"seed": seed}} | settings
    key = json.dumps([method, seed])
    metrics = {
        "key": key,
        "kind": "control",
        "settings": {"task": {"name": "t"}, "method": method, "seed": seed},
        "environment": {"code": "as it is"},
        "finished": f"2026-01-01T{hour:02}:00:00+00:00",
    }
    folder = root / f"{len(list(root.iterdir()))}"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")


def named(root: Path, seeds: list[int] | None = None) -> list[tuple[str, str, int]]:
    return sorted((run.method, run.label, run.seed) for run in collect([root], seeds))


def test_settings_that_differ_make_another_method(tmp_path: Path):
    for seed in (0, 1):
        written(tmp_path, seed, hour=seed + 2, label_rounds=1, strengths=[1.0])
    written(tmp_path, 0, hour=0, label_rounds=5, strengths=[1.0])
    written(tmp_path, 0, hour=1, label_rounds=1, strengths=[1.0], flow={"seed": 0, "linear": False})
    assert named(tmp_path) == [
        ("walk", "Walk", 0),
        ("walk", "Walk", 1),
        ("walk[flow.linear=False]", "Walk, flow.linear=False", 0),
        ("walk[label_rounds=5]", "Walk, label_rounds=5", 0),
    ]


def test_the_first_keeps_the_name_where_there_are_as_many_of_each(tmp_path: Path):
    written(tmp_path, 0, hour=5, label_rounds=2)
    written(tmp_path, 0, hour=4, label_rounds=1)
    assert [method for method, _, _ in named(tmp_path)] == ["walk", "walk[label_rounds=2]"]


def test_a_field_that_the_code_of_then_did_not_have_tells_nothing_apart(tmp_path: Path):
    written(tmp_path, 0, hour=1)
    written(tmp_path, 1, hour=2, guidances=[1.0])
    assert {method for method, _, _ in named(tmp_path)} == {"walk"}


def test_other_seeds_are_left_out_when_some_are_asked_for(tmp_path: Path):
    for seed in (0, 1, 7):
        written(tmp_path, seed, hour=seed, label_rounds=1)
    assert [seed for _, _, seed in named(tmp_path, [0, 1])] == [0, 1]
    with pytest.raises(ValueError, match="no finished run of seed 3"):
        collect([tmp_path], [0, 3])


def test_a_report_of_a_seed_that_was_not_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    written(tmp_path, 0, hour=1)
    assert report.main([str(tmp_path), "--seeds", "4"]) == 2
    assert "no finished run of seed 4" in capsys.readouterr().err


def test_a_method_of_the_configuration_is_the_one_with_its_settings(tmp_path: Path):
    own = method_settings("mean_shift", "control.shift")
    assert own is not None
    assert own["label_rounds"] == 1
    for seed in (0, 1, 2):  # more runs of another setting do not take the name
        written(tmp_path, seed, hour=seed, **{**own, "label_rounds": 5})
    written(tmp_path, 0, hour=9, **own)
    found = {(method, seed) for method, _, seed in named(tmp_path)}
    assert found == {("mean_shift", 0), *(("mean_shift[label_rounds=5]", seed) for seed in (0, 1, 2))}
    assert method_settings("mean_shift", "no such family") is None


def test_settings_unlike_the_configured_ones_are_noted_where_no_other_run_tells_them(tmp_path: Path):
    shift, cpl = method_settings("mean_shift", "control.shift"), method_settings("cpl", "control.likelihood")
    assert shift is not None
    assert cpl is not None
    written(tmp_path, 0, hour=1, **shift)
    assert code_notes(collect([tmp_path])) == []
    written(tmp_path, 0, hour=2, **{**cpl, "label_rounds": 5})
    assert code_notes(collect([tmp_path])) == ["cpl was run with label_rounds=5, unlike its settings in conf/."]
