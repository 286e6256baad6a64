"""What a refinement adds to a response, encoder aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pfm
from benchmarks.speed.pairs import draw_pairs

__all__ = ["Remembered", "refining"]


class Remembered:
    """An encoder that looks vectors up, so that its own cost does not count."""

    def __init__(self, texts: Sequence[str], vectors: Tensor) -> None:
        self._rows = {text: row for row, text in enumerate(texts)}
        self._vectors = vectors
        self.dimension = vectors.shape[1]

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Look N texts up as (N, D) float32."""
        return self._vectors[[self._rows[text] for text in texts]]

    def encode_prompts(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Look N prompts up, likewise."""
        return self.encode(texts)

    def describe(self) -> dict[str, Any]:
        """Describe the encoder."""
        return {"name": "remembered"}


def refining(flow: pfm.PreferenceFlow, prompts: int = 64, candidates: int = 8) -> Callable[[], list[pfm.Refinement]]:
    """Make the refinement of one batch: that many prompts with so many candidates each."""
    drawn = draw_pairs(prompts * candidates, flow.dimension, seed=3)
    questions = [f"question {number}" for number in range(prompts)]
    answers = [[f"answer {number} {place}" for place in range(candidates)] for number in range(prompts)]
    assert drawn.context is not None
    vectors = torch.cat([drawn.context[:prompts], drawn.rejected])
    encoder = Remembered([*questions, *(text for row in answers for text in row)], vectors)
    refiner = pfm.wrap(None, flow, encoder=encoder, n=candidates)
    return lambda: refiner.refine(answers, questions)
