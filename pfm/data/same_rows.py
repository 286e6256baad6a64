"""Rows that are one and the same up to rounding: the identity of prompts that are known by their vectors only."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SAME", "same_rows"]

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
