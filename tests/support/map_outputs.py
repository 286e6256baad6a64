"""A callable that refines batches in the workers of an engine; the first worker that reaches a row is killed, once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pfm


class Refine:
    """Loads the flow once a worker, and refines batches of columns.

    Args:
        folder: of the flow. killed: a file that says that a worker was killed; None kills none.
    """

    def __init__(self, folder: str, killed: str | None = None) -> None:
        flow = pfm.PreferenceFlow.from_pretrained(folder)
        encoder = pfm.encoders.encoder_from_description(flow.metadata["encoder"])
        self.refiner = pfm.wrap(None, flow, encoder=encoder)
        self.killed = killed

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.killed is not None and 33 in list(batch["id"]) and not Path(self.killed).exists():
            Path(self.killed).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return self.refiner.map_batch(batch)

    def frames(self, frames: Iterator[Any]) -> Iterator[Any]:
        """Refine data frames, as Spark's ``mapInPandas`` hands them over."""
        import pandas

        for frame in frames:
            yield pandas.DataFrame(self.refiner.map_batch(frame.to_dict("list")))
