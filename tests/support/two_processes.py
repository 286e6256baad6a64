"""Fits by two processes that talk through gloo; run as a program: ``python two_processes.py FOLDER PORT``.

What process R found is in ``FOLDER/R.json``. The second process ends itself in the last fit, with status 7.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch

import pfm
from pfm.encoders import SplitEncoder, SurfaceEncoder
from pfm.flow.couplings import Paired
from pfm.flow.distributed import Processes
from pfm.preferences import MeanShift

DIES = "PFM_TEST_DIES"  # set in the process that is to end
DRAWS = 60  # after which it does


@pfm.register_coupling("mortal")
class Mortal(Paired):
    """Joins pairs as they are, until its process ends."""

    def __init__(self, pairs: pfm.EncodedPairs, *, source: str, seed: int) -> None:
        super().__init__(pairs, source)
        self.drawn = 0

    def draw(self, index: torch.Tensor, generator: torch.Generator | None = None):
        self.drawn += 1
        if self.drawn > DRAWS and os.environ.get(DIES):
            os._exit(7)
        return super().draw(index, generator)


def ring(count: int, dimension: int, seed: int = 0) -> pfm.EncodedPairs:
    """Make pairs of which the output nearer to a circle is preferred, which no linear field does."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, count, dimension, generator=generator)
    context = torch.randn(count, dimension, generator=generator)
    nearer = (one[:, :2].norm(dim=1) - 1.5).abs() < (other[:, :2].norm(dim=1) - 1.5).abs()
    return pfm.EncodedPairs(
        torch.where(nearer[:, None], one, other), torch.where(nearer[:, None], other, one), context,
        weight=torch.rand(count, generator=generator) + 0.5,
    )  # fmt: skip


SMALL = pfm.FlowConfig(hidden=32, layers=2, batch_size=256, epochs=8, patience=100, device="cpu", steps=4)
#: Pairs and settings: each row at a time of its own, or many rows at one; a batch that two cannot halve; two fields.
FITS = {
    "a time a row": (ring(1500, 2), SMALL.replace(batch_size=250, epochs=40, hidden=64)),
    "shared times": (ring(300, 48), SMALL),
    "two fields": (ring(300, 3), SMALL.replace(source="rejected", context_free=True)),
}
LAST = (ring(600, 2), SMALL.replace(coupling="mortal", epochs=20))
TEXTS = [f"Text {n}!" if n % 3 else f"Is it {n}? {'Yes. ' * (n % 7)}" for n in range(2500)]


def fit(pairs: pfm.EncodedPairs, config: pfm.FlowConfig, **options: Any) -> pfm.PreferenceFlow:
    """Fit with the quickest b: it is no part of what processes share."""
    return pfm.PreferenceFlow.fit(pairs, config, progress=False, preference=MeanShift(), **options)


def outputs(flow: pfm.PreferenceFlow) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    y, context = torch.randn(2, 20, flow.dimension, generator=generator)
    return flow.transport(y, context)


def found_by(group: Processes) -> dict:
    found: dict = {"rank": group.rank, "count": group.count}
    for name, (pairs, config) in FITS.items():
        flow = fit(pairs, config, processes=group)
        found[name] = {"outputs": outputs(flow).tolist(), "metadata": flow.metadata}
    found["vectors"] = SplitEncoder(SurfaceEncoder(), group).encode(TEXTS).tolist()
    for name, (pairs, config) in {
        "other pairs": (ring(600, 2, seed=group.rank), SMALL),
        "small batch": (ring(600, 2), SMALL.replace(batch_size=1)),
    }.items():
        try:
            fit(pairs, config, processes=group)
        except ValueError as error:
            found[name] = str(error)
    return found


def run(rank: int, folder: Path, port: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pfm.processes(timeout_minutes=5) as group:
        found = found_by(group)
        (folder / f"{rank}.json").write_text(json.dumps(found))
        if rank == 1:
            os.environ[DIES] = "1"
        try:
            fit(*LAST, processes=group, checkpoint=folder / "checkpoint")
        except pfm.ProcessLostError as error:
            found["lost"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    forked = multiprocessing.get_context("fork")
    both = [forked.Process(target=run, args=(rank, Path(sys.argv[1]), sys.argv[2])) for rank in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    print(json.dumps([each.exitcode for each in both]))
