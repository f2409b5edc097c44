"""Listening, and stopping without losing what is in flight."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        OSError: no such host, or the port is taken; with the remedy.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}; see --host and --port") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port, or 0 for any that is free"
        ) from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    address = str(listener.getsockname()[0])
    return address.startswith("127.") or address == "::1"


def address_of(listener: socket.socket) -> str:
    """As a browser takes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready, and whether it cut anything off.

    Args:
        grace: seconds that a stop may take to answer what is in flight. What is left then is cut off.
        ready: called when connections are taken.

    Attributes:
        should_exit: set it to stop, from any thread.
        cut: after the end, whether something was cut off.
    """

    def __init__(self, app: ASGIApp, *, grace: int, ready: Callable[[], object]) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=grace,
            # Longer than clients and proxies keep theirs, or one of these would send into a connection that closes.
            timeout_keep_alive=75,
            lifespan="off",
            # Not whatever happens to be installed.
            loop="asyncio",
            http="h11",
        )
        super().__init__(config)
        self.ready = ready
        self.cut = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # Tasks that are left were cancelled when the time was up.
        self.cut = self.force_exit or bool(self.server_state.tasks)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop it. Unlike uvicorn's own it does not raise them again: a stop is no error."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A second one, of either kind, stops at once.
        self.force_exit = self.should_exit
        self.should_exit = True
