"""Moves by flows that know the sources of a pool apart, on distributions whose sources are known exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pfm
from benchmarks.core.bench import Bench
from benchmarks.core.errors import UnsuitableMethodError
from benchmarks.laws.laws import Law
from benchmarks.preference.pool_config import PoolConfig
from benchmarks.tasks.two_references import TwoReferences
from pfm.references import PooledFlow, TaggedPairs, learned_shares

__all__ = ["PoolMover", "make", "own_sources"]

_RULES = ("tagged", "weighted", "apart", "single")


class PoolMover:
    """Fits as the config's rule says, on equally many votes under every rule."""

    draws = 1
    evaluations: float | None = None  # until learned

    def __init__(self, config: PoolConfig) -> None:
        if config.rule not in _RULES:
            raise ValueError(f"method.rule must be one of {', '.join(_RULES)}: got {config.rule!r}")
        if config.labels not in ("given", "shuffled"):
            raise ValueError(f"method.labels must be 'given' or 'shuffled': got {config.labels!r}")
        if config.labels == "shuffled" and config.rule not in ("tagged", "weighted"):
            raise ValueError(f"method.labels='shuffled' goes with rule 'tagged' or 'weighted': got {config.rule!r}")
        self.config = config

    def learn(self, law: Law, train: pfm.EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit on the pool's pairs with their tags, or on as many votes on pairs of a source's own draws."""
        self.law = law = own_sources(law)
        generator = torch.Generator().manual_seed(bench.seed + 1_000_003)
        config, settings = self.config, pfm.FlowConfig.from_dict(self.config.flow)
        self.labels = len(train)
        if config.rule in ("tagged", "weighted"):
            chosen, rejected = (law.tag(side, generator) for side in (train.chosen, train.rejected))
            tagged = TaggedPairs.of(train, chosen, rejected)
            if config.labels == "shuffled":
                tagged = tagged.shuffle_labels(bench.seed)
            self.flow = PooledFlow.fit(tagged, settings, progress=bench.progress)
            self.evaluations = float(self.flow.flow.evaluations)
            self.shares = learned_shares(self.flow.rates, self.flow.shares, temperature=config.temperature)
            notes = {"rates": self.flow.rates.tolist(), "shares": self.shares.tolist()}
            return notes | {"residual_kept": self.flow.flow.metadata["residual_kept"]}
        numbers = range(len(law.sources)) if config.rule == "apart" else [config.source]
        self.flows = {
            number: pfm.PreferenceFlow.fit(
                _own_pairs(law, number, len(train) // len(numbers), generator), settings, progress=bench.progress
            )
            for number in numbers
        }
        self.evaluations = float(max(flow.evaluations for flow in self.flows.values()))
        return {"residual_kept": [flow.metadata["residual_kept"] for flow in self.flows.values()]}

    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Carry draws of the pool; "weighted" and "single" draw afresh from the sources that they want."""
        rule = self.config.rule
        if rule == "single":
            number = self.config.source
            return self.flows[number].transport(self.law.source(number, len(y), generator))
        if rule == "weighted":
            tag = torch.multinomial(self.shares, len(y), replacement=True, generator=generator)
            drawn = torch.stack([self.law.source(number, len(y), generator) for number in range(len(self.shares))])
            y = drawn[tag, torch.arange(len(y))]
        else:
            tag = self.law.tag(y, generator)
        if rule in ("tagged", "weighted"):
            return self.flow.transport(y, tag=tag)
        moved = y.clone()
        for number, flow in self.flows.items():
            moved[tag == number] = flow.transport(y[tag == number])
        return moved


def own_sources(law: Law) -> TwoReferences:
    """Return the law, which must know its sources.

    Raises:
        TypeError: it is not a pool.
    """
    if not isinstance(law, TwoReferences):
        raise UnsuitableMethodError(
            f"{law.name} is no pool of references, which this method needs: use task=two_references"
        )
    return law


def _own_pairs(law: TwoReferences, number: int, count: int, generator: torch.Generator) -> pfm.EncodedPairs:
    one, other = (law.source(number, count, generator) for _ in range(2))
    first = law.label(one, other, None, generator)[:, None]
    return pfm.EncodedPairs(torch.where(first, one, other), torch.where(first, other, one))


def make(config: PoolConfig) -> PoolMover:
    """Make the method of a config."""
    return PoolMover(config)
