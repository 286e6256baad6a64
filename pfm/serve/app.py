"""The proxy: what happens to a request from its arrival to the answer."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from itertools import zip_longest
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from pfm.proxies import proxy_of
from pfm.refiner import Refiner
from pfm.serve.answer import envelope, events
from pfm.serve.asked import EXTENSION, HEADER, Asked, read
from pfm.serve.config import ServeConfig, is_loopback
from pfm.serve.errors import Disconnected, Refused, error_body
from pfm.serve.judge import Judge, Judged
from pfm.serve.metrics import Metrics
from pfm.serve.places import Places
from pfm.serve.upstream import Drawn, Reply, Upstream, returned_headers, summed

__all__ = ["create_app", "run"]

logger = logging.getLogger(__name__)

BODY_BYTES = 64 * 2**20
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
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
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,  # its access log would write queries, which may hold keys
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,  # longer than clients keep connections, so that none is reused while it closes
            timeout_graceful_shutdown=math.ceil(config.grace),
        )
    )
    with listening:
        server.run(sockets=[listening])


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
        self.instance = secrets.token_hex(8)
        self._token = config.secret("token_env")
        self._key = config.secret("upstream_key_env")
        proxy_of(config.upstream)  # one that cannot be used shows before the proxy listens
        self._usual_seconds = 1.0  # of a request, a running mean

    async def open(self) -> None:
        self.places = Places(self.config.concurrency, self.config.queue)
        self.upstream = Upstream(self.config, self._key, self._token is not None, self.instance, self.metrics)
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
        self._admit(request)
        text = self.metrics.text(active=self.places.active, waiting=self.places.waiting)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def other(self, request: Request, path: str) -> Response:
        """Pass a request through, its body as it comes."""
        with self._counted("other", request) as note:
            self._admit(request)
            deadline = self._deadline()
            path = _escaped_path(request)
            await self._take(deadline)
            try:
                if _has_body(request):
                    return await self._relayed(request, path, request.stream(), deadline, note)
                return await _unless_gone(request, self._relayed(request, path, b"", deadline, note))
            except BaseException:
                self.places.leave()
                raise

    async def chat(self, request: Request) -> Response:
        """Answer a chat request by the best of its candidates, or pass it through."""
        with self._counted("chat", request) as note:
            self._admit(request)
            content = await _body(request)
            headers = dict(request.headers)
            asked = read(content, headers, self.config, self.refiner)
            started = time.perf_counter()
            deadline = self._deadline()
            await _unless_gone(request, self._take(deadline))
            try:
                note.queue = time.perf_counter() - started
                if asked.plain is not None:
                    relayed = self._relayed(request, "chat/completions", asked.content, deadline, note, asked.plain)
                    return await _unless_gone(request, relayed)
                response = await _unless_gone(request, self._refined(request, asked, deadline, note))
                self._usual_seconds += 0.1 * (time.perf_counter() - started - self._usual_seconds)
            except BaseException:
                self.places.leave()
                raise
            self.places.leave()
            return response

    # -- passing through -----------------------------------------------------------------------------------

    async def _relayed(
        self,
        request: Request,
        path: str,
        content: bytes | AsyncIterator[bytes],
        deadline: float,
        note: _Note,
        reason: str = "only chat completions are refined",
    ) -> Response:
        """Pass a request on, and the answer back as it comes. The place is left when the answer has ended."""
        response = await self.upstream.relay(
            request.method, path, request.url.query, request.headers.items(), content, deadline
        )
        note.outcome, note.status = "passed", response.status_code
        headers = returned_headers(response.headers, body=True) + _told({"refined": "false", "reason": reason})

        async def pieces() -> AsyncIterator[bytes]:
            ended = aiter(response.aiter_raw())
            while True:
                async with asyncio.timeout(self.config.timeout):  # for the next piece, not for all
                    try:
                        piece = await anext(ended)
                    except StopAsyncIteration:
                        return
                yield piece

        async def end() -> None:
            self.places.leave()
            await response.aclose()

        return _Relayed(pieces(), response.status_code, headers, end)

    # -- refining ------------------------------------------------------------------------------------------

    async def _refined(self, request: Request, asked: Asked, deadline: float, note: _Note) -> Response:
        started = time.perf_counter()
        body = asked.body or {}
        drawn = await self.upstream.draw(body, request.headers.items(), request.url.query, asked.n, deadline)
        note.upstream = time.perf_counter() - started
        self._count(drawn)
        if not drawn.replies:
            return self._failed(drawn, note)
        judged, plain = None, drawn.plain
        if plain is None and not drawn.choices:
            plain = "the upstream gave no text"
        if plain is None:
            judged, plain = await self._judged(drawn, asked)
        return self._answer(drawn, judged, plain, asked, note)

    def _failed(self, drawn: Drawn, note: _Note) -> Response:
        """Pass on what went wrong first, as the upstream said it."""
        failure = drawn.failure
        if not isinstance(failure, Reply):
            raise failure or Refused(502, "the upstream gave nothing", outcome="upstream_failed")
        note.outcome, note.status = "upstream_error", failure.status
        headers = [*failure.headers, ("content-type", failure.kind), *_told({"refined": "false"})]
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
        headers = [*reply.headers, *_told(told)]
        if asked.stream:
            return _streamed(events(whole, evidence, include_usage=asked.include_usage), headers)
        content = json.dumps({**whole, EXTENSION: evidence}).encode()
        return _response(content, 200, [*headers, ("content-type", "application/json")])

    def _margin(self, asked: Asked) -> float | None:
        if asked.rule is None or asked.rule.by == "sample":  # it has no guard
            return None
        return self.refiner.flow.guard_margin if asked.rule.margin is None else asked.rule.margin

    def _count(self, drawn: Drawn) -> None:
        self.metrics.candidates.add(len(drawn.choices), usable="true")
        self.metrics.candidates.add(drawn.dropped, usable="false")
        usage = drawn.usage() or {}
        for kind in ("prompt_tokens", "completion_tokens"):
            if isinstance(usage.get(kind), int | float):
                self.metrics.tokens.add(usage[kind], kind=kind.removesuffix("_tokens"))

    # -- who may come in, and when -------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        """Refuse clients without the token, pages of other sites, and the proxy's own requests.

        Raises:
            Refused: with status 401, 403 or 508.
        """
        if self._token is not None:
            kind, _, token = request.headers.get("authorization", "").partition(" ")
            sent = token.strip().encode("utf-8", "replace")
            if not (hmac.compare_digest(sent, self._token.encode()) and kind.lower() == "bearer"):
                raise Refused(
                    401,
                    "this proxy wants its token as the API key (Authorization: Bearer ...)",
                    outcome="unauthorized",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        else:
            # Without a token a web page could spend the upstream's key through its visitor's browser.
            origin = request.headers.get("origin")
            if origin is not None and not is_loopback(urlsplit(origin).hostname or ""):
                raise Refused(403, "pages of other sites may not use this proxy", outcome="forbidden")
        if request.headers.get(f"{HEADER}instance") == self.instance:
            raise Refused(508, "the upstream of this proxy is the proxy itself", outcome="loop")

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.config.timeout

    async def _take(self, deadline: float) -> None:
        # As long as it takes until the work that waits is done, at the usual pace.
        waiting = self.places.waiting / self.config.concurrency
        await self.places.take(deadline, retry_after=(1 + waiting) * self._usual_seconds)

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
        self.metrics.requests.add(endpoint=self.endpoint, outcome=self.outcome)
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


class _Relayed(StreamingResponse):
    """Is an answer that is passed on piece by piece; it ends what it stands on however it ends itself."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        status: int,
        headers: list[tuple[str, str]],
        end: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        super().__init__(pieces, status)
        self.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except (TimeoutError, httpx2.RequestError, httpx2.StreamError) as error:
            # The client sees the connection break off, as the proxy saw the upstream's.
            logger.warning("the upstream broke off in the middle of an answer: %s", type(error).__name__)
        except ClientDisconnect:
            logger.debug("the client has gone in the middle of an answer")
        finally:
            await self._end()


def _response(content: bytes, status: int, headers: list[tuple[str, str]]) -> Response:
    response = Response(content, status)
    _extend(response, headers)
    return response


def _streamed(pieces: Iterator[bytes], headers: list[tuple[str, str]]) -> Response:
    async def each() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    response = StreamingResponse(each(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
    _extend(response, [(name, value) for name, value in headers if name != "cache-control"])
    return response


def _extend(response: Response, headers: list[tuple[str, str]]) -> None:
    response.raw_headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def _told(values: dict[str, str]) -> list[tuple[str, str]]:
    """Write the proxy's own headers."""
    return [(HEADER + name, " ".join(value.split())) for name, value in values.items()]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _has_body(request: Request) -> bool:
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"


async def _body(request: Request) -> bytes:
    """Read a body, up to a bound."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > BODY_BYTES:
            raise Refused(413, f"the request is larger than {BODY_BYTES >> 20} MiB", outcome="bad_request")
        pieces.append(piece)
    return b"".join(pieces)


def _escaped_path(request: Request) -> str:
    """Return the path after /v1/ as the client wrote it, unless it would leave the upstream's base URL.

    Raises:
        Refused: it has a segment ``.`` or ``..``.
    """
    raw = request.scope.get("raw_path") or request.scope["path"].encode()
    path = raw.decode("latin-1").partition("?")[0].removeprefix("/v1/")
    decoded = request.scope["path"].replace("\\", "/").split("/")
    if {".", ".."} & set(decoded) or not path.isascii():
        raise Refused(400, "the path must hold no segments . or ..", outcome="bad_request")
    return path


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work on a request whose body has been read; stop it when the client goes.

    Raises:
        Disconnected: the client has gone.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error_body(error), error.status, headers={**error.headers, f"{HEADER}refined": "false"})


async def _not_found(request: Request, _: Exception) -> Response:
    hint = "; the base URL for clients ends in /v1" if "completions" in request.url.path else ""
    error = Refused(404, f"there is /v1/..., /healthz and /metrics here{hint}", outcome="not_found")
    return JSONResponse(error_body(error), 404)


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # read by nobody
