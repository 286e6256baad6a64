"""The distinct outputs of each prompt, which are compared within prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pfm.data.identity import PromptIdentity, prompt_identity
from pfm.reasoning import training_text

if TYPE_CHECKING:
    from pfm.data.encoded import EncodedPairs
    from pfm.data.pairs import PreferencePairs

__all__ = ["Array", "Outputs", "distinct_outputs", "some_prompts"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outputs:
    """Holds the distinct outputs of each prompt: what is centred is so within prompts.

    ``rows`` maps each place of a pair (2 i chosen, 2 i + 1 rejected) to its output; ``unit`` (n,) numbers what is
    resampled: prompts, or with one prompt only, outputs.
    """

    texts: list[str]
    prompts: list[str]
    group: NDArray[np.int64]
    unit: NDArray[np.int64]
    rows: NDArray[np.int64]
    y: Tensor
    context: Tensor | None

    def centred(self, values: Array) -> Array:
        """Take each prompt's mean from values (n,) or (n, K)."""
        columns = values.reshape(len(values), -1)
        count = np.bincount(self.group)[:, None]
        sums = np.stack([np.bincount(self.group, column, len(count)) for column in columns.T], axis=1)
        return (columns - (sums / np.maximum(count, 1))[self.group]).reshape(values.shape)

    def by_unit(self, values: Array) -> Array:
        """Sum values (n, K) over each unit: (U, K)."""
        columns = values.reshape(len(values), -1)
        sums = [np.bincount(self.unit, column, int(self.unit.max()) + 1) for column in columns.T]
        return np.stack(sums, axis=1).astype(np.float64)


def some_prompts(pairs: PreferencePairs, limit: int, seed: int) -> list[int] | None:
    """Draw prompts, and pairs of the last one, with at most ``limit`` outputs; None if all fit."""
    groups = pairs.group or [None] * len(pairs)
    keys = [prompt_identity(prompt, group) for prompt, group in zip(pairs.prompts, groups, strict=True)]
    rows: dict[PromptIdentity, list[int]] = {}
    for number, key in enumerate(keys):
        rows.setdefault(key, []).append(number)
    sides = (pairs.chosen, pairs.rejected)
    if len({pair for side in sides for pair in zip(keys, side, strict=True)}) <= limit:
        return None
    rng = np.random.default_rng([seed, 1])
    taken: list[int] = []
    seen: set[Any] = set()
    every = list(rows.items())
    for position in rng.permutation(len(every)).tolist():
        key, numbers = every[position]
        for number in rng.permutation(numbers).tolist():
            new = {(key, pairs.chosen[number]), (key, pairs.rejected[number])} - seen
            if len(seen) + len(new) > limit:
                return sorted(taken)
            seen |= new
            taken.append(number)
    return sorted(taken)


def distinct_outputs(pairs: PreferencePairs, encoded: EncodedPairs) -> Outputs:
    """Collect each distinct output of each prompt once, with its embedding and context."""
    numbers: dict[tuple[int, str], int] = {}
    group = encoded.group.tolist()
    rows, first = [], []
    for pair, (of, chosen, rejected) in enumerate(zip(group, pairs.chosen, pairs.rejected, strict=True)):
        for place, text in ((2 * pair, chosen), (2 * pair + 1, rejected)):
            number = numbers.setdefault((of, text), len(numbers))
            rows.append(number)
            if number == len(first):
                first.append(place)
    places = torch.tensor(first)
    # Prompts are numbered by their texts, so that folds and resamples do not depend on the order of the pairs.
    keys: dict[int, tuple[str, str]] = {}
    for (of, text), place in zip(numbers, first, strict=True):
        keys[of] = min(keys.get(of, (pairs.prompts[place // 2], text)), (pairs.prompts[place // 2], text))
    ranks = {of: rank for rank, of in enumerate(sorted(keys, key=lambda of: keys[of]))}
    groups = np.array([ranks[of] for of, _ in numbers], dtype=np.int64)
    unit = groups if groups.max() > 0 else np.arange(len(groups))
    return Outputs(
        texts=[training_text(text) for _, text in numbers],  # what was encoded of each
        prompts=[pairs.prompts[place // 2] for place in first],
        group=groups,
        unit=unit,
        rows=np.array(rows),
        y=encoded.members(places).unflatten(1, encoded.event_shape),
        context=encoded.contexts_of(places // 2),
    )
