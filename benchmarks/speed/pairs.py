"""Pairs of any size to measure speed on: what is preferred depends on the context, and not linearly."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pfm import EncodedPairs

__all__ = ["draw_blocks", "draw_pairs"]

_LATENT = 3
_BLOCK = 65_536


def draw_blocks(count: int, dimension: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draw (chosen, rejected, context), each (B, D), block by block.

    Outputs are a bent sheet of three dimensions, shifted by the context. A draw is the better, the nearer its
    latent lies to a sphere about a point that the context names: the field that carries draws to better ones has
    to turn round at that sphere.
    """
    fixed = torch.Generator().manual_seed(0)  # the law is the same for every seed, the draws are not
    spread, bend, read, shift = (
        torch.randn(rows, columns, generator=fixed) / math.sqrt(rows)
        for rows, columns in (
            (_LATENT, dimension), (_LATENT, dimension), (dimension, _LATENT), (_LATENT, dimension),
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, count, _BLOCK):
        rows = min(_BLOCK, count - begin)
        context = torch.randn(rows, dimension, generator=generator)
        centre = context @ read
        latents = torch.randn(2, rows, _LATENT, generator=generator)
        outputs = latents @ spread + torch.tanh(2 * latents @ bend) + centre @ shift
        outputs += 0.1 * torch.randn(outputs.shape, generator=generator)
        worse = ((latents - 0.5 * centre).norm(dim=2) - math.sqrt(_LATENT)).abs()
        first = (worse[0] < worse[1])[:, None]
        yield torch.where(first, *outputs), torch.where(first, *outputs.flip(0)), context


def draw_pairs(count: int, dimension: int, seed: int = 0) -> EncodedPairs:
    """Draw that many pairs, each of a prompt of its own."""
    chosen, rejected, context = (torch.cat(parts) for parts in zip(*draw_blocks(count, dimension, seed), strict=True))
    return EncodedPairs(chosen, rejected, context, group=torch.arange(count))
