"""The server behind the proxy: draw candidates from it, or pass a request through to it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import httpx2

from pfm.generators.base import is_usable_text
from pfm.nesting import parse_json
from pfm.proxies import proxied_client, proxy_of
from pfm.reasoning import field_reasoning, read_content
from pfm.serve.asked import HEADER
from pfm.serve.config import ServeConfig
from pfm.serve.errors import Refused
from pfm.serve.metrics import Metrics

__all__ = ["Choice", "Drawn", "Reply", "Upstream", "returned_headers", "summed"]

CONNECT_SECONDS = 10.0
MODELS_KEPT = 1024
REPLY_BYTES = 64 * 2**20
# They belong to one connection, not to the message (RFC 9110, section 7.6.1).
_OF_CONNECTION = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
_OF_BODY = frozenset(("content-length", "content-encoding", "content-type"))


@dataclass
class Reply:
    """Is one whole answer of the upstream.

    Attributes:
        status: HTTP status.
        headers: those that travel back, without what describes the body.
        kind: the content type.
        content: the body, decoded.
        data: the body where it is a chat completion.
    """

    status: int
    headers: list[tuple[str, str]]
    kind: str
    content: bytes
    data: dict[str, Any] | None


@dataclass
class Choice:
    """Is one usable candidate: its text, the choice that holds it, and the completion that holds that.

    ``reasoning`` counts the characters of hidden reasoning beside the text, in a field or a part of its own.
    """

    text: str
    choice: dict[str, Any]
    reply: Reply
    reasoning: int = 0


@dataclass
class Drawn:
    """What the upstream gave for one request.

    Attributes:
        choices: usable candidates, the original first.
        replies: chat completions, in the order of the calls.
        plain: why the original must be passed on as it is, if it must.
        failure: what went wrong first: an answer with another status or form, or an error of the proxy's own.
        calls: calls of the upstream.
        dropped: choices without usable text.
        errors: what went wrong, by how often.
    """

    choices: list[Choice] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    plain: str | None = None
    failure: Reply | Refused | None = None
    calls: int = 0
    dropped: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def usage(self) -> dict[str, Any] | None:
        """Return the usage of all calls together, as far as the upstream reports it; None if it never does."""
        total: dict[str, Any] | None = None
        for reply in self.replies:
            usage = (reply.data or {}).get("usage")
            if isinstance(usage, dict):
                total = summed(total, usage)
        return total

    def add(self, result: Reply | Refused, n: int) -> None:
        """Take in the result of one call, up to n candidates in all."""
        if isinstance(result, Refused):
            self.errors[result.message] += 1
            self.failure = self.failure or result
            return
        if result.data is None:
            form = "no chat completion" if result.status == 200 else f"status {result.status}"
            self.errors[f"the upstream answered with {form}"] += 1
            self.failure = self.failure or result
            return
        self.replies.append(result)
        for choice in result.data["choices"]:
            problem = _beyond_text(choice)
            if problem is not None and not self.choices and len(self.replies) == 1:
                self.plain = self.plain or problem
            message = choice["message"]
            text, reasoning = message.get("content"), field_reasoning(message)
            if (parts := read_content(text)) is not None:
                text, reasoning = parts.text, reasoning + parts.reasoning
            if problem is None and is_usable_text(text):
                if len(self.choices) < n:
                    self.choices.append(Choice(text, choice, result, len(reasoning)))
            else:
                self.dropped += 1


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
        self._key = key
        self._strip = strip or key is not None
        self._one_a_call: OrderedDict[str, None] = OrderedDict()  # models for which the upstream does not heed n
        self._proxy = proxy_of(config.upstream)
        self._client = proxied_client(
            httpx2.AsyncClient,
            httpx2.AsyncHTTPTransport,
            config.upstream,
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
        self, body: Mapping[str, Any], headers: Iterable[tuple[str, str]], query: str, n: int, deadline: float
    ) -> Drawn:
        """Draw up to n candidates: with one call, topped up by parallel ones where that gives fewer.

        Never raises for what the upstream does: that is in the result.

        Args:
            body: the chat request.
            headers: the client's.
            query: the query of the client's URL.
            n: candidates.
            deadline: time of the event loop at which drawing ends; what is there then is returned.
        """
        ask = _Ask(self, dict(body), self.headers(headers), self.url("chat/completions", query), deadline)
        drawn = Drawn()
        model = str(body.get("model"))
        if n > 1 and model not in self._one_a_call:
            first = await ask.once(n=n)
            if isinstance(first, Reply) and first.status in (400, 422):
                # Whether it is n that is refused shows when it is left out; if not, this is the answer to pass on.
                drawn.calls += 1
                first = await ask.once()
                if isinstance(first, Reply) and first.data is not None:
                    self._note_one_a_call(model)
            elif isinstance(first, Reply) and first.data is not None and len(first.data["choices"]) == 1:
                self._note_one_a_call(model)
            drawn.calls += 1
            drawn.add(first, n)
            if not drawn.replies or drawn.plain is not None:
                return drawn
        missing = n - len(drawn.choices)
        if missing:
            start = n - missing
            for result in await ask.several(range(start, n)):
                drawn.calls += 1
                drawn.add(result, n)
        return drawn

    def _note_one_a_call(self, model: str) -> None:
        self._one_a_call[model] = None
        while len(self._one_a_call) > MODELS_KEPT:
            self._one_a_call.popitem(last=False)

    async def call(self, content: bytes, headers: dict[str, str], url: str, deadline: float) -> Reply | Refused:
        """Send one chat request and read the whole answer; what fails is returned, not raised."""
        result = await self._called(content, headers, url, deadline)
        self.metrics.upstream_calls.add(
            status=str(result.status) if isinstance(result, Reply) else f"proxy_{result.outcome}"
        )
        return result

    async def _called(self, content: bytes, headers: dict[str, str], url: str, deadline: float) -> Reply | Refused:
        try:
            async with (
                asyncio.timeout_at(deadline),
                self._client.stream("POST", url, content=content, headers=_raw(headers)) as response,
            ):
                pieces, size = [], 0
                async for piece in response.aiter_bytes():
                    size += len(piece)
                    if size > REPLY_BYTES:
                        return Refused(
                            502,
                            f"the upstream's answer is larger than {REPLY_BYTES >> 20} MiB",
                            outcome="upstream_failed",
                        )
                    pieces.append(piece)
        except TimeoutError:
            return self.timed_out()
        except (httpx2.RequestError, httpx2.StreamError) as error:
            return self.failed(error)
        whole = b"".join(pieces)
        data = _completion(whole) if response.status_code == 200 else None
        kind = response.headers.get("content-type", "")
        return Reply(response.status_code, returned_headers(response.headers), kind, whole, data)

    # -- passing through -----------------------------------------------------------------------------------

    async def relay(
        self,
        method: str,
        path: str,
        query: str,
        headers: Iterable[tuple[str, str]],
        content: bytes | AsyncIterator[bytes],
        deadline: float,
    ) -> httpx2.Response:
        """Send a request as it is; the answer's body is still to be read, raw, and to be closed.

        Raises:
            Refused: the upstream cannot be reached (502), or does not begin to answer before the deadline (504).
        """
        sent = self.headers(headers)
        # Without the client's own word for it the answer must come as it can read it: plain.
        sent.setdefault("accept-encoding", "identity")
        request = self._client.build_request(method, self.url(path, query), headers=_raw(sent), content=content)
        if isinstance(content, bytes) and not content and method in ("GET", "HEAD", "DELETE"):
            request.headers.pop("content-length", None)
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._client.send(request, stream=True)
        except TimeoutError:
            error = self.timed_out()
        except httpx2.RequestError as problem:
            error = self.failed(problem)
        else:
            self.metrics.upstream_calls.add(status=str(response.status_code))
            return response
        self.metrics.upstream_calls.add(status=f"proxy_{error.outcome}")
        raise error

    async def probe(self, seconds: float = 3.0) -> str | None:
        """Ask for the list of models, and say in one line what looks wrong; None if nothing does."""
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            async with asyncio.timeout(seconds):
                response = await self._client.get(self.url("models", ""), headers=headers)
        except (TimeoutError, httpx2.RequestError) as error:
            problem = "does not answer" if isinstance(error, TimeoutError) else self.failed(error).message
            return f"{problem}; is {self.config.upstream} the right address? Requests get status 502 until it answers"
        if response.status_code == 404 and not urlsplit(self.config.upstream).path:
            return f"the upstream has no /models: did you mean {self.config.upstream}/v1?"
        if response.status_code in (401, 403) and self._key:
            return f"the upstream refuses the key in {self.config.upstream_key_env} (status {response.status_code})"
        if response.status_code == 200 and "json" not in response.headers.get("content-type", ""):
            return f"{self.config.upstream}/models is no JSON: is that an OpenAI-compatible server?"
        return None

    # -- addresses and headers -----------------------------------------------------------------------------

    def url(self, path: str, query: str) -> str:
        """Return the upstream's address of a path, which must already be encoded."""
        return f"{self.config.upstream}/{path}" + (f"?{query}" if query else "")

    def headers(self, received: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Return what travels on of a client's headers, with the upstream's key where the proxy has one."""
        received = list(received)
        named = {part.strip().lower() for name, value in received if name == "connection" for part in value.split(",")}
        dropped = _OF_CONNECTION | named | {"host", "content-length", "expect"}
        if self._strip:
            dropped |= {"authorization"}
        sent = {name: value for name, value in received if name not in dropped and not name.startswith(HEADER)}
        if self._key:
            sent["authorization"] = f"Bearer {self._key}"
        sent[f"{HEADER}instance"] = self.instance
        return sent

    def timed_out(self) -> Refused:
        """Return the error of an upstream that is too slow."""
        return Refused(504, f"the upstream did not answer in {self.config.timeout:g} seconds", outcome="timeout")

    def failed(self, error: Exception) -> Refused:
        """Return the error of an upstream that cannot be reached or breaks off."""
        what = "cannot be reached" if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout) else "broke off"
        # A local protocol error may quote the headers, and with them a key.
        quotable = str(error) and not isinstance(error, httpx2.LocalProtocolError)
        detail = str(error) if quotable else type(error).__name__
        what += "" if self._proxy is None else f" through {self._proxy}"
        return Refused(502, f"the upstream {what}: {detail}", outcome="upstream_failed")


@dataclass
class _Ask:
    """Is the chat request of one client, to be sent once or several times."""

    upstream: Upstream
    body: dict[str, Any]
    headers: dict[str, str]
    url: str
    deadline: float

    def __post_init__(self) -> None:
        # The candidates are read whole; the answer is streamed once one of them is chosen.
        for name in ("stream", "stream_options", "n"):
            self.body.pop(name, None)
        # What it says of the body holds for the client's; and the client library decodes what it asks for.
        for name in ("accept-encoding", "content-encoding"):
            self.headers.pop(name, None)
        self.headers["content-type"] = "application/json"
        self.headers["accept"] = "application/json"

    async def once(self, n: int | None = None, place: int = 0) -> Reply | Refused:
        """Send it; as candidate number ``place``, so that a seed gives another draw for each."""
        body = self.body if n is None else self.body | {"n": n}
        seed = body.get("seed")
        if place and isinstance(seed, int) and not isinstance(seed, bool):
            body = body | {"seed": seed + place}
        content = json.dumps(body).encode()
        return await self.upstream.call(content, self.headers, self.url, self.deadline)

    async def several(self, places: Iterable[int]) -> list[Reply | Refused]:
        """Send it for each place at once; results in their order."""
        return await _together(self.once(place=place) for place in places)


async def _together(calls: Iterable[Coroutine[Any, Any, Reply | Refused]]) -> list[Reply | Refused]:
    """Await all; when that is cancelled, so are they, and their connections are closed."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call) for call in calls]
    return [task.result() for task in tasks]


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


def returned_headers(headers: httpx2.Headers, *, body: bool = False) -> list[tuple[str, str]]:
    """Return the headers of an answer that travel back; those that describe the body only with ``body``."""
    dropped = _OF_CONNECTION | (frozenset() if body else _OF_BODY) | {"date", "server"}
    return [(name.lower(), value) for name, value in headers.multi_items() if name.lower() not in dropped]


def _completion(content: bytes) -> dict[str, Any] | None:
    """Return the body of a chat completion that has at least one choice with a message, else None."""
    try:
        data = parse_json(content)
    except ValueError:
        return None
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices:
        return None
    if not all(isinstance(choice, dict) and isinstance(choice.get("message"), dict) for choice in choices):
        return None
    return data


def _beyond_text(choice: Mapping[str, Any]) -> str | None:
    """Say what a choice holds that is more, or less, than a text of the model."""
    for name in ("tool_calls", "function_call", "refusal", "audio"):
        if choice["message"].get(name):
            return f"the answer has {name}"
    if choice.get("finish_reason") == "content_filter":
        return "the answer was cut by a content filter"
    content = choice["message"].get("content")
    if not isinstance(content, str | None) and read_content(content) is None:
        return "the answer is not text"
    return None


def summed(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> dict[str, Any] | None:
    """Add the numbers of two usages up, at any depth; of anything else keep the first. None is no usage."""
    if one is None:
        return dict(other) or None
    total = dict(one)
    for name, value in other.items():
        before = total.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            total[name] = summed(before, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            total[name] = value + (before if isinstance(before, int | float) else 0)
        elif before is None:
            total[name] = value
    return total
