"""The server behind the proxy: draw candidates from it, or pass a request through to it."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import httpx2

from pfm._internal.nesting import parse_json
from pfm._internal.proxies import proxied_client, proxy_of
from pfm.serve.access import INSTANCE
from pfm.serve.answer import to_json
from pfm.serve.asked import HEADER, MAX_VALUES
from pfm.serve.config import ServeConfig
from pfm.serve.drawn import Drawn, Header, Reply
from pfm.serve.errors import Refused
from pfm.serve.metrics import Metrics
from pfm.serve.places import HeldBytes
from pfm.serve.redaction import Redactor

__all__ = ["Upstream", "in_background"]

CONNECT_SECONDS = 10.0
MODELS_KEPT = 1024
BACKGROUND_BYTES = 64 * 2**10  # larger bodies are read and written in a thread
# They belong to one connection, not to the message (RFC 9110, section 7.6.1).
_OF_CONNECTION = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
_OF_BODY = frozenset((b"content-length", b"content-encoding", b"content-type"))
_OF_SERVER = frozenset((b"date", b"server"))


class Upstream:
    """Talks to the server behind the proxy.

    Keys travel in the headers of a request and are kept nowhere. Cookies of the upstream are not kept either:
    they would travel on with other clients' requests.

    Args:
        config: the proxy's settings.
        key: sent as bearer token in place of the client's, if given.
        strip: whether the client's own authorization is meant for the proxy, and must not travel on.
        instance: a name of this proxy, by which it knows its own requests.
        metrics: where calls are counted.
    """

    def __init__(self, config: ServeConfig, key: str | None, strip: bool, instance: str, metrics: Metrics) -> None:
        self.config = config
        self.metrics = metrics
        self.instance = instance
        self.redactor = Redactor(key)
        self._key = key
        self._strip = strip or key is not None
        self._one_a_call: OrderedDict[bytes, None] = OrderedDict()  # models for which the upstream does not heed n
        address = config.upstream
        assert address is not None, "an Upstream has an address"
        self._address = address
        self._proxy = proxy_of(address)
        self._client = proxied_client(
            httpx2.AsyncClient,
            httpx2.AsyncHTTPTransport,
            address,
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=config.connections, max_keepalive_connections=config.connections),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    # -- draws ---------------------------------------------------------------------------------------------

    async def draw(
        self,
        body: Mapping[str, Any],
        headers: Iterable[Header],
        query: bytes,
        n: int,
        deadline: float,
        held: HeldBytes,
        earlier: Drawn | None = None,
        asked: int = 0,
    ) -> Drawn:
        """Draw up to n candidates: with one call, topped up by parallel ones where that gives fewer.

        Never raises for what the upstream does: that is in the result.

        Args:
            body: the chat request.
            headers: the client's.
            query: the query of the client's URL.
            n: candidates.
            deadline: time of the event loop at which drawing ends; what is there then is returned.
            held: where the bytes of the answers are counted.
            earlier: what earlier waves gave, to which n further candidates are added.
            asked: candidates that those asked for.

        Raises:
            Refused: the query cannot travel on.
        """
        url = self.url("chat/completions", query)
        ask = _Ask(self, dict(body), self.headers(headers), url, deadline, held)
        drawn = Drawn() if earlier is None else earlier
        total = len(drawn.choices) + n
        model = hashlib.blake2b(to_json(body.get("model")), digest_size=16).digest()
        if n > 1 and model not in self._one_a_call:
            first = await ask.once(n=n, place=asked)
            if isinstance(first, Reply) and first.status in (400, 422):
                # Whether it is n that is refused shows when it is left out; if not, this is the answer to pass on.
                drawn.calls += 1
                first = await ask.once(place=asked)
                if isinstance(first, Reply) and first.data is not None:
                    self._note_one_a_call(model)
            elif isinstance(first, Reply) and first.data is not None and len(first.data["choices"]) == 1:
                self._note_one_a_call(model)
            drawn.calls += 1
            drawn.add(first, total)
            if not drawn.replies or drawn.plain is not None:
                return drawn
        missing = total - len(drawn.choices)
        if missing:
            end = asked + n
            for result in await ask.several(range(end - missing, end)):
                drawn.calls += 1
                drawn.add(result, total)
        return drawn

    def _note_one_a_call(self, model: bytes) -> None:
        self._one_a_call[model] = None
        while len(self._one_a_call) > MODELS_KEPT:
            self._one_a_call.popitem(last=False)

    async def call(
        self, content: bytes, headers: list[Header], url: httpx2.URL, deadline: float, held: HeldBytes
    ) -> Reply | Refused:
        """Send one chat request and read the whole answer; what fails is returned, not raised."""
        result = await self._called(content, headers, url, deadline, held)
        self.metrics.upstream_calls.labels(
            str(result.status) if isinstance(result, Reply) else f"proxy_{result.outcome}"
        ).inc()
        return result

    async def _called(
        self, content: bytes, headers: list[Header], url: httpx2.URL, deadline: float, held: HeldBytes
    ) -> Reply | Refused:
        def build() -> httpx2.Request:
            return self._client.build_request("POST", url, content=content, headers=headers)

        pieces, size = [], 0
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._sent(build, repeatable=True)
                try:
                    _check_status(response.status_code)
                    async for piece in response.aiter_bytes():
                        size += len(piece)
                        if size > self.config.reply_bytes:
                            return Refused(
                                502,
                                f"the upstream's answer is larger than {self.config.reply_bytes} bytes",
                                outcome="upstream_failed",
                            )
                        held.add(len(piece))
                        pieces.append(piece)
                finally:
                    await response.aclose()
        except TimeoutError:
            return self.timed_out()
        except (httpx2.RequestError, httpx2.StreamError) as error:
            return self.failed(error)
        except Refused as error:
            return error
        status = response.status_code
        whole = self.redactor.whole(b"".join(pieces), error=status >= 400)
        data = await in_background(_completion, whole, size) if status == 200 else None
        kind = b"".join(value for name, value in response.headers.raw if name.lower() == b"content-type")
        return Reply(status, self.returned(response, body=False), kind, whole, data)

    # -- passing through -----------------------------------------------------------------------------------

    async def relay(
        self,
        method: str,
        path: str,
        query: bytes,
        headers: Iterable[Header],
        content: bytes | AsyncIterator[bytes],
        deadline: float,
        own: Callable[[Callable[[], Coroutine[Any, Any, None]]], object],
    ) -> httpx2.Response:
        """Send a request as it is; the answer's body is still to be read, raw.

        Args:
            method, path, query, headers, content: of the client's request.
            deadline: time of the event loop at which the answer must have begun.
            own: called with what closes the answer as soon as there is one, so that it is closed whatever happens.

        Raises:
            Refused: the request cannot travel on (400), the upstream cannot be reached (502), or does not begin
                to answer before the deadline (504).
        """
        received = list(headers)
        url, sent = self.url(path, query), self.headers(received)
        if not isinstance(content, bytes):  # else it would travel in chunks, which not every server takes
            sent += [(name, value) for name, value in received if name == b"content-length"]
        if self.redactor:  # what is compressed could not be searched for the key
            sent = [(name, value) for name, value in sent if name != b"accept-encoding"]
        if all(name != b"accept-encoding" for name, _ in sent):
            # Without the client's own word for it the answer must come as it can read it: plain.
            sent.append((b"accept-encoding", b"identity"))

        def build() -> httpx2.Request:
            request = self._client.build_request(method, url, headers=sent, content=content)
            if isinstance(content, bytes) and not content and method in ("GET", "HEAD", "DELETE"):
                request.headers.pop("content-length", None)
            return request

        try:
            async with asyncio.timeout_at(deadline):
                response = await self._sent(build, repeatable=isinstance(content, bytes))
                own(response.aclose)
            _check_status(response.status_code)
        except TimeoutError:
            error = self.timed_out()
        except httpx2.RequestError as problem:
            error = self.failed(problem)
        except Refused as problem:
            error = problem
        else:
            self.metrics.upstream_calls.labels(str(response.status_code)).inc()
            return response
        self.metrics.upstream_calls.labels(f"proxy_{error.outcome}").inc()
        raise error

    def body(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        """Return the pieces of an answer as they come, without the proxy's own key."""
        if not self.redactor:
            return response.aiter_raw()
        return self.redactor.pieces(response.aiter_bytes(), error=response.status_code >= 400)

    async def _sent(self, build: Callable[[], httpx2.Request], *, repeatable: bool) -> httpx2.Response:
        """Send a request; once more where a connection that was kept open turns out to be closed.

        A server may close an idle connection at the moment at which a request is sent on it. Each repetition uses
        that connection up, and a failure on a fresh connection is final.
        """
        while True:
            fresh = False

            async def trace(event: str, _: Any) -> None:
                nonlocal fresh
                fresh = fresh or event == "connection.connect_tcp.started"

            request = build()
            request.extensions = {**request.extensions, "trace": trace}
            try:
                return await self._client.send(request, stream=True)
            except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError) as error:
                answered = isinstance(error, httpx2.RemoteProtocolError) and "without sending" not in str(error)
                if fresh or answered or not repeatable:
                    raise

    async def probe(self, seconds: float = 3.0) -> str | None:
        """Ask for the list of models, and say in one line what looks wrong; None if nothing does."""
        try:
            async with asyncio.timeout(seconds):
                response = await self._client.get(self.url("models", b""), headers=self.headers([]))
        except (TimeoutError, httpx2.RequestError) as error:
            problem = "does not answer" if isinstance(error, TimeoutError) else self.failed(error).message
            return f"{problem}; is {self._address} the right address? Requests get status 502 until it answers"
        if response.status_code == 404 and not urlsplit(self._address).path:
            return f"the upstream has no /models: did you mean {self._address}/v1?"
        if response.status_code in (401, 403) and self._key:
            return f"the upstream refuses the key in {self.config.upstream_key_env} (status {response.status_code})"
        if response.status_code == 200 and "json" not in response.headers.get("content-type", ""):
            return f"{self._address}/models is no JSON: is that an OpenAI-compatible server?"
        return None

    # -- addresses and headers -----------------------------------------------------------------------------

    def url(self, path: str, query: bytes) -> httpx2.URL:
        """Return the upstream's address of a path, which must already be encoded.

        Raises:
            Refused: there can be no such address; status 400.
        """
        try:
            if not query:  # else it may hold a key, which is not to be kept
                return _url(f"{self._address}/{path}")
            return httpx2.URL(f"{self._address}/{path}?{query.decode('ascii')}")
        except (httpx2.InvalidURL, ValueError):
            raise Refused(
                400, "path and query are too long, or hold what no address may", outcome="bad_request"
            ) from None

    def headers(self, received: Iterable[Header]) -> list[Header]:
        """Return what travels on of a client's headers, with the upstream's key where the proxy has one."""
        received = list(received)
        dropped = _OF_CONNECTION | _named_by_connection(received) | {b"host", b"content-length", b"expect"}
        if self._strip:
            dropped |= {b"authorization"}
        own = HEADER.encode()
        sent = [(name, value) for name, value in received if name not in dropped and not name.startswith(own)]
        if self._key:
            sent.append((b"authorization", f"Bearer {self._key}".encode()))
        passed = [value for name, value in received if name == INSTANCE.encode()]
        sent.append((INSTANCE.encode(), b", ".join([*passed, self.instance.encode()])))
        return sent

    def returned(self, response: httpx2.Response, *, body: bool) -> list[Header]:
        """Return the headers of an answer that travel back; those that describe the body only with ``body``.

        Those that only this proxy may write are left out: its own, and who may read answers in a browser.
        """
        received = [(name.lower(), value) for name, value in response.headers.raw]
        dropped = _OF_CONNECTION | _OF_SERVER | _named_by_connection(received)
        if not body:
            dropped |= _OF_BODY
        elif self.redactor and any(name == b"content-encoding" for name, _ in received):  # it is decoded
            dropped |= {b"content-encoding", b"content-length"}
        own = (HEADER.encode(), b"access-control-")
        error = response.status_code >= 400
        return [
            (name, self.redactor.whole(value, error=error))
            for name, value in received
            if name not in dropped and not name.startswith(own)
        ]

    def timed_out(self) -> Refused:
        """Return the error of an upstream that is too slow."""
        return Refused(504, f"the upstream did not answer in {self.config.timeout:g} seconds", outcome="timeout")

    def failed(self, error: Exception) -> Refused:
        """Return the error of an upstream that cannot be reached or breaks off.

        The client library's own message may quote headers, and with them a key, or what another client was sent on
        the same connection. It is quoted only where no connection came about.
        """
        through = "" if self._proxy is None else f" through {self._proxy}"
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            message = f"the upstream cannot be reached{through}: {error or type(error).__name__}"
        else:
            message = f"the upstream broke off{through} ({type(error).__name__})"
        return Refused(502, message, outcome="upstream_failed")


@dataclass
class _Ask:
    """The chat request of one client, to be sent once or several times."""

    upstream: Upstream
    body: dict[str, Any]
    headers: list[Header]
    url: httpx2.URL
    deadline: float
    held: HeldBytes

    def __post_init__(self) -> None:
        # The candidates are read whole; the answer is streamed once one of them is chosen.
        for name in ("stream", "stream_options", "n"):
            self.body.pop(name, None)
        # What the client says of the body holds for its own; and a compressed answer could be of any size.
        own = {
            b"accept": b"application/json",
            b"accept-encoding": b"identity",
            b"content-type": b"application/json",
        }
        dropped = own.keys() | {b"content-encoding"}
        self.headers = [(name, value) for name, value in self.headers if name not in dropped] + list(own.items())
        self._content: bytes | None = None

    async def once(self, n: int | None = None, place: int = 0) -> Reply | Refused:
        """Send it; as candidate number ``place``, so that a seed gives another draw for each."""
        seed, more = self.body.get("seed"), {} if n is None else {"n": n}
        if place and isinstance(seed, int) and not isinstance(seed, bool):
            more["seed"] = seed + place
        if more:
            content = await self._written(self.body | more)
        else:
            if self._content is None:  # parallel calls share the bytes
                self._content = await self._written(self.body)
            content = self._content
        return await self.upstream.call(content, self.headers, self.url, self.deadline, self.held)

    async def _written(self, body: Mapping[str, Any]) -> bytes:
        return await in_background(to_json, body, self.held.size)

    async def several(self, places: Iterable[int]) -> list[Reply | Refused]:
        """Send it for each place at once; results in their order."""
        return await _together(self.once(place=place) for place in places)


async def _together(calls: Iterable[Coroutine[Any, Any, Reply | Refused]]) -> list[Reply | Refused]:
    """Await all; when that is cancelled, so are they, and their connections are closed."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call) for call in calls]
    return [task.result() for task in tasks]


async def in_background(work: Callable[[Any], Any], value: Any, size: int) -> Any:
    """Call a function that reads or writes a body of about so many bytes, in a thread where that is large."""
    return work(value) if size <= BACKGROUND_BYTES else await asyncio.to_thread(work, value)


@functools.lru_cache(maxsize=64)
def _url(address: str) -> httpx2.URL:
    """Read an address once."""
    return httpx2.URL(address)


def _check_status(status: int) -> None:
    if not 200 <= status < 600:
        raise Refused(502, f"the upstream answered with status {status}", outcome="upstream_failed")


def _named_by_connection(headers: Iterable[Header]) -> set[bytes]:
    return {part.strip().lower() for name, value in headers if name == b"connection" for part in value.split(b",")}


def _completion(content: bytes) -> dict[str, Any] | None:
    """Return the body of a chat completion that has at least one choice with a message, else None."""
    try:
        data = parse_json(content, max_values=MAX_VALUES)
    except ValueError:
        return None
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices:
        return None
    if not all(isinstance(choice, dict) and isinstance(choice.get("message"), dict) for choice in choices):
        return None
    return data
