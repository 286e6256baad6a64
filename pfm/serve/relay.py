"""Passes requests through to the upstream, and its answers back as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from pfm.serve.answer import to_json
from pfm.serve.http import JSON, Body, escaped_path, own_headers, plain_response, unless_gone
from pfm.serve.note import Note
from pfm.serve.scores import model_list
from pfm.serve.state import State

__all__ = ["pass_through", "relayed"]


async def pass_through(state: State, request: Request) -> Response:
    """Pass a request through, its body as it comes."""
    path = escaped_path(request)
    with state.counted("other", request) as note:
        state.access.check(request)
        if state.config.upstream is None and path == "models" and request.method == "GET":
            note.outcome = "passed"
            return plain_response(to_json(model_list(state.config)), 200, [JSON])
        _ = state.upstream
        async with AsyncExitStack() as owned:
            place = state.admitted(owned)
            body = Body(request, state.config.read_timeout)
            await body.begin()
            deadline = state.deadline()
            content = body.first if body.ended.is_set() else aiter(body)

            async def answered() -> Response:
                await place.start(deadline)
                return await relayed(state, request, path, content, deadline, note, owned)

            response = await unless_gone(request, answered(), body.ended)
            return note.owning(response, owned)


async def relayed(
    state: State,
    request: Request,
    path: str,
    content: bytes | AsyncIterator[bytes],
    deadline: float,
    note: Note,
    owned: AsyncExitStack,
    reason: str = "only chat completions are refined",
) -> Response:
    """Pass a request on, and the answer back as it comes; what ``owned`` holds is to be kept until it has ended."""
    call = note.trace.relay(path)
    owned.callback(call.end)  # when its body has been passed on, or it has failed
    response = await state.upstream.relay(
        request.method,
        path,
        request.scope["query_string"],
        call.headers(request.headers.raw),
        content,
        deadline,
        owned.push_async_callback,
    )
    call.set(http__response__status_code=response.status_code)
    note.outcome, note.status = "passed", response.status_code
    headers = state.upstream.returned(response, body=True)

    async def pieces() -> AsyncIterator[bytes]:
        received = aiter(state.upstream.body(response))
        while True:
            async with asyncio.timeout(state.config.timeout):  # for the next piece, not for all
                try:
                    piece = await anext(received)
                except StopAsyncIteration:
                    return
            yield piece

    answer = StreamingResponse(pieces(), response.status_code)
    answer.raw_headers = [*headers, *own_headers({"refined": "false", "reason": reason})]
    return answer
