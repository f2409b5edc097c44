"""The one form that every error of the server has: {"error": {"message", "argument"?}}."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Response


class Refused(Exception):
    """A request that gets an error instead of an answer.

    Args:
        status: of HTTP.
        message: what is wrong, what is allowed, and the remedy.
        argument: the field of the request that it is about.
        reason: under which `eqr_rejected_total` counts it.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        argument: str | None = None,
        *,
        reason: str = "bad_request",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.argument = status, message, argument
        self.reason, self.headers = reason, headers or {}


def error_body(message: str, argument: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, **({} if argument is None else {"argument": argument})}}


def to_json(value: Any) -> bytes:
    """Compact, in ASCII: a lone surrogate in a message has no UTF-8."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def shortened(value: object, limit: int = 80) -> str:
    """How a value that came is quoted."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
