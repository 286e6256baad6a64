"""Listens on the address, and serves the proxy by uvicorn until a signal ends it."""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from pfm.refiner import Refiner
from pfm.serve.app import create_app
from pfm.serve.config import ServeConfig
from pfm.serve.connections import limited_protocol

__all__ = ["listen_on", "run", "server_settings"]

_TAKEN = (errno.EADDRINUSE, errno.EACCES)  # in use, or not for users


def run(refiner: Refiner, config: ServeConfig, *, on_start: Callable[[str], object] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; requests under way have ``config.grace`` seconds to end.

    Args:
        refiner, config: as for :func:`pfm.serve.create_app`.
        on_start: called with the base URL for clients once the address is taken.

    Raises:
        ValueError: a variable that the settings name is not set.
        OSError: the address cannot be listened on.
    """
    app = create_app(refiner, config)
    listening = listen_on(config)
    host, port = listening.getsockname()[:2]
    if on_start is not None:
        on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
    with listening:
        uvicorn.Server(server_settings(app, config)).run(sockets=[listening])


def server_settings(app: ASGIApp, config: ServeConfig) -> uvicorn.Config:
    """Return how uvicorn serves an application."""
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


def listen_on(config: ServeConfig) -> socket.socket:
    """Take the address of the settings.

    Raises:
        OSError: it cannot be listened on.
    """
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
        way_out = "; choose another by --port N, or a free one by --port 0" if error.errno in _TAKEN else ""
        problem = f"cannot listen on {config.host} port {config.port}: {error.strerror or error}{way_out}"
        raise OSError(problem) from error
    return listening
