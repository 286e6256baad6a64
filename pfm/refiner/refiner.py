"""Wrap a frozen generator: draw candidates, judge them with the flow, return one and say why."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import logging
import math
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from pfm.data.encoded import vector_space
from pfm.data.outputs import json_output, same_output
from pfm.decoders import Decoder, Judged, Latent, Rewrite, Select, Selection
from pfm.decoders.improve import added
from pfm.encoders.sentence import as_encoder
from pfm.errors import GenerationError
from pfm.generators import Draw, Prompt, as_generator
from pfm.generators.base import (
    Accepts,
    count,
    first_samples,
    is_usable_text,
    numbered_adraws,
    numbered_draws,
    occurrences,
)
from pfm.reasoning import checked_reasoning, judged_text

logger = logging.getLogger(__name__)

# Finished draws wait to be encoded together, but neither for more memory than this many candidates take
# nor for so long that a slow generator's results would be at risk.
WAITING_CANDIDATES = 1024
WAITING_SECONDS = 1.0

# Fields of a Refinement that most generators and decoders have nothing to say in.
_WHERE_KNOWN = ("generator", "generators", "trace", "usage", "reasoning")

DECODERS: dict[str, Callable[..., Decoder]] = {"select": Select, "rewrite": Rewrite, "latent": Latent}


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


def wrap(
    generator: Any,
    flow: Any,
    *,
    encoder: Any,
    decoder: str | Decoder = "select",
    n: int = 8,
    reasoning: str = "strip",
    **options: Any,
) -> Refiner:
    """Wrap a frozen generator with a preference flow.

    Args:
        generator: a function ``prompt -> str | list[str]``, with or without the keyword ``n``, or an object
            with ``.generate(prompts, n)``; None if only :meth:`Refiner.refine` is used.
        flow: a fitted :class:`pfm.PreferenceFlow`, a :class:`pfm.Composition` of some, or, with a
            :class:`pfm.generators.GeneratorPool` whose generators have the names of its sources, a
            :class:`pfm.references.PooledFlow`.
        encoder: the encoder on whose vectors the flow was fitted, or a loaded ``SentenceTransformer``: an object with
            ``encode(outputs)``, which gives (N, D) or (N, \\*D). Prompts go through its ``encode_prompts`` where it has
            one. Outputs are texts, or where it has ``accepts(output)`` whatever that is true for: images, arrays.
        decoder: ``"select"``, ``"rewrite"``, ``"latent"``, or an object with ``decode`` (see
            :class:`pfm.decoders.Decoder`).
        n: candidates a prompt.
        reasoning: "strip" judges of a candidate with hidden reasoning (``<think>...</think>`` and the like, see
            :mod:`pfm.reasoning`) the answer after it, and hands on the whole; "keep" judges the whole text.
        options: settings of the decoder that is named: ``by``, ``margin``, ``strength``, ``seed`` of
            :class:`pfm.decoders.Select`; ``exemplars``, ``rounds``, ``rewrites``, ... of
            :class:`pfm.decoders.Rewrite`; ``strength``, ``win_gradient``, ... of :class:`pfm.decoders.Latent`.

    Raises:
        TypeError: generator, flow, encoder or decoder lack a method that is needed, n is not an integer, or the
            decoder lacks a setting.
        ValueError: n < 1, an unknown ``reasoning``, an encoder of another dimension than the flow's, a setting that
            the decoder does not have, or settings beside a decoder object.

    Warns:
        UserWarning: the flow was fitted with another encoder of the same dimension, by its description.

    >>> import pfm
    >>> from pfm.encoders import SurfaceEncoder
    >>> rows = [{"prompt": f"Ask {n}", "chosen": f"Yes, {n} times!", "rejected": f"no {n}"} for n in range(40)]
    >>> encoder = SurfaceEncoder()
    >>> pairs = pfm.PreferencePairs.from_rows(rows).encode(encoder, progress=False)
    >>> flow = pfm.PreferenceFlow.fit(pairs, pfm.FlowConfig(residual=False), progress=False)
    >>> refiner = wrap(lambda prompt: ["no thanks", "Yes, please!"], flow, encoder=encoder, n=2)
    >>> refiner("Tea?").text
    'Yes, please!'
    >>> [result.changed for result in refiner.batch(["Tea?", "Milk?"], progress=False)]
    [True, True]
    """
    encoder = as_encoder(encoder)
    _check_flow_and_encoder(flow, encoder)
    found = None if generator is None else as_generator(generator, _accepts(encoder))
    chooser = _as_decoder(decoder, options)
    if getattr(flow, "takes_tags", False):
        _check_sources(flow, found, chooser)
    return Refiner(found, flow, encoder, chooser, _checked_n(n), reasoning)


class Refiner:
    """A frozen generator with a preference flow behind it; made by :func:`wrap`.

    It holds no open handle and can be pickled when its generator can (a function must live in a module), so
    :meth:`map_batch` runs in the workers of ``datasets.map``, Ray Data or Spark.
    """

    def __init__(
        self, generator: Any, flow: Any, encoder: Any, decoder: Decoder, n: int, reasoning: str = "strip"
    ) -> None:
        self.reasoning = checked_reasoning(reasoning)
        self.generator = generator
        self.flow = flow
        self.encoder = encoder
        bind = getattr(decoder, "bind", None)
        self.decoder = decoder if bind is None else bind(generator, flow, encoder)
        self.n = n

    def __repr__(self) -> str:
        return f"Refiner(generator={self.generator!r}, decoder={self.decoder!r}, n={self.n})"

    def __call__(self, prompt: Prompt) -> Refinement:
        """Draw n candidates for one prompt and return the refined output.

        Raises:
            GenerationError: there is no candidate at all; ``.partial`` holds the Refinement that says so.
        """
        if not isinstance(prompt, str) and not _is_conversation(prompt):
            raise TypeError(
                f"prompt must be a text or a list of messages, got {_shown(prompt)}; "
                "several prompts go to .batch(prompts), a dict of columns to .map_batch(batch)"
            )
        (result,) = self.batch([prompt], progress=False)
        if not result.candidates:
            raise GenerationError(str(result.error), partial=result)
        return result

    def batch(
        self,
        prompts: Sequence[Prompt],
        *,
        progress: bool = True,
        on_result: Callable[[Refinement], object] | None = None,
        start: Sequence[int] | None = None,
    ) -> list[Refinement]:
        """Refine a fresh output for each prompt; the results are in the order of the prompts.

        What goes wrong with one prompt is recorded in the ``error`` of its Refinement and leaves the others
        alone. What stops the whole run (KeyboardInterrupt, a failing encoder) is raised with the results so
        far as its attribute ``partial``; candidates already drawn but not yet judged are in there too, with
        ``error`` set.

        Args:
            prompts: texts, or conversations as lists of messages.
            progress: show a progress bar.
            on_result: called with each Refinement as it is finished, in order, so that it can be saved.
                Draws of about a second are encoded and judged together.
            start: for a generator that numbers its samples because a seed or a cache makes them repeatable, the
                number of the first sample of each prompt. None: 0, and n further each time that a prompt is
                repeated.

        Raises:
            TypeError: a prompt is neither text nor messages.
            ValueError: the Refiner has no generator, a prompt that must be encoded is empty, or the encoder's
                vectors are of another dimension than the flow's.
        """
        prompts = _checked_prompts(prompts)
        generator, first = self._generator(), first_samples(prompts, self.n, start)
        run = _Run(self, prompts, progress, on_result)
        return run.over(numbered_draws(generator, prompts, self.n, first))

    async def abatch(
        self,
        prompts: Sequence[Prompt],
        *,
        progress: bool = True,
        on_result: Callable[[Refinement], object] | None = None,
        start: Sequence[int] | None = None,
    ) -> list[Refinement]:
        """Do what :meth:`batch` does without holding up the event loop.

        A generator with ``adraws`` draws in this loop, for all prompts at once as far as its own bound allows, and
        goes on while finished draws are judged in a thread. Any other runs in a thread of its own, with the rest.
        ``on_result`` is called in such a thread.
        """
        if not callable(getattr(self.generator, "adraws", None)):
            executor = ThreadPoolExecutor(1, thread_name_prefix="pfm-refiner")
            work = functools.partial(self.batch, prompts, progress=progress, on_result=on_result, start=start)
            try:
                return await asyncio.get_running_loop().run_in_executor(executor, work)
            finally:
                executor.shutdown(wait=False)
        prompts = _checked_prompts(prompts)
        first = first_samples(prompts, self.n, start)
        run = _Run(self, prompts, progress, on_result)
        return await run.aover(numbered_adraws(self.generator, prompts, self.n, first))

    def refine(
        self,
        outputs: Sequence[str | Sequence[str]],
        prompts: Sequence[Prompt],
        *,
        generators: Sequence[str | Sequence[str]] | None = None,
        progress: bool = False,
        on_result: Callable[[Refinement], object] | None = None,
    ) -> list[Refinement]:
        """Refine outputs that were made elsewhere.

        Args:
            outputs: for each prompt its candidates, the original first; or one text, which is then only
                judged. Candidates that are empty or not text are dropped and counted in ``reason``.
            prompts: as many as outputs.
            generators: for each prompt the names of those that made its candidates; a flow of a pool needs them.
            progress, on_result: as in :meth:`batch`.

        Raises:
            TypeError: outputs, prompts or generators of another type.
            ValueError: unequal lengths, or an empty prompt that must be encoded.
        """
        prompts = _checked_prompts(prompts)
        accepts = _accepts(self.encoder)
        rows = _checked_outputs(outputs, accepts)
        if len(rows) != len(prompts):
            raise ValueError(
                f"outputs and prompts must be equally many, got {len(rows)} outputs and {len(prompts)} prompts"
            )
        tags = _checked_tags(generators, rows)
        return _Run(self, prompts, progress, on_result).over(map(functools.partial(_given, accepts), rows, tags))

    def candidates(self, prompts: Sequence[Prompt], n: int) -> list[list[str]]:
        """Draw up to n fresh outputs for each prompt; fewer, with a line in the log, where it failed.

        They are others than the candidates of :meth:`batch` over the same prompts, even where a seed or a cache
        makes draws repeatable.

        Raises:
            TypeError: a prompt is neither text nor messages, or n is not an integer.
            ValueError: n < 1, or the Refiner has no generator.
        """
        prompts, n = _checked_prompts(prompts), _checked_n(n)
        before = occurrences(prompts)
        after = occurrences(prompts[::-1])[::-1]
        # Behind the samples that batch takes for a prompt, as often as it is there.
        first = [self.n * (past + 1 + left) + n * past for past, left in zip(before, after, strict=True)]
        rows = []
        for row, draw in enumerate(numbered_draws(self._generator(), prompts, n, first)):
            if draw.error is not None:
                logger.warning("prompts[%d]: %d of %d candidates: %s", row, len(draw.texts), n, draw.error)
            rows.append(draw.texts)
        return rows

    def map_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Refine a batch of columns, for ``datasets.map(..., batched=True)`` and the like.

        Args:
            batch: column ``prompt``, and ``candidates`` when the outputs are there already.

        Returns:
            All columns, and ``refined``, ``original``, ``win_probability``, ``changed`` and ``error``, which
            is empty unless the row failed. Without a candidate the texts are empty, without a judgement the
            win probability is NaN.

        Raises:
            ValueError: there is no column ``prompt``.
        """
        columns = dict(batch)
        if "prompt" not in columns:
            raise ValueError(f"batch needs the column 'prompt', got {', '.join(columns) or 'no columns'}")
        prompts = list(columns["prompt"])
        if "candidates" in columns:
            results = self.refine(list(columns["candidates"]), prompts)
        else:
            results = self.batch(prompts, progress=False)
        columns["refined"] = [result.text for result in results]
        columns["original"] = [result.original for result in results]
        columns["win_probability"] = [result.win_probability for result in results]
        columns["changed"] = [result.changed for result in results]
        columns["error"] = [result.error or "" for result in results]
        return columns

    def _generator(self) -> Any:
        if self.generator is None:
            raise ValueError(
                "this Refiner has no generator: pass one to pfm.wrap, or give outputs to .refine(outputs, prompts)"
            )
        return self.generator

    def _judge(self, portion: list[Refinement], keys: list[str]) -> None:
        """Encode all candidates at once, judge them in one call, and decode prompt by prompt, in place."""
        started = time.perf_counter()
        judged = []
        for result, key in zip(portion, keys, strict=True):
            answered = _Answered.of(result, key, self.reasoning, _accepts(self.encoder))
            if answered.places:
                judged.append(answered)
            elif result.candidates:
                _keep_unanswered(result)
        if not judged:
            return
        vectors, contexts, probabilities = self._probabilities(judged)
        end = 0
        rows: list[tuple[_Answered, Judged]] = []
        for row, answered in enumerate(judged):
            start, end = end, end + len(answered.texts)
            result, found = answered.result, probabilities[start:end]
            of_all = np.zeros(len(result.candidates))
            of_all[answered.places] = found
            result.probabilities = of_all.tolist()
            if np.isnan(found).any():
                _keep_unjudgeable(result)
                continue
            given = [result.candidates[place] for place in answered.places]
            context = None if contexts is None else contexts[row]
            seen = Judged(result.prompt, answered.key, given, vectors[start:end], context, found, self.reasoning)
            rows.append((answered, seen))
        for (answered, _), selection in zip(rows, self._decoded([row for _, row in rows]), strict=True):
            _take(answered, selection, self.reasoning)
        share = (time.perf_counter() - started) / len(judged)
        for answered in judged:
            answered.result.seconds += share

    def _decoded(self, rows: list[Judged]) -> Iterable[Selection]:
        """Decode several prompts: together where the decoder can, else one by one."""
        together = getattr(self.decoder, "decode_many", None)
        if together is not None:
            return together(self.flow, rows)
        return (
            self.decoder.decode(self.flow, row.candidates, row.vectors, row.context, row.probabilities, row.key)
            for row in rows
        )

    def _probabilities(self, judged: list[_Answered]) -> tuple[torch.Tensor, torch.Tensor | None, np.ndarray]:
        """Return vectors (N, D), contexts (G, C) or None, and b (N,), NaN where the encoder's values are.

        N counts the answers of all G prompts, one prompt after the other.
        """
        texts = [text for answered in judged for text in answered.texts]
        vectors = _encoded(self.encoder.encode, texts, self.flow.metadata["dimension"], _event_shape(self.flow))
        usable = vectors.flatten(1).isfinite().all(dim=1)
        sizes = torch.tensor([len(answered.texts) for answered in judged])
        of_prompt = torch.arange(len(judged)).repeat_interleave(sizes)
        contexts = context_rows = None
        context_dimension = self.flow.metadata.get("context_dimension")
        if context_dimension:
            encode = getattr(self.encoder, "encode_prompts", self.encoder.encode)
            contexts = _encoded(encode, [answered.key for answered in judged], context_dimension)
            context_rows = contexts[of_prompt]
            usable &= context_rows.isfinite().all(dim=1)
            context_rows = context_rows[usable]
        probabilities = np.full(len(texts), np.nan)
        if usable.any():
            if getattr(self.flow, "takes_tags", False):
                tags = _tags_of(judged, self.flow.names)
                tag = [tag for tag, good in zip(tags, usable.tolist(), strict=True) if good]
                found = self.flow.win_probability(vectors[usable], context_rows, tag=tag)
            elif isinstance(self.decoder, Select) and hasattr(self.flow, "candidate_probabilities"):
                found = self.flow.candidate_probabilities(vectors[usable], context_rows, of_prompt[usable])
            else:  # texts that a decoder adds later are to be compared with these: against the reference alike
                found = self.flow.win_probability(vectors[usable], context_rows)
            probabilities[usable.numpy()] = found.detach().cpu().double().numpy()
        return vectors, contexts, probabilities


class _Run:
    """Judges the draws of one batch portion by portion as they arrive."""

    def __init__(
        self,
        refiner: Refiner,
        prompts: list[Prompt],
        progress: bool,
        on_result: Callable[[Refinement], object] | None,
    ) -> None:
        from pfm.data.conversations import conversation_text

        self.refiner = refiner
        self.prompts = prompts
        self.keys = [conversation_text(prompt) for prompt in prompts]
        for row, key in enumerate(self.keys if refiner.flow.metadata.get("context_dimension") else []):
            if not is_usable_text(key):
                raise ValueError(f"prompts[{row}] must be text that can be encoded, got {_shown(prompts[row])}")
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
    def _kept(self) -> Iterator[None]:
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
        portion = [_unjudged(prompt, draw) for prompt, draw in zip(self.prompts[rows], self.waiting, strict=True)]
        drawn = list(self.waiting)
        self.waiting.clear()
        self.size, self.started = 0, time.perf_counter()
        self.results.extend(portion)
        try:
            self.refiner._judge(portion, self.keys[rows])
        except BaseException as error:
            for result in portion:
                if math.isnan(result.win_probability):
                    result.error = result.error or f"{type(error).__name__}: {error}"
            raise
        for result, draw in zip(portion, drawn, strict=True):
            result.reason += _notes(draw, self.refiner.n, result)
            self.bar.update()
            if self.on_result is not None:
                self.on_result(result)

    def _check(self) -> None:
        if len(self.results) < len(self.prompts):
            raise ValueError(f"the generator gave {len(self.results)} draws for {len(self.prompts)} prompts")


def _encoded(
    encode: Callable[..., Any], texts: list[str], dimension: int | Sequence[int], shape: Sequence[int] = ()
) -> torch.Tensor:
    """Encode texts to (N, D) or (N, *shape) float32 on the CPU, and check the shape against what the flow takes."""
    vectors = torch.as_tensor(encode(texts, progress=False)).detach().to("cpu", torch.float32)
    expected = (len(texts), _flat(dimension))
    if shape and tuple(vectors.shape) in (expected, (len(texts), *shape)):
        return vectors.reshape(len(texts), *shape)
    if tuple(vectors.shape) != expected:
        raise ValueError(
            f"the encoder must return shape {expected} for {count(len(texts), 'text')}, "
            f"got {tuple(vectors.shape)}; use the encoder on which the flow was fitted"
        )
    return vectors


def _unjudged(prompt: Prompt, draw: Draw) -> Refinement:
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
    )


def _take(answered: _Answered, selection: Selection, reasoning: str) -> None:
    """Write a decoder's selection among the candidates with an answer into the result."""
    result, places = answered.result, answered.places
    index = selection.index
    index = places[index] if index < len(places) else len(result.candidates) + index - len(places)
    if selection.added:
        hidden = [_hidden(text, reasoning) for text in selection.added]
        if result.reasoning or any(hidden):
            result.reasoning = [*(result.reasoning or [0] * len(result.candidates)), *hidden]
        result.candidates = [*result.candidates, *selection.added]
        result.probabilities = [*result.probabilities, *selection.added_probabilities]
        if result.generators or selection.added_tags:
            drawn = result.generators or [""] * (len(result.candidates) - len(selection.added))
            result.generators = [*drawn, *(selection.added_tags or [""] * len(selection.added))]
    result.index = index
    result.text = result.candidates[index]
    result.win_probability = result.probabilities[index]
    result.changed = not same_output(result.text, result.original)
    result.generator = (result.generators[index] or None) if result.generators else None
    result.reason = selection.reason
    if places[0] != 0:
        kept = "kept the original", "took the first output with an answer"
        result.reason = f"changed: the original was cut off before its answer; {selection.reason.replace(*kept)}"
    result.calls += selection.calls
    result.usage = added(result.usage, selection.usage)
    result.trace = selection.trace
    result.error = result.error or selection.error


@dataclass
class _Answered:
    """The candidates of one prompt that hold an answer.

    Attributes:
        result: of the prompt. key: its text.
        places: of these candidates among all. texts: what of each is judged.
    """

    result: Refinement
    key: str
    places: list[int]
    texts: list[str]

    @classmethod
    def of(cls, result: Refinement, key: str, reasoning: str, accepts: Accepts) -> _Answered:
        """Set hidden reasoning aside, and note in the result how much."""
        beside = result.reasoning or [0] * len(result.candidates)
        hidden = [aside + _hidden(whole, reasoning) for aside, whole in zip(beside, result.candidates, strict=True)]
        texts = [judged_text(text, reasoning) if isinstance(text, str) else text for text in result.candidates]
        result.reasoning = hidden if any(hidden) else []
        places = [place for place, text in enumerate(texts) if accepts(text)]
        return cls(result, key, places, [texts[place] for place in places])


def _hidden(text: Any, reasoning: str) -> int:
    return len(text) - len(judged_text(text, reasoning)) if isinstance(text, str) else 0


def _keep_unanswered(result: Refinement) -> None:
    """Keep the original of a prompt without any answer."""
    result.probabilities = [0.0] * len(result.candidates)
    result.win_probability = 0.0
    result.reason = "kept the original: no output holds an answer after its reasoning"
    found = (
        "EmptyAnswerError: every output was cut off within its hidden reasoning: let the generator write more tokens, "
        'or judge the reasoning too with reasoning="keep"'
    )
    result.error = found if result.error is None else f"{result.error}; {found}"


def _keep_unjudgeable(result: Refinement) -> None:
    """Keep the original of a prompt whose vectors the flow cannot compare."""
    rows = [str(row) for row, value in enumerate(result.probabilities) if math.isnan(value)]
    result.win_probability = result.probabilities[0]
    result.reason = "kept the original: the encoder's values are not finite"
    found = f"ValueError: the encoder gave NaN or infinity for the prompt or for candidates {', '.join(rows)}"
    result.error = found if result.error is None else f"{result.error}; {found}"


def _notes(draw: Draw, n: int, result: Refinement) -> str:
    """Say what was missing or set aside among the candidates, as an addition to a reason."""
    notes = ""
    if not draw.texts:
        return notes  # the error tells all of it
    hidden = sum(characters > 0 for characters in result.reasoning)
    if hidden:
        notes += f"; hidden reasoning set aside in {hidden} of {count(len(result.reasoning), 'candidate')}"
    if draw.calls and len(draw.texts) < n:
        notes += f"; {len(draw.texts)} of {n} candidates after {count(draw.calls, 'call')}"
    if draw.dropped:
        notes += f"; {count(draw.dropped, 'output')} dropped: {draw.unusable}"
    return notes


def _given(accepts: Accepts, outputs: list[Any], tags: list[str]) -> Draw:
    draw = Draw(accepts=accepts)
    draw.add(outputs, len(outputs))
    draw.tags = [tag for output, tag in zip(outputs, tags, strict=False) if accepts(output)]
    return draw.close()


def _checked_tags(generators: Any, rows: list[list[Any]]) -> list[list[str]]:
    """Return for each row the names of its candidates' generators; none at all where none are given."""
    if generators is None:
        return [[] for _ in rows]
    tags = _checked_outputs(generators)
    sizes, wanted = [len(row) for row in tags], [len(row) for row in rows]
    if sizes != wanted:
        at = next(
            (row for row, pair in enumerate(zip(sizes, wanted, strict=False)) if pair[0] != pair[1]),
            min(len(sizes), len(wanted)),
        )
        raise ValueError(
            f"generators must name one for each candidate: got {len(sizes)} rows for {len(wanted)} prompts, and they "
            f"differ at row {at}"
        )
    return tags


def _tags_of(judged: list[_Answered], names: Sequence[str]) -> list[str]:
    """Return the generator of every candidate with an answer, one prompt after the other."""
    for result in (answered.result for answered in judged):
        if len(result.generators) != len(result.candidates):
            raise ValueError(
                f"this flow needs to know which of {', '.join(names)} made each candidate: wrap a "
                "pfm.generators.GeneratorPool with generators of these names, or give generators to .refine"
            )
    return [answered.result.generators[place] for answered in judged for place in answered.places]


def _check_sources(flow: Any, generator: Any, decoder: Any) -> None:
    if not (isinstance(decoder, Select) and decoder.by in ("win_probability", "sample")):
        raise ValueError(
            "a flow of a pool knows the outputs of its generators alone: use decoder='select' by 'win_probability' or "
            f"'sample', got {decoder!r}"
        )
    pool = getattr(generator, "generators", None)
    if isinstance(pool, Mapping) and (foreign := [name for name in pool if name not in flow.names]):
        raise ValueError(
            f"the flow was fitted on outputs of {', '.join(flow.names)}: the pool has {', '.join(foreign)} too; leave "
            "these out, or fit on pairs of their outputs"
        )


def _as_decoder(decoder: str | Decoder, options: Mapping[str, Any]) -> Decoder:
    names = " or ".join(f"'{name}'" for name in DECODERS)
    if isinstance(decoder, str):
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be {names}, or an object with .decode, got {decoder!r}")
        known = inspect.signature(DECODERS[decoder]).parameters
        foreign = [name for name in options if name not in known]
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} are no settings of decoder={decoder!r}, which has {', '.join(known)}"
            )
        lacking = [name for name, p in known.items() if p.default is p.empty and name not in options]
        if lacking:
            raise TypeError(f"decoder={decoder!r} needs {', '.join(lacking)}: pass it to pfm.wrap")
        return DECODERS[decoder](**options)
    if isinstance(decoder, type) or not callable(getattr(decoder, "decode", None)):
        raise TypeError(f"decoder must be {names}, or an object with .decode, got {_shown(decoder)}")
    if options:
        raise ValueError(
            f"{', '.join(options)} belong to decoder='select' or another that is named, got them with "
            f"{_shown(decoder)}; set them on the decoder itself"
        )
    return decoder


def _check_flow_and_encoder(flow: Any, encoder: Any) -> None:
    if not callable(getattr(flow, "win_probability", None)):
        raise TypeError(f"flow must be a PreferenceFlow, got {_shown(flow)}")
    if isinstance(encoder, type) or not callable(getattr(encoder, "encode", None)):
        raise TypeError(f"encoder must have .encode(outputs), got {_shown(encoder)}")
    expected = _flat(flow.metadata["dimension"])
    if encoder.dimension is None:  # it does not say: what it encodes is checked
        encoder.dimension = expected
    if _flat(encoder.dimension) != expected:
        raise ValueError(
            f"encoder has dimension {encoder.dimension}, but the flow was fitted on dimension {expected}; "
            f"use the encoder of the fit: {_name(flow.metadata.get('encoder'))}"
        )
    fitted, given = vector_space(flow.metadata.get("encoder") or {}), vector_space(encoder.describe())
    differing = [name for name in fitted if name in given and fitted[name] != given[name]]
    if differing:
        differences = ", ".join(f"{name} {fitted[name]!r} against {given[name]!r}" for name in differing)
        warnings.warn(
            f"the flow was fitted with another encoder than the one given: {differences}; "
            "vectors of different encoders cannot be compared",
            stacklevel=3,
        )


def _name(description: Mapping[str, Any] | None) -> str:
    """Write name and revision of an encoder's description."""
    if not description:
        return "not recorded"
    revision = description.get("revision")
    return f"{description.get('name')}" + (f" (revision {revision})" if revision else "")


def _accepts(encoder: Any) -> Accepts:
    """Return what tells the outputs that an encoder encodes: its ``accepts``, else texts that are not empty."""
    return getattr(encoder, "accepts", is_usable_text)


def _event_shape(flow: Any) -> tuple[int, ...]:
    """Return the shape of one output for flows of matrices and images, () for flows of vectors."""
    shape = tuple(getattr(flow, "event_shape", ()))
    return shape if len(shape) > 1 else ()


def _flat(dimension: int | Sequence[int]) -> int:
    return dimension if isinstance(dimension, int) else math.prod(dimension)


def _checked_n(n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"n must be an integer, got {_shown(n)}")
    if n < 1:
        raise ValueError(f"n must be at least 1 candidate a prompt, got {n}")
    return int(n)


def _checked_prompts(prompts: Any) -> list[Prompt]:
    """Return the prompts as plain texts and lists of plain dicts, whatever table they came from."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a list of prompts, got {_shown(prompts)}; one prompt goes to refiner(prompt)")
    checked: list[Prompt] = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            checked.append(str(prompt))
        elif _is_conversation(prompt):
            checked.append([dict(message) for message in prompt])
        else:
            raise TypeError(
                f"prompts[{row}] must be a text or a list of messages with role and content, got {_shown(prompt)}"
            )
    return checked


def _is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, list | tuple | np.ndarray)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in prompt)
    )


def _checked_outputs(outputs: Any, accepts: Accepts = is_usable_text) -> list[list[Any]]:
    """Return a list of candidates for each row; an empty cell of a table (None) has none.

    An array is a row of candidates, whatever is accepted: one image is given as ``[image]``.
    """
    if isinstance(outputs, str | Mapping) or not isinstance(outputs, Iterable):
        raise TypeError(f"outputs must be a list with one entry a prompt, got {_shown(outputs)}")
    rows: list[list[Any]] = []
    for row, output in enumerate(outputs):
        if output is None:
            rows.append([])
        elif isinstance(output, str):
            rows.append([output])
        elif isinstance(output, list | tuple | np.ndarray | torch.Tensor):
            rows.append(list(output))
        elif accepts(output):
            rows.append([output])
        else:
            raise TypeError(f"outputs[{row}] must be a text or a list of texts, got {_shown(output)}")
    return rows


def _shown(value: Any) -> str:
    """Name the type of a wrong argument, and its value where that is short."""
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 60 else type(value).__name__


def _number_or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number_or_nan(value: float | None) -> float:
    return math.nan if value is None else value
