"""An OpenAI-compatible endpoint: its address, its key, and clients that cannot be kept waiting for ever.

The openai client retries and has a timeout, which bounds the wait for the *next* piece of an answer. A server
that sends a byte a second, or bytes without end, is never timed out. The clients made here also bound the time
and the size of an answer as a whole; breaking a bound is an error like any other, and retried by the client. They
follow no redirect: it would carry prompts, and keys in headers of any name, to another place than the one given.

A key goes over https or to this machine only, and a key of the environment only to the origin (scheme, host, port)
that it was set for.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, urlsplit

from pfm._internal.proxies import is_own_address, proxied_client, proxy_of
from pfm.errors import MissingKeyError

__all__ = [
    "NO_KEY",
    "OPENAI",
    "Endpoint",
    "check_extra_query",
    "is_secret_name",
    "origin",
    "public_address",
    "redacted",
]

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
MAX_ANSWER_BYTES = 32_000_000
NO_KEY = "none"  # what a server that needs none is sent
# What people pass as a key to servers that need none; nothing is lost if others read it.
PLACEHOLDERS = frozenset({"", "none", "empty", "-", "x", "null", "dummy", "no-key", "not-needed", "sk-no-key-required"})
PORTS = {"http": 80, "https": 443}
SHOWN = 600  # characters of a message
PIECE = 8  # characters of a secret that are a piece of it, not chance


_SECRET_NAME = re.compile(
    r"key|secret|passw|authori[sz]|auth\b|auth[._-]|credential|cookie|signature|\bsig\b|session|"
    r"(access|auth|bearer|refresh|id|api|x|security).?token|^token$",
    re.IGNORECASE,
)


def is_secret_name(name: str) -> bool:
    """Return whether what is named so is likely to be a secret."""
    return _SECRET_NAME.search(name) is not None


def checked_key(name: str, key: str | None) -> str | None:
    """Return a key without the white space around it, such as the line break of a file; None where nothing is left.

    Raises:
        ValueError: it cannot be sent in a header. The message does not show it.

    >>> checked_key("api_key", "sk-abc\\n")
    'sk-abc'
    """
    if key is None:
        return None
    if not isinstance(key, str):
        raise ValueError(f"{name} must be a text: got {type(key).__name__}")
    key = key.strip()
    wrong = next((place for place, character in enumerate(key) if not " " <= character <= "~"), None)
    if wrong is not None:
        raise ValueError(
            f"{name} must hold letters, digits and signs of ASCII only: character {wrong + 1} of {len(key)} is none, "
            "perhaps a line break, or a quote or dash that an editor changed; copy it again"
        )
    return key or None


class Endpoint:
    """Holds where to send requests, and the key in memory only.

    Attributes:
        hidden: further texts that must not be shown, such as the values of headers.

    Args:
        base_url: None: ``OPENAI_BASE_URL``, else OpenAI itself.
        api_key: None: ``OPENAI_API_KEY``, which is sent to the origins of OpenAI and of ``OPENAI_BASE_URL`` only;
            another ``base_url`` gets a placeholder.
        timeout: seconds for one try; None: the client's default.
        max_retries: None: the client's default.

    Attributes:
        route: says the proxy of clients made here, for errors; empty for none.

    Raises:
        ValueError: the address is none, or holds a password or a query; a key would be sent in the clear.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | None = None,
        max_retries: int | None = None,
    ) -> None:
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).strip()
        _check_address(self.base_url)
        self.timeout = timeout
        self.max_retries = max_retries
        self.route = ""
        self._api_key = api_key = checked_key("api_key", api_key)
        self.hidden: tuple[str, ...] = ()
        if api_key is not None and api_key.lower() not in PLACEHOLDERS and not self.is_private:
            raise ValueError(
                f"api_key would be sent in the clear to {self.address}: give an https address, reach the server "
                "through a tunnel to 127.0.0.1, leave api_key out if it needs none, or pass a client of your own"
            )

    @classmethod
    def of_client(cls, client: Any) -> Endpoint:
        """Describe the endpoint of a client that the user has made, whose address and key are the user's affair."""
        self = object.__new__(cls)
        key = getattr(client, "api_key", None)  # of some clients a function that fetches it
        self.base_url = str(getattr(client, "base_url", None) or OPENAI)
        self.timeout = self.max_retries = None
        self.route = ""
        self._api_key = key if isinstance(key, str) and key else NO_KEY
        headers = getattr(client, "default_headers", None)
        shown = (
            {} if headers is None else {name: value for name, value in dict(headers).items() if is_secret_name(name)}
        )
        self.hidden = tuple(value for value in shown.values() if isinstance(value, str))
        return self

    @property
    def is_private(self) -> bool:
        """Return whether no one in between can read what is sent: https, or a server on this machine."""
        parts = urlsplit(self.base_url)
        return parts.scheme == "https" or is_own_address(parts.hostname or "")

    @property
    def address(self) -> str:
        """The address without what may be secret in it."""
        return public_address(self.base_url)

    def key(self) -> str:
        """Return the key to send.

        Raises:
            MissingKeyError: there is none, and the address is that of OpenAI.
        """
        if self._api_key is not None:
            return self._api_key
        key = checked_key("OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY"))
        own = {origin(OPENAI), origin(os.environ.get("OPENAI_BASE_URL", "").strip())} - {None}
        if key and origin(self.base_url) in own:
            if self.is_private or key.lower() in PLACEHOLDERS:
                return key
            logger.warning("OPENAI_API_KEY is not sent to %s: keys go over https or to this machine only", self.address)
        if origin(self.base_url) != origin(OPENAI):
            return NO_KEY
        raise MissingKeyError("no key: set OPENAI_API_KEY, or pass api_key, or base_url for a server that needs none")

    def secrets(self) -> list[str]:
        """List what must not be shown."""
        try:
            key = self.key()
        except MissingKeyError:
            key = ""
        return [*([key] if key and key != NO_KEY else []), *self.hidden]

    def check_proxy(self) -> None:
        """Check the proxy that the environment names for this address.

        Raises:
            ValueError: it cannot be used.
        """
        proxy = proxy_of(self.base_url)
        self.route = "" if proxy is None else f" through {proxy}"

    def client(self) -> Any:
        """Make an `openai.OpenAI`.

        Raises:
            MissingKeyError, ValueError: there is no key, or the environment's proxy cannot be used.
        """
        import openai

        return openai.OpenAI(**self._options(_bounded_clients()[0]))

    def async_client(self) -> Any:
        """Make an `openai.AsyncOpenAI`; raises as :meth:`client` does."""
        import openai

        return openai.AsyncOpenAI(**self._options(_bounded_clients()[1]))

    def _options(self, kinds: tuple[Any, Any]) -> dict[str, Any]:
        import openai

        options = {"timeout": self.timeout, "max_retries": self.max_retries}
        given = {name: value for name, value in options.items() if value is not None}
        self.check_proxy()
        # Not compressed: the bounds are on what an answer takes in memory.
        http_client = proxied_client(
            *kinds, self.base_url, limits=openai.DEFAULT_CONNECTION_LIMITS, follow_redirects=False,
            headers={"Accept-Encoding": "identity"},
        )  # fmt: skip
        return {"base_url": self.base_url, "api_key": self.key(), "http_client": http_client, **given}

    def __repr__(self) -> str:
        return f"Endpoint({self.address!r})"

    def __getstate__(self) -> dict[str, Any]:
        # The other process takes its key from its environment.
        return {**self.__dict__, "_api_key": None, "hidden": ()}


def _split(address: str) -> SplitResult | None:
    """Take an address apart, or return None if it is none; the parser's own errors quote what they were given."""
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018 - raises if it is no number
    except ValueError:
        return None
    return parts


def _check_address(base_url: str) -> None:
    """Refuse what is no address, or holds what must not be shown; never repeat what may be a password.

    Raises:
        ValueError: it is.
    """
    if "@" in base_url:
        raise ValueError("base_url must not hold a password (or '@'): it would show in logs; pass it as api_key")
    parts = _split(base_url)
    if parts is None or parts.scheme not in PORTS or not parts.hostname or re.search(r"[\s\x00-\x20\x7f]", base_url):
        host = re.fullmatch(r"(localhost|[\w-]+(\.[\w-]+)+)(:\d{1,5})?(/[\w./-]{0,40})?", base_url, re.ASCII)
        got = f", got {base_url!r}" if host or not base_url else ""
        raise ValueError(f"base_url must be an address such as http://localhost:8000/v1, with http:// or https://{got}")
    if parts.query or parts.fragment or base_url.endswith(("?", "#")):
        # Of a query without "=" the name may be the secret.
        names = ", ".join(f"{name!r}: ..." for name, _ in parse_qsl(parts.query))
        raise ValueError(
            "base_url must not hold a query: requests would go astray; give the address without it, and "
            f"extra_query={{{names or '...'}}}"
        )


def check_extra_query(query: Mapping[str, Any] | None) -> None:
    """Refuse a key in a query, which would show in logs.

    Raises:
        ValueError: by the name of the entry.
    """
    shown = [name for name in query or {} if is_secret_name(name)]
    if shown:
        raise ValueError(
            f"extra_query must not hold {', '.join(shown)}: addresses show in logs; pass api_key or extra_headers"
        )


def public_address(base_url: str) -> str:
    """Return an address without user, password, query and fragment; "(no address)" for what is none."""
    parts = _split(base_url)
    if parts is None or not parts.scheme or not parts.hostname or "@" in parts.path + parts.query + parts.fragment:
        return "(no address)"
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    return re.sub(r"[\x00-\x20\x7f-\x9f]", "?", shown)  # a terminal would obey some of these


def origin(address: str) -> tuple[str, str, int] | None:
    """Return scheme, host and port of an address of the web, None for anything else."""
    parts = _split(address)
    if parts is None or parts.scheme not in PORTS or not parts.hostname:
        return None
    return parts.scheme, parts.hostname.rstrip("."), parts.port or PORTS[parts.scheme]


def redacted(text: str, secrets: Iterable[str], shown: int = SHOWN) -> str:
    """Return text in one line of bounded length without secrets, whole or in pieces, as servers quote them.

    What is cut is cut after that, so that no cut leaves the beginning of a secret.
    """
    whole = [secret for secret in secrets if secret]
    for secret in sorted(whole, key=len, reverse=True):
        for spelled in {secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1]}:
            text = text.replace(spelled, "***")
    text = " ".join(text.split())
    longest = max(map(len, whole), default=0)
    if len(text) > shown + longest:
        text = text[: shown + longest]
    pieces = {secret[at : at + PIECE] for secret in whole for at in range(len(secret) - PIECE + 1)}
    hidden = [False] * len(text)
    for at in range(len(text) - PIECE + 1 if pieces else 0):
        if text[at : at + PIECE] in pieces:
            hidden[at : at + PIECE] = [True] * PIECE
    found = re.sub("\0+", "***", "".join("\0" if hide else letter for letter, hide in zip(text, hidden, strict=True)))
    return found if len(found) <= shown else f"{found[:shown]}..."


@functools.cache
def _bounded_clients() -> tuple[tuple[type, type], tuple[type, type]]:
    """Make the two classes of HTTP clients, each with that of its transport, once openai has been imported."""
    import openai

    http = import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])  # httpx2, or httpx

    class BoundedClient(openai.DefaultHttpxClient):
        def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            bound = _Bound(request)
            options["follow_redirects"] = False
            response = super().send(request, stream=True, **options)
            if stream:
                return response
            try:
                bound.begin(response)
                for piece in response.iter_raw():
                    bound.add(piece)
            finally:
                response.close()
            return bound.whole(response)

    class AsyncBoundedClient(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            bound = _Bound(request)
            options["follow_redirects"] = False
            response = await super().send(request, stream=True, **options)
            if stream:
                return response
            try:
                bound.begin(response)
                async for piece in response.aiter_raw():
                    bound.add(piece)
            finally:
                await response.aclose()
            return bound.whole(response)

    return (BoundedClient, http.HTTPTransport), (AsyncBoundedClient, http.AsyncHTTPTransport)


class _Bound:
    """Collects the pieces of one answer, up to a size and a moment."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.seconds = (request.extensions.get("timeout") or {}).get("read")
        self.started = time.monotonic()
        self.pieces: list[bytes] = []
        self.size = 0

    def begin(self, response: Any) -> None:
        """Refuse an answer that says itself that it is too large, before any of it is read."""
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length[:30]) > MAX_ANSWER_BYTES:
            raise self._too_large()

    def add(self, piece: bytes) -> None:
        """Take one piece as it came over the wire."""
        self.size += len(piece)
        if self.size > MAX_ANSWER_BYTES:
            raise self._too_large()
        if self.seconds is not None and time.monotonic() - self.started > self.seconds:
            text = f"the answer took longer than {self.seconds:g} seconds"
            raise self._errors().ReadTimeout(text, request=self.request)
        self.pieces.append(piece)

    def _errors(self) -> Any:
        return import_module(type(self.request).__module__.partition(".")[0])  # httpx2, or the older httpx

    def _too_large(self) -> Exception:
        text = f"the answer is larger than {MAX_ANSWER_BYTES:,} bytes"
        return self._errors().ReadError(text, request=self.request)

    def _unpacked(self, coding: str) -> bytes:
        """Decompress what was sent; a small body may unpack to one that fills the memory, so this is bounded too."""
        packed = b"".join(self.pieces)
        if coding in ("", "identity"):
            return packed
        if coding not in ("gzip", "x-gzip", "deflate"):
            text = f"the answer is compressed as {coding[:40]!r}, which was not asked for"
            raise self._errors().DecodingError(text, request=self.request)
        try:
            found = zlib.decompressobj(47).decompress(packed, MAX_ANSWER_BYTES + 1)
        except zlib.error as error:
            raise self._errors().DecodingError(
                f"the answer cannot be unpacked: {error}", request=self.request
            ) from None
        if len(found) > MAX_ANSWER_BYTES:
            raise self._too_large()
        return found

    def whole(self, response: Any) -> Any:
        """Return the response with its body in memory."""
        encoded = ("content-encoding", "transfer-encoding", "content-length")
        headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in encoded]
        whole = type(response)(
            status_code=response.status_code,
            headers=headers,
            content=self._unpacked(response.headers.get("content-encoding", "").strip().lower()),
            request=response.request,
            extensions=response.extensions,
            history=response.history,
        )
        whole.elapsed = response.elapsed
        return whole
