"""The proxy as an ASGI application: its paths, and what answers each of them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from pfm.refiner import Refiner
from pfm.serve.access import LOOPBACK_ORIGIN
from pfm.serve.answer import to_json
from pfm.serve.asked import HEADER
from pfm.serve.chat import chat_page
from pfm.serve.config import ServeConfig
from pfm.serve.errors import Disconnected, Refused
from pfm.serve.feedback import read_feedback
from pfm.serve.http import (
    JSON,
    Guard,
    answer_nobody,
    answer_not_found,
    answer_other_method,
    answer_refusal,
    plain_response,
)
from pfm.serve.note import Note
from pfm.serve.places import HeldBytes, Place
from pfm.serve.refining import refine_chat
from pfm.serve.relay import pass_through
from pfm.serve.scores import PATHS
from pfm.serve.scoring import score
from pfm.serve.state import State
from pfm.serve.upstream import in_background

__all__ = ["create_app"]

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]


def create_app(refiner: Refiner, config: ServeConfig, *, tracer_provider: Any = None) -> FastAPI:
    """Make the proxy as an ASGI application.

    Args:
        refiner: from :func:`pfm.wrap`, without a generator. A request may ask for another n and, where the
            decoder is ``"select"``, for another rule.
        config: the settings.
        tracer_provider: of OpenTelemetry; None: that of the process. Without its API nothing is recorded.

    Raises:
        ValueError: a variable that the settings name is not set, or the environment names a proxy for the upstream
            that cannot be used, or the file of feedback holds something else.
        OSError: the file of feedback cannot be written, or another server writes to it.
    """
    state = State(refiner, config, tracer_provider)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await state.open()
        try:
            yield
        finally:
            await state.close()

    app = FastAPI(title="pfm serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/healthz", state.health, methods=["GET"])
    app.add_api_route("/metrics", state.show_metrics, methods=["GET"], response_model=None)
    answers = [("/v1/chat/completions", refine_chat, ["POST"])]
    answers += [(path, functools.partial(score, kind), ["POST"]) for path, kind in PATHS.items()]
    if config.feedback is not None:
        answers.append(("/v1/feedback", keep_feedback, ["POST"]))
        if config.upstream is not None:
            app.add_api_route("/chat", chat_page, methods=["GET"], response_model=None)
    answers.append(("/v1/{path:path}", pass_through, METHODS))
    for path, answer, methods in answers:
        app.add_api_route(path, functools.partial(answer, state), methods=methods, response_model=None)
    app.add_exception_handler(Refused, answer_refusal)
    app.add_exception_handler(404, answer_not_found)
    app.add_exception_handler(405, answer_other_method)
    for gone in (Disconnected, ClientDisconnect):
        app.add_exception_handler(gone, answer_nobody)
    # The last one added is the first to see a request.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.allowed_origins,
        allow_origin_regex=LOOPBACK_ORIGIN,
        allow_methods=METHODS,
        allow_headers=["*"],
        expose_headers=["*", "authorization", *(f"{HEADER}{name}" for name in ("refined", "changed", "reason"))],
        allow_private_network=True,
    )
    app.add_middleware(Guard, access=state.access, send_timeout=config.send_timeout)
    return app


async def keep_feedback(state: State, request: Request) -> Response:
    """Keep what somebody thought of an answer as a preference row."""
    with state.counted("feedback", request) as note:
        state.access.check(request)
        return await state.with_body(request, note, functools.partial(_kept, state))


async def _kept(
    state: State, request: Request, content: bytes, place: Place, _: HeldBytes, note: Note, owned: AsyncExitStack
) -> Response:
    assert state.feedback is not None, "the path is served with a file only"
    row = await in_background(lambda content: read_feedback(content, state.config), content, len(content))
    await place.start(state.deadline())
    await asyncio.to_thread(state.feedback.add, row)  # a disk may be slow
    kind = "pair" if "chosen" in row else "liked" if row["label"] else "disliked"
    state.metrics.feedback.labels(kind).inc()
    note.outcome, note.status = "kept", 201
    place.leave()
    return plain_response(to_json({"object": "feedback", "kind": kind}), 201, [JSON])
