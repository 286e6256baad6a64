"""Preference models on frozen embeddings: who beats whom, and which of n candidates has the highest b."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.bench import Bench
from benchmarks.preference.config import PreferenceMethodConfig
from benchmarks.selection.selection import Item, candidate_vectors, one_hot
from pfm import EncodedPairs, preferences
from pfm.encoders import Encoder
from pfm.preferences import PreferenceModel
from pfm.preferences.logistic import pairwise_log_loss

__all__ = ["Preference", "make"]

_HELD_OUT = 0.2  # of the training prompts, by which a penalty is chosen


class Preference:
    """Fits a model of :mod:`pfm.preferences`; compares by its log-odds, and chooses by its b.

    b of a candidate is its mean probability of beating the other candidates, which are as many draws of the reference.
    """

    reads_vectors = True

    def __init__(self, config: PreferenceMethodConfig) -> None:
        known = [name for name in preferences.__all__ if _is_model(getattr(preferences, name))]
        if config.model not in known:
            raise ValueError(f"method.model must be one of {', '.join(known)}: got {config.model!r}")
        if config.labels not in ("given", "shuffled", "swapped"):
            raise ValueError(f"method.labels must be 'given', 'shuffled' or 'swapped', got {config.labels!r}")
        self.config = config

    def make(self, seed: int, **options: Any) -> PreferenceModel:
        """Make the model, unfitted; its seed is the run's if it takes one."""
        kind = getattr(preferences, self.config.model)
        given = {"seed": seed} if "seed" in inspect.signature(kind).parameters else {}
        return kind(**given | self.config.options | options)

    def learn(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit the model, on labels as given or as a control turns them."""
        if self.config.labels == "shuffled":
            train = train.shuffle_labels(bench.seed)
        elif self.config.labels == "swapped":
            train = train.swap()
        chosen = {}
        if self.config.penalties:
            part, held_out = train.split(_HELD_OUT, bench.seed)
            every = held_out.gather(torch.arange(len(held_out)))

            def loss(penalty: float) -> float:
                model = self.make(bench.seed, l2=penalty).fit(part)
                score = model.score(every.chosen, every.rejected, every.context)
                return pairwise_log_loss(score, every.weight, every.probability)

            chosen = {"l2": min(self.config.penalties, key=loss)}
        self.model = self.make(bench.seed, **chosen).fit(train)
        return chosen | self.model.found

    def compare(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        """Return the log-odds (B,)."""
        return self.model.score(y, other, context)

    def fit(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit the model."""
        return self.learn(train, bench)

    def choose(self, items: Sequence[Item], encoder: Encoder) -> NDArray[np.float64]:
        """Take each item's candidate of the highest b; a tie keeps the earlier one."""
        vectors = candidate_vectors(items, encoder)
        contexts = None
        if self.model.context_dimension and all(item.prompt is not None for item in items):
            contexts = encoder.encode_prompts([str(item.prompt) for item in items])
        best: list[int] = []
        for number, candidates in enumerate(vectors):
            odds = self.model.table(candidates, None if contexts is None else contexts[number])
            b = (torch.sigmoid(odds).sum(1) - 0.5) / (len(odds) - 1)
            best.append(int(b.argmax()))
        return one_hot(best, vectors.shape[1])


def _is_model(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, PreferenceModel) and found is not PreferenceModel


def make(config: PreferenceMethodConfig) -> Preference:
    """Make the method of a config."""
    return Preference(config)
