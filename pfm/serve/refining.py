"""Answers chat requests: draws candidates, judges them, and gives the best."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from contextlib import AsyncExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from pfm.refiner.stopping import CHARACTERS_A_TOKEN
from pfm.serve.asked import Asked, read
from pfm.serve.drawn import Drawn, Reply
from pfm.serve.errors import Refused
from pfm.serve.http import own_headers, plain_response
from pfm.serve.judge import Judged
from pfm.serve.note import Note
from pfm.serve.places import HeldBytes, Place
from pfm.serve.refined import refined_answer
from pfm.serve.relay import relayed
from pfm.serve.state import State
from pfm.serve.upstream import in_background

__all__ = ["refine_chat"]

logger = logging.getLogger("pfm.serve.app")


async def refine_chat(state: State, request: Request) -> Response:
    """Answer a chat request by the best of its candidates, or pass it through."""
    with state.counted("chat", request) as note:
        state.access.check(request)
        _ = state.upstream
        return await state.with_body(request, note, functools.partial(_answered, state))


async def _answered(
    state: State, request: Request, content: bytes, place: Place, held: HeldBytes, note: Note, owned: AsyncExitStack
) -> Response:
    headers = dict(request.headers)
    asked: Asked = await in_background(
        lambda content: read(content, headers, state.config, state.refiner), content, len(content)
    )
    started = time.perf_counter()
    deadline = await state.start(place, note)
    if asked.plain is not None:
        return await relayed(state, request, "chat/completions", asked.content, deadline, note, owned, asked.plain)
    response = await _refined(state, request, asked, deadline, note, held)
    state.usual_seconds += 0.1 * (time.perf_counter() - started - state.usual_seconds)
    place.leave()
    return response


async def _refined(
    state: State, request: Request, asked: Asked, deadline: float, note: Note, held: HeldBytes
) -> Response:
    headers, query = request.headers.raw, request.scope["query_string"]
    drawn, judged, plain, spent = Drawn(), None, None, None
    total, waves, more = 0, 0, asked.n if asked.plan is None else asked.plan.first
    while more:
        started, troubles = time.perf_counter(), drawn.errors.total()
        call = note.trace.generate((asked.body or {}).get("model"), more)
        try:
            sent = call.headers(headers)
            await state.upstream.draw(asked.body or {}, sent, query, more, deadline, held, drawn, total)
        finally:
            call.set(**_drawn_attributes(drawn))
            call.end(None if drawn.replies else "upstream_failed")
        note.upstream += time.perf_counter() - started
        total, waves, more = total + more, waves + 1, 0
        if not drawn.replies:
            break
        found, plain = await _judged(state, drawn, asked, judged)
        if found is not None:
            note.trace.judged(len(drawn.choices), found.encoder_seconds, found.flow_seconds)
        judged = found or judged  # the best of earlier waves is not lost to a later one's trouble
        if spent is not None and found is None:
            spent["ended"] = "failed"
        if asked.plan is not None and found is not None:
            decision = asked.plan.decide(found.log_odds or [], total, _tokens_a_draw(drawn))
            ended = "failed" if drawn.errors.total() > troubles else decision.ended
            more = 0 if ended is not None else decision.more
            spent = {"draws": len(drawn.choices) + drawn.dropped, "waves": waves, "max_n": asked.n, "ended": ended}
            spent |= {"expected_gain": decision.expected_gain, "price": decision.price}
    _count(state, drawn)
    if not drawn.replies:
        return _failed(drawn, note)
    plain = None if judged is not None else plain
    return await in_background(
        lambda judged: refined_answer(state, drawn, judged, plain, asked, note, spent), judged, held.size
    )


def _unjudgeable(state: State, drawn: Drawn, asked: Asked) -> str | None:
    """Return why the candidates cannot be judged, or None."""
    if drawn.plain is not None:
        return drawn.plain
    if not drawn.choices:
        return "the upstream gave no text"
    return asked.unjudged or _too_long(state, drawn, asked)


def _too_long(state: State, drawn: Drawn, asked: Asked) -> str | None:
    """Return why the texts of a request are too long to encode, or None."""
    sizes = [len(choice.text) for choice in drawn.choices]
    if max(sizes) > state.config.text_characters:
        return f"a candidate is longer than {state.config.text_characters} characters"
    if sum(sizes) + len(asked.key) > state.config.judged_characters:
        return f"prompt and candidates are together longer than {state.config.judged_characters} characters"
    return None


def _failed(drawn: Drawn, note: Note) -> Response:
    """Pass on what went wrong first, as the upstream said it."""
    failure = drawn.failure
    if not isinstance(failure, Reply):
        raise failure or Refused(502, "the upstream gave nothing", outcome="upstream_failed")
    note.outcome, note.status = "upstream_error", failure.status
    kind = [(b"content-type", failure.kind)] if failure.kind else []
    headers = [*failure.headers, *kind, *own_headers({"refined": "false"})]
    return plain_response(failure.content, failure.status, headers)


async def _judged(
    state: State, drawn: Drawn, asked: Asked, earlier: Judged | None = None
) -> tuple[Judged | None, str | None]:
    """Choose, or say why the original must do: an answer that is there is not lost to the judge's trouble."""
    plain = _unjudgeable(state, drawn, asked)
    if plain is not None:
        return None, plain
    try:
        async with asyncio.timeout(state.config.judge_timeout):
            texts = [choice.text for choice in drawn.choices]
            judged = await state.judge.refine(
                texts, asked.prompt, asked.rule, with_odds=asked.plan is not None, earlier=earlier
            )
    except TimeoutError:
        return None, f"judging took more than {state.config.judge_timeout:g} seconds"
    except Exception as error:
        # Its message may quote the candidates: they go to no log.
        logger.warning("candidates could not be judged: %s", type(error).__name__)
        logger.debug("candidates could not be judged", exc_info=True)
        return None, f"the candidates could not be judged ({type(error).__name__})"
    state.metrics.encoder_seconds.observe(judged.encoder_seconds)
    state.metrics.flow_seconds.observe(judged.flow_seconds)
    state.metrics.batch_requests.observe(judged.batch)
    if judged.refinement.error is not None:
        return None, f"the candidates could not be judged ({judged.refinement.error.partition(':')[0]})"
    return judged, None


def _count(state: State, drawn: Drawn) -> None:
    state.metrics.candidates.labels("true").inc(len(drawn.choices))
    state.metrics.candidates.labels("false").inc(drawn.dropped)
    usage = drawn.usage() or {}
    for kind in ("prompt", "completion"):
        tokens = usage.get(f"{kind}_tokens")
        if isinstance(tokens, int | float) and not isinstance(tokens, bool):
            state.metrics.tokens.labels(kind).inc(tokens)


def _drawn_attributes(drawn: Drawn) -> dict[str, Any]:
    usage = drawn.usage() or {}
    tokens = {
        f"gen_ai__usage__{ours}_tokens": usage.get(f"{theirs}_tokens")
        for ours, theirs in (("input", "prompt"), ("output", "completion"))
        if isinstance(usage.get(f"{theirs}_tokens"), int)
    }
    return {"pfm__calls": drawn.calls, "pfm__candidates": len(drawn.choices), "pfm__dropped": drawn.dropped, **tokens}


def _tokens_a_draw(drawn: Drawn) -> float | None:
    """Return the mean tokens of a candidate; where the upstream does not count them, by its characters."""
    count = len(drawn.choices) + drawn.dropped
    told = (drawn.usage() or {}).get("completion_tokens")
    if isinstance(told, bool) or not isinstance(told, int | float):
        told = sum(len(choice.text) for choice in drawn.choices) / CHARACTERS_A_TOKEN
    return told / count if count else None
