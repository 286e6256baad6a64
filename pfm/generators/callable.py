"""Adapt functions, and objects with ``.generate``, to the protocol of :mod:`pfm.generators.base`."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from pfm._internal.checks import check_whole
from pfm.errors import GenerationError
from pfm.generators.base import Accepts, Draw, GeneratesTexts, Generator, Prompt, is_usable_text
from pfm.generators.looping import LoopSlots, in_order, iterate


def as_generator(generator: Any, accepts: Accepts = is_usable_text) -> Generator:
    """Adapt ``generator`` to the :class:`~pfm.generators.base.Generator` protocol.

    Args:
        generator: an object with ``.draws(prompts, n)`` (returned unchanged) or ``.generate(prompts, n)``, or
            a callable on one prompt, plain or async, with or without the keyword ``n``.
        accepts: returns whether an output is usable; no effect on objects with ``.draws``, which decide themselves.

    Raises:
        TypeError: it is none of these.

    >>> generator = as_generator(lambda prompt: f"An answer to {prompt}")
    >>> [draw.texts for draw in generator.draws(["A", "B"], 1)]
    [['An answer to A'], ['An answer to B']]
    """
    if isinstance(generator, type):
        raise TypeError(
            f"generator must be an instance or a function, got the class {generator.__name__}; "
            f"pass {generator.__name__}(...)"
        )
    if callable(getattr(generator, "draws", None)):
        return generator
    if _generates_n(generator):
        return BatchGenerator(generator, accepts=accepts)
    if _is_async(generator):
        return AsyncCallableGenerator(generator, accepts=accepts)
    if callable(generator):
        return CallableGenerator(generator, accepts=accepts)
    raise TypeError(
        f"generator must be a function prompt -> str or list[str], or an object with .generate(prompts, n), "
        f"got {type(generator).__name__}; wrap a model as lambda prompt: ..."
    )


class CallableGenerator(GeneratesTexts):
    """Draw from a function of one prompt.

    The function returns a text or a list of texts. If it has a parameter ``n`` it is given the number of
    texts still missing. It is called again until all are there; surplus texts are dropped.

    Args:
        function: ``prompt -> str | list[str]`` or ``(prompt, n=...) -> list[str]``. It gets its own copy of
            a message list, so that it may append to it.
        max_calls: calls for one prompt before fewer texts are accepted; None means twice the number of
            texts.
        accepts: returns whether an output is usable.

    Raises:
        TypeError: the function cannot be called with one prompt, or is async.
        ValueError: ``max_calls`` is below 1.
    """

    def __init__(
        self, function: Callable[..., Any], *, max_calls: int | None = None, accepts: Accepts = is_usable_text
    ) -> None:
        if _is_async(function):
            raise TypeError("function must be a plain one, got an async one; AsyncCallableGenerator takes it")
        self.function = function
        self.max_calls = _checked_max_calls(max_calls)
        self.accepts = accepts
        self._takes_n = _takes_n(function)

    def __repr__(self) -> str:
        return f"CallableGenerator({getattr(self.function, '__qualname__', repr(self.function))})"

    def draws(self, prompts: Sequence[Prompt], n: int) -> Iterator[Draw]:
        """Yield the draw of each prompt; an exception of the function ends the draw of that prompt only."""
        for prompt in prompts:
            yield self._draw(prompt, n)

    def _draw(self, prompt: Prompt, n: int) -> Draw:
        draw = Draw(accepts=self.accepts)
        started = time.perf_counter()
        limit = self.max_calls or 2 * n
        while len(draw.texts) < n and draw.calls < limit:
            draw.calls += 1
            options = {"n": n - len(draw.texts)} if self._takes_n else {}
            try:
                output = self.function(copy.deepcopy(prompt), **options)
            except Exception as error:
                draw.add((text for text in _partial(error) if text is not None), n)
                draw.fail(error)
                break
            draw.add(_outputs(output), n)
        draw.seconds = time.perf_counter() - started
        return draw.close()


class AsyncCallableGenerator(GeneratesTexts):
    """Draw from an async function of one prompt, called for several prompts at once.

    Args:
        function: ``async prompt -> str | list[str]`` or ``async (prompt, n=...) -> list[str]``.
        concurrency: calls under way at once in one event loop.
        max_calls: calls for one prompt before fewer texts are accepted; None means twice the number of
            texts.
        accepts: returns whether an output is usable.

    Raises:
        TypeError: the function cannot be called with one prompt.
        ValueError: ``concurrency`` or ``max_calls`` is below 1.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        concurrency: int = 8,
        max_calls: int | None = None,
        accepts: Accepts = is_usable_text,
    ) -> None:
        check_whole("concurrency", concurrency, 1)
        self.function = function
        self.concurrency = concurrency
        self.max_calls = _checked_max_calls(max_calls)
        self.accepts = accepts
        self._takes_n = _takes_n(function)
        self._slots = LoopSlots(concurrency)

    def __repr__(self) -> str:
        return f"AsyncCallableGenerator({getattr(self.function, '__qualname__', repr(self.function))})"

    def draws(self, prompts: Sequence[Prompt], n: int) -> Iterator[Draw]:
        """Yield the draw of each prompt; the function runs in an event loop of the background."""
        return iterate(lambda: self.adraws(prompts, n))

    async def adraws(self, prompts: Sequence[Prompt], n: int) -> AsyncIterator[Draw]:
        """Yield the draw of each prompt, in order; an exception ends the draw of its prompt only."""
        calls = [functools.partial(self._draw, prompt, n) for prompt in prompts]
        async with aclosing(in_order(calls, self.concurrency)) as draws:
            async for draw in draws:
                yield draw

    async def _draw(self, prompt: Prompt, n: int) -> Draw:
        draw = Draw(accepts=self.accepts)
        started = time.perf_counter()
        limit = self.max_calls or 2 * n
        while len(draw.texts) < n and draw.calls < limit and draw.error is None:
            missing = n - len(draw.texts)
            times = 1 if self._takes_n else min(missing, limit - draw.calls)
            draw.calls += times
            calls = [self._call(prompt, missing) for _ in range(times)]
            for output in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(output, Exception):
                    draw.add((text for text in _partial(output) if text is not None), n)
                    draw.fail(output)
                elif isinstance(output, BaseException):
                    raise output
                else:
                    draw.add(_outputs(output), n)
        draw.seconds = time.perf_counter() - started
        return draw.close()

    async def _call(self, prompt: Prompt, missing: int) -> Any:
        async with self._slots.here():
            return await self.function(copy.deepcopy(prompt), **({"n": missing} if self._takes_n else {}))


class BatchGenerator:
    """Draw from an object with ``.generate(prompts, n) -> list[list[str]]``.

    Rows that come back short are requested again. When a call for several prompts raises, each of them is
    tried alone, so that one bad prompt does not cost the others; a GenerationError is taken as final, and the
    rows in its ``partial`` (one for each prompt) are kept.

    Args:
        generator: the object.
        prompts_per_call: most prompts handed over in one call; results arrive in portions of this size.
        max_calls: calls for one prompt before fewer texts are accepted; None means twice the number of
            texts.
        accepts: returns whether an output is usable.

    Raises:
        TypeError: there is no method ``generate`` with a parameter ``n``.
        ValueError: ``prompts_per_call`` or ``max_calls`` is below 1.
    """

    def __init__(
        self,
        generator: Any,
        *,
        prompts_per_call: int = 32,
        max_calls: int | None = None,
        accepts: Accepts = is_usable_text,
    ) -> None:
        if not _generates_n(generator):
            raise TypeError(
                f"generator must have .generate(prompts, n), got {type(generator).__name__} without one; "
                "pass a function prompt -> str instead"
            )
        check_whole("prompts_per_call", prompts_per_call, 1)
        self.generator = generator
        self.prompts_per_call = prompts_per_call
        self.max_calls = _checked_max_calls(max_calls)
        self.accepts = accepts

    def __repr__(self) -> str:
        return f"BatchGenerator({self.generator!r})"

    def draws(self, prompts: Sequence[Prompt], n: int) -> Iterator[Draw]:
        """Yield the draw of each prompt, portion by portion."""
        for start in range(0, len(prompts), self.prompts_per_call):
            yield from self._portion(prompts[start : start + self.prompts_per_call], n)

    def _portion(self, prompts: Sequence[Prompt], n: int) -> list[Draw]:
        limit = self.max_calls or 2 * n
        draws = [Draw(accepts=self.accepts) for _ in prompts]
        short = list(range(len(prompts)))
        while short:
            self._call([prompts[i] for i in short], [draws[i] for i in short], n)
            short = [i for i in short if draws[i].error is None and len(draws[i].texts) < n and draws[i].calls < limit]
        return [draw.close() for draw in draws]

    def _call(self, prompts: list[Prompt], draws: list[Draw], n: int) -> None:
        """Ask once for what is missing in ``draws``, and add it there."""
        missing = n - min(len(draw.texts) for draw in draws)
        started = time.perf_counter()
        failure: Exception | None = None
        try:
            rows = self.generator.generate(copy.deepcopy(prompts), n=missing)
            if len(rows) != len(prompts):
                raise ValueError(f"generate returned {len(rows)} rows for {len(prompts)} prompts")
        except Exception as error:
            failure = error
            rows = [[] if row is None else row for row in _partial(error)]
        seconds = (time.perf_counter() - started) / len(prompts)
        for draw in draws:
            draw.calls += 1
            draw.seconds += seconds

        if failure is not None and len(prompts) > 1 and not isinstance(failure, GenerationError):
            for prompt, draw in zip(prompts, draws, strict=True):
                self._call([prompt], [draw], n)
            return
        if len(rows) == len(prompts):
            for row, draw in zip(rows, draws, strict=True):
                draw.add(_outputs(row), n)
        if failure is not None:
            for draw in draws:
                if len(draw.texts) < n:
                    draw.fail(failure)


def _outputs(returned: Any) -> Sequence[Any]:
    """Return what a generator gave for one prompt as a sequence; a single output stands for itself."""
    if isinstance(returned, np.ndarray) and returned.dtype.kind in "UT" and returned.ndim:  # texts, as of numpy.array
        return returned.ravel().tolist()
    return returned if isinstance(returned, list | tuple) else [returned]


def _partial(error: Exception) -> list[Any]:
    """Return what a GenerationError says was made before it (with None in the gaps), or nothing."""
    partial = error.partial if isinstance(error, GenerationError) else None
    return partial if isinstance(partial, list) else []


def _takes_n(function: Callable[..., Any]) -> bool:
    """Return whether ``function`` has a parameter ``n`` beside the prompt.

    Raises:
        TypeError: it cannot be called with one prompt, or is an async generator.
    """
    call = getattr(function, "__call__", None)  # noqa: B004 - the method of a callable object may be async
    if any(inspect.isasyncgenfunction(candidate) for candidate in (function, call)):
        raise TypeError("generator must return its texts, got an async function that yields them; return a list")
    if any(inspect.isgeneratorfunction(candidate) for candidate in (function, call)):
        raise TypeError("generator must return its texts, got a function that yields; return a text or a list of texts")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-ins have no signature to read
        return False
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes_n = any(p.name == "n" and p.kind in named for p in list(signature.parameters.values())[1:])
    try:
        signature.bind("prompt", **({"n": 1} if takes_n else {}))
    except TypeError as error:
        raise TypeError(
            f"generator must be callable as f(prompt) or f(prompt, n=...), got {signature}: {error}"
        ) from None
    return takes_n


def _is_async(function: Any) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004 - the method of a callable object may be async
    return any(inspect.iscoroutinefunction(candidate) for candidate in (function, call))


def _generates_n(generator: Any) -> bool:
    """Return whether ``generator`` has a method ``generate`` with a parameter named ``n``.

    The name is required because models of other libraries have a ``generate`` of another meaning.
    """
    method = getattr(generator, "generate", None)
    if not callable(method):
        return False
    try:
        return "n" in inspect.signature(method).parameters
    except (TypeError, ValueError):
        return False


def _checked_max_calls(max_calls: int | None) -> int | None:
    check_whole("max_calls", max_calls, 1, also=(None,))
    return max_calls
