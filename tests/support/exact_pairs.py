"""Pairs whose optimal map is known, on a line and in the plane with contexts, and distances to it."""

from __future__ import annotations

import math

import torch

from pfm import EncodedPairs, FlowConfig, PreferenceFlow

QUICK = FlowConfig(epochs=20, hidden=64, layers=3)


def line_pairs(count: int = 20_000, seed: int = 0) -> EncodedPairs:
    """Draw pairs of U(0, 1) numbers, the larger of which always wins (method: p0 = 2(1 - u), p1 = 2u)."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.rand(2, count, 1, generator=generator)
    return EncodedPairs(torch.maximum(one, other), torch.minimum(one, other))


def ks_to_square_law(values: torch.Tensor, power: int = 2) -> float:
    """Give the Kolmogorov-Smirnov distance to the law with distribution function u ** power."""
    ordered = values.flatten().sort().values.clamp(0, 1) ** power
    grid = torch.arange(len(ordered) + 1) / len(ordered)
    return float(torch.maximum((ordered - grid[:-1]).abs(), (ordered - grid[1:]).abs()).max())


def uniforms(count: int = 20_000) -> torch.Tensor:
    return torch.rand(count, 1, generator=torch.Generator().manual_seed(77))


def compass_pairs(count: int = 8000, seed: int = 0) -> EncodedPairs:
    """Draw standard normal outputs in the plane; the one further in the context's direction tends to win."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(count, generator=generator) * 2 * math.pi
    context = torch.stack([angle.cos(), angle.sin()], 1)
    one, other = torch.randn(2, count, 2, generator=generator)
    odds = 4 * ((one - other) * context).sum(1)
    first = (torch.rand(count, generator=generator) < torch.sigmoid(odds))[:, None]
    return EncodedPairs(torch.where(first, one, other), torch.where(first, other, one), context)


def rejected_and_context(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = compass_pairs(count, seed=6)
    assert pairs.context is not None
    return pairs.rejected, pairs.context


def compass_gain(flow: PreferenceFlow, permute: bool = False) -> float:
    """Give the mean gain along the context's direction of transported fresh draws."""
    _, context = rejected_and_context(4000)
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(4000, 2, generator=generator)
    given = context[torch.randperm(len(y), generator=generator)] if permute else context
    return float(((flow.transport(y, given) - y) * context).sum(1).mean())
