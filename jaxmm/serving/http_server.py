"""Run a web application until it is stopped by SIGTERM or Ctrl-C."""

import contextlib
import errno
import ipaddress
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from jaxmm.validation import ConfigError, require

STOPPING = 30
"""Most seconds in which requests are still answered after SIGTERM."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""


def is_loopback(host: str) -> bool:
    """Return whether only this computer can connect to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any free one. Raise `ConfigError` if it is not possible."""
    require(0 <= port < 2**16, "port", port, "0 to 65535")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET,
                                    backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port is {port}, which another program uses; expected a free one, or 0") from None
        raise ConfigError(f"host is {host!r}, port {port}, which cannot be listened at: {error.strerror}") from None


def run_server(app: Any, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then those that are still running; call `ready` when it starts."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", server_header=False,
                            timeout_graceful_shutdown=STOPPING)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn stops, and then repeats the signal
    try:
        ready()
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
