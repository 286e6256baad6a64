"""The proxy that the environment names for an address, checked before any request.

An HTTP client that reads ``http_proxy``, ``https_proxy``, ``all_proxy`` and ``no_proxy`` by itself fails as soon as it
is made when one of them cannot be used, also for addresses that no proxy is meant for. Here only the proxy of the
address itself is looked at. Addresses of this machine never go through a proxy: it would look for them on its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

__all__ = ["Proxy", "is_own_address", "proxied_client", "proxy_of"]

SCHEMES = ("http", "https", "socks5", "socks5h")


@dataclass(frozen=True)
class Proxy:
    """A proxy that can be used.

    Attributes:
        url: as the environment has it, with scheme; it may hold a password.
        variable: the name of the environment variable.
    """

    url: str
    variable: str

    def __repr__(self) -> str:
        return f"Proxy({self.address!r}, {self.variable!r})"

    def __str__(self) -> str:
        return f"the proxy {self.address} of {self.variable}"

    @property
    def address(self) -> str:
        """The address without user and password."""
        return _shown(self.url)


def proxy_of(url: str) -> Proxy | None:
    """Return the proxy that the environment names for a URL, or None if requests go there directly.

    Raises:
        ValueError: that proxy cannot be used; the message names variable, proxy and way out, and no password.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_own_address(host) or _is_excluded(host, parts.port):
        return None
    named = getproxies()
    scheme = next((scheme for scheme in (parts.scheme, "all") if named.get(scheme)), None)
    if scheme is None:
        return None
    proxy = named[scheme] if "://" in named[scheme] else f"http://{named[scheme]}"
    variable = f"{scheme}_proxy"
    if variable not in os.environ:
        variable = variable.upper() if variable.upper() in os.environ else "the system's settings"
    problem = _problem(proxy)
    if problem is not None:
        raise ValueError(
            f"{variable} names the proxy {_shown(proxy)} for {host}, which cannot be used: {problem}, "
            f"unset {variable}, or add {host} to no_proxy"
        )
    return Proxy(proxy, variable)


def proxied_client(kind: Any, transport: Any, url: str, **options: Any) -> Any:
    """Make an HTTP client for one address, with the proxy of that address and no other.

    Args:
        kind: the class of the client.
        transport: the class of its transport, for an address without a proxy.
        url: the address.
        options: of the client.

    Raises:
        ValueError: the proxy cannot be used.
    """
    proxy = proxy_of(url)
    if proxy is not None:
        return kind(proxy=proxy.url, **options)
    # With a transport of its own a client does not read the proxies of the environment.
    limits = {"limits": options["limits"]} if "limits" in options else {}
    return kind(transport=transport(**limits), **options)


def is_own_address(host: str) -> bool:
    """Return whether a host is this machine: a loopback address, or the unspecified one."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address is not None and (address.is_loopback or address.is_unspecified)


def _is_excluded(host: str, port: int | None) -> bool:
    """Return whether ``no_proxy`` names a host, by its name, its ending, its address or its network."""
    if proxy_bypass(host) or (port is not None and proxy_bypass(f"{host}:{port}")):
        return True
    entries = [entry.strip() for entry in getproxies().get("no", "").split(",")]
    address = _address(host)
    return "*" in entries or (address is not None and any(address in network for network in _networks(entries)))


def _networks(entries: Iterable[str]) -> Iterator[Any]:
    for entry in entries:
        with contextlib.suppress(ValueError):
            yield ipaddress.ip_network(entry.replace("[", "").replace("]", ""), strict=False)


def _problem(proxy: str) -> str | None:
    """Describe what is wrong with a proxy's address, and what would be right; None if nothing is."""
    try:
        parts = urlsplit(proxy)
        scheme, host, _ = parts.scheme.lower(), parts.hostname, parts.port
    except ValueError as error:
        return f"{error}: write it as http://host:port"
    if scheme not in SCHEMES:
        known = "socks5://" if scheme.startswith("socks") else "http://"
        return f"its scheme must be {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}: write {known}, if the proxy speaks that"
    if not host:
        return "it names no host: write it as http://host:port"
    if scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        return "SOCKS needs a package: pip install socksio"
    return None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None


def _shown(proxy: str) -> str:
    scheme, mark, rest = proxy.partition("://")
    return f"{scheme}{mark}{rest.partition('/')[0].rpartition('@')[2]}"
