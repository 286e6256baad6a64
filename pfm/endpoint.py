"""An OpenAI-compatible endpoint: its address, its key, and clients that cannot be kept waiting for ever.

The openai client retries and has a timeout, which bounds the wait for the *next* piece of an answer. A server
that sends a byte a second, or bytes without end, is never timed out. The clients made here also bound the time
and the size of an answer as a whole; breaking a bound is an error like any other, and retried by the client.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pfm.errors import MissingKeyError
from pfm.proxies import proxied_client, proxy_of

__all__ = ["NO_KEY", "OPENAI", "SECRET_NAME", "Endpoint", "check_extra_query", "public_address"]

OPENAI = "https://api.openai.com/v1"
MAX_ANSWER_BYTES = 32_000_000
SECRET_NAME = re.compile(r"api.?key|secret|password|authorization|(access|auth|bearer).?token", re.IGNORECASE)
NO_KEY = "none"  # what a server that needs none is sent


class Endpoint:
    """Holds where to send requests, and the key in memory only.

    Args:
        base_url: None: ``OPENAI_BASE_URL``, else OpenAI itself.
        api_key: None: ``OPENAI_API_KEY``, which is sent to OpenAI and to ``OPENAI_BASE_URL`` only; another
            ``base_url`` gets a placeholder.
        timeout: seconds for one try; None: the client's default.
        max_retries: None: the client's default.

    Attributes:
        route: says through which proxy a client that was made here asks, for errors; empty for none.

    Raises:
        ValueError: the address is none, or holds a password or a query.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | None = None,
        max_retries: int | None = None,
    ) -> None:
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"base_url must be an address such as http://localhost:8000/v1, got {public_address(self.base_url)!r}"
            )
        if "@" in parts.netloc:
            raise ValueError("base_url must not hold a password: it would show in logs; pass it as api_key")
        if parts.query:
            names = ", ".join(f"{name!r}: ..." for name, _ in parse_qsl(parts.query, keep_blank_values=True))
            raise ValueError(
                "base_url must not hold a query: requests would go astray; give the address without it, and "
                f"extra_query={{{names}}}"
            )
        self.timeout = timeout
        self.max_retries = max_retries
        self.route = ""
        self._api_key = api_key
        self._takes_environment_key = base_url is None or parts.hostname == urlsplit(OPENAI).hostname

    @property
    def address(self) -> str:
        """The address without what may be secret in it."""
        return public_address(self.base_url)

    def key(self) -> str:
        """Return the key to send.

        Raises:
            MissingKeyError: there is none, and OpenAI is to be asked.
        """
        if self._api_key is not None:
            return self._api_key
        if self._takes_environment_key and os.environ.get("OPENAI_API_KEY"):
            return os.environ["OPENAI_API_KEY"]
        if self.base_url != OPENAI:
            return NO_KEY
        raise MissingKeyError("no key: set OPENAI_API_KEY, or pass api_key, or base_url for a server that needs none")

    def secrets(self) -> list[str]:
        """List what must not be shown."""
        try:
            key = self.key()
        except MissingKeyError:
            key = ""
        return [key] if key and key != NO_KEY else []

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
        http_client = proxied_client(*kinds, self.base_url, limits=openai.DEFAULT_CONNECTION_LIMITS)
        return {"base_url": self.base_url, "api_key": self.key(), "http_client": http_client, **given}

    def __repr__(self) -> str:
        return f"Endpoint({self.address!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_api_key": None}  # the other process takes its key from its environment


def check_extra_query(query: Mapping[str, Any] | None) -> None:
    """Refuse a key in a query, which would show in logs.

    Raises:
        ValueError: by the name of the entry.
    """
    shown = [name for name in query or {} if name == "key" or SECRET_NAME.search(name)]
    if shown:
        raise ValueError(
            f"extra_query must not hold {', '.join(shown)}: addresses show in logs; pass api_key or extra_headers"
        )


def public_address(base_url: str) -> str:
    """Return an address without user, password, query and fragment."""
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


@functools.cache
def _bounded_clients() -> tuple[tuple[type, type], tuple[type, type]]:
    """Make the two classes of HTTP clients, each with that of its transport, once openai has been imported."""
    import openai

    http = import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])  # httpx2, or httpx

    class BoundedClient(openai.DefaultHttpxClient):
        def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            bound = _Bound(request)
            response = super().send(request, stream=True, **options)
            if stream:
                return response
            try:
                for piece in response.iter_bytes():
                    bound.add(piece)
            finally:
                response.close()
            return bound.whole(response)

    class AsyncBoundedClient(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            bound = _Bound(request)
            response = await super().send(request, stream=True, **options)
            if stream:
                return response
            try:
                async for piece in response.aiter_bytes():
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

    def add(self, piece: bytes) -> None:
        errors = import_module(type(self.request).__module__.partition(".")[0])  # httpx2, or the older httpx
        self.size += len(piece)
        if self.size > MAX_ANSWER_BYTES:
            raise errors.ReadError(f"the answer is larger than {MAX_ANSWER_BYTES:,} bytes", request=self.request)
        if self.seconds is not None and time.monotonic() - self.started > self.seconds:
            raise errors.ReadTimeout(f"the answer took longer than {self.seconds:g} seconds", request=self.request)
        self.pieces.append(piece)

    def whole(self, response: Any) -> Any:
        """Return the response with its body in memory."""
        encoded = ("content-encoding", "transfer-encoding", "content-length")
        headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in encoded]
        whole = type(response)(
            status_code=response.status_code,
            headers=headers,
            content=b"".join(self.pieces),
            request=response.request,
            extensions=response.extensions,
            history=response.history,
        )
        whole.elapsed = response.elapsed
        return whole
