"""Large pair sets on disk: what it costs to feed batches from them, and how much memory a fit on them needs.

Run as a program, it fits and refines the pairs in a folder and prints the peaks of its memory: see :func:`peaks`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.clock import Contestant
from benchmarks.speed.pairs import draw_blocks
from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.flow.couplings import make_coupling

__all__ = ["feeding", "peaks", "stored_pairs"]

GIGABYTE = 1e9


@contextmanager
def stored_pairs(count: int, dimension: int, seed: int = 0) -> Generator[Path, None, None]:
    """Write pairs to a temporary folder as memory-mapped float16, block by block: they are never all in memory."""
    with tempfile.TemporaryDirectory(prefix="pfm-speed-") as temporary:
        raw = {
            name: np.lib.format.open_memmap(Path(temporary) / name, "w+", np.float16, (rows, dimension))
            for name, rows in (("outputs", 2 * count), ("contexts", count))
        }
        at = 0
        for chosen, rejected, context in draw_blocks(count, dimension, seed):
            rows = slice(at, at + len(chosen))
            raw["outputs"][rows] = chosen.half().numpy()
            raw["outputs"][count + at : count + at + len(chosen)] = rejected.half().numpy()
            raw["contexts"][rows] = context.half().numpy()
            at += len(chosen)
        every = torch.arange(count)
        outputs, contexts = (torch.from_numpy(raw[name]) for name in ("outputs", "contexts"))
        pairs = EncodedPairs.from_table(outputs, every, every + count, contexts=contexts, context_index=every)
        folder = pairs.save(Path(temporary) / "pairs")
        del pairs, outputs, contexts
        for name in list(raw):
            del raw[name]
            (Path(temporary) / name).unlink()
        yield folder


def feeding(pairs: EncodedPairs, batch: int, source: str = "reference") -> Contestant:
    """Make batches of the pairs as training does, and nothing else: rows in random order, as float32."""
    coupling = make_coupling(pairs, source=source, coupling="paired", best_of=2)
    items = batch // coupling.rows_per_item
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(coupling), generator=generator)
    place = 0

    def work(batches: int) -> None:
        nonlocal place
        for _ in range(batches):
            if place + items > len(order):
                place = 0
            coupling.draw(order[place : place + items], generator)
            place += items

    return work


def peaks(folder: Path, config: FlowConfig, rows: int, threads: int = 1) -> dict[str, Any]:
    """Fit the pairs in a folder and refine their first ``rows`` rejected outputs, in a process of its own.

    Returns:
        for "start" (all is imported), "fit" and "refine" the peaks in GB of "anonymous" memory, which is the process's
        own, and of "resident" memory, which counts the pages of the mapped files that the system keeps for it too; and
        the "seconds" of processor time each took.
    """
    settings = json.dumps({"config": config.to_dict(), "rows": rows, "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.storage", str(folder), settings],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"fitting {folder} in a process of its own failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


class _Watch:
    """Keeps the highest memory of this process; Linux only."""

    def __init__(self) -> None:
        self._highest = {"RssAnon": 0, "VmRSS": 0}
        self._began = time.process_time()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(":")
                if name in self._highest:
                    self._highest[name] = max(self._highest[name], 1024 * int(value.split()[0]))
            if self._over.wait(0.02):
                return

    def stop(self) -> dict[str, float]:
        """Return the peaks in GB, and the processor time since the start."""
        self._over.set()
        self._thread.join()
        return {
            "anonymous": self._highest["RssAnon"] / GIGABYTE,
            "resident": self._highest["VmRSS"] / GIGABYTE,
            "seconds": time.process_time() - self._began,
        }


def _main(folder: Path, config: dict[str, Any], rows: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    found = {"start": _Watch().stop()}
    watch = _Watch()
    pairs = EncodedPairs.load(folder)
    flow = PreferenceFlow.fit(pairs, config, progress=False)
    found["fit"] = watch.stop()
    watch = _Watch()
    moved = 0.0
    for begin in range(0, min(rows, len(pairs)), 8192):
        batch = pairs.gather(torch.arange(begin, min(begin + 8192, rows, len(pairs))))
        moved += float((flow.transport(batch.rejected, batch.context) - batch.rejected).square().sum())
    found["refine"] = watch.stop()
    return found | {"moved": moved, "residual_kept": flow.metadata["residual_kept"]}


if __name__ == "__main__":
    print(json.dumps(_main(Path(sys.argv[1]), **json.loads(sys.argv[2]))))
