"""Coordinates of outputs in which preferences are fitted: the output itself, and products of its leading components."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["COMPONENTS", "Coordinates", "weighted_mean"]

COMPONENTS = 8


class Coordinates(nn.Module):
    """Gives the linear coordinates (..., D), of unit mean square length, and the products (..., P) of the leading
    principal components, each component of unit variance; fitted by :meth:`fit`.
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
            "scale": torch.ones(()),
            "axes": torch.zeros(dimension, components),
            "product_mean": torch.zeros(self.products),
            "spread": torch.ones(dimension),
        }.items():
            self.register_buffer(name, value)

    def fit(self, both: Tensor, weight: Tensor | None = None) -> None:
        """Fit on outputs (N, D) with weights (N,) >= 0, or None for 1."""
        if weight is not None and bool((weight == weight[0]).all()):
            weight = None
        self.mean.copy_(weighted_mean(both, weight))
        centred = both - self.mean
        squares = weighted_mean(centred.square(), weight)
        self.scale.copy_(squares.sum().sqrt().clamp_min(1e-12))
        self.spread.copy_(squares.sqrt().clamp_min(1e-6 * float(self.scale)))
        centred = centred / self.scale
        weighed = centred if weight is None else centred * (weight * len(weight) / weight.sum())[:, None]
        values, vectors = torch.linalg.eigh((centred.T @ weighed).double() / len(centred))
        leading = values.flip(0)[: self.axes.shape[1]].clamp_min(1e-12)
        self.axes.copy_(vectors.flip(1)[:, : self.axes.shape[1]] / leading.sqrt())
        self.product_mean.zero_()
        self.product_mean.copy_(weighted_mean(self(both)[1], weight))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Give linear coordinates and products of outputs y (..., D)."""
        linear = (y - self.mean) / self.scale
        # Clipped, so that one outlying text does not dominate a product.
        leading = (linear @ self.axes).clamp(-4, 4)
        first, second = torch.triu_indices(leading.shape[-1], leading.shape[-1], device=y.device)
        return linear, leading[..., first] * leading[..., second] - self.product_mean

    def standardised(self, y: Tensor) -> Tensor:
        """Give outputs y (..., D) with every value of unit variance: a network's input."""
        return (y - self.mean) / self.spread


def weighted_mean(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Return the mean (D,) of rows (N, D) with weights (N,), or None for 1; of equal weights to the last bit alike."""
    if weight is None or bool((weight == weight[0]).all()):
        return rows.mean(0)
    return weight @ rows / weight.sum()
