"""A server in a thread of this process, for the tests of HTTP: real sockets, a model of no size."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from eqr_kernels import Engine, EqRConfig, EquilibriumReasoner
from eqr_kernels.checkpoint import ModelCard
from eqr_kernels.serving.http.app import create_app
from eqr_kernels.serving.http.server import Server, address_of, listening_socket
from eqr_kernels.tasks.registry import SUDOKU
from eqr_kernels.tasks.task import Task
from tests.support.commands import TINY
from tests.support.models import copier
from tests.support.serving import PATIENCE

SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
BROKEN = "55" + "." * 79


@dataclass
class Served:
    """A running server.

    Attributes:
        url: of it. client: to it, with a timeout.
    """

    url: str
    client: httpx.Client
    engine: Engine
    model: EquilibriumReasoner
    app: Any

    def solve(self, *puzzles: str, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/solve", json={"puzzles": list(puzzles), **fields})

    def raw(self, request: bytes) -> socket.socket:
        """A connection on which the bytes were sent."""
        address = httpx.URL(self.url)
        connection = socket.create_connection((address.host, address.port), timeout=PATIENCE)
        connection.sendall(request)
        return connection


def post(body: bytes, *headers: str) -> bytes:
    """A POST to /v1/solve as it goes over the wire."""
    lines = ["POST /v1/solve HTTP/1.1", "Host: here", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def sudoku_copier() -> EquilibriumReasoner:
    """Copies its clues, so that it solves a grid of which all are given; anything else it never solves."""
    config = EqRConfig.sudoku_paper(**TINY, noise_scale=0.0)
    model = copier(config)
    model.card = ModelCard(config, tol=0.02)
    return model


@contextmanager
def serving(
    model: EquilibriumReasoner | None = None,
    task: Task = SUDOKU,
    engine_options: dict[str, Any] | None = None,
    **app_options: Any,
) -> Iterator[Served]:
    """A server of the model, which ends with the block.

    Args:
        engine_options, app_options: of `Engine` and `create_app`.
    """
    model = sudoku_copier() if model is None else model
    ready = threading.Event()
    # The reference backend is stepped by the engine: what is cancelled there ends at the next step.
    engine = Engine(model, **{"backend": "reference", **(engine_options or {})})
    app = create_app(engine, model, task, **{"name": "tiny", **app_options})
    listener = listening_socket("127.0.0.1", 0)
    server = Server(app, grace=1, ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        url = address_of(listener)
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            yield Served(url, client, engine, model, app)
    finally:
        engine.close(cancel=True)
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
