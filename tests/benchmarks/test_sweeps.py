"""Sweeps on the command line: no job takes another down, nothing is done twice, and the end says what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
from omegaconf import OmegaConf
from support.places import ROOT

from benchmarks.core.config import at_most_asked, cores
from benchmarks.core.schemas import choices, composed
from benchmarks.core.sweeps import LAUNCHERS, check_launcher, threads_of_a_job

SMALL = (
    "task=line", "task.pairs=200", "task.samples=200", "task.draws=2", "task.directions=8", "task.energy_samples=50",
    "progress=false",
)  # fmt: skip


def start(*arguments: str, threads: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def command(*arguments: str, threads: int = 1) -> tuple[int, str, str]:
    process = start(*arguments, threads=threads)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def finished(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Read the finished runs: by method and seed, when and what was written."""
    return {
        path.parent.parent.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("metrics.json")
    }


def hydra_config(*overrides: str) -> Any:
    return composed(*overrides, return_hydra_config=True).hydra


def needs(launcher: str) -> None:
    if missing := check_launcher([f"hydra/launcher={launcher}"]):
        pytest.skip(missing)


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path):
    sweep = ("-m", *SMALL, "method=law_identity,shift", "seed=0,1,2", f"out={tmp_path}")
    process = start(*sweep)
    until = time.monotonic() + 60
    while len(finished(tmp_path)) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = finished(tmp_path)
    assert 2 <= len(before) < 6
    code, out, _ = command(*sweep)
    assert code == 0
    assert f"6 runs: {6 - len(before)} done, {len(before)} finished before" in out
    after = finished(tmp_path)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    # Nothing of the notes is left, of the killed sweep the empty place at most.
    assert len(list((tmp_path / ".sweeps").rglob("*.json"))) <= len(before) + 1


@pytest.mark.parametrize(
    "launcher",
    [
        ("basic",),
        ("joblib", "hydra.launcher.n_jobs=2"),
        ("submitit_local", "hydra.sweeper.max_batch_size=2"),
        ("ray", "+hydra.launcher.ray.init.num_cpus=2"),
    ],
    ids=lambda launcher: launcher[0],
)
def test_under_every_launcher_a_failed_job_is_kept_and_the_others_go_on(launcher: tuple[str, ...], tmp_path: Path):
    needs(launcher[0])
    # A method that chooses among texts fails on a law; it comes first.
    code, out, err = command(
        "-m", *SMALL, "method=longest,shift", f"out={tmp_path}", f"hydra/launcher={launcher[0]}", *launcher[1:],
        threads=cores(),
    )  # fmt: skip
    assert code == 1, err
    assert "2 runs: 1 done, 1 failed" in out
    (error,) = tmp_path.rglob("error.txt")
    assert "UnsuitableMethodError" in error.read_text()
    assert f"failed: {error}: UnsuitableMethodError" in out
    ((name, (_, metrics)),) = finished(tmp_path).items()
    assert name == "line-shift-0"
    threads = json.loads(metrics)["environment"]["threads"]
    assert threads == (cores() if launcher[0] == "basic" else 1 if launcher[0] == "ray" else max(1, cores() // 2))
    assert not (tmp_path / ".sweeps").exists()


def test_a_launcher_that_is_not_installed_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LAUNCHERS, "abacus", ("hydra_abacus_launcher", "hydra-abacus-launcher"))
    said = check_launcher(["-m", "seed=0,1", "hydra/launcher=abacus"])
    assert said is not None
    assert said.endswith("pip install hydra-abacus-launcher")
    assert check_launcher(["-m", "seed=0,1"]) is None
    assert check_launcher(["-m", "hydra/launcher=basic"]) is None


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [
        (["hydra.mode=RUN"], cores()),
        (["hydra.mode=MULTIRUN"], cores()),
        (["hydra.mode=MULTIRUN", "hydra/launcher=joblib"], 1),
        (["hydra.mode=MULTIRUN", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1"], cores()),
        (["hydra.mode=MULTIRUN", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], max(1, cores() // 2)),
        (["hydra.mode=MULTIRUN", "hydra/launcher=joblib", "hydra.sweeper.max_batch_size=1"], cores()),
        (["hydra.mode=MULTIRUN", "hydra/launcher=submitit_local"], 1),
        (["hydra.mode=MULTIRUN", "hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=3"], 3),
        (["hydra.mode=MULTIRUN", "hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=8"], 8),
        (["hydra.mode=MULTIRUN", "hydra/launcher=submitit_slurm"], cores()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_jobs_at_a_time_share_the_cores(overrides: list[str], threads: int, monkeypatch: pytest.MonkeyPatch):
    for launcher in LAUNCHERS:
        if f"hydra/launcher={launcher}" in overrides:
            needs(launcher)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert threads_of_a_job(hydra_config(*overrides)) == threads


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_can_be_composed(path: Path):
    found = hydra_config(f"experiment={path.stem}")
    params = found.sweeper.params or {}
    assert cast(Any, OmegaConf.load(path)).get("hydra", {}).get("sweeper", {}).get("params", {}) == params
    named = {"task": found.runtime.choices.task, "method": found.runtime.choices.method, **params}
    for group in ("task", "method"):
        assert set(str(named[group]).replace(" ", "").split(",")) <= set(choices(group))
    # So that an override of a task's field, which is no sweep, finds the field: task.pairs=300 of experiment=pbrl.
    assert found.runtime.choices.task == named["task"].split(",")[0].strip()
    if path.stem == "speed":  # one run, which a sweep would disturb
        assert named["task"] == "speed"
        assert not params


@pytest.mark.parametrize(("asked", "threads"), [(None, 4), ("1", 1), ("8", 4), ("2,1", 2), ("0", 4), ("many", 4)])
def test_no_run_takes_more_threads_than_the_environment_allows(monkeypatch, asked, threads):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert at_most_asked(4) == threads


def test_the_modules_of_the_launchers_are_named_rightly():
    installed = {name: find_spec("hydra_plugins." + module) for name, (module, _) in LAUNCHERS.items()}
    for name, spec in installed.items():
        if spec is not None:
            assert hydra_config(f"hydra/launcher={name}").launcher._target_.startswith("hydra_plugins.")


def test_a_method_that_does_not_suit_the_task_is_one_line(tmp_path: Path):
    code, _, err = command(*SMALL, "method=longest", f"out={tmp_path}")
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("method=longest does not suit task=line: ")
    assert "Traceback" not in err
