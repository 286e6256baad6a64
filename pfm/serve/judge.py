"""Encode and judge candidates off the event loop, those of concurrent requests together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pfm.refiner import Refinement, Refiner
from pfm.serve.asked import Rule

__all__ = ["Judge", "Judged", "RememberingEncoder"]

logger = logging.getLogger(__name__)

BATCH_CANDIDATES = 256
PROMPTS_KEPT = 4096


class RememberingEncoder:
    """Is an encoder that keeps the vectors of the latest prompts in memory, and adds up the time that it takes.

    Candidates are not kept: they hardly ever repeat. Used by one thread.
    """

    def __init__(self, encoder: Any, prompts: int = PROMPTS_KEPT) -> None:
        self.encoder = encoder
        self.prompts = prompts
        self.seconds = 0.0
        self._encode_prompts = getattr(encoder, "encode_prompts", encoder.encode)
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    @property
    def dimension(self) -> int:
        """The length of a vector."""
        return self.encoder.dimension

    def describe(self) -> dict[str, Any]:
        """Describe the encoder in JSON values."""
        return self.encoder.describe()

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> torch.Tensor:
        """Encode N responses as (N, D)."""
        started = time.perf_counter()
        try:
            return self.encoder.encode(texts, progress=progress)
        finally:
            self.seconds += time.perf_counter() - started

    def encode_prompts(self, texts: Sequence[str], *, progress: bool = False) -> torch.Tensor:
        """Encode N prompts as (N, C); those that are kept cost nothing."""
        started = time.perf_counter()
        found = {text: self._kept[text] for text in texts if text in self._kept}
        missing = list(dict.fromkeys(text for text in texts if text not in found))
        try:
            if missing:
                vectors = torch.as_tensor(self._encode_prompts(missing, progress=progress)).detach().cpu()
                # Rows of their own: a view would keep the whole block alive.
                found |= {text: vector.clone() for text, vector in zip(missing, vectors, strict=True)}
        finally:
            self.seconds += time.perf_counter() - started
        for text, vector in found.items():
            self._kept[text] = vector
            self._kept.move_to_end(text)
        while len(self._kept) > self.prompts:
            self._kept.popitem(last=False)
        return torch.stack([found[text] for text in texts])


@dataclass(frozen=True)
class Judged:
    """A refinement, and what its batch took.

    Attributes:
        refinement: the choice.
        encoder_seconds, flow_seconds: encoding, and all else, of the whole batch.
        batch: requests in it.
    """

    refinement: Refinement
    encoder_seconds: float
    flow_seconds: float
    batch: int


@dataclass
class _Job:
    candidates: list[str]
    prompt: list[dict[str, str]]
    rule: Rule | None
    future: asyncio.Future[Judged]


class Judge:
    """Refines given candidates in a thread. Requests that arrive while it works make up its next batch.

    Args:
        refiner: its flow and its encoder are used; its decoder, with its generator, where a job has no rule.
    """

    def __init__(self, refiner: Refiner) -> None:
        self.refiner = refiner
        self.encoder = RememberingEncoder(refiner.encoder)
        self._waiting: list[_Job] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pfm-judge")

    async def refine(self, candidates: list[str], prompt: list[dict[str, str]], rule: Rule | None) -> Judged:
        """Choose among the candidates of one prompt.

        Raises:
            Exception: what the encoder or the decoder raised for this request.
        """
        job = _Job(candidates, prompt, rule, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await job.future

    def close(self) -> None:
        """Stop the thread, after the batch that it works on."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            try:
                results = await loop.run_in_executor(self._thread, self._judged, batch)
            except BaseException as error:
                for job in batch:
                    job.future.cancel() if isinstance(error, asyncio.CancelledError) else _fail(job, error)
                raise
            for job, result in zip(batch, results, strict=True):
                if isinstance(result, BaseException):
                    _fail(job, result)
                elif not job.future.done():
                    job.future.set_result(result)

    def _next_batch(self) -> list[_Job]:
        """Take the waiting jobs in order, at least one, up to the bound on candidates; drop cancelled ones."""
        batch, size = [], 0
        while self._waiting and (not batch or size + len(self._waiting[0].candidates) <= BATCH_CANDIDATES):
            job = self._waiting.pop(0)
            if not job.future.done():
                batch.append(job)
                size += len(job.candidates)
        return batch

    def _judged(self, batch: list[_Job]) -> list[Judged | BaseException]:
        """Judge in the thread: all jobs of one rule at once; one by one where that fails."""
        results: list[Judged | BaseException | None] = [None] * len(batch)
        for rule in dict.fromkeys(job.rule for job in batch):
            places = [place for place, job in enumerate(batch) if job.rule == rule]
            try:
                found: list[Any] = self._refined([batch[place] for place in places], rule)
            except Exception as error:
                found = [error]
                if len(places) > 1:
                    found = [self._alone(batch[place], rule) for place in places]
            for place, result in zip(places, found, strict=True):
                results[place] = result
        return [result for result in results if result is not None]

    def _alone(self, job: _Job, rule: Rule | None) -> Judged | BaseException:
        try:
            (result,) = self._refined([job], rule)
        except Exception as error:
            return error
        return result

    def _refined(self, jobs: list[_Job], rule: Rule | None) -> list[Judged]:
        own = self.refiner
        decoder = own.decoder if rule is None else rule.decoder()
        refiner = Refiner(own.generator, own.flow, self.encoder, decoder, own.n, own.reasoning)
        encoded, started = self.encoder.seconds, time.perf_counter()
        refinements = refiner.refine([job.candidates for job in jobs], [job.prompt for job in jobs])
        seconds, encoder = time.perf_counter() - started, self.encoder.seconds - encoded
        return [Judged(refinement, encoder, seconds - encoder, len(jobs)) for refinement in refinements]


def _fail(job: _Job, error: BaseException) -> None:
    if not job.future.done():
        job.future.set_exception(error)
