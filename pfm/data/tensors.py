"""Hashes and identity of rows of tensors.

Rows that are the same up to rounding are one: the identity of prompts that are known by their vectors only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CHUNK",
    "SAME",
    "float_rows",
    "group_numbers",
    "row_hash",
    "same_rows",
]

SAME = 1e-5  # largest difference of a value, in units of the rows' root mean square: what batches round differently
DIRECTIONS = 8
CHUNK = 8192


def same_rows(rows: Tensor) -> Tensor:
    """Number rows (N, C) so that rows which differ by rounding alone share a number; return (N,) int64 on the CPU.

    Rows are compared with the first row of a number, so that chains of small differences do not join rows far apart.
    Rows are sorted by one random projection, and compared where all of a few projections are close.

    Args:
        rows: (N, C) finite; they are read in pieces, so that they may be mapped from a file.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(rows.shape[1], DIRECTIONS, generator=generator, dtype=torch.float32, device="cpu")
    directions = torch.nn.functional.normalize(directions, dim=0).to(rows.device)
    places, squares = [], 0.0
    for part in rows.split(CHUNK):
        part = part.float()
        places.append((part @ directions).cpu())
        squares += float(part.square().sum())
    if not rows.numel():
        return torch.zeros(len(rows), dtype=torch.long, device="cpu")
    unit = (squares / rows.numel()) ** 0.5
    near = 4 * SAME * unit  # of projections: differences of rounding have no common direction
    place = torch.cat(places)
    order = place[:, 0].argsort(stable=True)
    place = place[order]
    first, second = _close(place, near)
    kept = torch.cat(
        [
            (rows[order[i].to(rows.device)].double() - rows[order[j].to(rows.device)].double()).abs().amax(1).cpu()
            <= SAME * unit
            for i, j in zip(first.split(CHUNK), second.split(CHUNK), strict=True)
        ]
    )
    leader = list(range(len(rows)))
    for i, j in sorted(zip(order[first[kept]].tolist(), order[second[kept]].tolist(), strict=True), key=sorted):
        low, high = min(i, j), max(i, j)
        if leader[low] == low and leader[high] == high:
            leader[high] = low
    return torch.unique(torch.tensor(leader, device="cpu"), return_inverse=True)[1]


def _close(place: Tensor, near: float) -> tuple[Tensor, Tensor]:
    """Return the pairs of rows whose projections (N, K), sorted by the first, all differ by at most ``near``."""
    firsts, seconds = [torch.zeros(0, dtype=torch.long, device="cpu")], [torch.zeros(0, dtype=torch.long, device="cpu")]
    columns = [column.contiguous() for column in place.T]
    for offset in range(1, len(place)):
        window = (columns[0][offset:] - columns[0][:-offset] <= near).nonzero().flatten()
        if not len(window):
            break
        for column in columns[1:]:
            window = window[(column[window + offset] - column[window]).abs() <= near]
        firsts.append(window)
        seconds.append(window + offset)
    return torch.cat(firsts), torch.cat(seconds)


def float_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Gather rows of a table as float32."""
    return table[rows].float()


def row_hash(rows: Tensor, start: Tensor | int = 0) -> Tensor:
    """Return a 64-bit hash (B,) int64 of the values of each row (B, D), as float32; -0.0 counts as 0.0.

    Args:
        rows: (B, D).
        start: the hash to go on from, one for all rows or (B,) int64.
    """
    bits = (rows.float() + 0.0).contiguous().view(torch.int32).long() & 0xFFFFFFFF
    state = torch.zeros(len(rows), dtype=torch.long, device=rows.device) ^ start
    for column in bits.T:
        state = (state ^ column) * 0x2545F4914F6CDD1D
        state = state ^ ((state >> 29) & 0x7FFFFFFFF)
    return state * 0x2545F4914F6CDD1D


def group_numbers(group: Any) -> Tensor:
    """Return groups as int64: integers unchanged, anything else by its rank among the distinct values.

    Raises:
        ValueError: a group is NaN or None, which names none.
    """
    if isinstance(group, Tensor):
        group = group.detach().cpu()
        if not group.is_floating_point():
            return group.long()
    values = np.asarray(group)
    if values.dtype.kind in "iub":
        return torch.as_tensor(values.astype(np.int64))
    missing = [place for place, value in enumerate(values.ravel().tolist()) if value is None or value != value]
    if missing:
        raise ValueError(
            f"group must name the group of every pair: row {missing[0]} of {len(missing)} such rows has "
            f"{values.ravel()[missing[0]]}; give pairs without a group an identity of their own"
        )
    if values.dtype.kind == "f" and (values == np.floor(values)).all() and (np.abs(values) < 2**53).all():
        return torch.as_tensor(values.astype(np.int64))
    if values.dtype.kind == "O":  # values of several types have no order
        values = np.array([f"{type(value).__name__} {value}" for value in values.ravel()]).reshape(values.shape)
    return torch.as_tensor(np.unique(values, return_inverse=True)[1].reshape(values.shape))
