"""What a run lends to tasks and methods, and what it wants back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pfm.encoders import Encoder, encoder_from_name
from pfm.statistics import Estimate

__all__ = ["Bench", "Outcome"]


@dataclass(frozen=True)
class Bench:
    """Lends the encoder that all methods share, the run's seed, whether to show progress, and wrong labels.

    ``flips`` is the share of training labels that a task turns round, by chance, before any method sees them.
    The encoder is made when a task first needs it: the laws on the plane have nothing to encode.
    """

    encoder_name: str
    long_texts: str
    seed: int
    progress: bool
    flips: float = 0.0

    @cached_property
    def encoder(self) -> Encoder:
        """Make the encoder."""
        return encoder_from_name(self.encoder_name, long_texts=self.long_texts)


@dataclass(frozen=True)
class Outcome:
    """Holds what a method reached on a task.

    Attributes:
        kind: of the task: "selection" or "law". It says what ``save`` writes, and which tables the run belongs in.
        score: the figure by which methods are ordered, higher is better.
        figures: every figure with its interval over the test data of this seed.
        seconds: wall-clock time by what it went into.
        about: what was measured on, as JSON values: the judge, counts.
        notes: what the method says of its fit, as JSON values.
        save: writes what the report needs beyond this to a path ending in .npz.
    """

    kind: str
    score: float
    figures: dict[str, Estimate | None]
    seconds: dict[str, float]
    about: dict[str, Any]
    notes: dict[str, Any]
    save: Callable[[Path], None] = field(repr=False)
