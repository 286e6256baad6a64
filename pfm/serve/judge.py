"""Encode and judge candidates off the event loop, in small slices to which concurrent requests contribute in turn."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pfm.data.conversations import conversation_text
from pfm.decoders import Selection
from pfm.generators.base import is_usable_text
from pfm.reasoning import judged_text
from pfm.refiner import Refinement, Refiner
from pfm.refiner.judging import log_odds
from pfm.serve.asked import Rule

__all__ = ["Judge", "Judged", "RememberingEncoder", "Scores"]

logger = logging.getLogger(__name__)

# What is encoded before the waiting requests are looked at again: a few seconds of work on one core at most.
SLICE_TEXTS = 64
SLICE_CHARACTERS = 32_768
# What one request contributes to a slice before it is another's turn.
TURN_TEXTS = 16
TURN_CHARACTERS = 8_192
PROMPTS_KEPT = 4096
CLOSE_SECONDS = 2.0


class RememberingEncoder:
    """An encoder that keeps the vectors of the latest prompts in memory, and adds up the time that it takes.

    Prompts are kept by a digest, so that long ones take no more memory than short ones. Candidates hardly ever
    repeat: their vectors are kept in ``ready`` only until their request is judged. Used by one thread.

    Attributes:
        ready: vectors of candidates that are encoded already, by text.
        seconds: time that encoding took so far.
    """

    def __init__(self, encoder: Any, prompts: int = PROMPTS_KEPT) -> None:
        self.encoder = encoder
        self.prompts = prompts
        self.seconds = 0.0
        self.ready: dict[str, torch.Tensor] = {}
        self._encode_prompts = getattr(encoder, "encode_prompts", encoder.encode)
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @property
    def dimension(self) -> int:
        """The length of a vector."""
        return self.encoder.dimension

    def describe(self) -> dict[str, Any]:
        """Describe the encoder in JSON values."""
        return self.encoder.describe()

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> torch.Tensor:
        """Encode N responses as (N, D); those in ``ready`` cost nothing."""
        missing = list(dict.fromkeys(text for text in texts if text not in self.ready))
        found = dict(self.ready)
        if missing:
            started = time.perf_counter()
            try:
                vectors = torch.as_tensor(self.encoder.encode(missing, progress=progress)).detach().cpu()
            finally:
                self.seconds += time.perf_counter() - started
            found |= dict(zip(missing, vectors, strict=True))
        return torch.stack([found[text] for text in texts])

    def encode_prompts(self, texts: Sequence[str], *, progress: bool = False) -> torch.Tensor:
        """Encode N prompts as (N, C); those that are kept cost nothing."""
        started = time.perf_counter()
        digests = {text: _digest(text) for text in texts}
        found = {text: self._kept[digest] for text, digest in digests.items() if digest in self._kept}
        missing = [text for text in digests if text not in found]
        try:
            if missing:
                vectors = torch.as_tensor(self._encode_prompts(missing, progress=progress)).detach().cpu()
                # Rows of their own: a view would keep the whole block alive.
                found |= {text: vector.clone() for text, vector in zip(missing, vectors, strict=True)}
        finally:
            self.seconds += time.perf_counter() - started
        for text, vector in found.items():
            self._kept[digests[text]] = vector
            self._kept.move_to_end(digests[text])
        while len(self._kept) > self.prompts:
            self._kept.popitem(last=False)
        return torch.stack([found[text] for text in texts])


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class Judged:
    """A refinement, and what its batch took.

    Attributes:
        refinement: the choice.
        encoder_seconds: encoding of the slices that held texts of this request.
        flow_seconds: all else, of the whole batch.
        batch: requests judged together.
        log_odds: logit b of each candidate against the reference, where it was asked for.
        ready: vectors of the candidates, by what of each is judged.
    """

    refinement: Refinement
    encoder_seconds: float
    flow_seconds: float
    batch: int
    log_odds: list[float] | None = None
    ready: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Scores:
    """b of several texts, and what it took.

    Attributes:
        values: b of each text; NaN where it could not be judged.
        encoder_seconds, flow_seconds: as of :class:`Judged`, of the slowest prompt.
    """

    values: list[float]
    encoder_seconds: float
    flow_seconds: float


@dataclass(frozen=True)
class AgainstReference:
    """The rule of texts that are not each other's opponents: it chooses nothing."""

    def decoder(self) -> AgainstReference:
        """Return itself."""
        return self

    def decode(self, flow: Any, candidates: Any, vectors: Any, context: Any, probabilities: Any, key: str) -> Selection:
        """Keep the first text."""
        return Selection(0, False, probabilities.tolist(), "scored")


@dataclass(eq=False)
class _Job:
    """One request.

    Attributes:
        waiting: candidates that are to be encoded yet.
        prompt_waits: whether the prompt is, too.
        ready: vectors by text.
        alone: whether something went wrong beside others, so that it is judged by itself.
        result: what came of it.
    """

    candidates: list[str]
    prompt: list[dict[str, str]]
    rule: Rule | AgainstReference | None
    future: asyncio.Future[Judged]
    key: str
    waiting: deque[str]
    prompt_waits: bool
    with_odds: bool = False
    ready: dict[str, torch.Tensor] = field(default_factory=dict)
    encoder_seconds: float = 0.0
    alone: bool = False
    result: Judged | BaseException | None = None

    @property
    def next_size(self) -> int:
        """Characters of the text that is to be encoded next."""
        return len(self.key) if self.prompt_waits else len(self.waiting[0]) if self.waiting else 0


@dataclass
class _Turn:
    """Is what one request contributes to a slice."""

    job: _Job
    texts: list[str] = field(default_factory=list)
    with_prompt: bool = False

    def add(self, size: int) -> int:
        """Take further texts of the job, at least one, up to so many characters; return the characters taken."""
        taken, characters = 0, 0
        job = self.job
        if job.prompt_waits:
            job.prompt_waits, self.with_prompt = False, True
            taken, characters = 1, len(job.key)
        while job.waiting and (not taken or (taken < TURN_TEXTS and characters + len(job.waiting[0]) <= size)):
            text = job.waiting.popleft()
            self.texts.append(text)
            taken, characters = taken + 1, characters + len(text)
        return characters


class Judge:
    """Refines given candidates in a thread, slice by slice.

    A slice holds texts of all waiting requests in turn, so that one request with much to encode delays the others
    by no more than its share. Between slices, requests whose clients have gone are dropped. Requests whose last
    texts were in the same slice are judged together.

    Args:
        refiner: its flow and its encoder are used; its decoder, with its generator, where a job has no rule.
    """

    def __init__(self, refiner: Refiner) -> None:
        self.refiner = refiner
        self.encoder = RememberingEncoder(refiner.encoder)
        self._reads_prompts = bool(refiner.flow.metadata.get("context_dimension"))
        self._jobs: list[_Job] = []
        self._long_is_next = False
        self._worker: asyncio.Task[None] | None = None
        self._thread = _Thread("pfm-judge")

    async def refine(
        self,
        candidates: list[str],
        prompt: list[dict[str, str]],
        rule: Rule | AgainstReference | None,
        *,
        with_odds: bool = False,
        earlier: Judged | None = None,
    ) -> Judged:
        """Choose among the candidates of one prompt.

        Args:
            candidates, prompt, rule: of the request.
            with_odds: give their logit b too.
            earlier: the judgement of earlier candidates, which are not encoded again.

        Raises:
            Exception: what the encoder or the decoder raised for this request.
        """
        judged = (judged_text(text, self.refiner.reasoning) for text in candidates)
        ready = {} if earlier is None else dict(earlier.ready)
        job = _Job(
            candidates,
            prompt,
            rule,
            asyncio.get_running_loop().create_future(),
            key=conversation_text(prompt),
            waiting=deque(dict.fromkeys(text for text in judged if text.strip() and text not in ready)),
            prompt_waits=self._reads_prompts,
            with_odds=with_odds,
            ready=ready,
        )
        self._jobs.append(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await job.future

    async def win_probabilities(
        self, prompts: Sequence[list[dict[str, str]]], texts: Sequence[str], *, together: bool
    ) -> Scores:
        """Return b of texts under their prompts; a text without an answer has 0.

        Args:
            prompts: of each text, as conversations.
            texts: what is judged.
            together: whether the texts of a prompt are its candidates, and so each other's opponents where a preference
                model gives b, as when one of them is chosen; else all are judged against the reference.

        Raises:
            Exception: what the encoder raised for one of them.
        """
        rule = Rule("win_probability", 0.0, 1.0, 0) if together else AgainstReference()
        places: dict[str, list[int]] = {}
        for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if is_usable_text(text):
                places.setdefault(conversation_text(prompt) if prompt else "", []).append(place)
        judged = await asyncio.gather(
            *(self.refine([texts[k] for k in rows], prompts[rows[0]], rule) for rows in places.values())
        )
        values = [0.0] * len(texts)
        for rows, found in zip(places.values(), judged, strict=True):
            for place, value in zip(rows, found.refinement.probabilities, strict=True):
                values[place] = value
        return Scores(
            values,
            max((found.encoder_seconds for found in judged), default=0.0),
            max((found.flow_seconds for found in judged), default=0.0),
        )

    def close(self) -> None:
        """Drop what waits, and wait for the slice at work, but not for long."""
        self._jobs.clear()
        self._thread.close(CLOSE_SECONDS)

    async def _work(self) -> None:
        while turns := self._next_slice():
            try:
                await self._thread.call(self._advance, turns)
            except BaseException as error:
                for job in [turn.job for turn in turns] + self._jobs:
                    job.future.cancel() if isinstance(error, asyncio.CancelledError) else _fail(job, error)
                self._jobs.clear()
                raise
            for turn in turns:
                job = turn.job
                if isinstance(job.result, BaseException):
                    _fail(job, job.result)
                elif job.result is not None and not job.future.done():
                    job.future.set_result(job.result)

    def _next_slice(self) -> list[_Turn]:
        """Take texts of the waiting jobs in turn, at least one text; drop cancelled jobs."""
        self._jobs = [job for job in self._jobs if not job.future.done()]
        turns: dict[_Job, _Turn] = {}
        # A long text has a slice to itself; every other slice is for short ones, so that they wait for one at most.
        short = [job for job in self._jobs if job.next_size <= TURN_CHARACTERS]
        long = [job for job in self._jobs if job.next_size > TURN_CHARACTERS]
        waiting = deque(short if short and not (long and self._long_is_next) else long[:1])
        if short and long:
            self._long_is_next = not self._long_is_next
        characters = 0
        while waiting and (not turns or characters < SLICE_CHARACTERS):
            job = waiting.popleft()
            turn = turns.setdefault(job, _Turn(job))
            characters += turn.add(min(TURN_CHARACTERS, SLICE_CHARACTERS - characters))
            if sum(len(turn.texts) for turn in turns.values()) >= SLICE_TEXTS:
                characters = SLICE_CHARACTERS
            if job.waiting and job.next_size <= TURN_CHARACTERS:
                waiting.append(job)
        # Those that were not served go first next time.
        unserved = [job for job in self._jobs if job not in turns]
        self._jobs = unserved + [job for job in turns if job.waiting]
        return list(turns.values())

    # -- in the thread -------------------------------------------------------------------------------------

    def _advance(self, turns: list[_Turn]) -> None:
        """Encode a slice, and judge the jobs that are encoded by now; what goes wrong is their result."""
        try:
            self._encode(turns)
        except Exception as error:
            if len(turns) == 1:
                turns[0].job.result = error
            else:
                for turn in turns:
                    turn.job.alone = True
                    try:
                        self._encode([turn])
                    except Exception as own:
                        turn.job.result = own
        for turn in turns:
            if turn.job.result is not None:
                turn.job.waiting.clear()
        done = [turn.job for turn in turns if turn.job.result is None and not turn.job.waiting]
        groups = [[job] for job in done if job.alone]
        together = [job for job in done if not job.alone]
        rules = dict.fromkeys(job.rule for job in together)
        groups += [[job for job in together if job.rule == rule] for rule in rules]
        for group in groups:
            self._judge(group)

    def _encode(self, turns: list[_Turn]) -> None:
        before = self.encoder.seconds
        try:
            prompts = [turn.job.key for turn in turns if turn.with_prompt]
            if prompts:
                self.encoder.encode_prompts(prompts)
            texts = list(dict.fromkeys(text for turn in turns for text in turn.texts))
            vectors = dict(zip(texts, self.encoder.encode(texts), strict=True)) if texts else {}
        finally:
            for turn in turns:
                turn.job.encoder_seconds += self.encoder.seconds - before
        for turn in turns:
            turn.job.ready |= {text: vectors[text] for text in turn.texts}

    def _judge(self, jobs: list[_Job]) -> None:
        try:
            for job, result in zip(jobs, self._refined(jobs), strict=True):
                job.result = result
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].result = error
            else:
                for job in jobs:
                    self._judge([job])

    def _refined(self, jobs: list[_Job]) -> list[Judged]:
        own, rule = self.refiner, jobs[0].rule
        decoder = own.decoder if rule is None else rule.decoder()
        refiner = Refiner(own.generator, own.flow, self.encoder, decoder, own.n, own.reasoning)
        for job in jobs:
            self.encoder.ready |= job.ready
        before, started = self.encoder.seconds, time.perf_counter()
        try:
            refinements = refiner.refine([job.candidates for job in jobs], [job.prompt for job in jobs])
            odds = self._log_odds(jobs)
        finally:
            self.encoder.ready = {}
        encoder = self.encoder.seconds - before  # of texts that the decoder added
        seconds = time.perf_counter() - started - encoder
        return [
            Judged(refinement, job.encoder_seconds + encoder, seconds, len(jobs), found, job.ready)
            for job, refinement, found in zip(jobs, refinements, odds, strict=True)
        ]

    def _log_odds(self, jobs: list[_Job]) -> list[list[float] | None]:
        asking = [job for job in jobs if job.with_odds]
        if not asking:
            return [None] * len(jobs)
        own, rows = self.refiner, [job.candidates for job in asking]
        found = iter(
            log_odds(rows, [job.key for job in asking], flow=own.flow, encoder=self.encoder, reasoning=own.reasoning)
        )
        return [next(found) if job.with_odds else None for job in jobs]


class _Thread:
    """Runs calls one after the other in a thread that no exit of the process waits for.

    A pool's thread would be waited for, however long an encoder behind a network takes. The thread is one and the
    same, because torch keeps worker threads for each thread that calls it.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started = False

    async def call(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run a call in the thread and await its end."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def deliver(error: BaseException | None) -> None:
            if not ended.done():
                ended.set_result(None) if error is None else ended.set_exception(error)

        def run() -> None:
            error = None
            try:
                work(*arguments)
            except BaseException as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(deliver, error)
            except RuntimeError:  # the loop is closed: nobody waits
                logger.debug("the event loop has ended before the judge")

        if not self._started:
            self._started = True
            self._thread.start()
        self._calls.put(run)
        await ended

    def close(self, seconds: float) -> None:
        """End the thread after the call at work, and wait for that up to so many seconds."""
        self._calls.put(None)
        if self._started:
            self._thread.join(seconds)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # its arguments are not kept until the next one comes


def _fail(job: _Job, error: BaseException) -> None:
    if not job.future.done():
        job.future.set_exception(error)
