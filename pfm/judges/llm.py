"""A language model as judge, in both orders."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pfm._internal.checks import check_choice, check_whole
from pfm._internal.templates import Template, fence, fence_mark
from pfm.data.conversations import conversation_text
from pfm.generators import Prompt, as_generator
from pfm.judges.base import Comparison, Judge, Verdict
from pfm.reasoning import answer_of, judged_text

__all__ = ["LLMJudge", "Tally", "read_verdict"]

_VERDICT = re.compile(r"[\s*_#>`]*verdict[\s*_`]*[:：][\s*_`]*(a|b|tie)[\s*_`.]*", re.IGNORECASE)
_BARE = re.compile(r"[\s*_`]*(a|b|tie)[\s*_`.]*", re.IGNORECASE)


@dataclass
class Tally:
    """Counts what a judge has answered since it was made.

    Attributes:
        calls: of the generator.
        shown_first, shown_second, ties: answers by the place of the winner in the prompt.
        unread: answers without a verdict that could be read.
        failed: answers that never came.
        agreed, turned: pairs on which both orders gave the same verdict, and on which they did not.
    """

    calls: int = 0
    shown_first: int = 0
    shown_second: int = 0
    ties: int = 0
    unread: int = 0
    failed: int = 0
    agreed: int = 0
    turned: int = 0

    @property
    def position_bias(self) -> float:
        """Return how much more often the first place won than the second, of all wins: 0 for none, 1 for always.

        Meaningful over both orders, in which each output stands in each place once. NaN without a win.
        """
        wins = self.shown_first + self.shown_second
        return (self.shown_first - self.shown_second) / wins if wins else math.nan

    @property
    def consistency(self) -> float:
        """Return the share of pairs on which both orders agreed; NaN if none was judged in both."""
        both = self.agreed + self.turned
        return self.agreed / both if both else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; what is not known is None."""
        known = {"position_bias": self.position_bias, "consistency": self.consistency}
        return asdict(self) | {name: None if math.isnan(value) else value for name, value in known.items()}


class LLMJudge(Judge):
    """Asks a language model which of two outputs is better, once in each order.

    A model that leans to the first or the second place says opposite things in the two orders, which cancel to a tie;
    :attr:`tally` says how far it leans. An answer must end with ``VERDICT: A``, ``B`` or ``TIE`` on a line of its own,
    without another verdict before it that differs, or be that letter alone; anything else is unread. A pair has a
    verdict only if each order has one that was read. What answers say decides nothing else.

    Args:
        generator: anything :func:`pfm.generators.as_generator` takes.
        template: ``"judge"``, or the path of a file with the places ``{prompt}``, ``{first}``, ``{second}`` and, if
            wanted, ``{rubric}`` and ``{mark}``.
        rubric: what makes an output better: the path of a file, or ``"rubric"``, the one of this package.
        both_orders: False judges in one order only, at half the price and with the model's position bias.
        samples: answers an order, of which the mean counts.
        temperature: for a generator that takes one (with a dict ``parameters``, or a function with a parameter of this
            name) and has not been given another; 1 in place of 0 for several samples. None sends none, as models need
            that refuse it.
        against: ``"all"`` or ``"first"``, see :class:`Judge`.
        name: what reports call it.

    Raises:
        ValueError: a template lacks a place, the rubric is empty, or a number is out of range.
    """

    def __init__(
        self,
        generator: Any,
        *,
        template: str | os.PathLike[str] = "judge",
        rubric: str | os.PathLike[str] = "rubric",
        both_orders: bool = True,
        samples: int = 1,
        temperature: float | None = 0.0,
        against: str = "all",
        name: str | None = None,
    ) -> None:
        check_whole("samples", samples, 1)
        check_choice("against", against, ("all", "first"))
        self.temperature = 1.0 if samples > 1 and temperature == 0 else temperature
        own, self.applied = _with_temperature(generator, self.temperature)
        self.generator = as_generator(own)
        self.template = Template.load(template, needed=("prompt", "first", "second"), optional=("rubric", "mark"))
        self.rubric = _rubric(rubric)
        self.both_orders = both_orders
        self.samples = samples
        self.against = against
        self.name = name or f"LLMJudge({_label(generator)})"
        self.tally = Tally()

    def __repr__(self) -> str:
        return f"{self.name}: {self.samples} answers in {'both orders' if self.both_orders else 'one order'}"

    def describe(self) -> dict[str, Any]:
        """Describe what the verdicts depend on: template, rubric, orders, and the generator as it describes itself."""
        described = getattr(self.generator, "describe", None)
        return {
            "type": type(self).__name__,
            "name": self.name,
            "template": hashlib.sha256(repr(self.template.pieces).encode()).hexdigest()[:16],
            "rubric": hashlib.sha256(self.rubric.encode()).hexdigest()[:16],
            "both_orders": self.both_orders,
            "samples": self.samples,
            "temperature": self.temperature if self.applied else None,
            "generator": described() if callable(described) else _label(self.generator),
        }

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Ask about all comparisons, in both orders, as concurrently as the generator allows."""
        orders = (False, True) if self.both_orders else (False,)
        questions = [self._prompt(comparison, turned) for comparison in comparisons for turned in orders]
        draws = iter(list(self.generator.draws(questions, self.samples)))
        verdicts = []
        for _ in comparisons:
            votes = {"first": 0, "second": 0, "tie": 0, "unread": 0}
            shares: list[float] = []
            error: str | None = None
            for turned in orders:
                draw = next(draws)
                self.tally.calls += draw.calls
                self.tally.failed += max(self.samples - len(draw.texts) - draw.dropped, 0)
                self.tally.unread += draw.dropped
                votes["unread"] += draw.dropped
                error = error or draw.error
                read = [self._count(text, turned, votes) for text in draw.texts]
                won = [share for share in read if share is not None]
                if won:
                    shares.append(sum(won) / len(won))
            if len(orders) == 2 and len(shares) == 2:
                if (shares[0] > 0.5, shares[0] < 0.5) == (shares[1] > 0.5, shares[1] < 0.5):
                    self.tally.agreed += 1
                else:
                    self.tally.turned += 1
            probability = sum(shares) / len(shares) if len(shares) == len(orders) else math.nan
            verdicts.append(Verdict(probability, votes, error))
        return verdicts

    def _count(self, text: str, turned: bool, votes: dict[str, int]) -> float | None:
        """Read an answer and count it; give what it is worth to the first output, or None if it was not read."""
        letter = read_verdict(answer_of(text))
        if letter is None:
            self.tally.unread += 1
            votes["unread"] += 1
            return None
        if letter == "TIE":
            self.tally.ties += 1
            votes["tie"] += 1
            return 0.5
        if letter == "A":
            self.tally.shown_first += 1
        else:
            self.tally.shown_second += 1
        first = (letter == "A") != turned
        votes["first" if first else "second"] += 1
        return float(first)

    def _prompt(self, comparison: Comparison, turned: bool) -> Prompt:
        request = conversation_text(comparison.prompt)
        one, two = (judged_text(text, self.reasoning) for text in (comparison.first, comparison.second))
        if turned:
            one, two = two, one
        mark = fence_mark([request, one, two])
        text = self.template.fill(
            prompt=fence("request", request, mark),
            first=fence("answer A", one, mark),
            second=fence("answer B", two, mark),
            rubric=self.rubric,
            mark=mark,
        )
        return text if isinstance(comparison.prompt, str) else [{"role": "user", "content": text}]


def read_verdict(answer: str) -> str | None:
    """Read "A", "B" or "TIE" off an answer; None if it does not end with one verdict, or names two."""
    lines = [line for line in answer.splitlines() if line.strip()]
    if not lines:
        return None
    if len(lines) == 1 and (bare := _BARE.fullmatch(lines[0])):
        return bare[1].upper()
    found = [_VERDICT.fullmatch(line) for line in lines]
    letters = {match[1].upper() for match in found if match}
    return letters.pop() if found[-1] and len(letters) == 1 else None


def _rubric(rubric: str | os.PathLike[str]) -> str:
    text = Template.load(rubric, needed=()).fill().strip()
    if not text:
        raise ValueError(f"rubric {os.fspath(rubric)} is empty")
    return text


def _with_temperature(generator: Any, temperature: float | None) -> tuple[Any, bool]:
    """Return the generator with a temperature, and whether it takes one."""
    if temperature is None:
        return generator, False
    parameters = getattr(generator, "parameters", None)
    if isinstance(parameters, Mapping):
        if "temperature" in parameters:
            return generator, True
        twin = object.__new__(type(generator))  # not copy.copy, which goes by what pickles keep: no key, no client
        twin.__dict__.update(generator.__dict__)
        twin.parameters = {**parameters, "temperature": temperature}
        return twin, True
    try:
        names = inspect.signature(generator).parameters if callable(generator) else {}
    except (TypeError, ValueError):
        names = {}
    if "temperature" in names:
        return functools.partial(generator, temperature=temperature), True
    return generator, False


def _label(generator: Any) -> str:
    for name in ("model", "name", "__qualname__"):
        found = getattr(generator, name, None)
        if isinstance(found, str):
            return found
    return type(getattr(generator, "function", generator)).__name__
