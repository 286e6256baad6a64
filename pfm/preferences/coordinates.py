"""Coordinates of outputs in which preferences are fitted: the output itself, and products of its leading components."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pfm._internal.columns import column_statistics, weighted_mean
from pfm.preferences.spectrum import principal_axes

__all__ = ["COMPONENTS", "Coordinates", "component_axes", "equal_units"]

COMPONENTS = 8
NEGLIGIBLE = 1e-6  # share of the largest variance below which a component is left out


class Coordinates(nn.Module):
    """Gives linear coordinates (..., D) and the products (..., P) of the leading principal components.

    Coordinates have unit mean square length, components unit variance; both are fitted by :meth:`fit`.
    Every column is divided by its own spread (:mod:`pfm._internal.columns`): the units of the outputs do not matter.
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor
    product_mean: Tensor
    spread: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        components = min(COMPONENTS, dimension)
        self.products = components * (components + 1) // 2
        for name, value in {
            "mean": torch.zeros(dimension),
            "scale": torch.ones(dimension),
            "axes": torch.zeros(dimension, components),
            "product_mean": torch.zeros(self.products),
            "spread": torch.ones(dimension),
        }.items():
            self.register_buffer(name, value)

    def fit(self, both: Tensor, weight: Tensor | None = None, emphasis: Tensor | None = None) -> None:
        """Fit on outputs (N, D) with weights (N,) >= 0, or None for 1; ``emphasis`` as for :func:`equal_units`."""
        mean, spread = column_statistics(both, weight)
        self.mean.copy_(mean)
        self.spread.copy_(spread)
        self.scale.copy_(equal_units(spread, emphasis))
        axes = component_axes((both - self.mean) / self.scale, self.axes.shape[1], weight)
        self.axes.zero_()
        self.axes[:, : axes.shape[1]] = axes
        self.product_mean.zero_()
        self.product_mean.copy_(weighted_mean(self(both)[1], weight))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return linear coordinates and products of outputs y (..., D)."""
        linear = (y - self.mean) / self.scale
        # Clipped, so that one outlying text does not dominate a product.
        leading = (linear @ self.axes).clamp(-4, 4)
        first, second = torch.triu_indices(leading.shape[-1], leading.shape[-1], device=y.device)
        return linear, leading[..., first] * leading[..., second] - self.product_mean

    def standardised(self, y: Tensor) -> Tensor:
        """Return outputs y (..., D) with every value of unit variance: a network's input."""
        return (y - self.mean) / self.spread

    def upgraded(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Return each column the one scale of all of them that earlier versions saved."""
        scale = tensors.get(f"{prefix}scale")
        if scale is None or scale.ndim:
            return tensors
        return tensors | {f"{prefix}scale": scale.expand(len(self.scale)).clone()}


def equal_units(spread: Tensor, emphasis: Tensor | None = None) -> Tensor:
    """Return the scales (D,) to divide centred columns by, so that rows have unit mean square length.

    Args:
        spread: (D,) by :func:`pfm._internal.columns.column_statistics`; infinite for constant columns.
        emphasis: (D,) > 0, standard deviations of the columns relative to each other afterwards, by which a penalty
            treats some more lightly; None for equal ones.
    """
    share = spread.isfinite().to(spread.dtype)
    if emphasis is not None:
        share = share * emphasis.to(spread)
    share = share / share.square().sum().sqrt().clamp_min(1e-30)
    return torch.where(share > 0, spread / share, torch.inf)


def component_axes(rows: Tensor, count: int, weight: Tensor | None = None) -> Tensor:
    """Return axes (F, n) along which rows (N, F) have unit variance: the n <= ``count`` leading principal components.

    Components of negligible variance are left out.
    """
    equal = weight is None or bool((weight == weight[0]).all())
    share = torch.full_like(rows[:, 0], 1 / len(rows)) if weight is None or equal else weight / weight.sum()
    values, vectors = principal_axes(rows - weighted_mean(rows, weight), share)
    first = max(len(values) - count, int((values <= NEGLIGIBLE * values[-1]).sum()))
    return (vectors[:, first:] * values[first:].rsqrt()).flip(1).float()
