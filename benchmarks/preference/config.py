"""The settings of tasks and methods that compare outputs, as plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.core.config import MethodConfig, TaskConfig

__all__ = [
    "METHODS",
    "TASKS",
    "ArgumentsVotesConfig",
    "ComparisonsConfig",
    "CycleTextConfig",
    "PreferenceMethodConfig",
    "QloraConfig",
]


@dataclass
class ComparisonsConfig(TaskConfig):
    """Predict who wins on prompts that the fit has not seen.

    ``folds``: the prompts are dealt into so many parts, each of which is held out once.
    """

    folds: int = 3


@dataclass
class CycleTextConfig(ComparisonsConfig):
    """Compare real texts by criteria that beat each other in turn.

    What stands out
        texts: "alpaca", answers of all generators, "arguments", "imdb", film reviews, or "critics", film reviews of one
        line. criteria: three features of
        :class:`pfm.encoders.SurfaceEncoder`, each of which beats the next, and the last the first. dominant: a fourth,
        which beats all three, or None. lead: standard deviations by which a text must stand out more in its criterion
        than in any other. longest: characters of a text, at most; small encoders read no further. each: texts of a
        criterion a prompt, at most; every criterion has equally many.
    """

    texts: str = "alpaca"
    criteria: list[str] = field(default_factory=lambda: ["lines", "sentence_length", "second_person"])
    dominant: str | None = None
    lead: float = 0.5
    longest: int = 1500
    each: int = 3


@dataclass
class QloraConfig(ComparisonsConfig):
    """Compare answers of eight systems; a judge has seen every two of them in both orders.

    Which verdicts are learned from
        orders: "both", averaged. "half": the same of every other pair only. "one": in one order, and in four pairs of
        five the shorter answer was shown first, so that a liking for what comes first looks like one for brevity.
        "told": the same, and what was shown first is one more number of an output, without which it is predicted.
        "half", "one" and "told" cost equally many verdicts.
    """

    orders: str = "both"


@dataclass
class ArgumentsVotesConfig(ComparisonsConfig):
    """Predict the shares of human votes; debates are held out whole.

    ``soft``: learn from the shares, undecided votes half; else from the majority's word.
    """

    soft: bool = True


@dataclass
class PreferenceMethodConfig(MethodConfig):
    """Compare outputs by a model of :mod:`pfm.preferences`, or choose among candidates by its b.

    What it is
        model: a class of :mod:`pfm.preferences`. options: of its constructor. penalties: fit with each of these as
        ``l2``, and keep the one that predicts held-out prompts of the training pairs best; empty: as in ``options``.

    Controls
        labels: "given", "shuffled" or "swapped".
    """

    model: str = "BradleyTerry"
    options: dict[str, Any] = field(default_factory=dict)
    penalties: list[float] = field(default_factory=list)
    labels: str = "given"


TASKS = {"comparisons": ComparisonsConfig, "cycle_text": CycleTextConfig, "qlora": QloraConfig,
         "arguments_votes": ArgumentsVotesConfig}  # fmt: skip
METHODS = {"preference": PreferenceMethodConfig}
