"""Runs one method on one task, once: results are found again, failures are kept and do not stop others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

import pfm
from benchmarks.core.bench import Bench
from benchmarks.core.config import RunConfig, at_most_asked, cores
from benchmarks.methods import make_method
from benchmarks.tasks import load_task

__all__ = ["ARRAYS", "ERROR", "METRICS", "find_result", "run"]

logger = logging.getLogger(__name__)

METRICS, ERROR = "metrics.json", "error.txt"
# what a run of a kind keeps beside its metrics
ARRAYS = {"selection": "picks.npz", "law": "draws.npz", "speed": "seconds.npz", "preference": "predictions.npz",
          "acquisition": "curves.npz", "text_editing": "edits.npz",
          "control": "returns.npz", "images": "images.npz",
          "text_autoencoder": "outputs.npz", "paper": "runs.npz"}  # fmt: skip


def run(config: RunConfig, folder: Path) -> float:
    """Measure a method on a task, write the result into ``folder``, and return the score.

    A finished run of equal settings below ``config.out`` is taken instead, unless ``config.force``.

    Raises:
        MissingDataError: the task's data are absent.
        Exception: whatever went wrong; its traceback is in ``error.txt``.
    """
    found = None if config.force else find_result(Path(config.out), config.key())
    if found is not None:
        logger.info("already there: %s", found)
        return float(json.loads(found.read_text(encoding="utf-8"))["score"])
    threads = at_most_asked(cores()) if config.threads == "auto" else int(config.threads)
    torch.set_num_threads(threads)
    threadpool_limits(threads)  # of numpy and scipy
    try:
        metrics = _measure(config, folder)
    except Exception:
        (folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
        raise
    (folder / ERROR).unlink(missing_ok=True)
    logger.info(
        "%s on %s, seed %d: %.4f in %.1f s",
        config.method.name, config.task.name, config.seed, metrics["score"], sum(metrics["seconds"].values()),
    )  # fmt: skip
    return metrics["score"]


def find_result(root: Path, key: str) -> Path | None:
    """Find the metrics of a finished run by the key of its settings."""
    for path in sorted(root.rglob(METRICS)):
        if json.loads(path.read_text(encoding="utf-8")).get("key") == key:
            return path
    return None


def _measure(config: RunConfig, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    task = load_task(config.task, config.seed)
    method = make_method(config.method)
    loading = round(time.perf_counter() - began, 3)
    outcome = task.run(method, Bench(config.encoder, config.long_texts, config.seed, config.progress, config.flips))
    metrics = {
        "key": config.key(),
        "kind": outcome.kind,
        "settings": config.settings(),
        "score": outcome.score,
        "figures": {name: None if figure is None else asdict(figure) for name, figure in outcome.figures.items()},
        "seconds": {"load": loading, **outcome.seconds},
        "about": outcome.about,
        "notes": outcome.notes,
        "environment": {
            "code": _CODE,
            "pfm": version("preference-flow"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    # The metrics come last and whole: where they are, the run is finished.
    outcome.save(folder / ARRAYS.get(outcome.kind, f"{outcome.kind}.npz"))
    partial = folder / f"{METRICS}.partial"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, folder / METRICS)
    return metrics


def _code_digest() -> str:
    """Name the code that was measured: a report that joins runs of different code must be able to say so."""
    digest = hashlib.sha256()
    for package in (Path(pfm.__file__).parent, Path(__file__).parents[1]):
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{path.relative_to(package.parent).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


_CODE = _code_digest()  # at once: the files may change while a sweep runs, what it has imported does not
