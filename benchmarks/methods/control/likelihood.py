"""Fine-tuning of a Gaussian policy of segments on preferences, by DPO and CPL.

The policy is N(mean(x), S) over residuals, S the covariance of the noise with which the segments were drawn; it starts
as the reference, mean = 0, and the mean is what is trained and executed. With l = log pi(chosen) - log pi_ref(chosen)
and l' that of the rejected segment, DPO (Rafailov et al., 2305.18290, eq. 7) minimises -log sigmoid(beta (l - l')).
CPL (Hejna et al., 2310.13639, eq. 5 and section 3.2) has no reference, and a bias lambda in (0, 1] by which the
rejected segment counts less, -log sigmoid(beta (log pi(chosen) - lambda log pi(rejected))), which keeps it on the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.baselines.networks import Network, fit_early_stopped, pair_loss
from benchmarks.control.config import ControlLikelihoodConfig
from benchmarks.control.learning import Candidate, ControlData, Displaced, observation_network
from benchmarks.core.bench import Bench

__all__ = ["Likelihood", "make"]


class Likelihood:
    """Trains one policy for every temperature."""

    def __init__(self, config: ControlLikelihoodConfig) -> None:
        if config.loss not in ("dpo", "cpl"):
            raise ValueError(f"method.loss must be 'dpo' or 'cpl': got {config.loss!r}")
        if not 0 < config.bias <= 1:
            raise ValueError(f"method.bias must lie in (0, 1]: got {config.bias}")
        self.config = config

    def learn(self, data: ControlData, bench: Bench) -> dict[str, Any]:
        """Fit the means."""
        self._candidates, notes = [], {}
        for beta in self.config.betas:
            network = observation_network(data, data.factor.shape[1], data.seed)
            fitted = fit_early_stopped(network, self._loss(network, data, beta), data.pairs, seed=data.seed)
            notes[f"{beta:g}"] = fitted.notes()
            self._candidates.append(Candidate({"beta": beta}, Displaced.on(data, _mean_of(network, data))))
        return notes

    def _loss(self, network: Network, data: ControlData, beta: float) -> Any:
        every = data.pairs.gather(torch.arange(len(data.pairs)))
        chosen, rejected = data.whiten(every.chosen), data.whiten(every.rejected)
        assert every.context is not None
        context = every.context

        def log_density(y: Tensor, mean: Tensor) -> Tensor:
            return -(y - mean).square().sum(1) / 2  # up to what no mean changes

        def loss(index: Tensor) -> Tensor:
            mean = network(context[index], None)
            won, lost = log_density(chosen[index], mean), log_density(rejected[index], mean)
            if self.config.loss == "cpl":
                forward = softplus(-beta * (won - self.config.bias * lost))
                back = softplus(-beta * (lost - self.config.bias * won))
                p = every.probability[index]
                return p * forward + (1 - p) * back
            zero = torch.zeros_like(mean)
            margin = (won - log_density(chosen[index], zero)) - (lost - log_density(rejected[index], zero))
            return pair_loss(lambda m: softplus(-beta * m), margin, every.probability[index])

        return loss

    def candidates(self) -> list[Candidate]:
        """Return one policy for every temperature."""
        return self._candidates


def _mean_of(network: Network, data: ControlData) -> Any:
    def displacement(seen: Tensor) -> Tensor:
        return data.colour(network(seen, None))

    return displacement


def make(config: ControlLikelihoodConfig) -> Likelihood:
    """Make the method of a config."""
    return Likelihood(config)
