"""Votes under preference models: their log-odds, losses and likelihoods, by rater and mixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from pfm.data.encoded import EncodedPairs
from pfm.preferences import PreferenceModel

__all__ = ["mixed_log_odds", "rater_likelihood", "vote_loss", "vote_scores", "vote_weight"]

NEGLIGIBLE = 1e-4  # responsibility below which a rater's votes are left out of a taste's fit


def vote_weight(pairs: EncodedPairs) -> Tensor:
    """Return the weight (N,) of each pair, 1 where none is given."""
    ones = torch.ones(len(pairs), dtype=torch.float32, device=pairs.device)
    return ones if pairs.weight is None else pairs.weight


def vote_scores(model: PreferenceModel, pairs: EncodedPairs) -> Tensor:
    """Return the log-odds (N,) of chosen over rejected."""
    batch = pairs.gather(torch.arange(len(pairs)))
    return model.score(batch.chosen, batch.rejected, batch.context)


def vote_loss(score: Tensor, pairs: EncodedPairs) -> Tensor:
    """Return -log P(label) (N,) at log-odds (N,)."""
    each = softplus(-score)
    return each if pairs.probability is None else each + (1 - pairs.probability) * score


def rater_likelihood(models: Sequence[PreferenceModel], pairs: EncodedPairs, index: Tensor, raters: int) -> Tensor:
    """Return the log-likelihood (R, K) of each rater's votes under each model, float64."""
    weight = vote_weight(pairs).double()
    each = torch.stack([-vote_loss(vote_scores(model, pairs), pairs).double() * weight for model in models], dim=1)
    return torch.zeros(raters, len(models), dtype=torch.float64).index_add_(0, index, each)


def mixed_log_odds(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the log-odds (B,) of sum_k w_k sigmoid(s_k), s (B, K); skew, as 1 - sigmoid(s) = sigmoid(-s)."""
    log = weights.clamp_min(1e-30).log()
    return (log + logsigmoid(scores)).logsumexp(1) - (log + logsigmoid(-scores)).logsumexp(1)
