"""Refinement: the refined output for one prompt, and how it came about."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pfm.data.outputs import json_output
from pfm.generators import Draw, Prompt

__all__ = ["Refinement", "unjudged"]

# Fields of a Refinement that most generators and decoders have nothing to say in.
_WHERE_KNOWN = ("generator", "generators", "trace", "usage", "reasoning", "spent")


@dataclass
class Refinement:
    """The refined output for one prompt, and how it came about.

    Attributes:
        prompt: as it was given.
        text: the refined output; equal to ``original`` unless ``changed``; empty if there is no candidate.
        original: the first candidate, which the generator alone would have given.
        candidates: the usable candidates; those that the decoder itself has made come last.
        win_probability: b(text | prompt) in [0, 1]; NaN if it could not be judged.
        probabilities: b of each candidate; 0 of one that was cut off before the answer that its reasoning leads to.
        index: place of ``text`` in ``candidates``; -1 if there is none.
        changed: whether ``text`` differs from ``original``.
        reason: why it was kept or changed, and what was missing, in one phrase.
        seconds: wall-clock time of this prompt: its generation and its share of encoding and judging.
        calls: calls of the generator.
        error: type and message of what went wrong, or None. With an error there may still be a text.
        trace: what the decoder did, round by round, in JSON values; None for one that only selects.
        generator: name of the generator that made ``text``, where several did; else None.
        generators: the same for each candidate, "" where it is not known; empty where there is only one generator.
        usage: tokens that drawing the candidates took (``prompt_tokens``, ``completion_tokens``,
            ``total_tokens``); empty where that is not known.
        reasoning: for each candidate how many characters of hidden reasoning were set aside: what was judged is the
            answer after it (see :mod:`pfm.reasoning`); empty where no candidate holds any.
        spent: with ``n="auto"`` how many draws were made: ``draws``, ``waves``, ``max_n``, why they ``ended`` ("good
            enough", "cap", "fixed n", "all the same", "failed", "interrupted"), and of the wave that was not made
            ``expected_gain`` and ``price`` in win probability; else None.
    """

    prompt: Prompt
    text: str
    original: str
    candidates: list[str]
    win_probability: float
    probabilities: list[float]
    index: int
    changed: bool
    reason: str
    seconds: float
    calls: int
    error: str | None = None
    trace: list[dict[str, Any]] | None = None
    generator: str | None = None
    generators: list[str] = dataclasses.field(default_factory=list)
    usage: dict[str, int] = dataclasses.field(default_factory=dict)
    reasoning: list[int] = dataclasses.field(default_factory=list)
    spent: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; a probability that is NaN becomes None, and what is not known is left out.

        Outputs that are arrays become nested lists; any other that is not text is left as it is.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in _WHERE_KNOWN:
            if not values[name]:
                del values[name]
        values["text"], values["original"] = json_output(self.text), json_output(self.original)
        values["candidates"] = [json_output(candidate) for candidate in self.candidates]
        values["win_probability"] = _number_or_none(self.win_probability)
        values["probabilities"] = [_number_or_none(value) for value in self.probabilities]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Refinement:
        """Rebuild from :meth:`to_dict`; keys of other meaning are ignored.

        Raises:
            ValueError: keys are missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in values and name not in ("error", *_WHERE_KNOWN)]
        if missing:
            raise ValueError(f"a refinement needs the keys {', '.join(missing)}; got {', '.join(values)}")
        found = {name: values[name] for name in names if name in values}
        found["win_probability"] = _number_or_nan(found["win_probability"])
        found["probabilities"] = [_number_or_nan(value) for value in found["probabilities"]]
        return cls(**found)


def unjudged(prompt: Prompt, draw: Draw) -> Refinement:
    """Return the Refinement that keeps the original of a draw."""
    original = draw.texts[0] if draw.texts else ""
    return Refinement(
        prompt=prompt,
        text=original,
        original=original,
        candidates=draw.texts,
        win_probability=math.nan,
        probabilities=[math.nan] * len(draw.texts),
        index=0 if draw.texts else -1,
        changed=False,
        reason="kept the original: not judged" if draw.texts else "no candidate",
        seconds=draw.seconds,
        calls=draw.calls,
        error=draw.error,
        generator=draw.tags[0] if draw.tags else None,
        generators=draw.tags,
        usage=draw.usage,
        reasoning=draw.reasoning,
        spent=draw.spent,
    )


def _number_or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number_or_nan(value: float | None) -> float:
    return math.nan if value is None else value
