"""What many answers cost beyond their encoding, and what several processes save a fit.

``python -m benchmarks.studies.scale`` measures a transport, and vectors on disk, in processor time on one
thread. ``--fit`` trains one network, alone or under ``torchrun --nproc-per-node 2 -m benchmarks.studies.scale --fit``,
and prints what each process computed. ``--ray 2`` refines answers of 60 words by two workers of Ray Data, with the
static encoder. What encoders cost: ``python -m benchmarks.studies.encoders --speed``.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import pfm
from benchmarks.core.tables import markdown_table
from benchmarks.studies.encoders import WORDS
from pfm.encoders import encoder_from_description, encoder_from_name
from pfm.flow.distributed import Processes

__all__ = ["fit_seconds", "main", "milliseconds", "ray_rates"]

SIZES = {"minilm+surface": (412, 384), "static+surface": (796, 768)}  # of an output, of a context
BATCHES = ((512, 4), (4096, 8))  # rows of an update, epochs


def pairs_of(count: int, dimension: int, context: int) -> pfm.EncodedPairs:
    """Make pairs whose preference depends on the context."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, count, dimension, generator=generator)
    given = torch.randn(count, context, generator=generator)
    shared = min(dimension, context)
    gap = ((one - other)[:, :shared].tanh() * given[:, :shared]).sum(1, keepdim=True)
    return pfm.EncodedPairs(torch.where(gap > 0, one, other), torch.where(gap > 0, other, one), given)


def cost(work: Callable[[], object], count: int, repeats: int) -> tuple[float, float, float]:
    """Return the median, least and most milliseconds of processor time an item, after one run to warm up."""
    work()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(1e3 * (time.process_time() - began) / count)
    return statistics.median(found), min(found), max(found)


def milliseconds(name: str, count: int = 4096, repeats: int = 5) -> dict[str, tuple[float, float, float]]:
    """Measure one transport with a network of the default size, and one output to disk and back."""
    dimension, context = SIZES[name]
    pairs = pairs_of(count, dimension, context)
    config = pfm.FlowConfig(linear=False, steps=2, device="cpu")
    flow = pfm.PreferenceFlow(pairs.event_shape, context, config).eval()
    flow.field.gain.fill_(1.0)
    y, given = pairs.rejected, pairs.context
    found = {"transport, 2 steps": cost(lambda: flow.transport(y, given), count, repeats)}
    with tempfile.TemporaryDirectory() as folder:
        found["write as float16"] = cost(lambda: pairs.save(folder), 2 * count, repeats)
        mapped, order = pfm.EncodedPairs.load(folder), torch.randperm(count)
        found["read in batches"] = cost(lambda: [mapped.gather(part) for part in order.split(512)], 2 * count, repeats)
    return found


def fit_seconds(processes: Processes, batch: int, epochs: int) -> tuple[float, float, int]:
    """Return the processor seconds that this process takes for further updates, the seconds, and how many they are.

    They are those of a fit of twice the epochs beyond those of a fit: both have the same parts besides.
    """
    one, other = torch.randn(2, 8192, 384, generator=torch.Generator().manual_seed(0))
    first = one[:, :1] > other[:, :1]
    pairs = pfm.EncodedPairs(torch.where(first, one, other), torch.where(first, other, one))
    config = pfm.FlowConfig(linear=False, batch_size=batch, patience=1000, steps=2, device="cpu")
    seconds, clock, updates = [], [], []
    for many in (1, epochs, 2 * epochs):  # the first warms up
        began, start = time.process_time(), time.perf_counter()
        flow = pfm.PreferenceFlow.fit(
            pairs, config.replace(epochs=many), progress=False, processes=processes,
            preference=pfm.preferences.MeanShift(),
        )  # fmt: skip
        seconds.append(time.process_time() - began)
        clock.append(time.perf_counter() - start)
        updates.append(flow.metadata["training"]["updates"])
    return seconds[2] - seconds[1], clock[2] - clock[1], updates[2] - updates[1]


class Refine:
    """Refines batches in a worker; notes how many rows it refined, in how many seconds of its processor and in all."""

    def __init__(self, flow: str, notes: str) -> None:
        fitted = pfm.PreferenceFlow.from_pretrained(flow)
        self.refiner = pfm.wrap(None, fitted, encoder=encoder_from_description(fitted.metadata["encoder"]))
        self.rows, self.began, self.note = 0, (time.process_time(), time.perf_counter()), Path(notes) / str(os.getpid())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        found = self.refiner.map_batch(batch)
        self.rows += len(found["refined"])
        seconds = time.process_time() - self.began[0], time.perf_counter() - self.began[1]
        self.note.write_text(f"{self.rows} {seconds[0]} {seconds[1]}")
        return found


def ray_rates(workers: int, answers: int, folder: Path) -> list[tuple[int, float, float]]:
    """Refine answers by workers of a local Ray cluster; give each one's rows, processor seconds and seconds.

    Raises:
        RuntimeError: a row was lost or doubled.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]

    rows = [{"prompt": f"Ask {n}", "chosen": f"The answer is {n}.", "rejected": f"nobody knows {n}"} for n in range(80)]
    pairs = pfm.PreferencePairs.from_rows(rows).encode(encoder_from_name("static"), progress=False)
    pfm.PreferenceFlow.fit(pairs, pfm.FlowConfig(residual=False), progress=False).save_pretrained(folder / "flow")
    source = random.Random(0)
    (folder / "notes").mkdir()
    columns = {
        "id": range(answers),
        "prompt": [f"Question {n}" for n in range(answers)],
        "candidates": [[" ".join(source.choices(WORDS, k=60))] for _ in range(answers)],
    }
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), folder / "answers.parquet")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # a worker is one core: its tokenizer would take all that there are
    ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False)
    try:
        read = ray.data.read_parquet(str(folder / "answers.parquet")).repartition(10 * workers)
        refined = read.map_batches(
            Refine, fn_constructor_args=(str(folder / "flow"), str(folder / "notes")), batch_size=1000,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )  # fmt: skip
        refined.write_parquet(str(folder / "refined"))
    finally:
        ray.shutdown()
    found = sorted(pq.read_table(folder / "refined", columns=["id"])["id"].to_pylist())
    if found != list(range(answers)):
        raise RuntimeError(f"{answers} answers went in, {len(found)} came out, {len(set(found))} of them distinct")
    notes = (note.read_text().split() for note in (folder / "notes").iterdir())
    return [(int(rows), float(own), float(clock)) for rows, own, clock in notes]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or with ``--fit`` what this process computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="train, alone or under torchrun")
    parser.add_argument("--ray", type=int, metavar="WORKERS", help="refine by workers of Ray Data")
    parser.add_argument("--answers", type=int, default=100_000, help="for --ray")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.fit:
        with pfm.processes() as group:
            for batch, epochs in BATCHES:
                own, clock, updates = fit_seconds(group, batch, epochs)
                which = f"process {group.rank} of {group.count}, batch {batch}, {updates} updates"
                own, clock = (f"{1e3 * seconds / updates:.1f}" for seconds in (own, clock))
                print(f"{which}: {own} ms of its processor an update, {clock} by the clock", flush=True)
        return
    if given.ray:
        with tempfile.TemporaryDirectory() as folder:
            for count, own, clock in ray_rates(given.ray, given.answers, Path(folder)):
                print(f"{count} answers, {count / own:.0f} a second of its processor, {count / clock:.0f} by the clock")
        return
    rows = [["encoder", "work", "ms an answer", "range"]]
    for name in SIZES:
        for work, (middle, least, most) in milliseconds(name, repeats=given.repeats).items():
            rows.append([name, work, f"{middle:.4f}", f"{least:.4f} to {most:.4f}"])
    print("\n".join(markdown_table(rows)))


if __name__ == "__main__":
    main()
