"""A Bradley–Terry reward that is a network, for laws whose reward no line can express."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.baselines.networks import Fitted, Network, fit_early_stopped, pair_loss
from pfm import EncodedPairs

__all__ = ["NetworkReward"]


class NetworkReward:
    """Scores outputs by r(y, x) with P(y > y' | x) = sigmoid(r(y, x) - r(y', x)): a network, by likelihood.

    This is the reward model of RLHF: the loss is -log sigmoid(r(chosen) - r(rejected)) (Ziegler et al. 2019,
    arXiv 1909.08593, eq. 1 with two options; Ouyang et al. 2022, arXiv 2203.02155, eq. 1 with K = 2).
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._network: Network | None = None

    def fit(self, pairs: EncodedPairs) -> Fitted:
        """Fit on labelled pairs, with early stopping; return what the fit found."""
        network = Network(pairs.dimension, pairs.context_dimension, seed=self.seed).standardise(pairs)

        every = pairs.gather(torch.arange(len(pairs)))
        outputs = torch.stack([every.chosen, every.rejected])

        def loss(index: Tensor) -> Tensor:
            context = None if every.context is None else every.context[index].repeat(2, 1)
            chosen, rejected = network(outputs[:, index].flatten(0, 1), context).squeeze(-1).chunk(2)
            return pair_loss(lambda margin: softplus(-margin), chosen - rejected, every.probability[index])

        self._network = network
        return fit_early_stopped(network, loss, pairs, seed=self.seed)

    def reward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the rewards (B,), in log-odds, of y (B, D) under contexts (B, C) or None; differentiable in y."""
        if self._network is None:
            raise RuntimeError("NetworkReward is not fitted: call fit(pairs) first")
        return torch.cat([self._network(a, b).squeeze(-1) for a, b in _chunks(y, context)])


def _chunks(y: Tensor, context: Tensor | None, rows: int = 65536) -> list[tuple[Tensor, Tensor | None]]:
    parts = y.split(rows)
    return [(part, None) for part in parts] if context is None else list(zip(parts, context.split(rows), strict=True))
