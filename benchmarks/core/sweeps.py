"""Sweeps: every job is accounted for, whichever launcher ran it, and none takes another down.

Hydra's launchers run jobs in this process, in others, or on other machines; what all of them share is the folder of the
runs. There each job of a sweep leaves a note of how far it came, and the process that started them adds the notes up.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from benchmarks.core.config import RunConfig, at_most_asked, cores
from benchmarks.core.data import MissingDataError
from benchmarks.core.runner import ERROR, find_result, run

__all__ = ["SettingsError", "Sweep", "check_launcher", "close_sweep", "one_folder", "run_job", "threads_of_a_job"]

NOTES = ".sweeps"
LAUNCHERS = {  # Hydra's launchers that are packages of their own: the module, and how to install it
    "joblib": ("hydra_joblib_launcher", "--constraint constraints.txt hydra-joblib-launcher"),
    "submitit_local": ("hydra_submitit_launcher", "--constraint constraints.txt hydra-submitit-launcher"),
    "submitit_slurm": ("hydra_submitit_launcher", "--constraint constraints.txt hydra-submitit-launcher"),
    # Without what it asks for: cloudpickle below 3 and boto3, for its other half, exclude joblib 1.6 and dateutil 4.
    "ray": ("hydra_ray_launcher", "--constraint constraints.txt ray && pip install --no-deps hydra-ray-launcher"),
}

_started: list[Path] = []  # the notes of the sweep that this process started


class Sweep(Callback):
    """Gives a sweep a name that its jobs, wherever they run, find their place for notes by."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Name the sweep, for every job."""
        name = f"sweep-{uuid.uuid4().hex[:12]}"  # digits alone, or with one e among them, Hydra would read as a number
        with read_write(config), open_dict(config):
            config.hydra.overrides.task.append(f"sweep={name}")
        _started.append(Path(config.out).absolute() / NOTES / name)


class SettingsError(ValueError):
    """Says what is wrong with a setting, before anything is run."""


def one_folder(name: str) -> str:
    """Write a name as that of one folder: a value with slashes must not lead out of the folder of the runs."""
    return re.sub(r"[/\\]|^\.+$", lambda found: quote(found[0], safe="").replace(".", "%2E"), str(name))


OmegaConf.register_new_resolver("one_folder", one_folder, replace=True)


def run_job(config: DictConfig) -> float:
    """Run one job of Hydra's and give its score; in a sweep, NaN in place of an error.

    A failed run has its traceback in ``error.txt``.
    """
    settings, hydra = cast(RunConfig, OmegaConf.to_object(config)), HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    if settings.threads == "auto":
        settings.threads = at_most_asked(threads_of_a_job(hydra))
    if settings.sweep is None:
        try:
            settings.check()
        except ValueError as error:
            raise SettingsError(str(error)) from None
        return run(settings, folder)
    note = _Note(Path(settings.out) / NOTES / settings.sweep / f"{hydra.job.num}.json")
    note.write("died", folder)  # until it turns out otherwise
    outcome, place, score, text = "finished before", folder, float("nan"), ""
    try:
        settings.check()
        if settings.force or find_result(Path(settings.out), settings.key()) is None:
            outcome = "done"
        score = run(settings, folder)
    except MissingDataError as error:
        outcome, text = "without data", str(error)
    except Exception as error:
        outcome, place = "failed", folder / ERROR
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    note.write(outcome, place, text)
    return score


def close_sweep(*, cut_short: bool = False) -> int:
    """Say what became of the jobs of the sweep that this process started, if it did; give the exit code.

    ``cut_short``: the launcher was stopped, or gave up as joblib's does when a worker is killed. The exit code is 0 if
    all are done, 1 if one failed or died, 2 if otherwise one lacked its data.
    """
    if not _started:
        return 0
    notes = _started.pop()
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in _by_number(notes)]
    shutil.rmtree(notes, ignore_errors=True)
    if notes.parent.is_dir() and not any(notes.parent.iterdir()):
        notes.parent.rmdir()
    if not jobs:  # what was asked for could not be understood, which Hydra says
        return 0
    count = {name: sum(job["outcome"] == name for job in jobs) for name in
             ("done", "finished before", "failed", "died", "without data")}  # fmt: skip
    said = ", ".join(f"{number} {name}" for name, number in count.items() if number)
    print(f"{len(jobs)} runs: {said}", flush=True)
    for job in jobs:
        if job["outcome"] == "failed":
            print(f"failed: {job['place']}: {job['error']}")
        elif job["outcome"] == "died":
            print(f"died, or was stopped: {job['place']}")
    if cut_short:
        print("the sweep was cut short", flush=True)
    if cut_short or count["failed"] or count["died"]:
        print("the same command runs these again, and what is left of the sweep; finished runs are kept", flush=True)
    for error in dict.fromkeys(job["error"] for job in jobs if job["outcome"] == "without data"):
        print(error, file=sys.stderr)
    return 1 if count["failed"] or count["died"] else 2 if count["without data"] else 0


def threads_of_a_job(hydra: Any) -> int:
    """Share the cores among the jobs that a launcher runs at a time."""
    if hydra.mode != RunMode.MULTIRUN:
        return cores()
    launcher, target = hydra.launcher, str(hydra.launcher._target_)
    at_once = hydra.sweeper.get("max_batch_size") or cores()
    if target.endswith("JoblibLauncher"):
        jobs = int(launcher.n_jobs)
        at_once = min(at_once, jobs if jobs > 0 else max(1, cores() + 1 + jobs))
    elif target.endswith("RayLauncher"):
        return max(1, int(launcher.ray.remote.get("num_cpus") or 1))
    elif "submitit" in target:
        if launcher.cpus_per_task:
            return int(launcher.cpus_per_task)
        if target.endswith("SlurmLauncher"):
            return int(os.environ.get("SLURM_CPUS_PER_TASK") or cores())
    else:  # one after another
        return cores()
    return max(1, cores() // at_once)


def check_launcher(arguments: list[str]) -> str | None:
    """Tell what to install if the arguments ask for a launcher that is not there; None if nothing is amiss."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        module, needs = LAUNCHERS.get(value, ("", ""))
        if name == "hydra/launcher" and module and find_spec("hydra_plugins." + module) is None:
            return f"hydra/launcher={value} is a package of its own that is not installed: pip install {needs}"
    return None


class _Note:
    """Is what one job has to say: how it ended, where to look, and the first line of an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, outcome: str, place: Path, error: str = "") -> None:
        partial = self.path.with_suffix(".partial")
        text = json.dumps({"outcome": outcome, "place": str(place), "error": error})
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path)


def _by_number(notes: Path) -> list[Path]:
    return sorted(notes.glob("*.json"), key=lambda path: int(path.stem))
