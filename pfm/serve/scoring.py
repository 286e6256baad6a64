"""Answers requests for scores by the flow."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from contextlib import AsyncExitStack

from fastapi import Request
from fastapi.responses import Response

from pfm.serve.answer import to_json
from pfm.serve.errors import Refused
from pfm.serve.http import JSON, escaped_path, plain_response
from pfm.serve.note import Note
from pfm.serve.places import HeldBytes, Place
from pfm.serve.relay import relayed
from pfm.serve.scores import OWN_NAME, ScoresAsked, read_scores, scored
from pfm.serve.state import State
from pfm.serve.upstream import in_background

__all__ = ["score"]

logger = logging.getLogger("pfm.serve.app")


async def score(kind: str, state: State, request: Request) -> Response:
    """Score texts by the flow; pass the request through where it names another model."""
    with state.counted(kind, request) as note:
        state.access.check(request)
        return await state.with_body(request, note, functools.partial(_scored, state, kind))


async def _scored(
    state: State, kind: str, request: Request, content: bytes, place: Place, _: HeldBytes, note: Note,
    owned: AsyncExitStack,
) -> Response:  # fmt: skip
    asked: ScoresAsked = await in_background(
        lambda content: read_scores(kind, content, state.config, state.refiner.flow), content, len(content)
    )
    deadline = await state.start(place, note)
    if asked.model is not None:
        path = escaped_path(request)
        if state.config.upstream is None or not request.url.path.startswith("/v1/"):
            names = " or ".join(dict.fromkeys([state.config.score_model, OWN_NAME]))
            raise Refused(
                404,
                f"there is no such model here: leave model out, or ask for {names}",
                outcome="not_found",
                param="model",
            )
        reason = "the request names another model"
        return await relayed(state, request, path, content, deadline, note, owned, reason)
    try:
        async with asyncio.timeout(state.config.judge_timeout):
            found = await state.judge.win_probabilities(asked.prompts, asked.texts, together=asked.together)
    except TimeoutError:
        raise Refused(
            504,
            f"scoring took more than {state.config.judge_timeout:g} seconds: send fewer texts",
            outcome="timeout",
        ) from None
    except Exception as error:
        # Its message may quote the texts: they go to no log.
        logger.warning("texts could not be scored: %s", type(error).__name__)
        logger.debug("texts could not be scored", exc_info=True)
        raise Refused(500, f"the texts could not be scored ({type(error).__name__})", outcome="error") from None
    bad = [place for place, value in enumerate(found.values) if not math.isfinite(value)]
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise Refused(500, f"the encoder gave NaN or infinity for texts {shown}", outcome="error")
    state.metrics.encoder_seconds.observe(found.encoder_seconds)
    state.metrics.flow_seconds.observe(found.flow_seconds)
    state.metrics.scored_texts.labels(kind).inc(len(asked.texts))
    note.outcome, note.encoder = "scored", found.encoder_seconds
    note.trace.judged(len(asked.texts), found.encoder_seconds, found.flow_seconds)
    seconds = {
        "queue": round(note.queue, 5),
        "encoder": round(found.encoder_seconds, 5),
        "flow": round(found.flow_seconds, 5),
        "total": round(note.elapsed(), 5),
    }
    place.leave()
    return await in_background(
        lambda b: plain_response(
            to_json(scored(asked, b, state.refiner.flow, state.config.score_model, seconds)), 200, [JSON]
        ),
        found.values,
        len(content),
    )
