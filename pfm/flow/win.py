"""The win-probability head: b(y|x), the chance that y beats an independent draw of the reference.

b is the calibrated classifier of winners against losers: with p1 = 2 pi_ref b and p0 = 2 pi_ref (1 - b), the
odds p1 / p0 are b / (1 - b). The head is built like the field, a convex closed part first and a network beyond it
only where held-out prompts confirm it:

1. a Bradley-Terry reward r(y), linear in y and in the products of its leading principal components, whose
   penalties are chosen by cross-validation over prompts (the best few settings are averaged);
2. its mean over the reference given the context, m(x), by ridge regression, and a logistic calibration
   logit b = a (r - m) + c, both on predictions for prompts that the reward was not fitted on;
3. a small network g(y, x) added to the logit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pfm._internal.columns import column_statistics, weighted_mean
from pfm._internal.networks import Perceptron
from pfm._internal.significance import choose_crosswise, confirmable, confirmed, halves
from pfm.data.batches import PairBatch
from pfm.data.encoded import EncodedPairs
from pfm.preferences.coordinates import Coordinates
from pfm.preferences.crossvalidation import Search, deal_folds
from pfm.preferences.logistic import fit_platt, pairwise_accuracy, pairwise_log_loss, smooth_labels
from pfm.preferences.networks import GAINS, train_network
from pfm.preferences.ridge import fit_ridge

__all__ = ["WinFit", "WinHead", "confirmed_margin"]

PRODUCT_SCALES = (0.0, 0.05, 0.1)  # of a product of two unit-variance components, against |y| of unit mean square
CONTEXT_RIDGES = (10.0, 1.0, 0.1, 0.01)  # in units of the contexts' variance
FIT_PAIRS = 30_000


@dataclass
class WinFit:
    """Holds the results of fitting the head, on prompts that each prediction's model had not seen.

    ``settings`` are the (penalty, scale of products) whose rewards are averaged. ``accuracy`` is the share of
    held-out pairs, ties left out, ordered rightly, ``z`` the z-score, over prompts, of its excess over one half
    (:func:`pfm._internal.significance.confirmed`), ``log_loss`` is in nats a pair (log 2 = 0.693 at chance),
    ``network_gain`` in nats an output.
    """

    settings: list[tuple[float, float]]
    accuracy: float
    log_loss: float
    z: float
    network_kept: bool
    network_gain: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; what is not finite - every held-out pair ordered rightly - is None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


class WinHead(nn.Module):
    """Gives logit b(y|x); fitted by :meth:`fit`, in the coordinates of the raw outputs and contexts."""

    def __init__(self, dimension: int, context_dimension: int, hidden: int = 64) -> None:
        super().__init__()
        self.coordinates = Coordinates(dimension)
        for name, value in {
            "weights": torch.zeros(dimension),
            "product_weights": torch.zeros(self.coordinates.products),
            "context_mean": torch.zeros(context_dimension),
            "context_weights": torch.zeros(context_dimension),
            "slope": torch.zeros(()),
            "offset": torch.zeros(()),
            "gain": torch.zeros(()),
            "margin": torch.tensor(math.inf),
            "context_spread": torch.ones(context_dimension),
        }.items():
            self.register_buffer(name, value)
        self.network: Perceptron | None = Perceptron(dimension + context_dimension, hidden, 1)

    # The buffers, typed.
    weights: Tensor
    product_weights: Tensor
    context_mean: Tensor
    context_weights: Tensor
    slope: Tensor
    offset: Tensor
    gain: Tensor
    margin: Tensor
    context_spread: Tensor

    def drop_network(self) -> None:
        """Leave the network out for good: held-out prompts did not confirm it."""
        self.network = None
        self.gain.zero_()

    def forward(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return logit b (B,) of outputs y (B, D) under contexts (B, C) or None."""
        logit = self.offset + self.slope * (self.reward(y) - self._reference_reward(context))
        if self.network is not None:
            logit = logit + self.gain * self.network(self._inputs(y, context)).squeeze(-1)
        return logit

    def reward(self, y: Tensor) -> Tensor:
        """Return the Bradley-Terry reward (B,) of outputs y (B, D), before calibration."""
        linear, products = self.coordinates(y)
        return linear @ self.weights + products @ self.product_weights

    def _reference_reward(self, context: Tensor | None) -> Tensor | float:
        return 0.0 if context is None else (context - self.context_mean) @ self.context_weights

    def _inputs(self, y: Tensor, context: Tensor | None) -> Tensor:
        inputs = self.coordinates.standardised(y)
        if context is None:
            return inputs
        return torch.cat([inputs, (context - self.context_mean) / self.context_spread], dim=-1)

    @torch.no_grad()
    def fit(self, pairs: EncodedPairs, *, seed: int = 0, network: bool = True) -> WinFit:
        """Fit all parts of the head on labelled pairs, on the head's device.

        Predictions used for calibration, margin and figures come from models that did not see their prompts
        (five-fold over prompts; over pairs when there is one prompt only).
        """
        pairs = pairs.counted()
        generator = torch.Generator().manual_seed(seed)
        index = torch.arange(len(pairs), device="cpu")
        if len(pairs) > FIT_PAIRS:
            index = torch.randperm(len(pairs), generator=generator, device="cpu")[:FIT_PAIRS]
        batch, group = pairs.gather(index).to(self.weights.device), pairs.group[index]
        fold = deal_folds(group, generator).to(self.weights.device)
        self.coordinates.fit(torch.cat([batch.chosen, batch.rejected]), batch.weight.repeat(2))
        if batch.context is not None:
            mean, spread = column_statistics(batch.context, batch.weight)
            self.context_mean.copy_(mean)
            self.context_spread.copy_(spread)
        linear_a, products_a = self.coordinates(batch.chosen)
        linear_b, products_b = self.coordinates(batch.rejected)
        search = Search((linear_a - linear_b, products_a - products_b), batch.weight, batch.probability, fold)
        search.over([(scale,) for scale in PRODUCT_SCALES])
        settings = search.best()
        loose_a, loose_b = torch.zeros_like(batch.weight), torch.zeros_like(batch.weight)
        for number in fold.unique().tolist():
            part = fold == number
            weights, product_weights = search.weights(settings, number)
            loose_a[part] = linear_a[part] @ weights + products_a[part] @ product_weights
            loose_b[part] = linear_b[part] @ weights + products_b[part] @ product_weights
        weights, product_weights = search.refit(settings)
        self.weights.copy_(weights)
        self.product_weights.copy_(product_weights)

        both = (loose_a + loose_b) / 2
        reference = self._fit_reference_reward(batch.context, both, batch.weight, fold)
        reward = torch.stack([loose_a - reference, loose_b - reference])
        label = smooth_labels(torch.stack([batch.probability, 1 - batch.probability]))
        slope, offset = fit_platt(reward.flatten(), label.flatten(), batch.weight.repeat(2))
        self.slope.fill_(slope)
        self.offset.fill_(offset - slope * float(weighted_mean(both[:, None], batch.weight)))
        logit = slope * reward + offset

        network_gain = 0.0
        seen_by_none = torch.ones_like(fold, dtype=torch.bool)
        if network:
            held_out = fold == 0
            correction, network_gain = self._fit_network(batch, logit, label, held_out, group, generator)
            if self.network is not None:
                logit, seen_by_none = logit + correction, held_out
        else:
            self.drop_network()

        gap = torch.sigmoid(logit[0]) - torch.sigmoid(logit[1])
        gap, weight, probability = (column[seen_by_none] for column in (gap, batch.weight, batch.probability))
        accuracy = pairwise_accuracy(gap, weight, probability)
        # Without the network each pair is judged by a fit on the labels of all other folds; with it, one fold is.
        order = confirmed(
            _agreement(gap, 1.0, probability), group[seen_by_none.cpu()], weight, cross_fitted=self.network is None
        )
        self.margin.fill_(confirmed_margin(gap, weight, probability) if order else math.inf)
        loss = pairwise_log_loss((logit[0] - logit[1])[seen_by_none], weight, probability)
        pairs_of = [(penalty, scale) for penalty, scale in settings]
        return WinFit(pairs_of, accuracy, loss, order.z, self.network is not None, network_gain)

    def _fit_reference_reward(self, context: Tensor | None, reward: Tensor, weight: Tensor, fold: Tensor) -> Tensor:
        """Regress the reference's mean reward on the context; give its out-of-fold predictions (N,)."""
        mean = float(weighted_mean(reward[:, None], weight))
        self.context_weights.zero_()
        if context is None:
            return torch.full_like(reward, mean)
        inputs = (context - self.context_mean) / self.context_spread
        weights, predicted = fit_ridge(inputs, reward - mean, weight, fold, CONTEXT_RIDGES)
        self.context_weights.copy_(weights / self.context_spread)
        return mean + predicted.float()

    def _fit_network(
        self,
        batch: PairBatch,
        logit: Tensor,
        label: Tensor,
        held_out: Tensor,
        group: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, float]:
        """Fit the network on what the calibrated logits (2, N) leave; keep it if the held-out part confirms it.

        Returns the corrections (2, N) and the held-out gain in log loss, nats an output; of held-out pairs, both come
        of the moment of the training and the multiple that are best on the other half of the held-out prompts.
        """
        if self.network is None or bool(held_out.all()) or not confirmable(group[held_out.cpu()]):
            self.drop_network()
            return torch.zeros_like(logit), 0.0
        inputs = torch.stack([self._inputs(batch.chosen, batch.context), self._inputs(batch.rejected, batch.context)])
        network = self.network

        def correct(index: Tensor) -> Tensor:
            return network(inputs[:, index]).squeeze(-1)

        def error(index: Tensor, more: Tensor) -> Tensor:
            value, target = logit[:, index] + more, label[:, index].expand_as(more)
            return binary_cross_entropy_with_logits(value, target, reduction="none").mean(-2)

        rows, looks = train_network(network, network.restart, correct, error, batch.weight, held_out, generator)
        every = torch.arange(len(group), device="cpu").to(rows.device)
        correction, weight = correct(every), batch.weight[rows]
        multiples = torch.tensor(GAINS, dtype=torch.float32, device="cpu").to(rows.device)
        gain = GAINS[int((error(rows, multiples[:, None, None] * correction[:, rows]) @ weight).argmin())]
        candidates = (looks[:, None] * multiples[:, None, None]).flatten(0, 1)
        losses = error(rows, candidates)
        places = torch.arange(len(rows), device="cpu").to(rows.device)
        half = halves(group[rows.cpu()]).to(rows.device)
        chosen = choose_crosswise(losses, weight, half)
        better = error(rows, torch.zeros_like(logit[:, rows])) - losses[chosen, places]
        judged = candidates[chosen, :, places].T
        accuracy = [
            pairwise_accuracy(value[0] - value[1], weight, batch.probability[rows])
            for value in (logit[:, rows], logit[:, rows] + judged)
        ]
        # Better calibrated, but a worse order would cost selection more than calibration gains.
        if not confirmed(better, group[rows.cpu()], weight) or accuracy[1] < accuracy[0] - 0.01:
            self.drop_network()
            return torch.zeros_like(logit), 0.0
        self.gain.fill_(gain)
        correction = gain * correction
        correction[:, rows] = judged
        return correction, float((better * weight).sum() / weight.sum())


def _agreement(gap: Tensor, weight: Tensor | float, probability: Tensor) -> Tensor:
    return (2 * probability - 1) * torch.sign(gap) * weight


def confirmed_margin(gap: Tensor, weight: Tensor, probability: Tensor, bins: int = 10) -> float:
    """Return the smallest difference in b from which on every larger one is right more often than not.

    The pairs are cut into equally filled bins of |gap|; from the largest gaps downwards, bins are taken as long
    as the label agrees with the order more often than it disagrees.
    """
    order = gap.abs().argsort(descending=True)
    excess = _agreement(gap, weight, probability)[order]
    size = gap.abs()[order]
    margin = math.inf
    for part, level in zip(excess.chunk(bins), size.chunk(bins), strict=True):
        if float(part.sum()) <= 0:
            return margin
        margin = float(level[-1])
    return 0.0
