"""Bradley-Terry preference model: P(y > y') = sigmoid(r(y) - r(y')) with a reward r, linear or a network's."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from pfm._internal.checks import check_number, check_seed, check_whole
from pfm._internal.columns import column_statistics
from pfm.data.encoded import EncodedPairs
from pfm.preferences.base import Embedded, PreferenceModel, check_pairs
from pfm.preferences.coordinates import component_axes, equal_units
from pfm.preferences.correction import Correction, fit_correction
from pfm.preferences.crossvalidation import deal_folds
from pfm.preferences.logistic import PairwiseLogistic, fit_temperature

__all__ = ["BradleyTerry"]

NETWORK_INPUTS = 64  # components of an output that the network reads


class BradleyTerry(PreferenceModel):
    """Scores outputs with a Bradley-Terry reward (Bradley & Terry 1952), by penalised likelihood.

    The reward is linear, and the context then plays no part: within a prompt a linear term in it cancels. ``hidden``
    adds a network in y and x to it, as far as held-out prompts confirm it. A linear reward is not calibrated by
    itself: its fit takes the training pairs at their word; :meth:`calibrate`, or ``fit(pairs, validation)``, does it.

    Args:
        l2: penalty on the weights of outputs whose columns have equal spreads and unit mean square length together:
            a column's unit does not matter.
        hidden: width of the network; 0 for none.
        seed: of the network.

    >>> rejected, chosen = torch.randn(2, 200, 1, generator=torch.Generator().manual_seed(0)).sort(0).values
    >>> model = BradleyTerry().fit(EncodedPairs(chosen, rejected))
    >>> model.win_probability([[2.0], [-2.0]], chosen).round(decimals=1).tolist()
    [1.0, 0.0]
    """

    mean: Tensor
    weights: Tensor
    slope: Tensor

    def __init__(self, l2: float = 1e-4, *, hidden: int = 0, seed: int = 0) -> None:
        seed = check_seed(seed)
        l2 = check_number("l2", l2, above=0)
        hidden = check_whole("hidden", hidden, 0)
        super().__init__()
        self.l2, self.hidden, self.seed = l2, hidden, seed

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {"l2": self.l2, "hidden": self.hidden, "seed": self.seed}

    def _build(self, dimension: int, contexts: int = 0, network: dict[str, int] | None = None) -> None:
        self.dimension, self.context_dimension = dimension, contexts if network else 0
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("weights", torch.zeros(dimension))
        self.register_buffer("slope", torch.ones(()))
        self.network = None if network is None else Correction(dimension, contexts, **network, **self._shape())

    def _shape(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "blocks": 0, "reward": True}

    @torch.no_grad()
    def fit(self, pairs: EncodedPairs, validation: EncodedPairs | None = None, *, progress: bool = False) -> Self:
        """Fit on labelled pairs and return the model itself.

        ``validation`` sets the temperature, and with ``hidden`` judges the network; without it one prompt in five does
        the latter.
        """
        check_pairs(pairs, validation)
        batch = pairs.gather(torch.arange(len(pairs)))
        self._ready(dimension=pairs.dimension, contexts=pairs.context_dimension, network=None)
        both = torch.cat([batch.chosen, batch.rejected])
        mean, spread = column_statistics(both, batch.weight.repeat(2))
        self.mean.copy_(mean)
        scale = equal_units(spread, self._emphasis).to(self.mean.dtype)
        difference = (batch.chosen - batch.rejected) / scale
        soft = None if pairs.probability is None else batch.probability
        self.weights.copy_(PairwiseLogistic(difference, batch.weight, soft).fit(self.l2, iterations=100) / scale)
        if self.hidden:
            self._fit_network(pairs, validation, difference, scale)
        if validation is not None:
            self.calibrate(validation)
        return self

    def _fit_network(
        self, pairs: EncodedPairs, validation: EncodedPairs | None, difference: Tensor, scale: Tensor
    ) -> None:
        """Fit the network to what the linear reward, fitted without each pair's prompt, leaves.

        ``difference`` (N, D) and ``scale`` (D,) are the pairs' differences in equal units, and these units.
        """
        generator = torch.Generator().manual_seed(self.seed)
        batch, group = pairs.gather(torch.arange(len(pairs))), pairs.group
        fold = deal_folds(group, generator)
        out = fold == fold.unique()[:, None]
        weights = PairwiseLogistic(difference, batch.weight * ~out, batch.probability).fit(self.l2)
        score = ((weights @ difference.T) * out).sum(0)
        held_out = fold == 0
        if validation is not None:
            held = validation.gather(torch.arange(len(validation)))
            score = torch.cat([score, (held.chosen - held.rejected) @ self.weights])
            batch, group = batch.joined(held), torch.cat([group, validation.group + 1 + int(group.max())])
            held_out = torch.arange(len(score)) >= len(fold)
        if bool(held_out.all()):
            return
        slope = fit_temperature(score, batch.probability, batch.weight)
        one, other = batch.chosen - self.mean, batch.rejected - self.mean
        axes = component_axes(torch.cat([one, other]) / scale, NETWORK_INPUTS, batch.weight.repeat(2)) / scale[:, None]
        tries = [(axes, batch, {})]
        fitted = fit_correction(one, other, tries, slope * score, held_out, group, generator, **self._shape())
        self.weights *= slope
        self.network = fitted.network
        self.found = {"network": fitted.network is not None, "network_gain": fitted.gain}
        if fitted.network is not None:
            assert self.layout is not None
            self.layout["network"] = fitted.network.sizes
            self.context_dimension = self.layout["contexts"]

    def _rescale(self, slope: float) -> None:
        self.slope *= slope

    def reward(self, y: Any, context: Any = None) -> Tensor:
        """Return the reward (B,), in log-odds, of outputs y (B, \\*D), under contexts (B, C) if it reads them."""
        y, context = self._checked("y", y, context)
        return self.embed(y, context).reward

    def embed(self, y: Tensor, context: Tensor | None) -> Embedded:
        """Embed outputs (B, D) by their reward alone."""
        reward = (y - self.mean) @ self.weights
        if self.network is not None:
            reward = reward + self.network(y - self.mean, context).reward
        return Embedded(reward * self.slope, y.new_zeros(*y.shape[:-1], 0))
