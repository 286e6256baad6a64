"""The gate's draws: choose the rows of a gated pass that are kept, from the rows' own values."""

from __future__ import annotations

from torch import Tensor

from pfm.data.tensors import row_hash

__all__ = ["gate_uniforms"]


def gate_uniforms(y: Tensor, context: Tensor | None, seed: int, number: int) -> Tensor:
    """Return a uniform number in [0, 1) for each row, a hash of the row, its context, the seed and the round's number.

    It does not depend on the row's neighbours. Draws of one output under other contexts or in other rounds are
    independent.
    """
    start = (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xD1B54A32D192ED03) % 2**64
    state = row_hash(y, start - 2**64 if start >= 2**63 else start)
    if context is not None:
        state = row_hash(context, state)
    state = (state ^ ((state >> 32) & 0xFFFFFFFF)) * 0x2545F4914F6CDD1D
    return ((state >> 11) & 0x1FFFFFFFFFFFFF).double().div(2**53).float()
