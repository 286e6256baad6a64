"""The run of a batch: draws are judged portion by portion as they arrive, and what was done is never lost."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from contextlib import contextmanager

from tqdm.auto import tqdm

from pfm.generators import Draw, Prompt
from pfm.generators.base import count
from pfm.refiner.refinement import Refinement, unjudged

__all__ = ["Run"]

# Finished draws wait to be encoded together, but neither for more memory than this many candidates take
# nor for so long that a slow generator's results would be at risk.
WAITING_CANDIDATES = 1024
WAITING_SECONDS = 1.0


class Run:
    """Judges the draws of one batch portion by portion as they arrive.

    Args:
        prompts: as they were checked. keys: their texts.
        n: candidates a prompt.
        judge: judges the Refinements of some prompts, given with their texts, in place.
        progress: show a progress bar.
        on_result: called with each Refinement as it is finished, in order.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        keys: list[str],
        n: int,
        judge: Callable[[list[Refinement], list[str]], None],
        progress: bool,
        on_result: Callable[[Refinement], object] | None,
    ) -> None:
        self.prompts, self.keys, self.n, self.judge = prompts, keys, n, judge
        self.on_result = on_result
        self.results: list[Refinement] = []
        self.waiting: list[Draw] = []
        self.size, self.started = 0, time.perf_counter()
        # disable=False would overrule TQDM_DISABLE, so it is only ever set to True.
        make_bar = tqdm if progress else functools.partial(tqdm, disable=True)
        self.bar = make_bar(total=len(prompts), desc="Refining", unit="prompt")

    def over(self, draws: Iterable[Draw]) -> list[Refinement]:
        """Judge all draws, and return the results."""
        with self._kept():
            try:
                for draw in draws:
                    if self._add(draw):
                        self._judge()
            finally:
                self._judge()
            self._check()
        return self.results

    async def aover(self, draws: AsyncIterator[Draw]) -> list[Refinement]:
        """Judge all draws in threads, while further ones are drawn in this event loop, and return the results."""
        with self._kept():
            try:
                async for draw in draws:
                    if self._add(draw):
                        await asyncio.to_thread(self._judge)
            finally:
                close = getattr(draws, "aclose", None)
                if close is not None:
                    await close()
                await asyncio.to_thread(self._judge)
            self._check()
        return self.results

    @contextmanager
    def _kept(self) -> Generator[None, None, None]:
        """Close the bar, and hand over with an error what is there."""
        try:
            with self.bar:
                yield
        except BaseException as error:
            error.partial = self.results  # pyright: ignore[reportAttributeAccessIssue]
            raise

    def _add(self, draw: Draw) -> bool:
        """Let a draw wait for others, and say whether they have waited long enough."""
        self.waiting.append(draw)
        self.size += len(draw.texts)
        return self.size >= WAITING_CANDIDATES or time.perf_counter() - self.started >= WAITING_SECONDS

    def _judge(self) -> None:
        rows = slice(len(self.results), len(self.results) + len(self.waiting))
        portion = [unjudged(prompt, draw) for prompt, draw in zip(self.prompts[rows], self.waiting, strict=True)]
        drawn = list(self.waiting)
        self.waiting.clear()
        self.size, self.started = 0, time.perf_counter()
        self.results.extend(portion)
        try:
            self.judge(portion, self.keys[rows])
        except BaseException as error:
            for result in portion:
                if math.isnan(result.win_probability):
                    result.error = result.error or f"{type(error).__name__}: {error}"
            raise
        for result, draw in zip(portion, drawn, strict=True):
            result.reason += _notes(draw, self.n, result)
            self.bar.update()
            if self.on_result is not None:
                self.on_result(result)

    def _check(self) -> None:
        if len(self.results) < len(self.prompts):
            raise ValueError(f"the generator gave {len(self.results)} draws for {len(self.prompts)} prompts")


def _notes(draw: Draw, n: int, result: Refinement) -> str:
    """Say what was missing or set aside among the candidates, as an addition to a reason."""
    notes = ""
    if not draw.texts:
        return notes  # the error tells all of it
    hidden = sum(characters > 0 for characters in result.reasoning)
    if hidden:
        notes += f"; hidden reasoning set aside in {hidden} of {count(len(result.reasoning), 'candidate')}"
    if draw.spent is not None:
        notes += f"; {count(draw.spent['draws'], 'draw')} of at most {draw.spent['max_n']}: {draw.spent['ended']}"
    elif draw.calls and len(draw.texts) < n:
        notes += f"; {len(draw.texts)} of {n} candidates after {count(draw.calls, 'call')}"
    if draw.dropped:
        notes += f"; {count(draw.dropped, 'output')} dropped: {draw.unusable}"
    return notes
