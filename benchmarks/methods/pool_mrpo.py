"""MRPO against the two references that a task has itself; see :mod:`benchmarks.methods.mrpo`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.baselines.policies import Grid, Reference, reference_of
from benchmarks.laws.laws import Law
from benchmarks.methods.mrpo import MRPO
from benchmarks.methods.pool import own_sources
from benchmarks.preference.pool_config import PoolMRPOConfig
from benchmarks.tasks.two_references import TwoReferences

__all__ = ["PoolMRPO", "make"]


class PoolMRPO(MRPO):
    """Trains the policy against the virtual reference of a pool's sources; the pairs are the pool's."""

    config: PoolMRPOConfig

    def references(self, law: Law, grid: Grid, seed: int) -> tuple[Reference, Reference, dict[str, Any]]:
        """Return the base reference and the other one."""
        pool = own_sources(law)
        if self.config.base not in (0, 1):
            raise ValueError(f"method.base must be 0 or 1: got {self.config.base}")
        base, other = (_alone(pool, number, grid) for number in (self.config.base, 1 - self.config.base))
        return base, other, {}


def _alone(pool: TwoReferences, number: int, grid: Grid) -> Reference:
    shares = tuple(float(place == number) for place in range(len(pool.sources)))
    return reference_of(replace(pool, shares=shares), grid)


def make(config: PoolMRPOConfig) -> PoolMRPO:
    """Make the method of a config."""
    return PoolMRPO(config)
