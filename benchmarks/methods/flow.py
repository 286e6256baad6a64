"""Choices by a preference flow, on the road that users take: ``pfm.wrap`` and its ``select`` decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pfm
from benchmarks.core.bench import Bench
from benchmarks.core.config import FlowMethodConfig
from benchmarks.selection.selection import Item, one_hot
from pfm.encoders import Encoder

__all__ = ["make"]

_NOTED = ("win", "ridge", "residual_kept", "steps", "seconds")


class FlowChoice:
    """Fits a flow, and chooses by its win probability, alignment, or a draw, as the config says."""

    reads_vectors = True

    def __init__(self, config: FlowMethodConfig) -> None:
        if config.labels not in ("given", "shuffled", "swapped"):
            raise ValueError(f"method.labels must be 'given', 'shuffled' or 'swapped', got {config.labels!r}")
        self.config = config

    def fit(self, train: pfm.EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit on the labels as given, or as a control turns them."""
        if self.config.labels == "shuffled":
            train = train.shuffle_labels(bench.seed)
        elif self.config.labels == "swapped":
            train = train.swap()
        self.flow = pfm.PreferenceFlow.fit(train, pfm.FlowConfig.from_dict(self.config.flow), progress=bench.progress)
        margin = self.flow.guard_margin
        notes = {name: self.flow.metadata[name] for name in _NOTED}
        return notes | {"guard_margin": margin if math.isfinite(margin) else "infinite: never change"}

    def choose(self, items: Sequence[Item], encoder: Encoder) -> NDArray[np.float64]:
        """Refine every item's candidates with the fitted flow."""
        refiner = pfm.wrap(
            None, self.flow, encoder=encoder, by=self.config.by, margin=self.config.margin,
            n=len(items[0].candidates),
        )  # fmt: skip
        # Where no prompt is read, its place still names the item: draws by win probability are derived from it.
        prompts = [f"{item.group} {item.draw}" if item.prompt is None else item.prompt for item in items]
        refined = refiner.refine([item.candidates for item in items], prompts)
        return one_hot([result.index for result in refined], len(items[0].candidates))


def make(config: FlowMethodConfig) -> FlowChoice:
    """Make the method of a config."""
    return FlowChoice(config)
