"""Who may use the proxy: hosts, origins, the token, and no proxy that this one stands behind."""

from __future__ import annotations

import hmac
import re
from urllib.parse import urlsplit

from fastapi import Request

from pfm.serve.asked import HEADER
from pfm.serve.config import ServeConfig, is_loopback
from pfm.serve.errors import Refused

__all__ = ["INSTANCE", "LOOPBACK_ORIGIN", "Access"]

INSTANCE = f"{HEADER}instance"
MOST_PROXIES = 8  # in a row
# Pages of this machine. They may read answers; pages of other origins only where the settings name them.
LOOPBACK_ORIGIN = r"https?://(localhost|([a-z0-9-]+\.)+localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?"
_LOOPBACK = re.compile(LOOPBACK_ORIGIN)
_ID = re.compile(r"[0-9a-f]{16}")


class Access:
    """Decides whether a request may come in.

    Args:
        config: the proxy's settings.
        token: what clients must send as bearer token; None for nothing.
        instance: a name of this proxy, by which it knows its own requests.
    """

    def __init__(self, config: ServeConfig, token: str | None, instance: str) -> None:
        self.instance = instance
        self._token = token
        self._origins = frozenset(config.allowed_origins)
        self._hosts = frozenset(host.lower() for host in config.allowed_hosts)
        # A name that resolves to this machine reaches it from any web page; beyond loopback its names are not known.
        self._any_host = "*" in self._hosts or not (self._hosts or is_loopback(config.host))

    def check_host(self, host: str | None) -> None:
        """Check the name by which the client knows this proxy (DNS rebinding gives it an attacker's).

        Raises:
            Refused: with status 403.
        """
        if self._any_host or host is None:  # every browser sends one
            return
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if not is_loopback(name) and name not in self._hosts:
            raise Refused(403, "no host of this proxy: allowed_hosts names further ones", outcome="forbidden")

    def check(self, request: Request) -> None:
        """Check token or origin, and the proxies on the way.

        Raises:
            Refused: with status 400, 401, 403 or 508.
        """
        origin = request.headers.get("origin")
        if origin is not None:
            try:
                urlsplit(origin)
            except ValueError:
                raise Refused(400, "the Origin header is malformed", outcome="bad_request") from None
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
        elif origin is not None and not self._allows(origin, request.headers.get("host")):
            # Without a token a web page could spend the upstream's key through its visitor's browser.
            raise Refused(
                403,
                "pages of other sites may not use this proxy without its token: allowed_origins names those that may, "
                "and allowed_hosts the names of this proxy, whose own page then may",
                outcome="forbidden",
            )
        passed = proxies(request)
        if self.instance in passed:
            raise Refused(508, "the upstream of this proxy is the proxy itself", outcome="loop")
        if len(passed) >= MOST_PROXIES:
            raise Refused(508, f"the request came through {len(passed)} proxies already", outcome="loop")

    def _allows(self, origin: str, host: str | None) -> bool:
        if {"*", origin} & self._origins or _LOOPBACK.fullmatch(origin.lower()):
            return True
        # This proxy's own page, by a name that the settings give: a name that merely resolves to it may be anyone's.
        place = urlsplit(origin.lower())
        return host is not None and place.netloc == host.lower() and place.hostname in self._hosts


def proxies(request: Request) -> list[str]:
    """Return the names of the proxies that a request has come through."""
    return _ID.findall(",".join(request.headers.getlist(INSTANCE)))
