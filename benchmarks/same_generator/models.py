"""What is learned from the preferences of the training prompts, and what each candidate is worth by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import pfm
from benchmarks.same_generator.scored import FOLDS, Scored, fold_of, pairs_of
from pfm.encoders import Encoder, encoder_from_name
from pfm.preferences import BradleyTerry

__all__ = ["FLOWS", "Fitted", "kept_fit", "split"]

FLOWS = Path("runs/same_generator/flows")  # the fits that study and rivals share
PAIRS = 40  # a training prompt, of the 120 that sixteen answers make: a fit takes a third of the time

Array = NDArray[np.float64]


def split(rows: Sequence[Scored], seed: int) -> tuple[list[Scored], list[Scored]]:
    """Return the prompts that are learned from, and those that are tested on: one fold of three."""
    tested = [fold_of(row.name, seed // FOLDS) == seed % FOLDS for row in rows]
    return (
        [row for row, test in zip(rows, tested, strict=True) if not test],
        [row for row, test in zip(rows, tested, strict=True) if test],
    )


class Fitted:
    """Fits a flow and a linear Bradley–Terry reward on the training prompts.

    Only b and the closed-form part of the field are wanted, so no network is trained: b does not depend on it.

    Args:
        train: the training prompts. encoder: of prompts and answers. seed: of the fit.
        labels: "given", or for the controls "shuffled" or "swapped".
        keep: folder in which the flow is kept, and from which it is read if it is there.
    """

    def __init__(
        self, train: Sequence[Scored], encoder: Encoder, seed: int, labels: str = "given", keep: Path | None = None
    ) -> None:
        self.encoder = encoder
        self.pairs = pairs_of(train, PAIRS, seed)
        encoded = self.pairs.encode(encoder, progress=False)
        if labels == "shuffled":
            encoded = encoded.shuffle_labels(seed)
        elif labels == "swapped":
            encoded = encoded.swap()
        elif labels != "given":
            raise ValueError(f"labels must be 'given', 'shuffled' or 'swapped', got {labels!r}")
        if keep is not None and keep.is_dir():
            self.flow = pfm.PreferenceFlow.from_pretrained(keep)
        else:
            self.flow = pfm.PreferenceFlow.fit(encoded, pfm.FlowConfig(residual=False, seed=seed), progress=False)
            if keep is not None:
                self.flow.save_pretrained(keep)
        self.bradley_terry = BradleyTerry().fit(encoded)

    def rate(self, prompt: str, texts: Sequence[str]) -> dict[str, Array]:
        """Return the worth (n,) of texts by each rule: "bradley_terry" and "flow", its b."""
        vectors, context = self.encoder.encode(list(texts)), self.encoder.encode_prompts([prompt])
        with torch.no_grad():
            found: dict[str, Any] = {
                "bradley_terry": self.bradley_terry.reward(vectors),
                "flow": self.flow.win_probability(vectors, context.expand(len(texts), -1)),
            }
        return {name: value.double().cpu().numpy() for name, value in found.items()}


def kept_fit(train: Sequence[Scored], encoder: str, seed: int, labels: str, folder: Path) -> Fitted:
    """Fit on the training prompts, or read the flow that was fitted on the same answers with the same settings."""
    learned = [(row.name, row.sample.prompt, row.texts, row.labels.round(9).tolist()) for row in train]
    key = hashlib.sha256(json.dumps([learned, encoder, seed, labels]).encode()).hexdigest()[:16]
    return Fitted(train, encoder_from_name(encoder), seed, labels, keep=folder / key)
