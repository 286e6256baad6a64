"""A Bradley–Terry reward of images or noise under a digit: the model behind b, selection and ascent."""

from __future__ import annotations

import itertools
import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from benchmarks.baselines.networks import fit_early_stopped, pair_loss
from pfm import EncodedPairs
from pfm.preferences.base import Embedded, PreferenceModel

__all__ = ["DigitReward"]

UPDATES, ROWS = 500, 256


class _Convolutions(nn.Module):
    """Gives one reward a digit; the context chooses among them."""

    def __init__(self, size: int, contexts: int) -> None:
        super().__init__()
        stride = 2 if size > 16 else 1
        side = -(-size // stride)
        self.one = nn.Conv2d(1, 16, 5, stride, 2)
        self.two = nn.Conv2d(16, 32, 3, 2, 1)
        self.body = nn.Sequential(nn.Linear(32 * (-(-side // 2)) ** 2, 64), nn.ReLU(), nn.Linear(64, contexts))
        self.size = size

    def forward(self, y: Tensor, context: Tensor) -> Tensor:
        maps = relu(self.two(relu(self.one(y.view(-1, 1, self.size, self.size)))))
        return (self.body(maps.flatten(1)) * context).sum(1)


class _Layers(nn.Module):
    """Gives a linear reward of each digit's own, and what a perceptron of both adds."""

    def __init__(self, dimension: int, contexts: int) -> None:
        super().__init__()
        sizes = (dimension + contexts, 256, 256)
        body = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*body, nn.Linear(256, 1))
        self.own = nn.Linear(contexts, dimension, bias=False)
        nn.init.zeros_(self.own.weight)

    def forward(self, y: Tensor, context: Tensor) -> Tensor:
        return (self.own(context) * y).sum(1) + self.body(torch.cat([y, context], 1)).squeeze(1)


class DigitReward(PreferenceModel):
    """Scores outputs by r(y, x), P(y > y' | x) = sigmoid(r(y, x) - r(y', x)): a network, by likelihood.

    Convolutions for images (1, S, S), a perceptron for vectors. Digits are contexts that training has seen, so held-out
    pairs, not held-out digits, decide when to stop; what they do not confirm is given up, and b is one half.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {"seed": self.seed}

    def _build(self, dimension: int, contexts: int, image: bool) -> None:
        self.dimension, self.context_dimension = dimension, contexts
        self.register_buffer("slope", torch.ones(()))
        size = math.isqrt(dimension)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network: nn.Module = _Convolutions(size, contexts) if image else _Layers(dimension, contexts)

    slope: Tensor

    def fit(self, pairs: EncodedPairs, validation: EncodedPairs | None = None, *, progress: bool = False) -> Self:
        """Fit on labelled pairs, calibrate on ``validation`` if there is any, and return the model itself."""
        if not pairs.context_dimension:
            raise ValueError("pairs must have contexts, one-hot digits: got none")
        image = len(pairs.event_shape) == 3
        self._ready(dimension=pairs.dimension, contexts=pairs.context_dimension, image=image)

        def loss(index: Tensor) -> Tensor:
            batch = pairs.gather(index)
            assert batch.context is not None
            both = torch.cat([batch.chosen, batch.rejected])
            chosen, rejected = self.network(both, batch.context.repeat(2, 1)).chunk(2)
            return pair_loss(lambda margin: softplus(-margin), chosen - rejected, batch.probability)

        self.network.requires_grad_(True)
        fitted = fit_early_stopped(
            self.network, loss, pairs, seed=self.seed, updates=UPDATES, rows=ROWS, learning_rate=2e-3
        )
        self.network.requires_grad_(False)
        self.found = fitted.notes()
        if not fitted.confirmed:
            self.slope.zero_()
        if validation is not None:
            self.calibrate(validation)
        return self

    def embed(self, y: Tensor, context: Tensor | None) -> Embedded:
        """Embed outputs (B, D) under contexts (B, C) by their reward alone."""
        assert context is not None
        rows = [self.network(some, own) for some, own in zip(y.split(4096), context.split(4096), strict=True)]
        return Embedded(torch.cat(rows) * self.slope, y.new_zeros(*y.shape[:-1], 0))

    def reward(self, y: Tensor, context: Tensor) -> Tensor:
        """Return the reward (B,) of outputs (B, \\*D) under contexts (B, C), differentiable in y."""
        return self.embed(y.flatten(1), context).reward

    def _rescale(self, slope: float) -> None:
        self.slope *= slope
