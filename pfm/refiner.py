"""Wrap a frozen generator: draw candidates, judge them with the flow, return one and say why."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from pfm.decoders import Decoder, Select
from pfm.errors import GenerationError
from pfm.generators import Draw, Prompt, as_generator
from pfm.generators.base import count, is_usable_text

logger = logging.getLogger(__name__)

# Finished draws wait to be encoded together, but neither for more memory than this many candidates take
# nor for so long that a slow generator's results would be at risk.
WAITING_CANDIDATES = 1024
WAITING_SECONDS = 1.0

_SELECT_DEFAULTS = {"by": "win_probability", "margin": None, "strength": 1.0, "seed": 0}


@dataclass
class Refinement:
    """The refined output for one prompt, and how it came about.

    Attributes:
        prompt: as it was given.
        text: the refined output; equal to ``original`` unless ``changed``; empty if there is no candidate.
        original: the first candidate, which the generator alone would have given.
        candidates: the usable candidates.
        win_probability: b(text | prompt) in [0, 1]; NaN if it could not be judged.
        probabilities: b of each candidate.
        index: place of ``text`` in ``candidates``; -1 if there is none.
        changed: whether ``text`` differs from ``original``.
        reason: why it was kept or changed, and what was missing, in one phrase.
        seconds: wall-clock time of this prompt: its generation and its share of encoding and judging.
        calls: calls of the generator.
        error: type and message of what went wrong, or None. With an error there may still be a text.
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

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; a probability that is NaN becomes None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
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
        missing = [name for name in names if name not in values and name != "error"]
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
    by: str = "win_probability",
    margin: float | None = None,
    strength: float = 1.0,
    seed: int = 0,
) -> Refiner:
    """Wrap a frozen generator with a preference flow.

    Args:
        generator: a function ``prompt -> str | list[str]``, with or without the keyword ``n``, or an object
            with ``.generate(prompts, n)``; None if only :meth:`Refiner.refine` is used.
        flow: a fitted :class:`pfm.PreferenceFlow`.
        encoder: the encoder on whose vectors the flow was fitted; prompts go through its ``encode_prompts``
            where it has one.
        decoder: ``"select"``, or an object with ``decode`` (see :class:`pfm.decoders.Decoder`).
        n: candidates a prompt.
        by, margin, strength, seed: how ``"select"`` chooses, see :class:`pfm.decoders.Select`.

    Raises:
        TypeError: generator, flow, encoder or decoder lack a method that is needed, or n is not an integer.
        ValueError: n < 1, an encoder of another dimension than the flow's, or options of ``"select"`` beside
            a decoder object.

    Warns:
        UserWarning: the flow was fitted with another encoder of the same dimension, by its description.
    """
    options = {"by": by, "margin": margin, "strength": strength, "seed": seed}
    _check_flow_and_encoder(flow, encoder)
    return Refiner(
        None if generator is None else as_generator(generator),
        flow,
        encoder,
        _as_decoder(decoder, options),
        _checked_n(n),
    )


class Refiner:
    """A frozen generator with a preference flow behind it; made by :func:`wrap`.

    It holds no open handle and can be pickled when its generator can (a function must live in a module), so
    :meth:`map_batch` runs in the workers of ``datasets.map``, Ray Data or Spark.
    """

    def __init__(self, generator: Any, flow: Any, encoder: Any, decoder: Decoder, n: int) -> None:
        self.generator = generator
        self.flow = flow
        self.encoder = encoder
        self.decoder = decoder
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

        Raises:
            TypeError: a prompt is neither text nor messages.
            ValueError: the Refiner has no generator, a prompt that must be encoded is empty, or the encoder's
                vectors are of another dimension than the flow's.
        """
        prompts = _checked_prompts(prompts)
        return self._run(prompts, self._draws(prompts, self.n), progress, on_result)

    async def abatch(
        self,
        prompts: Sequence[Prompt],
        *,
        progress: bool = True,
        on_result: Callable[[Refinement], object] | None = None,
    ) -> list[Refinement]:
        """Run :meth:`batch` in a thread of its own, in which ``on_result`` is called too."""
        return await asyncio.to_thread(self.batch, prompts, progress=progress, on_result=on_result)

    def refine(
        self,
        outputs: Sequence[str | Sequence[str]],
        prompts: Sequence[Prompt],
        *,
        progress: bool = False,
        on_result: Callable[[Refinement], object] | None = None,
    ) -> list[Refinement]:
        """Refine outputs that were made elsewhere.

        Args:
            outputs: for each prompt its candidates, the original first; or one text, which is then only
                judged. Candidates that are empty or not text are dropped and counted in ``reason``.
            prompts: as many as outputs.
            progress, on_result: as in :meth:`batch`.

        Raises:
            TypeError: outputs or prompts of another type.
            ValueError: unequal lengths, or an empty prompt that must be encoded.
        """
        prompts = _checked_prompts(prompts)
        rows = _checked_outputs(outputs)
        if len(rows) != len(prompts):
            raise ValueError(
                f"outputs and prompts must be equally many, got {len(rows)} outputs and {len(prompts)} prompts"
            )
        return self._run(prompts, map(_given, rows), progress, on_result)

    def candidates(self, prompts: Sequence[Prompt], n: int) -> list[list[str]]:
        """Draw up to n fresh outputs for each prompt; fewer, with a line in the log, where it failed.

        Raises:
            TypeError: a prompt is neither text nor messages, or n is not an integer.
            ValueError: n < 1, or the Refiner has no generator.
        """
        rows = []
        for row, draw in enumerate(self._draws(_checked_prompts(prompts), _checked_n(n))):
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

    def _draws(self, prompts: Sequence[Prompt], n: int) -> Iterator[Draw]:
        if self.generator is None:
            raise ValueError(
                "this Refiner has no generator: pass one to pfm.wrap, or give outputs to .refine(outputs, prompts)"
            )
        return self.generator.draws(prompts, n)

    def _run(
        self,
        prompts: list[Prompt],
        draws: Iterable[Draw],
        progress: bool,
        on_result: Callable[[Refinement], object] | None,
    ) -> list[Refinement]:
        """Judge the draws portion by portion as they arrive."""
        from pfm.pairs import conversation_text

        keys = [conversation_text(prompt) for prompt in prompts]
        for row, key in enumerate(keys if self.flow.metadata.get("context_dimension") else []):
            if not is_usable_text(key):
                raise ValueError(f"prompts[{row}] must be text that can be encoded, got {_shown(prompts[row])}")
        results: list[Refinement] = []
        waiting: list[Draw] = []
        # disable=False would overrule TQDM_DISABLE, so it is only ever set to True.
        make_bar = tqdm if progress else functools.partial(tqdm, disable=True)

        def judge_waiting() -> None:
            rows = slice(len(results), len(results) + len(waiting))
            portion = [_unjudged(prompt, draw) for prompt, draw in zip(prompts[rows], waiting, strict=True)]
            notes = [_notes(draw, self.n) for draw in waiting]
            waiting.clear()
            results.extend(portion)
            try:
                self._judge(portion, keys[rows])
            except BaseException as error:
                for result in portion:
                    if math.isnan(result.win_probability):
                        result.error = result.error or f"{type(error).__name__}: {error}"
                raise
            for result, note in zip(portion, notes, strict=True):
                result.reason += note
                bar.update()
                if on_result is not None:
                    on_result(result)

        try:
            with make_bar(total=len(prompts), desc="Refining", unit="prompt") as bar:
                try:
                    size, started = 0, time.perf_counter()
                    for draw in draws:
                        waiting.append(draw)
                        size += len(draw.texts)
                        if size >= WAITING_CANDIDATES or time.perf_counter() - started >= WAITING_SECONDS:
                            judge_waiting()
                            size, started = 0, time.perf_counter()
                finally:
                    judge_waiting()
            if len(results) < len(prompts):
                raise ValueError(f"the generator gave {len(results)} draws for {len(prompts)} prompts")
        except BaseException as error:
            error.partial = results  # pyright: ignore[reportAttributeAccessIssue]
            raise
        return results

    def _judge(self, portion: list[Refinement], keys: list[str]) -> None:
        """Encode all candidates at once, judge them in one call, and decode prompt by prompt, in place."""
        started = time.perf_counter()
        judged = [(result, key) for result, key in zip(portion, keys, strict=True) if result.candidates]
        if not judged:
            return
        vectors, contexts, probabilities = self._probabilities(judged)
        end = 0
        for row, (result, key) in enumerate(judged):
            start, end = end, end + len(result.candidates)
            found = probabilities[start:end]
            result.probabilities = found.tolist()
            if np.isnan(found).any():
                _keep_unjudgeable(result)
                continue
            context = None if contexts is None else contexts[row]
            selection = self.decoder.decode(self.flow, result.candidates, vectors[start:end], context, found, key)
            result.index = selection.index
            result.text = result.candidates[selection.index]
            result.win_probability = result.probabilities[selection.index]
            result.changed = selection.changed
            result.reason = selection.reason
        share = (time.perf_counter() - started) / len(judged)
        for result, _ in judged:
            result.seconds += share

    def _probabilities(
        self, judged: list[tuple[Refinement, str]]
    ) -> tuple[torch.Tensor, torch.Tensor | None, np.ndarray]:
        """Return vectors (N, D), contexts (G, C) or None, and b (N,), NaN where the encoder's values are.

        N counts the candidates of all G prompts, one prompt after the other.
        """
        texts = [text for result, _ in judged for text in result.candidates]
        vectors = _encoded(self.encoder.encode, texts, self.flow.metadata["dimension"])
        usable = vectors.isfinite().all(dim=1)
        contexts = context_rows = None
        context_dimension = self.flow.metadata.get("context_dimension")
        if context_dimension:
            encode = getattr(self.encoder, "encode_prompts", self.encoder.encode)
            contexts = _encoded(encode, [key for _, key in judged], context_dimension)
            sizes = torch.tensor([len(result.candidates) for result, _ in judged])
            context_rows = contexts.repeat_interleave(sizes, dim=0)
            usable &= context_rows.isfinite().all(dim=1)
            context_rows = context_rows[usable]
        probabilities = np.full(len(texts), np.nan)
        if usable.any():
            found = self.flow.win_probability(vectors[usable], context_rows)
            probabilities[usable.numpy()] = found.detach().cpu().double().numpy()
        return vectors, contexts, probabilities


def _encoded(encode: Callable[..., Any], texts: list[str], dimension: int | Sequence[int]) -> torch.Tensor:
    """Encode texts to (N, D) float32 on the CPU, and check the shape against what the flow takes."""
    vectors = torch.as_tensor(encode(texts, progress=False)).detach().to("cpu", torch.float32)
    expected = (len(texts), _flat(dimension))
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
    )


def _keep_unjudgeable(result: Refinement) -> None:
    """Keep the original of a prompt whose vectors the flow cannot compare."""
    rows = [str(row) for row, value in enumerate(result.probabilities) if math.isnan(value)]
    result.win_probability = result.probabilities[0]
    result.reason = "kept the original: the encoder's values are not finite"
    found = f"ValueError: the encoder gave NaN or infinity for the prompt or for candidates {', '.join(rows)}"
    result.error = found if result.error is None else f"{result.error}; {found}"


def _notes(draw: Draw, n: int) -> str:
    """Say what was missing among the candidates, as an addition to a reason."""
    notes = ""
    if not draw.texts:
        return notes  # the error tells all of it
    if draw.calls and len(draw.texts) < n:
        notes += f"; {len(draw.texts)} of {n} candidates after {count(draw.calls, 'call')}"
    if draw.dropped:
        notes += f"; {count(draw.dropped, 'output')} dropped: empty or not text"
    return notes


def _given(outputs: list[Any]) -> Draw:
    draw = Draw()
    draw.add(outputs, len(outputs))
    return draw.close()


def _as_decoder(decoder: str | Decoder, options: dict[str, Any]) -> Decoder:
    if decoder == "select":
        return Select(options["by"], options["margin"], strength=options["strength"], seed=options["seed"])
    if isinstance(decoder, str):
        raise ValueError(f"decoder must be 'select' or an object with .decode, got {decoder!r}")
    if isinstance(decoder, type) or not callable(getattr(decoder, "decode", None)):
        raise TypeError(f"decoder must be 'select' or an object with .decode, got {_shown(decoder)}")
    unused = [name for name, value in options.items() if value != _SELECT_DEFAULTS[name]]
    if unused:
        raise ValueError(
            f"{', '.join(unused)} belong to decoder='select', got them with {_shown(decoder)}; "
            "set them on the decoder itself"
        )
    return decoder


def _check_flow_and_encoder(flow: Any, encoder: Any) -> None:
    if not callable(getattr(flow, "win_probability", None)):
        raise TypeError(f"flow must be a PreferenceFlow, got {_shown(flow)}")
    missing = [name for name in ("encode", "dimension", "describe") if not hasattr(encoder, name)]
    if missing:
        raise TypeError(f"encoder must have .{', .'.join(missing)}, got {_shown(encoder)}")
    expected = _flat(flow.metadata["dimension"])
    if encoder.dimension != expected:
        raise ValueError(
            f"encoder has dimension {encoder.dimension}, but the flow was fitted on dimension {expected}; "
            f"use the encoder of the fit: {_name(flow.metadata.get('encoder'))}"
        )
    fitted, given = _identity(flow.metadata.get("encoder") or {}), _identity(encoder.describe())
    differing = [name for name in fitted if name in given and fitted[name] != given[name]]
    if differing:
        differences = ", ".join(f"{name} {fitted[name]!r} against {given[name]!r}" for name in differing)
        warnings.warn(
            f"the flow was fitted with another encoder than the one given: {differences}; "
            "vectors of different encoders cannot be compared",
            stacklevel=3,
        )


def _identity(description: Any) -> Any:
    """Reduce an encoder's description, at any depth, to what makes its vectors another space.

    The number type is left out: the same model in bfloat16 gives the same vectors but for rounding.
    """
    if isinstance(description, Mapping):
        return {name: _identity(value) for name, value in description.items() if name != "dtype"}
    if isinstance(description, list | tuple):
        return [_identity(value) for value in description]
    return description


def _name(description: Mapping[str, Any] | None) -> str:
    """Write name and revision of an encoder's description."""
    if not description:
        return "not recorded"
    revision = description.get("revision")
    return f"{description.get('name')}" + (f" (revision {revision})" if revision else "")


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


def _checked_outputs(outputs: Any) -> list[list[Any]]:
    """Return a list of candidates for each row; an empty cell of a table (None) has none."""
    if isinstance(outputs, str | Mapping) or not isinstance(outputs, Iterable):
        raise TypeError(f"outputs must be a list with one entry a prompt, got {_shown(outputs)}")
    rows: list[list[Any]] = []
    for row, output in enumerate(outputs):
        if output is None:
            rows.append([])
        elif isinstance(output, str):
            rows.append([output])
        elif isinstance(output, list | tuple | np.ndarray):
            rows.append(list(output))
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
