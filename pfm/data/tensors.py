"""Checks, hashes and identity of rows of tensors.

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
    "as_float_tensor",
    "check_finite",
    "checked_column",
    "checked_index",
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


def as_float_tensor(name: str, value: Any) -> Tensor:
    """Turn an array-like into a floating-point tensor (float16, bfloat16 and float64 are kept)."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array of numbers: got {type(value).__name__}") from error
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers: got {tensor.dtype}")
    return tensor if tensor.is_floating_point() else tensor.float()


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


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity, naming the first row that holds one."""
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    # A sum is finite whenever every value is (float64 cannot overflow on float32 values): one cheap pass, in
    # pieces, since summing in another type copies.
    if rows.device.type == "cpu":
        fine = all(bool(torch.isfinite(part.sum(dtype=torch.float64))) for part in rows.split(CHUNK))
    else:  # one look at the device; the largest and smallest value are NaN if any is
        fine = rows.numel() == 0 or bool(torch.isfinite(torch.stack(rows.aminmax())).all())
    if fine:
        return
    bad = torch.cat([(~torch.isfinite(part)).any(1) for part in rows.split(CHUNK)])
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    raise ValueError(
        f"{name} must be finite: {int(bad.sum())} of {len(bad)} rows hold NaN or infinity, "
        f"the first is row {row} (shape {tuple(tensor.shape)}); remove or repair them"
    )


def checked_index(name: str, value: Any, table: Tensor) -> Tensor:
    """Check a one-dimensional index into a table's rows and return it on the table's device."""
    index, rows = torch.as_tensor(value).to(table.device), len(table)
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"{name} must be a one-dimensional integer tensor: got {index.dtype} {tuple(index.shape)}")
    index = index.long()
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
        raise ValueError(f"{name} must lie in 0..{rows - 1}: got values from {int(index.min())} to {int(index.max())}")
    return index


def group_numbers(group: Any) -> Tensor:
    """Return groups as int64: integers as they are, anything else by its rank among the distinct values.

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


def checked_column(name: str, value: Any, count: int, low: float, high: float, device: torch.device) -> Tensor | None:
    """Check a column (N,) of numbers in [low, high] and return it as float32; None stays None."""
    if value is None:
        return None
    column = as_float_tensor(name, value).to(device, torch.float32)
    if column.shape != (count,):
        raise ValueError(f"{name} must be ({count},), one number a pair: got {tuple(column.shape)}")
    check_finite(name, column)
    if bool((column < low).any()) or bool((column > high).any()):
        row = int(((column < low) | (column > high)).nonzero()[0])
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]: row {row} is {float(column[row]):g}")
    return column
