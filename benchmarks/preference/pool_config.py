"""The settings of methods that know the references of a pool apart, as plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pfm
from benchmarks.core.config import MethodConfig, MRPOConfig

__all__ = ["METHODS", "PoolConfig", "PoolMRPOConfig"]


@dataclass
class PoolConfig(MethodConfig):
    """Move draws of a pool by flows that know who made them.

    ``rule``
        "tagged": one field, conditioned on the tag. "weighted": the same, on draws with learned shares of the sources,
        at ``temperature``. "apart": a flow a source, each on its part of the votes, on pairs of its own draws.
        "single": the flow of ``source`` alone, on as many votes as the others have, for fresh draws of that source.
    labels: "given", or for the control "shuffled". flow: the settings of :class:`pfm.FlowConfig`.
    """

    rule: str = "tagged"
    source: int = 0
    temperature: float = 0.1
    labels: str = "given"
    flow: dict[str, Any] = field(default_factory=lambda: pfm.FlowConfig().to_dict())


@dataclass
class PoolMRPOConfig(MRPOConfig):
    """Train against the task's own two references; ``base``: the number of the one that the other is clipped around."""

    base: int = 1


METHODS = {"pool": PoolConfig, "pool_mrpo": PoolMRPOConfig}
