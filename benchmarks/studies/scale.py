"""What many answers cost beyond their encoding, and what several processes save a fit.

``python -m benchmarks.studies.scale`` measures a judgement, a transport, and vectors on disk, in processor time on one
thread. ``--fit`` trains one network, alone or under ``torchrun --nproc-per-node 2 -m benchmarks.studies.scale --fit``,
and prints what each process computed. What encoders cost: ``python -m benchmarks.studies.encoders --speed``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch

import pfm
from benchmarks.core.tables import markdown_table
from pfm.flow.distributed import Processes

__all__ = ["fit_seconds", "main", "milliseconds"]

SIZES = {"minilm+surface": (412, 384), "static+surface": (796, 768)}  # of an output, of a context
BATCHES = ((512, 3), (4096, 20))  # rows of an update, epochs


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
    """Measure one judgement, one transport with a network of the default size, and one output to disk and back."""
    dimension, context = SIZES[name]
    pairs = pairs_of(count, dimension, context)
    config = pfm.FlowConfig(linear=False, epochs=1, steps=2, device="cpu")
    flow = pfm.PreferenceFlow(pairs.event_shape, context, config).eval()
    flow.field.gain.fill_(1.0)
    y, given = pairs.rejected, pairs.context
    judge = pfm.PreferenceFlow.fit(
        pairs, config.replace(linear=True, residual=False), progress=False, preference=pfm.preferences.BradleyTerry()
    )
    found = {
        "judge (b)": cost(lambda: judge.win_probability(y, given), count, repeats),
        "transport, 2 steps": cost(lambda: flow.transport(y, given), count, repeats),
    }
    with tempfile.TemporaryDirectory() as folder:
        found["write as float16"] = cost(lambda: pairs.save(folder), 2 * count, repeats)
        mapped, order = pfm.EncodedPairs.load(folder), torch.randperm(count)
        found["read in batches"] = cost(lambda: [mapped.gather(part) for part in order.split(512)], 2 * count, repeats)
    return found


def fit_seconds(processes: Processes, batch: int, epochs: int) -> tuple[float, int]:
    """Return the processor seconds of this process in a training, beyond those of a fit without it, and updates."""
    pairs = pairs_of(16_384, 384, 384)
    config = pfm.FlowConfig(batch_size=batch, patience=1000, steps=2, device="cpu")
    seconds, updates = [], 0
    for changes in ({"residual": False}, {"epochs": epochs}):
        began = time.process_time()
        flow = pfm.PreferenceFlow.fit(
            pairs, config.replace(**changes), progress=False, processes=processes,
            preference=pfm.preferences.MeanShift(),
        )  # fmt: skip
        seconds.append(time.process_time() - began)
        updates = flow.metadata["training"]["updates"]
    return seconds[1] - seconds[0], updates


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or with ``--fit`` what this process computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="train, alone or under torchrun")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.fit:
        with pfm.processes() as group:
            for batch, epochs in BATCHES:
                seconds, updates = fit_seconds(group, batch, epochs)
                which = f"process {group.rank} of {group.count}"
                print(
                    f"{which}, batch {batch}: {1e3 * seconds / updates:.1f} ms an update, {updates} updates", flush=True
                )
        return
    rows = [["encoder", "work", "ms an answer", "range"]]
    for name in SIZES:
        for work, (middle, least, most) in milliseconds(name, repeats=given.repeats).items():
            rows.append([name, work, f"{middle:.4f}", f"{least:.4f} to {most:.4f}"])
    print("\n".join(markdown_table(rows)))


if __name__ == "__main__":
    main()
