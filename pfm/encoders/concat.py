"""Several encoders side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pfm._internal.checks import check_length, check_number
from pfm.encoders.base import Encoder
from pfm.encoders.sentence import as_encoder

__all__ = ["ConcatEncoder"]


class ConcatEncoder(Encoder):
    """Concatenates the vectors of several encoders, each times its weight.

    Prompts are encoded by the parts that provide context: all but those whose attribute `provides_context`
    is False, such as :class:`SurfaceEncoder`. If none does, all encode them.

    Args:
        encoders: at least one encoder, or loaded ``SentenceTransformer``.
        weights: a positive factor for each encoder's vectors, or None for 1. Parts of unit length and weight
            w contribute w² each to squared distances.
    """

    def __init__(self, encoders: Sequence[Encoder], weights: Sequence[float] | None = None) -> None:
        self.encoders = [as_encoder(encoder) for encoder in encoders]
        if not self.encoders:
            raise ValueError("encoders must hold at least one encoder, got none")
        self.weights = [1.0] * len(self.encoders) if weights is None else [float(weight) for weight in weights]
        check_length("weights", self.weights, len(self.encoders), "encoder")
        for index, weight in enumerate(self.weights):
            check_number(f"weights[{index}]", weight, above=0)

    @property
    def dimension(self) -> int:
        """The sum of the parts' dimensions."""
        return sum(encoder.dimension for encoder in self.encoders)

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Encode N responses as (N, D) float32: the parts' vectors times their weights, side by side."""
        texts = texts if isinstance(texts, str) else list(texts)
        return torch.cat(
            [
                weight * _rows(encoder, encoder.encode(texts, progress=progress), len(texts))
                for encoder, weight in zip(self.encoders, self.weights, strict=True)
            ],
            dim=1,
        )

    def encode_prompts(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Encode N prompts as (N, C) float32 by the parts that provide context."""
        texts = texts if isinstance(texts, str) else list(texts)
        weighted = list(zip(self.encoders, self.weights, strict=True))
        providing = [pair for pair in weighted if getattr(pair[0], "provides_context", True)] or weighted
        parts: list[Tensor] = []
        for encoder, weight in providing:
            # An encoder of the user's own may know responses only.
            encode = getattr(encoder, "encode_prompts", encoder.encode)
            parts.append(weight * _rows(encoder, encode(texts, progress=progress), len(texts)))
        return torch.cat(parts, dim=1)

    def describe(self) -> dict[str, Any]:
        """Describe every part, and the weights."""
        return {
            "type": type(self).__name__,
            "name": " + ".join(str(part.describe().get("name")) for part in self.encoders),
            "dimension": self.dimension,
            "weights": self.weights,
            "encoders": [encoder.describe() for encoder in self.encoders],
        }

    def __repr__(self) -> str:
        return f"ConcatEncoder({self.encoders!r}, weights={self.weights})"


def _rows(encoder: Encoder, vectors: Tensor, count: int) -> Tensor:
    vectors = torch.as_tensor(vectors, dtype=torch.float32)
    if vectors.ndim != 2 or len(vectors) != count:
        raise ValueError(f"{encoder!r} must return one row a text, ({count}, D); got shape {tuple(vectors.shape)}")
    return vectors
