"""Choices after wrong labels were looked for: the same models as elsewhere, on corrected labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.baselines.networks import Network, pair_loss
from benchmarks.core.bench import Bench
from benchmarks.core.config import RobustConfig, RobustFlowConfig
from benchmarks.methods.flow import FlowChoice
from benchmarks.selection.selection import Item, candidate_vectors, one_hot
from pfm import EncodedPairs
from pfm.encoders import Encoder
from pfm.preferences import BradleyTerry
from pfm.preferences.logistic import PairwiseLogistic
from pfm.preferences.noise import corrected, unbiased_label

__all__ = ["RobustChoice", "RobustFlowChoice", "make"]

MODELS = ("bradley_terry", "memorising")
CORRECTIONS = ("estimated", "known", "none")
UPDATES, ROWS, RATE = 500, 512, 2e-3  # of the network that memorises


class RobustChoice:
    """Corrects the labels, fits a reward, and chooses the candidate of the highest; a tie keeps the earlier one."""

    reads_vectors = True

    def __init__(self, config: RobustConfig) -> None:
        _check("model", config.model, MODELS)
        _check("correction", config.correction, (*CORRECTIONS, "unbiased"))
        if config.correction == "unbiased" and config.model != "bradley_terry":
            raise ValueError("method.correction='unbiased' needs method.model='bradley_terry': its loss has no minimum")
        self.config = config

    def fit(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Correct and fit; the notes say what was found about the labels."""
        if self.config.correction == "unbiased":
            self.reward = _fit_unbiased(train, bench.flips, self.config.l2)
            return {}
        train, notes = _correct(train, self.config.correction, bench)
        if self.config.model == "memorising":
            self.reward = _memorise(train, bench.seed)
        else:
            self.reward = BradleyTerry(self.config.l2).fit(train).reward
        return notes

    def choose(self, items: Sequence[Item], encoder: Encoder) -> NDArray[np.float64]:
        """Encode all candidates at once, and take each item's best."""
        vectors = candidate_vectors(items, encoder)
        best = self.reward(vectors.flatten(0, 1)).view(vectors.shape[:2]).argmax(1)
        return one_hot(best.tolist(), vectors.shape[1])


class RobustFlowChoice(FlowChoice):
    """Corrects the labels, fits a flow, and chooses as it does."""

    def __init__(self, config: RobustFlowConfig) -> None:
        super().__init__(config)
        _check("correction", config.correction, CORRECTIONS)
        self.correction = config.correction

    def fit(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Correct and fit; the notes say what was found about the labels."""
        train, notes = _correct(train, self.correction, bench)
        return notes | super().fit(train, bench)


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"method.{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _correct(train: EncodedPairs, correction: str, bench: Bench) -> tuple[EncodedPairs, dict[str, Any]]:
    if correction == "none":
        return train, {}
    found = corrected(train, bench.flips if correction == "known" else None, seed=bench.seed)
    report = found.report
    noted = {"flip_rate": report.flip_rate, "estimate": report.estimate, "z": report.z, "spread": report.spread}
    return found.pairs, {"labels": noted | {"z": report.z if math.isfinite(report.z) else None}}


def _fit_unbiased(train: EncodedPairs, flips: float, l2: float) -> Any:
    """Fit the linear reward by the unbiased loss, in the units of :class:`pfm.preferences.BradleyTerry`."""
    batch = train.gather(torch.arange(len(train)))
    mean = (batch.chosen.mean(0) + batch.rejected.mean(0)) / 2
    scale = (batch.chosen - mean).square().sum(1).mean().sqrt().clamp_min(1e-12)
    label = unbiased_label(batch.probability, flips)
    weights = PairwiseLogistic((batch.chosen - batch.rejected) / scale, batch.weight, label).fit(l2, iterations=100)
    return lambda y: (y - mean) @ weights


def _memorise(train: EncodedPairs, seed: int) -> Any:
    """Train a Bradley-Terry network on all pairs for a given number of updates: nothing is held out to stop it by."""
    network = Network(train.dimension, 0, hidden=128, layers=1, seed=seed)
    batch = train.gather(torch.arange(len(train)))
    network.standardise(EncodedPairs(batch.chosen, batch.rejected))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, fused=True)
    for _ in range(UPDATES):
        some = torch.randint(len(train), (ROWS,), generator=generator)
        margin = (network(batch.chosen[some], None) - network(batch.rejected[some], None))[:, 0]
        each = pair_loss(lambda m: -logsigmoid(m), margin, batch.probability[some])
        optimizer.zero_grad()
        (batch.weight[some] * each).mean().backward()
        optimizer.step()

    @torch.no_grad()
    def reward(y: Tensor) -> Tensor:
        return network(y, None)[:, 0]

    return reward


def make(config: RobustConfig | RobustFlowConfig) -> RobustChoice | RobustFlowChoice:
    """Make the method of a config."""
    return RobustFlowChoice(config) if isinstance(config, RobustFlowConfig) else RobustChoice(config)
