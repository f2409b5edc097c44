"""The app of `eqr serve` on the machines of a Ray cluster: Ray Serve runs replicas, each with an Engine of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eqr_kernels.arguments import check_count
from eqr_kernels.distributed.job import PackedModel
from eqr_kernels.distributed.optional import ray_core, ray_serve
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.serving import Engine
from eqr_kernels.serving.http.app import create_app
from eqr_kernels.serving.http.log import json_log
from eqr_kernels.tasks.registry import find_task

APP = "eqr"
"""Name of the app, and of its deployment, in Ray Serve."""
_ONGOING_PER_CPU = 4
"""Requests in a replica, for each of its CPUs, above which another replica is wanted."""
_PASSING = 100
"""Requests at a replica that have no puzzle in its engine: those that are refused, ask for metrics or read slowly."""


@dataclass(frozen=True)
class Served:
    """What each replica serves, as data.

    Attributes:
        packed: the model but for its weights.
        task: as `find_task` takes it; it must be found where the replica runs.
        cpus: of the replica, and threads of its engine.
        engine, app: options of `Engine` and of `create_app`.
    """

    packed: PackedModel
    task: str
    cpus: int
    engine: dict[str, Any]
    app: dict[str, Any]


class Replica:
    """The app with its engine, in a process of Ray's."""

    def __init__(self, served: Served, weights: list[Any]) -> None:
        torch.set_num_threads(served.cpus)
        model = served.packed.unpack(ray_core().get(weights[0]))
        self._open = ExitStack()
        self._open.enter_context(json_log())
        self._engine = Engine(model, **served.engine)
        self._open.callback(self._engine.close, cancel=True)
        self._built = create_app(self._engine, model, find_task(served.task), **served.app)
        self._figures: dict[str, Any] = {}

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _without_id(self._built)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises; and the app's figures are given to Ray's metrics.

        Raises:
            RuntimeError: the engine takes no more puzzles.
        """
        if self._engine.closed:
            raise RuntimeError("the engine is closed")
        for family in self._built.state.metrics.registry.collect():
            if not family.name.startswith("eqr_") or family.type not in ("gauge", "counter"):
                continue
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    self._figure(sample.name, family.documentation, sample.labels).set(sample.value, sample.labels)

    def _figure(self, name: str, text: str, labels: Mapping[str, str]) -> Any:
        if name not in self._figures:
            self._figures[name] = ray_serve().metrics.Gauge(name, description=text, tag_keys=tuple(labels))
        return self._figures[name]

    def __del__(self) -> None:
        # Ray Serve calls it when what was in flight is answered, or the grace is over.
        if hasattr(self, "_open"):
            self._open.close()


def _without_id(app: ASGIApp) -> ASGIApp:
    """The app without the request's id in its responses, where Ray Serve adds it: that which the request came with."""

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        request_id = dict(scope.get("headers", ())).get(b"x-request-id")

        async def send_once(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [each for each in message["headers"] if each != (b"x-request-id", request_id)]
            await send(message)

        await app(scope, receive, send_once)

    return called


def application(
    model: EquilibriumReasoner,
    task: str = "sudoku",
    *,
    name: str = "model",
    replicas: tuple[int, int] = (1, 1),
    cpus: int = 1,
    grace: float = 30,
    engine: Mapping[str, Any] | None = None,
    app: Mapping[str, Any] | None = None,
    autoscaling: Mapping[str, Any] | None = None,
) -> Any:
    """The app for `ray.serve.run`, where this process is connected to a cluster.

    The weights are in the object store, once on each machine, for as long as this process is connected. Each replica
    has an engine that answers bit for bit as `model.solve` here.

    Args:
        task: as `--task` takes it.
        name: of the model, to those who ask.
        replicas: least and most. Between them Ray Serve has as many as keep the requests in each, waiting ones with
            them, at four for each of its CPUs.
        cpus: of each replica, and threads of its engine; on a GPU it asks for one besides.
        grace: seconds that a replica which ends may take to answer what it has.
        engine, app: options of `Engine` and of `create_app`. max_queued is of each replica.
        autoscaling: fields of Ray Serve's `AutoscalingConfig` that are to be otherwise.

    Raises:
        ImportError: Ray Serve is missing.
        ValueError: replicas or cpus below 1, or the least above the most; an option of `Engine` or the app.
        RuntimeError: the model has hooks, adapters or other layers.
    """
    serve = ray_serve()
    least, most = replicas
    if check_count("replicas", least) > check_count("replicas", most):
        raise ValueError(f"replicas must be (least, most), got {replicas}")
    options = dict(engine or {})
    # Made once here, so that what is wrong is told here and not by a replica.
    with Engine(model, **options) as tried:
        create_app(tried, model, find_task(task), **{"name": name, **(app or {})})
        held_at_once = tried.max_queued + tried.max_in_flight + _PASSING
    packed, weights = PackedModel.of(model, options)
    served = Served(packed, task, check_count("cpus", cpus), options, {"name": name, **(app or {})})
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=APP,
        ray_actor_options={"num_cpus": cpus, "num_gpus": 1 if packed.device == "cuda" else 0},
        # It is the engine that says when there are too many, with 429.
        max_ongoing_requests=held_at_once,
        graceful_shutdown_timeout_s=grace,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=2,
        logging_config={"enable_access_log": False},
        **(
            {"num_replicas": least}
            if least == most
            else {
                "autoscaling_config": {
                    "min_replicas": least,
                    "max_replicas": most,
                    "target_ongoing_requests": _ONGOING_PER_CPU * cpus,
                    **(autoscaling or {}),
                }
            }
        ),
    )
    return deployment.bind(served, [ray_core().put(weights)])


@contextmanager
def running(application: Any, host: str, port: int) -> Iterator[None]:
    """Ray Serve on this process's cluster with the app, which answers while the block runs.

    At the end it answers what it has, or its grace is over, and then Ray Serve ends.

    Raises:
        RuntimeError: Ray Serve runs there already, or a replica could not be made; why.
    """
    serve = ray_serve()
    there = serve.status()
    if there.proxies or there.applications:
        raise RuntimeError(
            "Ray Serve runs on this cluster already, with its own address; deploy beside what is there with "
            "eqr_kernels.distributed.online.application, or stop it with `serve shutdown`"
        )
    # It tells on the terminal what it does; what fails is raised.
    logger = logging.getLogger("ray.serve")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        try:
            serve.run(application, name=APP)
        except RuntimeError as error:
            messages = [status.message for status in serve.status().applications.values() if status.message]
            raise RuntimeError(f"the replicas could not be started: {messages[0] if messages else error}") from error
        yield
        serve.delete(APP)
    finally:
        serve.shutdown()
        logger.setLevel(level)
