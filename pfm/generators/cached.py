"""Draw from a generator once, and from disk after that."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from pfm.generators.base import (
    Draw,
    GeneratesTexts,
    Prompt,
    Sample,
    draw_of,
    first_samples,
    uneven_draws,
)
from pfm.generators.cache import ResponseCache, sample_key
from pfm.generators.callable import as_generator

__all__ = ["CachedGenerator"]


class CachedGenerator(GeneratesTexts):
    """Looks for a sample in a cache before it calls the generator, and stores what the generator gives.

    Samples are numbered: the same call gives the same texts, a second occurrence of a prompt in one call gives
    further ones. A generator that stores call by call (:class:`OpenAIGenerator`) does so here too; of others a
    draw is stored when it is whole.

    Args:
        generator: what :func:`as_generator` takes.
        cache: a folder, a :class:`ResponseCache`, or None for the user's own.
        name: names what the draws depend on, for a generator without ``describe()``, such as a function.
            Change it when the function changes.

    Raises:
        TypeError: it is no generator.
        ValueError: the generator does not describe itself, and there is no name.
    """

    def __init__(
        self, generator: Any, cache: str | os.PathLike[str] | ResponseCache | None = None, *, name: str | None = None
    ) -> None:
        inner = as_generator(generator)
        self.cache = cache if isinstance(cache, ResponseCache) else ResponseCache(cache)
        if not (name or hasattr(inner, "describe")):
            raise ValueError(
                f"{inner!r} does not say what its texts depend on: pass name=, and change it when the generator changes"
            )
        self.name = name
        with_cache = getattr(inner, "with_cache", None)
        self.generator: Any = inner if with_cache is None or name else with_cache(self.cache)
        self._delegates = self.generator is not inner
        if self._delegates and hasattr(self.generator, "adraws"):
            self.adraws = self.generator.adraws

    def describe(self) -> dict[str, Any]:
        """Describe the generator in JSON values; the cache changes nothing of it."""
        own = self.generator.describe() if hasattr(self.generator, "describe") else {}
        return own | ({"name": self.name} if self.name else {})

    def __repr__(self) -> str:
        return f"CachedGenerator({self.generator!r}, {str(self.cache.folder)!r})"

    def draws(self, prompts: Sequence[Prompt], n: int, *, start: Sequence[int] | None = None) -> Iterator[Draw]:
        """Yield the draw of each prompt; what is not stored is drawn."""
        if self._delegates:
            return self.generator.draws(prompts, n, start=start)
        return self._draws(prompts, n, first_samples(prompts, n, start))

    def _draws(self, prompts: Sequence[Prompt], n: int, first: list[int]) -> Iterator[Draw]:
        origin = self.describe()
        keys = [
            [sample_key(origin, prompt, at + place) for place in range(n)]
            for prompt, at in zip(prompts, first, strict=True)
        ]
        stored = self.cache.get([key for row in keys for key in row])
        gaps = [[place for place, key in enumerate(row) if key not in stored] for row in keys]
        # Drawn from the first gap on: a generator with seeds then gives each number its own sample.
        missing = [row for row, gap in enumerate(gaps) if gap]
        fresh = uneven_draws(
            self.generator,
            [prompts[row] for row in missing],
            [n - gaps[row][0] for row in missing],
            [first[row] + gaps[row][0] for row in missing],
        )
        for row, gap in enumerate(gaps):
            found = {place: stored[key] for place, key in enumerate(keys[row]) if key in stored}
            draw = Draw()
            if gap:
                draw = next(fresh)
                new = dict(zip(range(gap[0], n), _samples(draw), strict=False))
                new = {place: sample for place, sample in new.items() if place in gap}
                self.cache.put({keys[row][place]: sample for place, sample in new.items()})
                found |= new
            whole = draw_of([found[place] for place in sorted(found)])
            whole.dropped, whole.seconds = draw.dropped, draw.seconds
            whole.error = draw.error if len(found) < n else None
            whole.calls = max(whole.calls, draw.calls)
            yield whole


def _samples(draw: Draw) -> list[Sample]:
    """Take a draw apart."""
    origin = uuid.uuid4().hex
    return [
        Sample(
            text,
            finish_reason=draw.finish_reasons[place] if draw.finish_reasons else None,
            tag=draw.tags[place] if draw.tags else None,
            origin=origin,
            calls=draw.calls,
            usage=draw.usage,
            reasoning=draw.reasoning[place] if draw.reasoning else 0,
        )
        for place, text in enumerate(draw.texts)
    ]
