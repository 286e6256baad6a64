"""Choices that need no training: the original, any, the longest, the shortest, and the judge's own favourite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.bench import Bench
from benchmarks.core.config import MethodConfig
from benchmarks.selection.selection import Item, one_hot
from pfm import EncodedPairs
from pfm.encoders import Encoder

__all__ = ["make"]


class Plain:
    """Chooses by a rule on one item: "identity", "random" (in exact expectation), "longest", "shortest" or "oracle"."""

    reads_vectors = False

    def __init__(self, rule: str) -> None:
        rules = {"identity": _identity, "random": _random, "longest": _longest, "shortest": _shortest,
                 "oracle": _oracle}  # fmt: skip
        self.weigh = rules[rule]

    def fit(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Learn nothing."""
        return {}

    def choose(self, items: Sequence[Item], encoder: Encoder) -> NDArray[np.float64]:
        """Weigh each item's candidates by the rule."""
        return np.stack([self.weigh(item) for item in items])


def make(config: MethodConfig) -> Plain:
    """Make the method whose name is the rule."""
    return Plain(config.name)


def _identity(item: Item) -> NDArray[np.float64]:
    return one_hot([0], len(item.candidates))[0]


def _random(item: Item) -> NDArray[np.float64]:
    return np.full(len(item.candidates), 1 / len(item.candidates))


def _longest(item: Item) -> NDArray[np.float64]:
    lengths = [len(text) for text in item.candidates]
    return one_hot([int(np.argmax(lengths))], len(lengths))[0]


def _shortest(item: Item) -> NDArray[np.float64]:
    lengths = [len(text) for text in item.candidates]
    return one_hot([int(np.argmin(lengths))], len(lengths))[0]


def _oracle(item: Item) -> NDArray[np.float64]:
    return one_hot([int(np.argmax(item.scores))], len(item.scores))[0]
