"""The benchmark of labels asked for: whole runs, and gains paired by seed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.bench_settings import configured
from support.linear_pairs import labelled
from support.places import data_path

from benchmarks.acquisition.config import AcquisitionMethodConfig
from benchmarks.acquisition.report import compare, markdown
from benchmarks.core.runner import run
from benchmarks.core.runs import collect
from benchmarks.core.seeds import student_interval
from benchmarks.methods.acquisition import make
from pfm.acquisition import CRITERIA


def test_the_benchmark_runs_and_pairs_its_gain_by_seed(tmp_path: Path) -> None:
    data_path("ukp_convarg")
    for method in ("acquire_random", "acquire_information"):
        for seed in (0, 1):
            config = configured("task=acquisition", "task.labels=[10,20]", "task.pool=80", "task.options={draws: 2}",
                                f"method={method}", f"seed={seed}", "encoder=surface", "progress=false", "threads=1",
                                f"out={tmp_path}")  # fmt: skip
            folder = tmp_path / f"{method}-{seed}"
            folder.mkdir()
            run(config, folder)
    curves = {curve.method: curve for curve in compare(collect([tmp_path]))}
    one, control = curves["acquire_information"], curves["acquire_random"]
    assert one.labels == [10, 20]
    assert one.seeds == 2
    assert one.gain == pytest.approx([a - b for a, b in zip(one.win, control.win, strict=True)])
    assert control.area == 0
    assert "| Information on the reward | 2 |" in markdown(list(curves.values()))


def test_the_interval_is_students() -> None:
    mean, half = student_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(3.182 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=1e-3)
    assert student_interval([1.0])[1] == math.inf


def test_what_is_asked_does_not_depend_on_the_hidden_labels() -> None:
    pool, _ = labelled(60, 5)
    outputs = torch.cat([pool.chosen, pool.rejected])
    known, _ = labelled(20, 5, seed=2)
    for by in CRITERIA:
        acquirer = make(AcquisitionMethodConfig("x", "acquisition", "x", by=by, members=3 * (by == "disagreement")))
        asked = [acquirer.ask(part, 5, known, outputs, 0) for part in (pool, pool.shuffle_labels(0), pool.swap())]
        assert torch.equal(asked[0], asked[1])
        assert torch.equal(asked[0], asked[2])
