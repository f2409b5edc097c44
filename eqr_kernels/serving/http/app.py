"""The FastAPI app over an Engine: its endpoints, and how they are described."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import json
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

import prometheus_client
from fastapi import Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

import eqr_kernels
from eqr_kernels.modules import EqROperator
from eqr_kernels.serving import Engine
from eqr_kernels.serving.http.errors import Refused, error_body, json_response
from eqr_kernels.serving.http.metrics import Metrics, Throughput
from eqr_kernels.serving.http.middleware import CLIENT_GONE, Observed
from eqr_kernels.serving.http.schema import (
    Defaults,
    Failure,
    Health,
    Limits,
    Results,
    SolveRequest,
    Step,
    parse_request,
    request_model,
)
from eqr_kernels.serving.http.solving import Solving, why_no_turns
from eqr_kernels.solver import card_in
from eqr_kernels.tasks.task import Task
from eqr_kernels.tolerance import card_tolerance

_BODY_SECONDS = 30.0
"""In which a body has to arrive."""
_PATHS = {
    "/": "the page",
    "/v1/solve": "POST puzzles",
    "/v1/model": "the model",
    "/healthz": "whether it answers",
    "/metrics": "for Prometheus",
    "/openapi.json": "the schema",
}


def create_app(
    engine: Engine,
    model: EqROperator,
    task: Task,
    *,
    name: str,
    limits: Limits | None = None,
    defaults: Defaults | None = None,
    token: str | None = None,
    example: str = "",
) -> FastAPI:
    """The app.

    Args:
        engine: which solves; the caller closes it.
        model: the engine's. task: how its puzzles are written.
        name: of the model, to those who ask.
        token: that requests to /v1/ and /metrics must bear; None asks for none.
        example: a puzzle as the task writes it, for the schema; by default one in which all cells are open.

    Raises:
        ValueError: defaults beyond the limits, or an empty token.
    """
    limits, defaults = limits or Limits(), defaults or Defaults()
    # More than may wait would never be taken.
    limits = dataclasses.replace(limits, puzzles=min(limits.puzzles, engine.max_queued))
    defaults.fit(limits)
    no_turns = why_no_turns(engine, task)
    if defaults.turn_every is not None and no_turns is not None:
        raise ValueError(f"turn_every is {defaults.turn_every} by default, and must be None here: {no_turns}")
    if token is not None and not token.strip():
        raise ValueError("the token is empty; leave it out, or give one that is hard to guess")
    accepted = request_model(limits, defaults, example)
    build = {"version": eqr_kernels.__version__, "model": name, "task": task.name, "backend": engine.backend}
    metrics, throughput = Metrics(engine, build), Throughput()
    app = FastAPI(
        title="eqr_kernels",
        version=eqr_kernels.__version__,
        description=f"Puzzles of the {task.name} task, each solved until its own latent state has settled.",
        docs_url=None,  # they fetch scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Observed, metrics=metrics, paths=frozenset(_PATHS))
    app.state.metrics = metrics
    _handle_errors(app, metrics)
    guarded = [] if token is None else [Depends(_token_check(token))]
    page, policy = _page()

    @app.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse, tags=["page"], include_in_schema=False)
    async def show_page() -> Response:
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
        return HTMLResponse(page, headers=headers)

    @app.get("/healthz", response_model=Health, responses=_errors(503), tags=["operation"])
    async def healthz() -> Response:
        """200 while the engine takes puzzles."""
        if engine.closed:
            raise Refused(503, "the server is shutting down", reason="shutting_down")
        return json_response({"status": "ok"})

    metrics_text: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Metrics."}
    }

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**metrics_text, **_errors(*([] if token is None else [401]))},
        dependencies=guarded,
        tags=["operation"],
    )
    async def show_metrics() -> Response:
        """Figures for Prometheus."""
        text = await asyncio.to_thread(prometheus_client.generate_latest, metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    facts = _model_facts(engine, model, task, name, limits, defaults)

    @app.get(
        "/v1/model",
        response_model=dict[str, Any],
        responses=_errors(*([] if token is None else [401])),
        dependencies=guarded,
        tags=["model"],
    )
    async def show_model() -> Response:
        """What answers: config, card, tolerances, backend and why; and what a request may ask for."""
        return json_response(facts)

    @app.post(
        "/v1/solve",
        response_model=Results,
        responses=_errors(400, 408, 413, 415, 429, 500, 503, 504, *([] if token is None else [401])),
        dependencies=guarded,
        tags=["solve"],
    )
    async def solve(request: Request) -> Response:
        """Solve puzzles; an entry for each, in their order.

        One that cannot be read, or was not answered in time, has an error in place of its answer. The request as a
        whole fails only where none has an answer.
        """
        parsed = parse_request(await _body(request, limits.body), accepted, limits)
        work = Solving(engine, task, no_turns, model.config, parsed, metrics, throughput, request.scope["state"])
        await work.submit()
        if parsed.stream:
            return _Stream(work)
        answered = await _unless_gone(request, work.results)
        if answered is None:
            work.give_up()
            return Response(status_code=CLIENT_GONE)
        return json_response(answered)

    app.openapi = lambda: _described(app, accepted)  # type: ignore[method-assign]
    return app


def _token_check(token: str) -> Callable[..., Awaitable[None]]:
    expected = hashlib.sha256(token.encode()).digest()
    bearer = HTTPBearer(auto_error=False, description="The token that the server was started with.")

    async def check(given: HTTPAuthorizationCredentials | None = Depends(bearer)) -> None:  # noqa: B008
        came = hashlib.sha256((given.credentials if given else "").encode("utf-8", "surrogateescape")).digest()
        if not hmac.compare_digest(came, expected):
            message = (
                "the token is wrong" if given else "a token is needed: send the header Authorization: Bearer TOKEN"
            )
            raise Refused(401, message, reason="unauthorized", headers={"WWW-Authenticate": "Bearer"})

    # FastAPI looks the annotation up among this module's names.
    return check


async def _body(request: Request, limit: int) -> bytes:
    """The body of a request for JSON.

    Raises:
        Refused: 415 another type, 413 above `limit` bytes, 408 too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps pages from elsewhere out: a browser asks before it sends this type across origins.
        raise Refused(415, f"the body must be application/json, got {kind[:80] or 'no Content-Type'}; set Content-Type")
    too_large = Refused(
        413, f"the body must be at most {limit} bytes; send fewer puzzles a request", reason="too_large"
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {_BODY_SECONDS:g} s", reason="slow_body") from None
    return bytes(body)


async def _unless_gone(request: Request, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any] | None:
    """What the work gives; None where the client leaves first, and the work is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work())
    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for each in (working, leaving):
            each.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class _Stream(StreamingResponse):
    """JSON lines of a solve, which ends where its reader leaves."""

    def __init__(self, work: Solving) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter for nginx: lines as they come
        super().__init__(work.lines(), media_type="application/x-ndjson", headers=headers)
        self.work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.work.give_up()


def _handle_errors(app: FastAPI, metrics: Metrics) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        metrics.rejected.labels(error.reason).inc()
        return json_response(error_body(error.message, error.argument), error.status, error.headers)

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path[:80]}; there are {', '.join(_PATHS)}"
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            message = f"{request.url.path[:80]} takes {allowed}, got {request.method[:20]}"
        return json_response(error_body(message), error.status_code, dict(error.headers or {}))

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, of_http)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Failure} for status in statuses}


def _described(app: FastAPI, accepted: type[SolveRequest]) -> dict[str, Any]:
    """The schema: that of FastAPI, with the body of /v1/solve and what a stream holds."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        parts = schema.setdefault("components", {}).setdefault("schemas", {})
        at = "#/components/schemas/{model}"
        for model in (accepted, Step):
            own = model.model_json_schema(ref_template=at)
            parts.update(own.pop("$defs", {}))
            parts[model.__name__] = own
        post = schema["paths"]["/v1/solve"]["post"]
        body = {"application/json": {"schema": {"$ref": at.format(model=accepted.__name__)}}}
        post["requestBody"] = {"required": True, "content": body}
        line = {"anyOf": [{"$ref": at.format(model=name)} for name in ("Step", "Results", "Failure")]}
        post["responses"]["200"]["content"]["application/x-ndjson"] = {"schema": line}
        retry = {"Retry-After": {"description": "Seconds, by the measured rate.", "schema": {"type": "integer"}}}
        post["responses"]["429"]["headers"] = retry
        app.openapi_schema = schema
    return app.openapi_schema


def _model_facts(
    engine: Engine, model: EqROperator, task: Task, name: str, limits: Limits, defaults: Defaults
) -> dict[str, Any]:
    card = model.card
    tolerances = {}
    for tol in ("auto", "fast"):
        known = card_tolerance(card_in(model, engine.precision), tol)
        tolerances[tol] = None if known is None else {"value": known.value, "caveat": known.caveat or None}
    return {
        "name": name,
        "version": eqr_kernels.__version__,
        "task": task.name,
        "written": task.written,
        "config": dataclasses.asdict(model.config),
        "card": None if card is None else json.loads(card.to_json()),
        "tolerances": tolerances,
        "backend": engine.backend,
        "backend_reason": engine.backend_reason,
        "defaults": dataclasses.asdict(defaults),
        "limits": dataclasses.asdict(limits),
    }


def _page() -> tuple[str, str]:
    """The page, and the Content-Security-Policy that lets it run its own script and style and reach this server."""
    html = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    def sources(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy
