"""The proxy: what happens to a request from its arrival to the answer."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from pfm._internal.proxies import proxy_of
from pfm.refiner import Refiner
from pfm.refiner.stopping import CHARACTERS_A_TOKEN
from pfm.serve.access import LOOPBACK_ORIGIN, Access
from pfm.serve.answer import envelope, events, to_json
from pfm.serve.asked import EXTENSION, HEADER, Asked, read
from pfm.serve.chat import chat_page
from pfm.serve.config import ServeConfig
from pfm.serve.connections import limited_protocol
from pfm.serve.drawn import Drawn, Reply, summed
from pfm.serve.errors import Disconnected, Refused
from pfm.serve.feedback import FeedbackFile, read_feedback
from pfm.serve.http import (
    Body,
    Guard,
    LoopErrors,
    Owning,
    answer_nobody,
    answer_not_found,
    answer_other_method,
    answer_refusal,
    escaped_path,
    own_headers,
    plain_response,
    streamed_response,
    unless_gone,
    whole_body,
)
from pfm.serve.judge import Judge, Judged
from pfm.serve.metrics import Metrics
from pfm.serve.places import HeldBytes, Memory, Place, Places
from pfm.serve.scores import OWN_NAME, PATHS, ScoresAsked, model_list, read_scores, scored
from pfm.serve.tracing import Trace, Tracing
from pfm.serve.upstream import Upstream, in_background

__all__ = ["create_app", "run"]

logger = logging.getLogger(__name__)

_JSON = (b"content-type", b"application/json")
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
    proxy = _Proxy(refiner, config, tracer_provider)

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
    for path, kind in PATHS.items():
        app.add_api_route(path, functools.partial(proxy.scores, kind), methods=["POST"], response_model=None, name=kind)
    if config.feedback is not None:
        app.add_api_route("/v1/feedback", proxy.feedback, methods=["POST"], response_model=None)
        if config.upstream is not None:
            app.add_api_route("/chat", chat_page, methods=["GET"], response_model=None)
    app.add_api_route("/v1/{path:path}", proxy.other, methods=METHODS, response_model=None)
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
    app.add_middleware(Guard, access=proxy.access, send_timeout=config.send_timeout)
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

    def __init__(self, refiner: Refiner, config: ServeConfig, tracer_provider: Any = None) -> None:
        self.config = config
        self.tracing = Tracing(config.upstream, tracer_provider)
        self.refiner = refiner
        self.metrics = Metrics()
        self.judge = Judge(refiner)
        self._token = config.secret("token_env")
        self._key = config.secret("upstream_key_env")
        if config.upstream is not None:
            proxy_of(config.upstream)  # one that cannot be used shows before the proxy listens
        self.access = Access(config, self._token, secrets.token_hex(8))
        self._feedback = None
        if config.feedback is not None:
            path = Path(config.feedback).expanduser()
            self._feedback = FeedbackFile(path, config.feedback_bytes, [self._token, self._key])
        self._usual_seconds = 1.0  # of a request, a running mean

    async def open(self) -> None:
        asyncio.get_running_loop().set_exception_handler(LoopErrors())
        self.places = Places(self.config.concurrency, self.config.queue)
        self.memory = Memory(self.config.held_bytes)
        self._upstream: Upstream | None = None
        if self.config.upstream is None:
            return
        self._upstream = Upstream(self.config, self._key, self._token is not None, self.access.instance, self.metrics)
        problem = await self._upstream.probe()
        if problem is not None:
            logger.warning("%s", problem)

    async def close(self) -> None:
        self.judge.close()
        if self._feedback is not None:
            self._feedback.close()
        if self._upstream is not None:
            await self._upstream.close()

    @property
    def upstream(self) -> Upstream:
        """The server behind the proxy.

        Raises:
            Refused: there is none; status 404.
        """
        if self._upstream is None:
            raise Refused(
                404,
                "this server gives scores only (/v1/score, /v1/rerank, /v1/classify): started with --upstream URL, it "
                "refines chat completions of that server too",
                outcome="not_found",
            )
        return self._upstream

    # -- endpoints -----------------------------------------------------------------------------------------

    async def health(self) -> dict[str, Any]:
        return {"status": "ok", "active": self.places.active, "waiting": self.places.waiting}

    async def show_metrics(self, request: Request) -> Response:
        self.access.check(request)
        text = self.metrics.text(active=self.places.active, waiting=self.places.waiting, held=self.memory.used)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def other(self, request: Request, path: str) -> Response:
        """Pass a request through, its body as it comes."""
        path = escaped_path(request)
        with self._counted("other", request) as note:
            self.access.check(request)
            if self._upstream is None and path == "models" and request.method == "GET":
                note.outcome = "passed"
                return plain_response(to_json(model_list(self.config)), 200, [_JSON])
            _ = self.upstream
            async with AsyncExitStack() as owned:
                place = self._admitted(owned)
                body = Body(request, self.config.read_timeout)
                await body.begin()
                deadline = self._deadline()
                content = body.first if body.ended.is_set() else aiter(body)

                async def relayed() -> Response:
                    await place.start(deadline)
                    return await self._relayed(request, path, content, deadline, note, owned)

                response = await unless_gone(request, relayed(), body.ended)
                return note.owning(response, owned)

    async def chat(self, request: Request) -> Response:
        """Answer a chat request by the best of its candidates, or pass it through."""
        with self._counted("chat", request) as note:
            self.access.check(request)
            _ = self.upstream
            return await self._with_body(request, note, self._chat)

    async def _with_body(
        self, request: Request, note: _Note, answer: Callable[..., Coroutine[Any, Any, Response]]
    ) -> Response:
        """Admit a request, read its whole body, and answer it unless its client is gone."""
        async with AsyncExitStack() as owned:
            place = self._admitted(owned)
            held = self.memory.held()
            owned.callback(held.close)
            content = await whole_body(request, self.config, held)
            response = await unless_gone(request, answer(request, content, place, held, note, owned))
            return note.owning(response, owned)

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

    # -- scores --------------------------------------------------------------------------------------------

    async def scores(self, kind: str, request: Request) -> Response:
        """Score texts by the flow; pass the request through where it names another model."""
        with self._counted(kind, request) as note:
            self.access.check(request)
            return await self._with_body(request, note, functools.partial(self._scores, kind))

    async def _scores(
        self, kind: str, request: Request, content: bytes, place: Place, _: HeldBytes, note: _Note,
        owned: AsyncExitStack,
    ) -> Response:  # fmt: skip
        asked: ScoresAsked = await in_background(
            lambda content: read_scores(kind, content, self.config, self.refiner.flow), content, len(content)
        )
        started = time.perf_counter()
        deadline = self._deadline()
        await place.start(deadline)
        note.queue = time.perf_counter() - started
        if asked.model is not None:
            path = escaped_path(request)
            if self._upstream is None or not request.url.path.startswith("/v1/"):
                names = " or ".join(dict.fromkeys([self.config.score_model, OWN_NAME]))
                raise Refused(
                    404,
                    f"there is no such model here: leave model out, or ask for {names}",
                    outcome="not_found",
                    param="model",
                )
            return await self._relayed(request, path, content, deadline, note, owned, "the request names another model")
        try:
            async with asyncio.timeout(self.config.judge_timeout):
                found = await self.judge.win_probabilities(asked.prompts, asked.texts, together=asked.together)
        except TimeoutError:
            raise Refused(
                504,
                f"scoring took more than {self.config.judge_timeout:g} seconds: send fewer texts",
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
        self.metrics.encoder_seconds.observe(found.encoder_seconds)
        self.metrics.flow_seconds.observe(found.flow_seconds)
        self.metrics.scored_texts.labels(kind).inc(len(asked.texts))
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
                to_json(scored(asked, b, self.refiner.flow, self.config.score_model, seconds)), 200, [_JSON]
            ),
            found.values,
            len(content),
        )

    # -- feedback ------------------------------------------------------------------------------------------

    async def feedback(self, request: Request) -> Response:
        """Keep what somebody thought of an answer as a preference row."""
        with self._counted("feedback", request) as note:
            self.access.check(request)
            return await self._with_body(request, note, self._kept)

    async def _kept(
        self, request: Request, content: bytes, place: Place, _: HeldBytes, note: _Note, owned: AsyncExitStack
    ) -> Response:
        assert self._feedback is not None, "the path is served with a file only"
        row = await in_background(lambda content: read_feedback(content, self.config), content, len(content))
        await place.start(self._deadline())
        await asyncio.to_thread(self._feedback.add, row)  # a disk may be slow
        kind = "pair" if "chosen" in row else "liked" if row["label"] else "disliked"
        self.metrics.feedback.labels(kind).inc()
        note.outcome, note.status = "kept", 201
        place.leave()
        return plain_response(to_json({"object": "feedback", "kind": kind}), 201, [_JSON])

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
        call = note.trace.relay(path)
        owned.callback(call.end)  # when its body has been passed on, or it has failed
        response = await self.upstream.relay(
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
        relayed.raw_headers = [*headers, *own_headers({"refined": "false", "reason": reason})]
        return relayed

    # -- refining ------------------------------------------------------------------------------------------

    async def _refined(self, request: Request, asked: Asked, deadline: float, note: _Note, held: HeldBytes) -> Response:
        headers, query = request.headers.raw, request.scope["query_string"]
        drawn, judged, plain, spent = Drawn(), None, None, None
        total, waves, more = 0, 0, asked.n if asked.plan is None else asked.plan.first
        while more:
            started, troubles = time.perf_counter(), drawn.errors.total()
            call = note.trace.generate((asked.body or {}).get("model"), more)
            try:
                sent = call.headers(headers)
                await self.upstream.draw(asked.body or {}, sent, query, more, deadline, held, drawn, total)
            finally:
                call.set(**_drawn_attributes(drawn))
                call.end(None if drawn.replies else "upstream_failed")
            note.upstream += time.perf_counter() - started
            total, waves, more = total + more, waves + 1, 0
            if not drawn.replies:
                break
            found, plain = await self._judged(drawn, asked, judged)
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
        self._count(drawn)
        if not drawn.replies:
            return self._failed(drawn, note)
        plain = None if judged is not None else plain
        return await in_background(
            lambda judged: self._answer(drawn, judged, plain, asked, note, spent), judged, held.size
        )

    def _unjudgeable(self, drawn: Drawn, asked: Asked) -> str | None:
        """Say why the candidates cannot be judged, if they cannot."""
        if drawn.plain is not None:
            return drawn.plain
        if not drawn.choices:
            return "the upstream gave no text"
        return asked.unjudged or self._too_long(drawn, asked)

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
        headers = [*failure.headers, *kind, *own_headers({"refined": "false"})]
        return plain_response(failure.content, failure.status, headers)

    async def _judged(
        self, drawn: Drawn, asked: Asked, earlier: Judged | None = None
    ) -> tuple[Judged | None, str | None]:
        """Choose, or say why the original must do: an answer that is there is not lost to the judge's trouble."""
        plain = self._unjudgeable(drawn, asked)
        if plain is not None:
            return None, plain
        try:
            async with asyncio.timeout(self.config.judge_timeout):
                texts = [choice.text for choice in drawn.choices]
                judged = await self.judge.refine(
                    texts, asked.prompt, asked.rule, with_odds=asked.plan is not None, earlier=earlier
                )
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

    def _answer(
        self,
        drawn: Drawn,
        judged: Judged | None,
        plain: str | None,
        asked: Asked,
        note: _Note,
        spent: dict[str, Any] | None,
    ) -> Response:
        evidence: dict[str, Any] = {
            "refined": judged is not None,
            "changed": False,
            "reason": plain,
            "n": asked.n if asked.plan is None else "auto",
            "calls": drawn.calls,
            "dropped": drawn.dropped,
            "errors": dict(drawn.errors),
        }
        if spent is not None:
            evidence["spent"] = spent
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
        headers = [*reply.headers, *own_headers(told)]
        if asked.stream:
            return streamed_response(events(whole, evidence, include_usage=asked.include_usage), headers)
        content = to_json({**whole, EXTENSION: evidence})
        return plain_response(content, 200, [*headers, _JSON])

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
        route = getattr(request.scope.get("route"), "path", endpoint)
        return _Note(
            self.metrics, endpoint, request.method, self.tracing.begin(request.method, route, request.headers.raw)
        )


class _Note:
    """Notes how a request goes; counts it and writes its line in the log when it is left."""

    def __init__(self, metrics: Metrics, endpoint: str, method: str, trace: Trace) -> None:
        self.metrics = metrics
        self.trace = trace
        self._sending = False
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

    def owning(self, response: Response, owned: AsyncExitStack) -> Response:
        """Return an answer with what it stands on; the span of the request ends when it has been sent."""
        stack = owned.pop_all()
        stack.callback(self.trace.end)
        self._sending = True
        return Owning(response, stack)

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
        self._close_trace()
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

    def _close_trace(self) -> None:
        b = self.b or (None, None)
        self.trace.set(
            http__response__status_code=self.status,
            pfm__outcome=self.outcome,
            pfm__queue_seconds=round(self.queue, 6),
            pfm__win_probability__original=b[0],
            pfm__win_probability__chosen=b[1],
        )
        if not self._sending:
            self.trace.end(self.outcome if self.status >= 500 else None)


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


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
