"""``task=paper``: three sweeps one after the other, since each has methods of its own, and a page of all."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.core.bench import Bench, Outcome
from benchmarks.core.data import MissingDataError
from benchmarks.paper.config import PaperConfig
from benchmarks.paper.known import EXPERIMENTS
from benchmarks.paper.page import finished, save
from benchmarks.text_autoencoder.writer import is_trained

__all__ = ["Paper"]

logger = logging.getLogger(__name__)

WITHOUT_DATA = 2  # what a sweep exits with where its data are absent
INTERRUPTED = 130


@dataclass(frozen=True)
class Paper:
    """Runs the sweeps and writes the page; the score is the share of the paper's experiments that have runs."""

    config: PaperConfig

    def run(self, method: object, bench: Bench) -> Outcome:
        """Run what is missing, and write the page of what there is, whatever became of the sweeps.

        The method is not used: every experiment has methods of its own.

        Raises:
            ValueError: an experiment is not one of the paper's. MissingDataError: an experiment has no run at all.
            RuntimeError: runs of a sweep failed.
        """
        config, known = self.config, {each.name: each for each in EXPERIMENTS}
        for name in [*config.experiments, *config.overrides]:
            if name not in known:
                raise ValueError(f"task.experiments and task.overrides name {', '.join(known)}: got {name!r}")
        took: dict[str, float] = {}
        codes: dict[str, int] = {}
        if config.sweep:
            for name in config.experiments:
                began = time.perf_counter()
                codes[name] = self._swept(name, bench.progress)
                took[name] = round(time.perf_counter() - began, 2)
        began = time.perf_counter()
        runs = finished([Path(config.folder) / name for name in config.experiments])
        page = Path(config.page)
        notes = {name: [f"The sweep ended with exit status {code}: not all of its runs are here."]
                 for name, code in codes.items() if code}  # fmt: skip
        save(runs, page, notes)
        took["page"] = round(time.perf_counter() - began, 2)
        logger.info("%s and %s", page, page.with_suffix(".html"))
        failed = [name for name, code in codes.items() if code not in (0, WITHOUT_DATA)]
        if failed:
            raise RuntimeError(
                f"runs of {', '.join(failed)} failed, see error.txt below {config.folder}; {page} shows the others, "
                "and the same command goes on"
            )
        count = {name: sum(run.kind == known[name].kind for run in runs) for name in config.experiments}
        if missing := [name for name, found in count.items() if not found]:
            commands = "; ".join(known[name].command for name in missing)
            raise MissingDataError(f"{page} lacks {', '.join(missing)}, of which there is no run: {commands}")
        return Outcome(
            kind="paper",
            score=len(count) / len(EXPERIMENTS),
            figures={},
            seconds=took,
            about={"runs": count, "page": str(page)},
            notes={},
            save=lambda path: np.savez_compressed(path, runs=np.array(list(count.values()))),
        )

    def _swept(self, name: str, progress: bool) -> int:
        """Run a sweep, and before that of texts the training that it needs; return the exit status."""
        config = self.config
        overrides = [f"out={Path(config.folder) / name}", f"progress={str(progress).lower()}"]
        if name == "imdb":
            overrides.append(f"task.autoencoder={config.autoencoder}")
            if not is_trained(Path(config.autoencoder)):
                training = [
                    "--out",
                    config.autoencoder,
                    "--updates",
                    str(config.updates),
                    "--writer",
                    str(config.writer),
                ]
                if code := _run("benchmarks.text_autoencoder", *training):
                    return code
        given = config.overrides.get(name, [])
        return _run("benchmarks", "-m", f"experiment={name}", *overrides, *given)


def _run(module: str, *arguments: str) -> int:
    """Run a module as a process of its own: a sweep in this one would share Hydra's state with the run."""
    logger.info("python -m %s %s", module, " ".join(arguments))
    code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    if code == INTERRUPTED or code < 0:
        raise KeyboardInterrupt
    return code
