"""The proxy: what happens to a request from its arrival to the answer."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import zip_longest
from typing import Any, TypeVar

import httpx2
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pfm._internal.proxies import proxy_of
from pfm.refiner import Refiner
from pfm.serve.access import LOOPBACK_ORIGIN, Access
from pfm.serve.answer import envelope, events, to_json
from pfm.serve.asked import EXTENSION, HEADER, Asked, read
from pfm.serve.config import ServeConfig
from pfm.serve.connections import limited_protocol
from pfm.serve.errors import Disconnected, Refused, error_body
from pfm.serve.judge import Judge, Judged
from pfm.serve.metrics import Metrics
from pfm.serve.places import HeldBytes, Memory, Place, Places
from pfm.serve.upstream import Drawn, Header, Reply, Upstream, in_background, summed

__all__ = ["create_app", "run"]

logger = logging.getLogger(__name__)

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
PIECE_BYTES = 64 * 2**10  # of an answer, which a client takes within the deadline on sending
PIECES_AT_ONCE = 32  # of a streamed answer, before other requests have their turn
LOG_SECONDS = 60.0  # between two lines about one and the same lasting trouble
T = TypeVar("T")


def create_app(refiner: Refiner, config: ServeConfig) -> FastAPI:
    """Make the proxy as an ASGI application.

    Args:
        refiner: from :func:`pfm.wrap`, without a generator. A request may ask for another n and, where the
            decoder is ``"select"``, for another rule.
        config: the settings.

    Raises:
        ValueError: a variable that the settings name is not set, or the environment names a proxy for the upstream
            that cannot be used.
    """
    proxy = _Proxy(refiner, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await proxy.open()
        try:
            yield
        finally:
            await proxy.close()

    app = FastAPI(title="pfm serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/healthz", proxy.health, methods=["GET"])
    app.add_api_route("/metrics", proxy.show_metrics, methods=["GET"], response_model=None)
    app.add_api_route("/v1/chat/completions", proxy.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/{path:path}", proxy.other, methods=METHODS, response_model=None)
    app.add_exception_handler(Refused, _refusal)
    app.add_exception_handler(404, _not_found)
    for gone in (Disconnected, ClientDisconnect):
        app.add_exception_handler(gone, _nobody)
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
    app.add_middleware(_Guard, access=proxy.access, send_timeout=config.send_timeout)
    return app


def run(refiner: Refiner, config: ServeConfig, *, on_start: Callable[[str], object] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; requests under way have ``config.grace`` seconds to end.

    Args:
        refiner, config: as for :func:`create_app`.
        on_start: called with the base URL for clients once the address is taken.

    Raises:
        ValueError: a variable that the settings name is not set.
        OSError: the address cannot be listened on.
    """
    app = create_app(refiner, config)
    listening = _listening(config)
    host, port = listening.getsockname()[:2]
    if on_start is not None:
        on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
    with listening:
        uvicorn.Server(_server_settings(app, config)).run(sockets=[listening])


def _server_settings(app: ASGIApp, config: ServeConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=limited_protocol(config),
        ws="none",
        log_config=None,  # its access log would write queries, which may hold keys
        access_log=False,
        server_header=False,
        backlog=256,
        timeout_keep_alive=75,  # longer than clients keep connections, so that none is reused while it closes
        timeout_graceful_shutdown=math.ceil(config.grace),
    )


def _listening(config: ServeConfig) -> socket.socket:
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
        config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    # Only where the protocol is named does asyncio set TCP_NODELAY; without it an answer may wait 40 ms for an ACK.
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise OSError(f"cannot listen on {config.host} port {config.port}: {error.strerror or error}") from error
    return listening


class _Proxy:
    """Holds what lives as long as the proxy."""

    def __init__(self, refiner: Refiner, config: ServeConfig) -> None:
        self.config = config
        self.refiner = refiner
        self.metrics = Metrics()
        self.judge = Judge(refiner)
        self._token = config.secret("token_env")
        self._key = config.secret("upstream_key_env")
        proxy_of(config.upstream)  # one that cannot be used shows before the proxy listens
        self.access = Access(config, self._token, secrets.token_hex(8))
        self._usual_seconds = 1.0  # of a request, a running mean

    async def open(self) -> None:
        asyncio.get_running_loop().set_exception_handler(_LoopErrors())
        self.places = Places(self.config.concurrency, self.config.queue)
        self.memory = Memory(self.config.held_bytes)
        self.upstream = Upstream(self.config, self._key, self._token is not None, self.access.instance, self.metrics)
        problem = await self.upstream.probe()
        if problem is not None:
            logger.warning("%s", problem)

    async def close(self) -> None:
        self.judge.close()
        await self.upstream.close()

    # -- endpoints -----------------------------------------------------------------------------------------

    async def health(self) -> dict[str, Any]:
        return {"status": "ok", "active": self.places.active, "waiting": self.places.waiting}

    async def show_metrics(self, request: Request) -> Response:
        self.access.check(request)
        text = self.metrics.text(active=self.places.active, waiting=self.places.waiting, held=self.memory.used)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def other(self, request: Request, path: str) -> Response:
        """Pass a request through, its body as it comes."""
        path = _escaped_path(request)
        with self._counted("other", request) as note:
            self.access.check(request)
            async with AsyncExitStack() as owned:
                place = self._admitted(owned)
                body = _Body(request, self.config.read_timeout)
                await body.begin()
                deadline = self._deadline()
                content = body.first if body.ended.is_set() else aiter(body)

                async def relayed() -> Response:
                    await place.start(deadline)
                    return await self._relayed(request, path, content, deadline, note, owned)

                response = await _unless_gone(request, relayed(), body.ended)
                return _Owning(response, owned.pop_all())

    async def chat(self, request: Request) -> Response:
        """Answer a chat request by the best of its candidates, or pass it through."""
        with self._counted("chat", request) as note:
            self.access.check(request)
            async with AsyncExitStack() as owned:
                place = self._admitted(owned)
                held = self.memory.held()
                owned.callback(held.close)
                content = await _whole_body(request, self.config, held)
                response = await _unless_gone(request, self._chat(request, content, place, held, note, owned))
                return _Owning(response, owned.pop_all())

    async def _chat(
        self, request: Request, content: bytes, place: Place, held: HeldBytes, note: _Note, owned: AsyncExitStack
    ) -> Response:
        headers = dict(request.headers)
        asked: Asked = await in_background(
            lambda content: read(content, headers, self.config, self.refiner), content, len(content)
        )
        started = time.perf_counter()
        deadline = self._deadline()
        await place.start(deadline)
        note.queue = time.perf_counter() - started
        if asked.plain is not None:
            return await self._relayed(request, "chat/completions", asked.content, deadline, note, owned, asked.plain)
        response = await self._refined(request, asked, deadline, note, held)
        self._usual_seconds += 0.1 * (time.perf_counter() - started - self._usual_seconds)
        place.leave()
        return response

    # -- passing through -----------------------------------------------------------------------------------

    async def _relayed(
        self,
        request: Request,
        path: str,
        content: bytes | AsyncIterator[bytes],
        deadline: float,
        note: _Note,
        owned: AsyncExitStack,
        reason: str = "only chat completions are refined",
    ) -> Response:
        """Pass a request on, and the answer back as it comes; what ``owned`` holds is to be kept until it has ended."""
        received = list(request.headers.raw)
        response = await self.upstream.relay(
            request.method,
            path,
            request.scope["query_string"],
            received,
            content,
            deadline,
            owned.push_async_callback,
        )
        note.outcome, note.status = "passed", response.status_code
        headers = self.upstream.returned(response, body=True)

        async def pieces() -> AsyncIterator[bytes]:
            received = aiter(self.upstream.body(response))
            while True:
                async with asyncio.timeout(self.config.timeout):  # for the next piece, not for all
                    try:
                        piece = await anext(received)
                    except StopAsyncIteration:
                        return
                yield piece

        relayed = StreamingResponse(pieces(), response.status_code)
        relayed.raw_headers = [*headers, *_own_headers({"refined": "false", "reason": reason})]
        return relayed

    # -- refining ------------------------------------------------------------------------------------------

    async def _refined(self, request: Request, asked: Asked, deadline: float, note: _Note, held: HeldBytes) -> Response:
        started = time.perf_counter()
        headers, query = request.headers.raw, request.scope["query_string"]
        drawn = await self.upstream.draw(asked.body or {}, headers, query, asked.n, deadline, held)
        note.upstream = time.perf_counter() - started
        self._count(drawn)
        if not drawn.replies:
            return self._failed(drawn, note)
        judged, plain = None, drawn.plain
        if plain is None and not drawn.choices:
            plain = "the upstream gave no text"
        if plain is None:
            plain = asked.unjudged or self._too_long(drawn, asked)
        if plain is None:
            judged, plain = await self._judged(drawn, asked)
        return await in_background(lambda judged: self._answer(drawn, judged, plain, asked, note), judged, held.size)

    def _too_long(self, drawn: Drawn, asked: Asked) -> str | None:
        """Say why the texts of a request are too long to encode, if they are."""
        sizes = [len(choice.text) for choice in drawn.choices]
        if max(sizes) > self.config.text_characters:
            return f"a candidate is longer than {self.config.text_characters} characters"
        if sum(sizes) + len(asked.key) > self.config.judged_characters:
            return f"prompt and candidates are together longer than {self.config.judged_characters} characters"
        return None

    def _failed(self, drawn: Drawn, note: _Note) -> Response:
        """Pass on what went wrong first, as the upstream said it."""
        failure = drawn.failure
        if not isinstance(failure, Reply):
            raise failure or Refused(502, "the upstream gave nothing", outcome="upstream_failed")
        note.outcome, note.status = "upstream_error", failure.status
        kind = [(b"content-type", failure.kind)] if failure.kind else []
        headers = [*failure.headers, *kind, *_own_headers({"refined": "false"})]
        return _response(failure.content, failure.status, headers)

    async def _judged(self, drawn: Drawn, asked: Asked) -> tuple[Judged | None, str | None]:
        """Choose, or say why the original must do: an answer that is there is not lost to the judge's trouble."""
        try:
            async with asyncio.timeout(self.config.judge_timeout):
                judged = await self.judge.refine([choice.text for choice in drawn.choices], asked.prompt, asked.rule)
        except TimeoutError:
            return None, f"judging took more than {self.config.judge_timeout:g} seconds"
        except Exception as error:
            # Its message may quote the candidates: they go to no log.
            logger.warning("candidates could not be judged: %s", type(error).__name__)
            logger.debug("candidates could not be judged", exc_info=True)
            return None, f"the candidates could not be judged ({type(error).__name__})"
        self.metrics.encoder_seconds.observe(judged.encoder_seconds)
        self.metrics.flow_seconds.observe(judged.flow_seconds)
        self.metrics.batch_requests.observe(judged.batch)
        if judged.refinement.error is not None:
            return None, f"the candidates could not be judged ({judged.refinement.error.partition(':')[0]})"
        return judged, None

    def _answer(self, drawn: Drawn, judged: Judged | None, plain: str | None, asked: Asked, note: _Note) -> Response:
        evidence: dict[str, Any] = {
            "refined": judged is not None,
            "changed": False,
            "reason": plain,
            "n": asked.n,
            "calls": drawn.calls,
            "dropped": drawn.dropped,
            "errors": dict(drawn.errors),
        }
        text, usage = None, drawn.usage()
        hidden = [choice.reasoning for choice in drawn.choices]
        if judged is not None:
            refinement = judged.refinement
            in_text = refinement.reasoning or [0] * len(hidden)
            hidden = [inside + beside for inside, beside in zip_longest(in_text, hidden, fillvalue=0)]
            index = refinement.index if 0 <= refinement.index < len(drawn.choices) else 0
            chosen = drawn.choices[index]
            data, choice, reply = chosen.reply.data or {}, chosen.choice, chosen.reply
            text = None if refinement.text == chosen.text else refinement.text
            before, after = refinement.probabilities[0], refinement.win_probability
            self.metrics.gain.observe(after - before)
            note.b = (before, after)
            usage = summed(usage, refinement.usage)  # of a decoder that asks a model itself
            evidence |= {
                "calls": drawn.calls + refinement.calls,
                "changed": refinement.changed,
                "reason": refinement.reason,
                "index": refinement.index,
                "win_probability": {"original": before, "chosen": after},
                "margin": _finite(self._margin(asked)),
                "by": None if asked.rule is None else asked.rule.by,
                "candidates": refinement.candidates,
                "probabilities": refinement.probabilities,
            }
            if refinement.trace is not None:
                evidence["trace"] = refinement.trace
        else:
            first = drawn.choices[0] if drawn.choices and drawn.plain is None else None
            reply = drawn.replies[0] if first is None else first.reply
            data = reply.data or {}
            choice = data["choices"][0] if first is None else first.choice
        if any(hidden):  # characters of each candidate that were set aside: what follows them was judged
            evidence["reasoning"] = hidden
        note.outcome = "unjudged" if judged is None else "changed" if evidence["changed"] else "kept"
        note.encoder = 0.0 if judged is None else judged.encoder_seconds
        evidence["seconds"] = {
            "queue": round(note.queue, 5),
            "upstream": round(note.upstream, 5),
            "encoder": round(note.encoder, 5),
            "flow": round(0.0 if judged is None else judged.flow_seconds, 5),
            "total": round(note.elapsed(), 5),
        }
        whole = envelope(data, choice, text, usage)
        told = {"refined": str(judged is not None).lower(), "changed": str(evidence["changed"]).lower()}
        if judged is None:
            told["reason"] = str(plain)
        headers = [*reply.headers, *_own_headers(told)]
        if asked.stream:
            return _streamed(events(whole, evidence, include_usage=asked.include_usage), headers)
        content = to_json({**whole, EXTENSION: evidence})
        return _response(content, 200, [*headers, (b"content-type", b"application/json")])

    def _margin(self, asked: Asked) -> float | None:
        if asked.rule is None or asked.rule.by == "sample":  # it has no guard
            return None
        return self.refiner.flow.guard_margin if asked.rule.margin is None else asked.rule.margin

    def _count(self, drawn: Drawn) -> None:
        self.metrics.candidates.labels("true").inc(len(drawn.choices))
        self.metrics.candidates.labels("false").inc(drawn.dropped)
        usage = drawn.usage() or {}
        for kind in ("prompt", "completion"):
            tokens = usage.get(f"{kind}_tokens")
            if isinstance(tokens, int | float) and not isinstance(tokens, bool):
                self.metrics.tokens.labels(kind).inc(tokens)

    # -- when a request may come in ------------------------------------------------------------------------

    def _admitted(self, owned: AsyncExitStack) -> Place:
        # As long as it takes until the work that waits is done, at the usual pace.
        waiting = self.places.waiting / self.config.concurrency
        place = self.places.admit(retry_after=(1 + waiting) * self._usual_seconds)
        owned.callback(place.leave)
        return place

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.config.timeout

    def _counted(self, endpoint: str, request: Request) -> _Note:
        return _Note(self.metrics, endpoint, request.method)


class _Note:
    """Notes how a request goes; counts it and writes its line in the log when it is left."""

    def __init__(self, metrics: Metrics, endpoint: str, method: str) -> None:
        self.metrics = metrics
        self.endpoint = endpoint
        self.method = method
        self.started = time.perf_counter()
        self.outcome = "error"
        self.status = 200
        self.queue = self.upstream = self.encoder = 0.0
        self.b: tuple[float, float] | None = None

    def elapsed(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self.started

    def __enter__(self) -> _Note:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Refused):
            self.outcome, self.status = error.outcome, error.status
        elif isinstance(error, Disconnected | ClientDisconnect | asyncio.CancelledError):
            self.outcome, self.status = "cancelled", 499
        elif error is not None:
            self.outcome, self.status = "error", 500
        self.metrics.requests.labels(self.endpoint, self.outcome).inc()
        if self.endpoint == "chat":
            self.metrics.request_seconds.observe(self.elapsed())
            self.metrics.queue_seconds.observe(self.queue)
            if self.upstream:
                self.metrics.upstream_seconds.observe(self.upstream)
        b = "" if self.b is None else f", b {self.b[0]:.2f} -> {self.b[1]:.2f}"
        parts = f"upstream {self.upstream * 1e3:.0f}, encoder {self.encoder * 1e3:.0f}"
        logger.info(
            "%s %s: %d %s%s, %.0f ms (%s)",
            self.method,
            self.endpoint,
            self.status,
            self.outcome,
            b,
            self.elapsed() * 1e3,
            parts,
        )


# ------------------------------------------------------------------------------------------------ HTTP's own affairs


class _Guard:
    """Checks the host of every request, and bounds how long a client may take for each piece of its answer.

    An error that nothing else has handled ends here: its traceback could quote what a client sent.
    """

    def __init__(self, app: ASGIApp, access: Access, send_timeout: float) -> None:
        self.app = app
        self.access = access
        self.send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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


class _LoopErrors:
    """Handles errors that belong to no request. At the limit on file descriptors there are hundreds a second."""

    def __init__(self) -> None:
        self._silent_until = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif loop.time() >= self._silent_until:
            self._silent_until = loop.time() + LOG_SECONDS
            logger.error("no file descriptor is left for further clients (ulimit -n); they wait until one is free")


class _Owning(Response):
    """Is an answer together with what it stands on, which is given back however sending ends."""

    def __init__(self, response: Response, owned: AsyncExitStack) -> None:
        self.response = response
        self.status_code = response.status_code
        self.raw_headers = response.raw_headers
        self.background = None
        self._owned = owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.response(scope, receive, send)
        except (TimeoutError, httpx2.RequestError, httpx2.StreamError) as error:
            # The client sees the connection break off, as the proxy saw the upstream's.
            logger.warning("the upstream broke off in the middle of an answer: %s", type(error).__name__)
        except (Disconnected, ClientDisconnect):
            logger.debug("the client has gone in the middle of an answer")
        finally:
            await self._owned.aclose()


def _response(content: bytes, status: int, headers: list[Header]) -> Response:
    response = Response(content, status)
    response.raw_headers += headers
    return response


def _streamed(pieces: Iterator[bytes], headers: list[Header]) -> Response:
    async def each() -> AsyncIterator[bytes]:
        for number, piece in enumerate(pieces):
            yield piece
            if number % PIECES_AT_ONCE == PIECES_AT_ONCE - 1:  # a client that reads fast never makes it wait
                await asyncio.sleep(0)

    response = StreamingResponse(each(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
    response.raw_headers += [(name, value) for name, value in headers if name != b"cache-control"]
    return response


def _own_headers(values: dict[str, str]) -> list[Header]:
    """Write the proxy's own headers."""
    return [
        ((HEADER + name).encode(), " ".join(value.split()).encode("latin-1", "replace"))
        for name, value in values.items()
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class _Body:
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


async def _whole_body(request: Request, config: ServeConfig, held: HeldBytes) -> bytes:
    """Read the body of a chat request.

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


def _escaped_path(request: Request) -> str:
    """Return the path after /v1/ as the client wrote it."""
    raw = request.scope.get("raw_path") or request.scope["path"].encode()
    return raw.decode("latin-1").partition("?")[0].removeprefix("/v1/")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T], body_ended: asyncio.Event | None = None) -> T:
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
    headers += [(b"content-type", b"application/json"), *_own_headers({"refined": "false"})]
    return _response(to_json(error_body(error)), error.status, headers)


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error_response(error)


async def _not_found(request: Request, _: Exception) -> Response:
    hint = "; the base URL for clients ends in /v1" if "completions" in request.url.path else ""
    return _error_response(Refused(404, f"there is /v1/..., /healthz and /metrics here{hint}", outcome="not_found"))


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # read by nobody
