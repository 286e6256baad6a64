"""Generators behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import difflib
import functools
import heapq
import inspect
import os
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from operator import attrgetter
from typing import Any, Literal

from pfm._internal.checks import check_choice, check_whole
from pfm._internal.endpoint import Endpoint, check_extra_query, is_secret_name
from pfm.errors import GenerationError, MissingKeyError
from pfm.generators.base import Draw, GeneratesTexts, Prompt, Sample, as_messages, canonical, first_samples
from pfm.generators.budget import Budget
from pfm.generators.cache import ResponseCache, sample_key
from pfm.generators.failures import named_failure
from pfm.generators.looping import LoopSlots, in_order, iterate
from pfm.generators.protocols import PROTOCOLS, answer_usage
from pfm.generators.sampling import Outcome, Sampling, Several

__all__ = ["OpenAIGenerator"]

_SET_ELSEWHERE = {
    "n": "it is the n of draws(prompts, n) and of pfm.wrap(..., n=); n_per_call bounds the samples of one request",
    "stream": "candidates are compared whole",
    "stream_options": "candidates are compared whole",
    "messages": "they are the prompts",
    "input": "it is the prompt",
}
_EXTRA = ("extra_headers", "extra_query", "extra_body")
_SHORT = 8  # characters up to which a value without a secret's name is none: hiding it would spoil messages
_NOT_NAMES = ("self", "parameters")
_NOT_SAMPLING = ("extra_headers", "timeout")


class OpenAIGenerator(GeneratesTexts):
    """Draws texts from a chat model through the openai client.

    Sends the parameters that are given here and no others. Retries and timeouts are the client's own. All
    samples of a prompt are requested with ``n``; where the server ignores or refuses it, with parallel requests.
    An error concerns its prompt alone and is recorded in its :class:`Draw`, by the names of :mod:`pfm.errors`.

    The key is kept in memory only: it is no part of `describe`, `repr`, pickles, the cache or an error. A
    pickled generator has forgotten its clients and a key that was passed to it, and looks in the environment; one
    that had texts in ``extra_headers``, ``extra_query`` or ``extra_body`` has forgotten those and refuses to draw.

    Args:
        model: the model's name at the endpoint.
        client: an `openai.OpenAI` of your own, with the bounds that it has; excludes ``base_url``, ``api_key``,
            ``timeout``, ``max_retries``.
        async_client: an `openai.AsyncOpenAI` of your own, for :meth:`adraws`. With only one of the two, the
            other way of drawing goes through it too.
        base_url: the endpoint. None: ``OPENAI_BASE_URL``, else OpenAI itself.
        api_key: None: ``OPENAI_API_KEY``, which is sent to OpenAI and to ``OPENAI_BASE_URL`` only; another
            ``base_url`` gets a placeholder.
        n_per_call: most samples to ask for in one request; 1 never sends ``n``. None: all at once.
        api: "chat" for chat completions, "responses" for the responses API.
        concurrency: requests under way at once, over all draws together.
        max_calls: requests over the life of the generator; None for no bound. The client's retries of a
            request do not count.
        max_tokens_total: tokens after which no further request is sent; those under way are not cut off.
        timeout: seconds for one try of a request, the whole of its answer included; None: the client's default.
        max_retries: None: the client's default.
        cache: a folder, a :class:`ResponseCache`, or True for the user's own: each response is stored as it
            comes, and the same sample is not requested again. None for no cache.
        parameters: what the endpoint takes, such as ``temperature=0.7``, ``max_completion_tokens=200`` or
            ``extra_body={"top_k": 40}``. With a ``seed`` the sample of number k is drawn with seed + k, for
            requests with one seed may all give the same text.

    Raises:
        MissingKeyError: the endpoint is that of OpenAI, and there is no key.
        ValueError, TypeError: an argument is out of range, a client is none, or the environment names a proxy that
            cannot be used.
    """

    def __init__(
        self,
        model: str,
        *,
        client: Any = None,
        async_client: Any = None,
        base_url: str | None = None,
        api_key: str | None = None,
        n_per_call: int | None = None,
        api: Literal["chat", "responses"] = "chat",
        concurrency: int = 8,
        max_calls: int | None = None,
        max_tokens_total: int | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        cache: bool | str | os.PathLike[str] | ResponseCache | None = None,
        **parameters: Any,
    ) -> None:
        if not isinstance(model, str) or not model.strip():
            raise ValueError(f"model must be a name, got {model!r}")
        check_choice("api", api, PROTOCOLS)
        for name, value in (("n_per_call", n_per_call), ("concurrency", concurrency)):
            check_whole(name, value, 1, also=(None,))
        given = client if client is not None else async_client
        if given is not None:
            _check_clients(client, async_client, api)
            if (base_url, api_key, timeout, max_retries) != (None,) * 4:
                raise ValueError("pass a client, or base_url, api_key, timeout and max_retries, not both")
            self._endpoint = Endpoint.of_client(given)
        else:
            self._endpoint = Endpoint(base_url, api_key, timeout=timeout, max_retries=max_retries)
            self._endpoint.key()  # a missing key is the caller's mistake: said before any work begins
            self._endpoint.check_proxy()  # and so is a proxy that cannot be used
        _check_parameters(parameters, api)
        self._endpoint.hidden += tuple(_hidden_values(parameters))
        self._forgotten: list[str] = []  # what a pickle has left out
        self.model = model
        self.api = api
        self.concurrency = concurrency
        self.parameters = parameters
        self.cache = _as_cache(cache)
        self._protocol = PROTOCOLS[api]
        self._several = Several(n_per_call if self._protocol.takes_n else 1)
        self._budget = Budget(max_calls, max_tokens_total)
        self._client = client
        self._async_client = async_client
        self._make_locks()

    @property
    def calls(self) -> int:
        """Requests made so far."""
        return self._budget.calls

    @property
    def usage(self) -> dict[str, int]:
        """Tokens taken so far, as the server counts them: prompt_tokens, completion_tokens, total_tokens."""
        return dict(self._budget.usage)

    @property
    def base_url(self) -> str:
        """The endpoint's address without what may be secret in it."""
        return self._endpoint.address

    def describe(self) -> dict[str, Any]:
        """Describe what the texts depend on in JSON values, without keys and headers."""
        shown = {name: value for name, value in self.parameters.items() if name not in (*_NOT_SAMPLING, "extra_query")}
        return {
            "type": type(self).__name__,
            "name": self.model,
            "base_url": self._endpoint.address,
            "api": self.api,
            "parameters": _without_keys(shown),
        }

    def with_cache(self, cache: ResponseCache) -> OpenAIGenerator:
        """Return the same generator with another cache; clients and budget are shared."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, cache=cache)
        return other

    def draws(self, prompts: Sequence[Prompt], n: int, *, start: Sequence[int] | None = None) -> Iterator[Draw]:
        """Yield the draw of each prompt, in order; requests run ahead in threads.

        What is still under way when the iterator is closed is not waited for; its answers reach the cache.

        Raises:
            ValueError: start does not fit the prompts.
        """
        tasks = self._tasks(prompts, n, start)
        if self._client is None and self._async_client is not None:
            return iterate(lambda: self._adraws(tasks))
        return _Crew(self, tasks, n).draws()

    async def adraws(
        self, prompts: Sequence[Prompt], n: int, *, start: Sequence[int] | None = None
    ) -> AsyncIterator[Draw]:
        """Yield the draw of each prompt, in order; requests run ahead in the event loop."""
        async with aclosing(self._adraws(self._tasks(prompts, n, start))) as draws:
            async for draw in draws:
                yield draw

    def _adraws(self, tasks: list[_Task]) -> AsyncGenerator[Draw, None]:
        return in_order([functools.partial(self._adraw, task) for task in tasks], self.concurrency)

    async def _adraw(self, task: _Task) -> Draw:
        if self.cache is None:
            task.begin()
        else:
            await asyncio.to_thread(task.begin)
        running: set[asyncio.Future[None]] = set()
        try:
            while True:
                running |= {asyncio.ensure_future(self._aask(task, places)) for places in task.sampling.requests()}
                if not running:
                    return task.sampling.draw()
                finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for one in finished:
                    one.result()
        finally:
            for one in running:
                one.cancel()

    async def _aask(self, task: _Task, places: tuple[int, ...]) -> None:
        async with self._loop_slots.here():
            client = self._made(self._of_this_loop)
            if isinstance(client, Outcome):
                task.sampling.take(places, client)
                return
            create = self._create_of(client)
            try:
                self._budget.reserve()
                arguments = task.arguments(places)
                if client is self._client:  # the only one given: it blocks
                    loop = asyncio.get_running_loop()
                    answer = await loop.run_in_executor(self._threads(), lambda: create(**arguments))
                else:
                    answer = await create(**arguments)
                outcome = self._outcome(task, answer)
            except Exception as error:
                outcome = self._failure(error)
        # The count of what is missing belongs to the loop; only the disk is waited for elsewhere.
        new = task.sampling.take(places, outcome)
        if self.cache is not None:
            await asyncio.to_thread(task.store, new)

    def ask(self, task: _Task, places: tuple[int, ...]) -> Outcome:
        """Send one request and return what came of it; never raises for what the other side does."""
        with self._slots:
            client = self._made(self._sync_client)
            if isinstance(client, Outcome):
                return client
            create = self._create_of(client)
            try:
                self._budget.reserve()
                return self._outcome(task, create(**task.arguments(places)))
            except Exception as error:
                return self._failure(error)

    def _made(self, make: Callable[[], Any]) -> Any:
        """Return the client, or the outcome of a request for which there is none.

        What is wrong with the environment, such as its proxy, is the caller's to mend and no answer of a server: it
        is raised.
        """
        try:
            return make()
        except GenerationError as error:
            return Outcome(error=error)

    def _outcome(self, task: _Task, answer: Any) -> Outcome:
        usage = answer_usage(answer)
        try:
            choices = self._protocol.read(answer)
        except GenerationError:
            self._budget.spend(usage, task.characters)
            raise
        self._budget.spend(usage, task.characters + sum(len(choice.text) for choice in choices))
        return Outcome(choices, usage)

    def _failure(self, error: Exception) -> Outcome:
        # A new error without the old one chained to it: the client's may quote the key, and holds the request.
        endpoint = self._endpoint
        return Outcome(error=named_failure(error, self.model, endpoint.address, endpoint.secrets(), endpoint.route))

    def _tasks(self, prompts: Sequence[Prompt], n: int, start: Sequence[int] | None) -> list[_Task]:
        if self._forgotten:
            raise MissingKeyError(
                f"this generator was pickled without the texts in {', '.join(self._forgotten)}, which may be secret: "
                "make a new one in this process"
            )
        first = first_samples(prompts, n, start)
        return [_Task(self, as_messages(prompt), n, at) for prompt, at in zip(prompts, first, strict=True)]

    def _origin(self) -> dict[str, Any]:
        """Return all that a response depends on, for the key of the cache, which is a digest."""
        parameters = {name: value for name, value in self.parameters.items() if name not in _NOT_SAMPLING}
        return {**self.describe(), "parameters": parameters}

    def _create_of(self, client: Any) -> Any:
        return attrgetter(self._protocol.method)(client)

    def _sync_client(self) -> Any:
        with self._lock:
            if not self._given_client and (self._client is None or self._process != os.getpid()):
                self._client = self._endpoint.client()  # connections must not outlive a fork
                self._process = os.getpid()
            return self._client

    def _of_this_loop(self) -> Any:
        """Return the client of the running loop: connections belong to one loop."""
        if self._async_client is not None:
            return self._async_client
        if self._given_client:
            return self._client
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._by_loop:
                self._by_loop[loop] = self._endpoint.async_client()
            return self._by_loop[loop]

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.concurrency, thread_name_prefix="pfm-generator")
            return self._executor

    def _make_locks(self) -> None:
        self._given_client = self._client is not None
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self.concurrency)
        self._loop_slots = LoopSlots(self.concurrency)
        self._by_loop: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._executor: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"OpenAIGenerator({self.model!r}, {self._endpoint.address!r})"

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_client", "_async_client", "_protocol", "_given_client")
        locks = ("_lock", "_slots", "_loop_slots", "_by_loop", "_executor")
        state = {name: value for name, value in self.__dict__.items() if name not in (*dropped, *locks)}
        forgotten = [name for name in _EXTRA if any(_texts(self.parameters.get(name)))]
        kept = {name: value for name, value in self.parameters.items() if name not in forgotten}
        return {**state, "parameters": kept, "_forgotten": sorted({*self._forgotten, *forgotten})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _client=None, _async_client=None, _protocol=PROTOCOLS[state["api"]])
        self._make_locks()


class _Task:
    """One prompt: its sampling, the arguments of its requests, its places in the cache."""

    sampling: Sampling

    def __init__(self, generator: OpenAIGenerator, messages: list[dict[str, Any]], n: int, first: int) -> None:
        self.generator = generator
        self.messages = messages
        self.n = n
        self.first = first

    def begin(self) -> None:
        """Look for stored samples."""
        stored: dict[int, Sample] = {}
        if self.generator.cache is not None:
            keys = {place: self._key(place) for place in range(self.n)}
            found = self.generator.cache.get(list(keys.values()))
            stored = {place: found[key] for place, key in keys.items() if key in found}
        self.sampling = Sampling(self.n, stored, self.generator._several)

    def store(self, samples: Mapping[int, Sample]) -> None:
        """Store new samples by their places; before the draw is done, so that no whole draw is lost."""
        if self.generator.cache is not None:
            self.generator.cache.put({self._key(place): sample for place, sample in samples.items()})

    def arguments(self, places: tuple[int, ...]) -> dict[str, Any]:
        """Return the arguments of a request for the samples of these places."""
        generator = self.generator
        found = {"model": generator.model, generator._protocol.prompt: self.messages, **generator.parameters}
        if (n := len(places)) > 1:
            found["n"] = n
        if found.get("seed") is not None:
            found["seed"] += self.first + places[0]
        return found

    @property
    def characters(self) -> int:
        """The length of the prompt, for servers that do not count tokens."""
        return sum(len(str(message.get("content"))) for message in self.messages)

    def _key(self, place: int) -> bytes:
        return sample_key(self.generator._origin(), self.messages, self.first + place)


class _Crew:
    """Works on the tasks of one call of draws with threads, requests of earlier prompts first.

    The threads are daemons: an interrupted program does not wait for servers that do not answer.
    """

    def __init__(self, generator: OpenAIGenerator, tasks: list[_Task], n: int) -> None:
        self.generator = generator
        self.tasks = tasks
        self.n = n
        # (row, order, places); the order keeps requests of one prompt apart, None begins a prompt.
        self.waiting: list[tuple[int, int, tuple[int, ...] | None]] = [(row, 0, None) for row in range(len(tasks))]
        self.finished: dict[int, Draw] = {}
        self.order = 0
        self.closed = False
        self.failure: BaseException | None = None
        self.changed = threading.Condition()

    def draws(self) -> Iterator[Draw]:
        hands = min(self.generator.concurrency, len(self.tasks) * self.n)
        for _ in range(hands):
            threading.Thread(target=self._work, daemon=True, name="pfm-generator").start()
        try:
            for row in range(len(self.tasks)):
                with self.changed:
                    while row not in self.finished and self.failure is None:
                        self.changed.wait()
                    if self.failure is not None:
                        raise self.failure
                    draw = self.finished.pop(row)
                yield draw
        finally:
            with self.changed:
                self.closed = True
                self.changed.notify_all()

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                row, _, places = job
                task = self.tasks[row]
                if places is None:
                    task.begin()
                else:
                    outcome = self.generator.ask(task, places)
                with self.changed:
                    if places is not None:
                        task.store(task.sampling.take(places, outcome))
                    for further in task.sampling.requests():
                        self.order += 1
                        heapq.heappush(self.waiting, (row, self.order, further))
                    if task.sampling.done:
                        self.finished[row] = task.sampling.draw()
                    self.changed.notify_all()
        except BaseException as error:  # a defect: it must reach the caller, who would wait for ever
            with self.changed:
                self.failure = error
                self.changed.notify_all()

    def _next(self) -> tuple[int, int, tuple[int, ...] | None] | None:
        with self.changed:
            while not self.waiting and not self.closed:
                self.changed.wait()
            return None if self.closed else heapq.heappop(self.waiting)


def _check_clients(client: Any, async_client: Any, api: str) -> None:
    import openai

    wanted = {
        "client": (client, "openai.OpenAI", openai.AsyncOpenAI),
        "async_client": (async_client, "openai.AsyncOpenAI", openai.OpenAI),
    }
    for name, (value, expected, other) in wanted.items():
        if value is None:
            continue
        try:
            create = attrgetter(PROTOCOLS[api].method)(value)
        except AttributeError:
            create = None
        wrong = isinstance(value, other) or (name == "client" and inspect.iscoroutinefunction(create))
        if not callable(create) or wrong or isinstance(value, type):
            raise TypeError(f"{name} must be an {expected} with .{PROTOCOLS[api].method}, got {type(value).__name__}")


def _check_parameters(parameters: Mapping[str, Any], api: str) -> None:
    for name, why in _SET_ELSEWHERE.items():
        if name in parameters:
            raise ValueError(f"{name} cannot be set as a parameter: {why}")
    for name in _EXTRA:
        value = parameters.get(name)
        if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
            raise TypeError(f"{name} must be a dict with names as its keys, got {type(value).__name__}")
    check_extra_query(parameters.get("extra_query"))
    seed = parameters.get("seed")
    check_whole("seed", seed, also=(None,))
    if api == "chat":
        from openai.resources.chat.completions import Completions as Resource
    else:
        from openai.resources.responses import Responses as Resource
    known = inspect.signature(Resource.create).parameters
    unknown = [name for name in parameters if name not in known or name == "self"]
    if unknown:
        own = [name for name in inspect.signature(OpenAIGenerator.__init__).parameters if name not in _NOT_NAMES]
        near = difflib.get_close_matches(unknown[0], {*own, *known} - {"self"}, 1)
        meant = f"did you mean {near[0]}? W" if near else "w"
        raise TypeError(
            f"{', '.join(unknown)}: no parameter of {PROTOCOLS[api].method}; {meant}hat a server of your own takes "
            f"goes into extra_body, as in extra_body={{{unknown[0]!r}: ...}}"
        )


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts among JSON values, at any depth."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _hidden_values(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts in headers, query and body that must not be shown."""
    for extra in _EXTRA:
        for name, value in (parameters.get(extra) or {}).items():
            for text in _texts(value):
                if len(text) > _SHORT or is_secret_name(name):
                    yield text
                    yield from (word for word in text.split() if len(word) > _SHORT)  # "Bearer" and what follows it


def _as_cache(cache: Any) -> ResponseCache | None:
    if cache is None or cache is False:
        return None
    if isinstance(cache, ResponseCache):
        return cache
    return ResponseCache() if cache is True else ResponseCache(cache)


def _without_keys(value: Any) -> Any:
    """Return JSON values with what is named like a key blotted out, at any depth."""
    if isinstance(value, Mapping):
        return {
            str(name): "***" if isinstance(item, str) and is_secret_name(str(name)) else _without_keys(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_keys(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else canonical(value)
