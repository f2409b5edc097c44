"""Around every request: its id, its time, its line in the log, its failure, and headers that keep browsers careful."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eqr_kernels.serving.http.errors import error_body, json_response
from eqr_kernels.serving.http.log import LOGGER
from eqr_kernels.serving.http.metrics import Metrics

CLIENT_GONE = 499
"""Status in log and metrics of a request whose client left before the answer, as nginx has it; nothing is sent."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Observed:
    """ASGI middleware; see the module.

    Args:
        paths: those that metrics are labelled with. Any other is "other": labels must not grow with what clients
            invent.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.monotonic()
        header = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = header.decode() if _REQUEST_ID.fullmatch(header) else uuid.uuid4().hex
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = CLIENT_GONE

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        path = scope["path"] if scope["path"] in self.paths else "other"
        try:
            with self.metrics.active.track_inprogress():
                await self.app(scope, receive, send_with_headers)
        except Exception as error:
            LOGGER.error("failed", extra={"fields": {"request_id": request_id}}, exc_info=error)
            if status != CLIENT_GONE:
                raise  # a response that has begun can only be broken off
            text = f"an error of the server; its log says what under the request id {request_id}"
            await json_response(error_body(text), 500)(scope, receive, send_with_headers)
        finally:
            seconds = time.monotonic() - begun
            status = state.get("status", status)
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            client = scope.get("client")
            fields = {
                "request_id": request_id,
                "client": client[0] if client else None,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "ms": round(1000 * seconds, 1),
                **{name: state[name] for name in ("puzzles", "answered", "nfe") if name in state},
            }
            LOGGER.info("request", extra={"fields": fields})
