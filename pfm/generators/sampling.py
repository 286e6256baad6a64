"""Collect n samples for one prompt from a server that may give fewer, without doing any of the asking itself.

:class:`Sampling` says which requests to send next and takes what came of them, in any order. It is the same for
threads and for an event loop, and holds no lock: its methods are called one at a time.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pfm.errors import BudgetError, GenerationError, RequestRefusedError, ServerError
from pfm.generators.base import Draw, Sample, add_usage, draw_of
from pfm.generators.protocols import Choice

__all__ = ["Outcome", "Sampling", "Several"]

_SPEAKS_OF_N = re.compile(r"\bn\b|choice", re.IGNORECASE)


@dataclass
class Outcome:
    """What came of one request: choices, or an error."""

    choices: list[Choice] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    error: GenerationError | None = None


class Several:
    """Knows whether a server gives several choices in one request, as far as has been seen.

    A refusal may be of the moment. So a server that seems not to give several is tried again, after as many prompts
    as a count says that doubles with each failure: one at first, or many where the server's words name the reason.

    Args:
        most: most choices to ask for in one request; None for no bound.
    """

    NAMED, LONGEST = 64, 1024  # prompts until the next try

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.round = 0  # grows with all that is learned
        self._pause = 0
        self._left = 0

    def bound(self) -> int | None:
        """Return the most choices to ask for in one request of the next prompt, None for no bound."""
        if not self._pause:
            return self.most
        if self._left:
            self._left -= 1
            return 1
        self._left = self._pause  # one prompt tries, those beside it do not
        return self.most

    def fail(self, seen: int, *, named: bool) -> None:
        """Note that several were not to be had.

        Args:
            seen: the ``round`` of the request; requests of the same time count once.
            named: whether it is sure that the number was the reason.
        """
        if seen == self.round:
            self.round += 1
            self._pause = self._left = min(max(2 * self._pause, self.NAMED if named else 1), self.LONGEST)

    def succeed(self) -> None:
        """Note that several came."""
        if self._pause:
            self.round += 1
            self._pause = self._left = 0


class Sampling:
    """The way to n samples for one prompt.

    All missing samples are requested at once where the server takes n, else in parallel requests for one. Unusable
    outputs are requested again, until as many were unusable as were wanted, or two. An error ends the sampling;
    what is there, and what is still under way, is kept.

    Args:
        n: samples wanted.
        stored: samples that are there already, by place from 0 to n - 1.
        several: what is known of the server; shared by all prompts.
    """

    def __init__(self, n: int, stored: Mapping[int, Sample], several: Several) -> None:
        self.n = n
        self.samples = dict(stored)
        self._several = several
        self._open: set[int] = set()
        self._under_way = 0
        self._calls = 0
        self._fruitful = 0
        self._dropped = 0
        self._wasted: dict[str, int] = {}
        self._refused_n = False
        self._sure = False  # that n was what the server refused
        self._named = False  # by its own words
        self._most: int | None = None
        self._round = -1
        self._problem: GenerationError | None = None
        self._error: GenerationError | None = None
        self._started = time.perf_counter()

    def requests(self) -> list[tuple[int, ...]]:
        """Return the places for which to send a request now, one tuple a request; they count as sent."""
        if self._error is not None or self._dropped >= max(self.n, 2):
            return []
        missing = [place for place in range(self.n) if place not in self.samples and place not in self._open]
        room = 2 * self.n + self._refused_n - self._calls
        if not missing or room <= 0:
            return []
        if self._round < 0:
            self._round = self._several.round
            self._most = self._several.bound() if len(missing) > 1 else None
        size = self._most or len(missing)
        if self._refused_n:
            # One request at a time until it is sure that n was what the server refused.
            size, room = 1, (room if self._sure else min(room, 1 - self._under_way))
            if room <= 0:
                return []
        found = [tuple(missing[at : at + size]) for at in range(0, len(missing), size)][:room]
        for places in found:
            self._open.update(places)
        self._under_way += len(found)
        self._calls += len(found)
        return found

    def take(self, places: Sequence[int], outcome: Outcome) -> dict[int, Sample]:
        """Take what came of a request, and return the samples that are new."""
        self._under_way -= 1
        self._open.difference_update(places)
        if outcome.error is not None:
            self._calls -= isinstance(outcome.error, BudgetError)  # it was never sent
            if len(places) > 1 and _may_be_about_n(outcome.error):
                self._refused_n = True
                self._named = self._named or bool(_SPEAKS_OF_N.search(str(outcome.error)))
            else:
                self._error = self._error or outcome.error
            return {}
        if self._refused_n and len(places) == 1 and not self._sure:
            self._sure = True
            self._several.fail(self._round, named=self._named)
        elif len(outcome.choices) == 1 < len(places):
            self._most = 1
            self._several.fail(self._round, named=True)
        elif len(outcome.choices) > 1:
            self._several.succeed()
        origin = uuid.uuid4().hex
        free = iter(places)
        new: dict[int, Sample] = {}
        for choice in outcome.choices:
            if choice.error is not None:
                self._problem = choice.error
                self._dropped += 1
            elif (place := next(free, None)) is not None:
                new[place] = Sample(choice.text, choice.finish_reason, None, origin, 1, outcome.usage, choice.reasoning)
        if new:
            self._fruitful += 1
        else:
            add_usage(self._wasted, outcome.usage)
        self.samples |= new
        return new

    @property
    def done(self) -> bool:
        """Return whether nothing is under way and nothing would be sent: ask after :meth:`requests`."""
        return not self._under_way

    def draw(self) -> Draw:
        """Return what was drawn."""
        draw = draw_of([self.samples[place] for place in sorted(self.samples)])
        draw.calls += self._calls - self._fruitful
        add_usage(draw.usage, self._wasted)
        draw.dropped = self._dropped
        draw.seconds = time.perf_counter() - self._started
        error = self._error or (self._problem if not draw.texts else None)
        if error is not None:
            draw.fail(error)
        return draw.close()


def _may_be_about_n(error: GenerationError) -> bool:
    if isinstance(error, ServerError):
        return bool(_SPEAKS_OF_N.search(str(error)))
    return isinstance(error, RequestRefusedError)
