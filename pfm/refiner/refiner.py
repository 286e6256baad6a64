"""Wrap a frozen generator: draw candidates, judge them with the flow, return one and say why."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pfm._internal.checks import check_whole
from pfm.data.conversations import conversation_text
from pfm.data.identity import prompt_identity
from pfm.decoders import Decoder
from pfm.devices import settle_after_fork
from pfm.encoders.sentence import as_encoder
from pfm.errors import GenerationError
from pfm.generators import Draw, Prompt, as_generator
from pfm.generators.base import Accepts, first_samples, is_usable_text, numbered_adraws, numbered_draws, occurrences
from pfm.protocols import Flow
from pfm.reasoning import checked_reasoning
from pfm.references import PooledFlow
from pfm.refiner.calibration import calibrate
from pfm.refiner.checks import (
    accepted_outputs,
    as_decoder,
    check_flow_and_encoder,
    check_outputs,
    check_plan,
    check_prompts,
    check_sources,
    check_tags,
    is_conversation,
    show,
)
from pfm.refiner.judging import judge, log_odds
from pfm.refiner.refinement import Refinement
from pfm.refiner.run import Run
from pfm.refiner.stopping import Plan, Stopping
from pfm.refiner.waves import RecentEncoder, drawn_in_waves

__all__ = ["Refiner", "wrap"]

logger = logging.getLogger(__name__)


def wrap(
    generator: Any,
    flow: Flow,
    *,
    encoder: Any,
    decoder: str | Decoder = "select",
    n: int | str = 8,
    max_n: int | None = None,
    spend: float | Mapping[str, float] | None = None,
    stopping: Stopping | None = None,
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
        n: candidates a prompt; ``"auto"`` draws in waves until the best b so far is good enough.
        max_n: with "auto", the most candidates; None takes that of the calibration.
        spend: with "auto", the price of a draw in win probability, or ``{"token": price}``; None takes the price at
            which the held-out score is that of the fixed n.
        stopping: the rule of "auto", made by :meth:`Refiner.calibrate`. With a number of candidates it is kept for
            requests to ``pfm serve`` that ask for "auto".
        reasoning: "strip" judges of a candidate with hidden reasoning (``<think>...</think>`` and the like, see
            :mod:`pfm.reasoning`) the answer after it, and hands on the whole; "keep" judges the whole text.
        options: settings of the decoder that is named: ``by``, ``margin``, ``strength``, ``seed`` of
            :class:`pfm.decoders.Select`; ``exemplars``, ``rounds``, ``rewrites``, ... of
            :class:`pfm.decoders.Rewrite`; ``strength``, ``win_gradient``, ... of :class:`pfm.decoders.Latent`.

    Raises:
        TypeError: generator, flow, encoder or decoder lack a method that is needed, or the decoder lacks a setting.
        ValueError: n is no whole number of at least 1, ``n="auto"`` without a stopping rule, an unknown ``reasoning``,
            an encoder of another dimension than the flow's, a setting that the decoder does not have, or settings
            beside a decoder object.

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
    check_flow_and_encoder(flow, encoder)
    found = None if generator is None else as_generator(generator, accepted_outputs(encoder))
    chooser = as_decoder(decoder, options)
    if isinstance(flow, PooledFlow):
        check_sources(flow, found, chooser)
    plan = check_plan(n, max_n, spend, stopping, flow, chooser)
    n = check_whole("n", n if plan is None else plan.max_n, 1)
    return Refiner(found, flow, encoder, chooser, n, reasoning, plan, stopping)


class Refiner:
    """A frozen generator with a preference flow behind it; made by :func:`wrap`.

    It holds no open handle and can be pickled when its generator can (a function must live in a module), so
    :meth:`map_batch` runs in the workers of ``datasets.map``, Ray Data or Spark.

    Attributes:
        n: candidates a prompt, or the most of them where there is a ``plan``.
        plan: with ``n="auto"`` the stopping rule, its cap and its price; else None.
        stopping: the stopping rule, where there is one.
    """

    def __init__(
        self,
        generator: Any,
        flow: Flow,
        encoder: Any,
        decoder: Decoder,
        n: int,
        reasoning: str = "strip",
        plan: Plan | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        self.reasoning = checked_reasoning(reasoning)
        self.generator = generator
        self.flow = flow
        self.encoder = encoder
        bind = getattr(decoder, "bind", None)
        self.decoder = decoder if bind is None else bind(generator, flow, encoder)
        self.n = n
        self.plan = plan
        self.stopping = stopping if plan is None else plan.stopping

    def __repr__(self) -> str:
        n = self.n if self.plan is None else f'"auto", max_n={self.n}'
        return f"Refiner(generator={self.generator!r}, decoder={self.decoder!r}, n={n})"

    def __call__(self, prompt: Prompt) -> Refinement:
        """Draw n candidates for one prompt and return the refined output.

        Raises:
            GenerationError: there is no candidate at all; ``.partial`` holds the Refinement that says so.
        """
        if not isinstance(prompt, str) and not is_conversation(prompt):
            raise TypeError(
                f"prompt must be a text or a list of messages, got {show(prompt)}; "
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
        prompts = check_prompts(prompts)
        generator, first = self._generator(), first_samples(prompts, self.n, start)
        if self.plan is None:
            return self._run(prompts, progress, on_result).over(numbered_draws(generator, prompts, self.n, first))
        encoder = RecentEncoder(self.encoder)
        run = self._run(prompts, progress, on_result, encoder)
        odds = functools.partial(log_odds, flow=self.flow, encoder=encoder, reasoning=self.reasoning)
        return run.over(drawn_in_waves(generator, prompts, run.keys, first, self.plan, odds))

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
        goes on while finished draws are judged in a thread. Any other, and any with ``n="auto"``, runs in a thread of
        its own, with the rest. ``on_result`` is called in such a thread.
        """
        if self.plan is not None or not callable(getattr(self.generator, "adraws", None)):
            executor = ThreadPoolExecutor(1, thread_name_prefix="pfm-refiner")
            work = functools.partial(self.batch, prompts, progress=progress, on_result=on_result, start=start)
            try:
                return await asyncio.get_running_loop().run_in_executor(executor, work)
            finally:
                executor.shutdown(wait=False)
        prompts = check_prompts(prompts)
        first = first_samples(prompts, self.n, start)
        run = self._run(prompts, progress, on_result)
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
        prompts = check_prompts(prompts)
        accepts = accepted_outputs(self.encoder)
        rows = check_outputs(outputs, accepts)
        if len(rows) != len(prompts):
            raise ValueError(
                f"outputs and prompts must be equally many, got {len(rows)} outputs and {len(prompts)} prompts"
            )
        tags = check_tags(generators, rows)
        draws = map(functools.partial(_given, accepts), rows, tags)
        return self._run(prompts, progress, on_result).over(draws)

    def calibrate(
        self,
        outputs: Sequence[Sequence[Any]],
        prompts: Sequence[Prompt],
        scores: Sequence[Sequence[float]],
        *,
        n: int = 8,
        max_n: int = 16,
        **settings: Any,
    ) -> Stopping:
        """Learn from scored candidates of held-out prompts when to stop drawing, for ``wrap(..., n="auto")``.

        Args:
            outputs: for each prompt independent draws of the generator, 16 or more; none with fewer than n is used.
            prompts: as many; none that the flow was fitted on.
            scores: one for each output, by people or a judge; higher is better.
            n: the fixed number of draws to replace. max_n: the most to take.
            settings: ``waves``, ``loss``, ``margin``, ``replays``, ``seed`` of :func:`pfm.refiner.calibrate`.

        Returns:
            the rule, with its evidence; it stands for n draws, and says why, where held-out scores do not confirm it.

        Raises:
            TypeError, ValueError: as :meth:`refine` and :func:`pfm.refiner.calibrate`.
        """
        prompts = check_prompts(prompts)
        rows = check_outputs(outputs, accepted_outputs(self.encoder))
        if not len(rows) == len(prompts) == len(scores):
            raise ValueError(
                f"outputs, prompts and scores must be equally many, got {len(rows)}, {len(prompts)} and {len(scores)}"
            )
        for row, (given, found) in enumerate(zip(rows, scores, strict=True)):
            if len(given) != len(found):
                raise ValueError(f"scores[{row}] must hold one for each output, got {len(found)} for {len(given)}")
        keys = [conversation_text(prompt) for prompt in prompts]
        odds = log_odds(rows, keys, flow=self.flow, encoder=self.encoder, reasoning=self.reasoning)
        kept = [[place for place, value in enumerate(values) if math.isfinite(value)] for values in odds]
        probabilities = [
            [(1 + math.tanh(values[at] / 2)) / 2 for at in places] for values, places in zip(odds, kept, strict=True)
        ]
        judged = [[found[at] for at in places] for found, places in zip(scores, kept, strict=True)]
        same = [prompt_identity(key, row) for row, key in enumerate(keys)]
        return calibrate(probabilities, judged, n=n, max_n=max_n, prompts=same, **settings)

    def candidates(self, prompts: Sequence[Prompt], n: int) -> list[list[str]]:
        """Draw up to n fresh outputs for each prompt; fewer, with a line in the log, where it failed.

        They are others than the candidates of :meth:`batch` over the same prompts, even where a seed or a cache
        makes draws repeatable.

        Raises:
            TypeError: a prompt is neither text nor messages.
            ValueError: n is no whole number of at least 1, or the Refiner has no generator.
        """
        prompts, n = check_prompts(prompts), check_whole("n", n, 1)
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

    def _run(
        self,
        prompts: list[Prompt],
        progress: bool,
        on_result: Callable[[Refinement], object] | None,
        encoder: Any = None,
    ) -> Run:
        settle_after_fork()
        keys = [conversation_text(prompt) for prompt in prompts]
        for row, key in enumerate(keys if self.flow.metadata.get("context_dimension") else []):
            if not is_usable_text(key):
                raise ValueError(f"prompts[{row}] must be text that can be encoded, got {show(prompts[row])}")
        judge_here = functools.partial(
            judge, flow=self.flow, encoder=encoder or self.encoder, decoder=self.decoder, reasoning=self.reasoning
        )
        return Run(prompts, keys, self.n, judge_here, progress, on_result)

    def _generator(self) -> Any:
        if self.generator is None:
            raise ValueError(
                "this Refiner has no generator: pass one to pfm.wrap, or give outputs to .refine(outputs, prompts)"
            )
        return self.generator


def _given(accepts: Accepts, outputs: list[Any], tags: list[str]) -> Draw:
    draw = Draw(accepts=accepts)
    draw.add(outputs, len(outputs))
    draw.tags = [tag for output, tag in zip(outputs, tags, strict=False) if accepts(output)]
    return draw.close()
