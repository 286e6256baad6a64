"""Pairs labelled by a Bradley-Terry model whose reward is linear."""

from __future__ import annotations

import torch
from torch import Tensor

from pfm import EncodedPairs


def labelled(count: int, dimension: int, seed: int = 0, weights: Tensor | None = None) -> tuple[EncodedPairs, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(dimension, generator=generator) if weights is None else weights
    y, other = (torch.randn(count, dimension, generator=generator) for _ in range(2))
    first = torch.rand(count, generator=generator) < torch.sigmoid((y - other) @ w)
    return EncodedPairs(torch.where(first[:, None], y, other), torch.where(first[:, None], other, y)), w
