"""Settings of the proxy."""

from __future__ import annotations

import ipaddress
import json
import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pfm._internal.checks import check_number, check_whole

__all__ = ["ServeConfig", "is_loopback", "read_settings"]

_COUNTS = ("max_n", "concurrency", "connections", "clients", "request_bytes", "reply_bytes", "held_bytes",
           "text_characters", "judged_characters", "scored_texts", "feedback_bytes")  # fmt: skip
_SECONDS = ("timeout", "judge_timeout", "grace", "read_timeout", "send_timeout")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of ``pfm serve``. It names the variables that hold keys, never the keys.

    Attributes:
        upstream: base URL of the OpenAI-compatible server behind the proxy, as a client would be given it;
            most end in ``/v1``. None: there is none, and the server gives scores only.
        model: sent to the upstream in place of the model that the client names; None leaves it alone.
        score_model: name of the flow as a model in requests for scores, beside ``pfm``. Such requests for other models
            are passed on.
        max_n: the most candidates that a request may ask for.
        host, port: where to listen; port 0 takes a free one.
        token_env: name of the environment variable that holds the token which clients must send. The upstream
            then never sees the clients' ``Authorization``. None: no token, and theirs is passed on.
        upstream_key_env: name of the environment variable that holds the key of the upstream.
        concurrency: requests worked on at once.
        queue: requests that may wait beyond those, or whose bodies are still arriving; further ones are refused with
            status 429.
        connections: calls of the upstream at once, over all requests.
        timeout: seconds for a request to wait its turn and to have its candidates drawn. Then the candidates
            that are there are judged; without any the status is 504.
        judge_timeout: seconds for encoding and judging; then the original is the answer.
        grace: seconds that a shutdown waits for requests under way.
        read_timeout: seconds in which the headers of a request must arrive, and then the whole body of a chat
            request; of other requests the next piece of the body.
        send_timeout: seconds in which a client must take the next 64 KiB of its answer.
        clients: connections of clients at once; further ones are closed.
        request_bytes: the largest body of a chat request; beyond it the status is 413.
        reply_bytes: the largest answer of the upstream that is read as a candidate.
        held_bytes: bodies of all requests and answers held in memory at one time; beyond it the status is 503.
        text_characters: the longest prompt and the longest candidate that are encoded; beyond it the original is
            the answer.
        judged_characters: the same for all texts of one request together.
        scored_texts: the most texts of a request for scores; beyond it the status is 413.
        feedback: file to which ``POST /v1/feedback`` appends preference rows, and with an upstream a chat page at
            ``/chat`` that sends them; None: requests for that path are passed on as any other.
        feedback_bytes: the most bytes of that file; beyond it the status is 507.
        allowed_hosts: names, beside those of this machine, under which a proxy that listens on loopback is asked
            (the ``Host`` header); ``"*"`` allows all. Given any, they hold wherever it listens, and its own page
            ``/chat`` works under them without a token.
        allowed_origins: web pages that may use the proxy from a browser, as ``https://chat.example``, beside those
            of this machine; ``"*"`` allows all.

    Raises:
        ValueError: a number is none, or out of range, or an address or a name cannot be used.
        TypeError: another setting is of another type.
    """

    upstream: str | None = None
    model: str | None = None
    score_model: str = "pfm"
    max_n: int = 32
    host: str = "127.0.0.1"
    port: int = 8100
    token_env: str | None = None
    upstream_key_env: str | None = None
    concurrency: int = 32
    queue: int = 128
    connections: int = 64
    timeout: float = 120.0
    judge_timeout: float = 60.0
    grace: float = 30.0
    read_timeout: float = 30.0
    send_timeout: float = 30.0
    clients: int = 1024
    request_bytes: int = 8 * 2**20
    reply_bytes: int = 16 * 2**20
    held_bytes: int = 256 * 2**20
    text_characters: int = 32_768
    judged_characters: int = 131_072
    scored_texts: int = 4096
    feedback: str | os.PathLike[str] | None = None
    feedback_bytes: int = 64 * 2**20
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.upstream is not None:
            object.__setattr__(self, "upstream", _checked_upstream(self.upstream))
        elif self.model is not None or self.upstream_key_env is not None:
            name = "model" if self.model is not None else "upstream_key_env"
            raise ValueError(f"{name} has no effect without upstream: the base URL of the server to refine")
        if not isinstance(self.score_model, str) or not self.score_model.strip() or not self.score_model.isprintable():
            raise ValueError(f"score_model must be a name, got {self.score_model!r}")
        if self.feedback is not None and (not isinstance(self.feedback, str | os.PathLike) or not str(self.feedback)):
            raise TypeError(f"feedback must be the path of a file, got {self.feedback!r}")
        for name in _COUNTS:
            check_whole(name, getattr(self, name), 1)
        check_whole("queue", self.queue, 0)
        check_whole("port", self.port, 0, 65535)
        for name in _SECONDS:
            check_number(name, getattr(self, name), above=0, hint="seconds")
        for name in ("request_bytes", "reply_bytes"):
            if getattr(self, name) > self.held_bytes:
                raise ValueError(f"{name} must be at most held_bytes={self.held_bytes}, got {getattr(self, name)}")
        object.__setattr__(self, "allowed_hosts", _checked_names("allowed_hosts", self.allowed_hosts, _is_host))
        object.__setattr__(self, "allowed_origins", _checked_names("allowed_origins", self.allowed_origins, _is_origin))
        if self.upstream_key_env and not self.token_env and not is_loopback(self.host):
            raise ValueError(
                f"upstream_key_env without token_env on {self.host}: whoever reaches it could use the upstream's key; "
                "set token_env too, or listen on 127.0.0.1"
            )

    def secret(self, name: str) -> str | None:
        """Return the value of the variable that ``token_env`` or ``upstream_key_env`` names.

        Raises:
            ValueError: the variable is not set, or empty.
        """
        variable = getattr(self, name)
        if variable is None:
            return None
        value = os.environ.get(variable, "").strip()
        if not value:
            raise ValueError(f"{name} names the environment variable {variable}, which is not set")
        if not value.isascii():
            raise ValueError(f"the environment variable {variable} must hold ASCII characters only")
        return value


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read settings by name from a ``.toml`` or ``.json`` file.

    Raises:
        ValueError: the file cannot be parsed, or holds no settings by name.
        OSError: it cannot be read.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected settings as TOML, or as JSON in a .json file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings by name, got {type(values).__name__}")
    return values


def is_loopback(host: str) -> bool:
    """Return whether an address or name of a host is this machine's own."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _checked_names(name: str, values: Any, valid: Callable[[str], bool]) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"{name} must be a list of texts, got {values!r}")
    shown = "host names, as proxy.example" if name == "allowed_hosts" else "origins, as https://chat.example"
    for value in values:
        if value != "*" and not valid(value):
            raise ValueError(f'{name} must hold {shown}, or "*"; got {value!r}')
    return tuple(values)


def _is_host(value: str) -> bool:
    try:
        return urlsplit(f"//{value}").hostname == value.lower()
    except ValueError:
        return False


def _is_origin(value: str) -> bool:
    scheme, separator, place = value.partition("://")
    try:
        return bool(scheme and separator and urlsplit(value).hostname and place == urlsplit(value).netloc)
    except ValueError:
        return False


def _checked_upstream(upstream: Any) -> str:
    if not isinstance(upstream, str):
        raise TypeError(f"upstream must be a URL, got {type(upstream).__name__}")
    shown = "as in http://localhost:8000/v1 or https://api.openai.com/v1"
    try:
        parts = urlsplit(upstream.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"upstream must be a URL, {shown}: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("upstream must hold no user or password; name the variable of a key in upstream_key_env")
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"upstream must be a URL with http or https, {shown}; got {upstream!r}")
    if parts.query or parts.fragment:
        raise ValueError(f"upstream must be a base URL, without ? and #, {shown}; got {parts.scheme}://{host}…")
    address = upstream.strip().rstrip("/")
    for ending in ("/chat/completions", "/models"):
        if address.endswith(ending):
            raise ValueError(f"upstream must be the base URL, without {ending}: {address.removesuffix(ending)}")
    return address
