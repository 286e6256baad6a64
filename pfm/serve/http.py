"""HTTP that all endpoints share: bodies read in time, answers sent in pieces, clients that disconnect."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import httpx2
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pfm.serve.access import Access
from pfm.serve.answer import to_json
from pfm.serve.asked import HEADER
from pfm.serve.config import ServeConfig
from pfm.serve.drawn import Header
from pfm.serve.errors import Disconnected, Refused, error_body
from pfm.serve.places import HeldBytes

__all__ = [
    "JSON",
    "Body",
    "Guard",
    "LoopErrors",
    "Owning",
    "answer_nobody",
    "answer_not_found",
    "answer_other_method",
    "answer_refusal",
    "escaped_path",
    "own_headers",
    "plain_response",
    "streamed_response",
    "unless_gone",
    "whole_body",
]

logger = logging.getLogger(__name__)

JSON = (b"content-type", b"application/json")
PIECE_BYTES = 64 * 2**10  # of an answer, which a client takes within the deadline on sending
PIECES_AT_ONCE = 32  # of a streamed answer, before other requests have their turn
LOG_SECONDS = 60.0  # between two lines about one and the same lasting trouble
T = TypeVar("T")


class Guard:
    """Checks the host of every request, and bounds how long a client may take for each piece of its answer.

    An error that nothing else has handled ends here: its traceback could quote what a client sent.
    """

    def __init__(self, app: ASGIApp, access: Access, send_timeout: float) -> None:
        self.app = app
        self.access = access
        self.send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on whose host and path are allowed."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_in_time(message: Message) -> None:
            nonlocal started
            started = True
            for part in _parts(message):
                try:
                    async with asyncio.timeout(self.send_timeout):
                        await send(part)
                except TimeoutError:
                    logger.warning("a client took more than %g seconds for a piece of its answer", self.send_timeout)
                    raise Disconnected from None

        try:
            host = next((value for name, value in scope["headers"] if name == b"host"), None)
            try:
                _check_path(scope["path"])
                self.access.check_host(None if host is None else host.decode("latin-1"))
            except Refused as error:
                await _error_response(error)(scope, receive, send_in_time)
                return
            await self.app(scope, receive, send_in_time)
        except (Disconnected, ClientDisconnect):
            logger.debug("a client has gone in the middle of its answer")
        except Exception as error:
            logger.error("a request failed: %s", type(error).__name__)
            logger.debug("a request failed", exc_info=True)
            if not started:
                failure = Refused(500, "the proxy failed on this request", outcome="error")
                await _error_response(failure)(scope, receive, send_in_time)


def _parts(message: Message) -> Iterator[Message]:
    """Cut a message with a large piece of a body into several, since only between them is waited for the client."""
    body = message.get("body", b"")
    if len(body) <= PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), PIECE_BYTES):
        more = start + PIECE_BYTES < len(body) or message.get("more_body", False)
        yield {**message, "body": body[start : start + PIECE_BYTES], "more_body": more}


class LoopErrors:
    """Handles errors that belong to no request. At the limit on file descriptors there are hundreds a second."""

    def __init__(self) -> None:
        self._silent_until = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error; those of missing file descriptors once in a while."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif loop.time() >= self._silent_until:
            self._silent_until = loop.time() + LOG_SECONDS
            logger.error("no file descriptor is left for further clients (ulimit -n); they wait until one is free")


class Owning(Response):
    """An answer together with what it stands on, which is given back however sending ends."""

    def __init__(self, response: Response, owned: AsyncExitStack) -> None:
        self.response = response
        self.status_code = response.status_code
        self.raw_headers = response.raw_headers
        self.background = None
        self._owned = owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, and give back what it stands on."""
        try:
            await self.response(scope, receive, send)
        except (TimeoutError, httpx2.RequestError, httpx2.StreamError) as error:
            # The client sees the connection break off, as the proxy saw the upstream's.
            logger.warning("the upstream broke off in the middle of an answer: %s", type(error).__name__)
        except (Disconnected, ClientDisconnect):
            logger.debug("the client has gone in the middle of an answer")
        finally:
            await self._owned.aclose()


def plain_response(content: bytes, status: int, headers: list[Header]) -> Response:
    """Return an answer with these headers beside its own."""
    response = Response(content, status)
    response.raw_headers += headers
    return response


def streamed_response(pieces: Iterator[bytes], headers: list[Header]) -> Response:
    """Return an answer of server-sent events, sent piece by piece."""

    async def each() -> AsyncIterator[bytes]:
        for number, piece in enumerate(pieces):
            yield piece
            if number % PIECES_AT_ONCE == PIECES_AT_ONCE - 1:  # a client that reads fast never makes it wait
                await asyncio.sleep(0)

    response = StreamingResponse(each(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
    response.raw_headers += [(name, value) for name, value in headers if name != b"cache-control"]
    return response


def own_headers(values: dict[str, str]) -> list[Header]:
    """Write the proxy's own headers."""
    return [
        ((HEADER + name).encode(), " ".join(value.split()).encode("latin-1", "replace"))
        for name, value in values.items()
    ]


class Body:
    """Reads the body of a request piece by piece, each within a deadline.

    Attributes:
        first: the first piece.
        ended: set when the last piece has been read.
    """

    def __init__(self, request: Request, seconds: float) -> None:
        self.first = b""
        self.ended = asyncio.Event()
        self._request = request
        self._seconds = seconds

    async def begin(self) -> None:
        """Read the first piece.

        Raises:
            Refused: it does not arrive in time; status 408.
            ClientDisconnect: the client has gone.
        """
        self.first = await self._next()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.first
        while not self.ended.is_set():
            yield await self._next()

    async def _next(self) -> bytes:
        try:
            async with asyncio.timeout(self._seconds):
                message = await self._request.receive()
        except TimeoutError:
            raise _late(self._seconds) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        if not message.get("more_body", False):
            self.ended.set()
        return message.get("body", b"")


async def whole_body(request: Request, config: ServeConfig, held: HeldBytes) -> bytes:
    """Read the body of a request that is held in memory.

    Raises:
        Refused: it is too large (413), too slow (408), or all bodies together would be too large (503).
        ClientDisconnect: the client has gone.
    """
    message = f"the request is larger than {config.request_bytes} bytes"
    said = request.headers.get("content-length", "")
    if said.isdecimal() and len(said) < 20 and int(said) > config.request_bytes:
        raise Refused(413, message, outcome="bad_request")
    pieces, size = [], 0
    try:
        async with asyncio.timeout(config.read_timeout):
            async for piece in request.stream():
                size += len(piece)
                if size > config.request_bytes:
                    raise Refused(413, message, outcome="bad_request")
                held.add(len(piece))
                pieces.append(piece)
    except TimeoutError:
        raise _late(config.read_timeout) from None
    return b"".join(pieces)


def _late(seconds: float) -> Refused:
    return Refused(408, f"the body did not arrive within {seconds:g} seconds", outcome="bad_request")


def _check_path(path: str) -> None:
    """Refuse a decoded path that might leave the upstream's base URL.

    Raises:
        Refused: it has a segment ``.`` or ``..``.
    """
    if {".", ".."} & set(path.replace("\\", "/").split("/")):
        raise Refused(400, "the path must hold no segments . or ..", outcome="bad_request")


def escaped_path(request: Request) -> str:
    """Return the path after /v1/ as the client wrote it."""
    raw = request.scope.get("raw_path") or request.scope["path"].encode()
    return raw.decode("latin-1").partition("?")[0].removeprefix("/v1/")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T], body_ended: asyncio.Event | None = None) -> T:
    """Await work on a request; stop it when the client goes.

    Args:
        request: the request; what it still has to send is read by the work alone.
        work: what is to be done.
        body_ended: set when the body has been read, from when on the client is watched; None: it has been.

    Raises:
        Disconnected: the client has gone.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request, body_ended))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request, body_ended: asyncio.Event | None) -> None:
    if body_ended is not None:
        await body_ended.wait()
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_response(error: Refused) -> Response:
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    headers += [JSON, *own_headers({"refined": "false"})]
    return plain_response(to_json(error_body(error)), error.status, headers)


async def answer_refusal(_: Request, error: Exception) -> Response:
    """Answer a request that was refused."""
    assert isinstance(error, Refused)
    return _error_response(error)


async def answer_not_found(request: Request, _: Exception) -> Response:
    """Answer a request for a path that is not served."""
    path = request.url.path
    hint = "; the base URL for clients ends in /v1" if "completions" in path else ""
    if path.rstrip("/") == "/chat":
        hint = "; the page /chat is there once the server is started with --upstream URL and --feedback FILE"
    return _error_response(
        Refused(
            404, f"there is /v1/..., /score, /rerank, /classify, /healthz and /metrics here{hint}", outcome="not_found"
        )
    )


async def answer_other_method(_: Request, error: Exception) -> Response:
    """Answer a request by a method that its path does not have."""
    allowed = (getattr(error, "headers", None) or {}).get("Allow", "POST")
    return _error_response(
        Refused(405, f"this path has {allowed} only", outcome="not_found", headers={"Allow": allowed})
    )


async def answer_nobody(_: Request, __: Exception) -> Response:
    """Answer a client that has gone."""
    return Response(status_code=499)  # read by nobody
