"""`eqr serve`."""

from __future__ import annotations

import os
from typing import Annotated, Any

import numpy as np
import typer

from eqr_kernels.cli import options as opt
from eqr_kernels.cli import puzzles as puz
from eqr_kernels.cli.console import INCOMPLETE, busy, command, complain, to_json
from eqr_kernels.cli.engines import task_spec
from eqr_kernels.cli.serve_ray import Cluster, check_ray_options, serve_on_ray
from eqr_kernels.cli.tolerance import parse_tolerance
from eqr_kernels.serving import Engine
from eqr_kernels.serving.http.app import create_app
from eqr_kernels.serving.http.log import json_log
from eqr_kernels.serving.http.schema import Defaults, Limits
from eqr_kernels.serving.http.server import Server, address_of, is_loopback, listening_socket

_LIMITS, _DEFAULTS = Limits(), Defaults()


@command
def serve(
    model: Annotated[str, typer.Argument(help="Name of a shipped model, or a file or folder of one.")] = opt.MODEL,
    task: opt.TaskName = None,
    host: Annotated[str, typer.Option(help="Address to listen on; by default only this machine can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8080,
    depth: Annotated[int, typer.Option(help="Outer steps at most, of requests that name none.")] = _DEFAULTS.depth,
    breadth: Annotated[int, typer.Option(help="Trajectories a puzzle, of requests that name none.")] = (
        _DEFAULTS.breadth
    ),
    tol: opt.Tol = "auto",
    select: opt.Select = _DEFAULTS.select,
    halt: opt.Halt = _DEFAULTS.halt,
    turn_every: opt.TurnEvery = None,
    max_in_flight: Annotated[int, typer.Option(help="Trajectories that have a state at a time.")] = 256,
    max_queued: Annotated[int, typer.Option(help="Puzzles that wait; beyond, a request gets 429.")] = 1000,
    max_puzzles: Annotated[int, typer.Option(help="Puzzles of a request.")] = _LIMITS.puzzles,
    max_depth: Annotated[int, typer.Option(help="Depth of a request.")] = _LIMITS.depth,
    max_breadth: Annotated[int, typer.Option(help="Breadth of a request.")] = _LIMITS.breadth,
    max_steps: Annotated[int, typer.Option(help="depth x breadth of a request.")] = _LIMITS.steps,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.")] = _LIMITS.body,
    max_seconds: Annotated[float, typer.Option(help="Longest deadline, and that of requests that name none.")] = (
        _LIMITS.seconds
    ),
    grace: Annotated[int, typer.Option(min=0, help="Seconds to answer what is in flight at Ctrl-C or SIGTERM.")] = 30,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="EQR_TOKEN",
            show_envvar=False,
            help="That requests must bear; better in the environment, EQR_TOKEN: others see a command's arguments.",
            show_default="none is asked for",
        ),
    ] = None,
    backend: opt.BackendName = "auto",
    precision: opt.Precision = "auto",
    device: opt.Device = "auto",
    engine: opt.Engine = "local",
    address: opt.Address = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            metavar="LEAST:MOST",
            help="Replicas of --engine ray; between the two, as many as the waiting requests ask for.",
            show_default="1 to as many as have room",
        ),
    ] = None,
    cpus_per_worker: opt.CpusPerWorker = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print where it listens as one JSON object.")] = False,
) -> int:
    """Solve puzzles over HTTP, with a page that shows one settle.

    With --engine ray, replicas on the machines of a Ray cluster do; --max-queued is of each. The answers are the same.

    Exit code 0: stopped by Ctrl-C or SIGTERM after everything in flight was answered; 1: something was cut off; 2: it
    could not start.
    """
    limits = Limits(
        body=max_body,
        puzzles=max_puzzles,
        depth=max_depth,
        breadth=max_breadth,
        steps=max_steps,
        seconds=max_seconds,
    )
    starts: dict[str, Any] = dict(depth=depth, breadth=breadth, tol=parse_tolerance(tol), select=select)
    defaults = Defaults(**starts, halt=halt, turn_every=turn_every)
    check_ray_options(engine, address=address, replicas=replicas, cpus_per_worker=cpus_per_worker, port=port)
    listener = listening_socket(host, port)
    with listener:
        if not is_loopback(listener) and token is None:
            complain(
                f"{address_of(listener)} can be reached from other machines, and no token is asked for; set EQR_TOKEN",
                "warning",
            )
        reasoner = puz.load_model(model, device)
        its_task = puz.task_for(task, reasoner)
        puz.turns_for(its_task, turn_every, depth, seed=0)  # before an engine or a replica starts for nothing
        open_cells = np.full(reasoner.config.seq_len, its_task.open_token, np.uint8)
        of_engine: dict[str, Any] = dict(
            max_in_flight=max_in_flight, max_queued=max_queued, backend=backend, precision=precision
        )
        of_app: dict[str, Any] = dict(
            name=os.path.basename(model.rstrip("/")) or model,
            limits=limits,
            defaults=defaults,
            token=token,
            example=its_task.decode(open_cells),
        )
        where = address_of(listener)

        def ready(on: str) -> None:
            facts = {"command": "serve", "address": where, "pid": os.getpid(), "model": model, "backend": on}
            typer.echo(to_json(facts) if as_json else f"{where} serves {model} ({on}); Ctrl-C stops\n", nl=False)

        if engine == "ray":
            listener.close()  # it was free; Ray Serve listens there
            cluster = Cluster(address, replicas, 1 if cpus_per_worker is None else cpus_per_worker, host, port, grace)
            serve_on_ray(cluster, reasoner, task_spec(task, its_task), of_engine, of_app, ready)
            return 0
        with busy("starting the engine"):
            running = Engine(reasoner, **of_engine)
        try:
            app = create_app(running, reasoner, its_task, **of_app)
            server = Server(app, grace=grace, ready=lambda: ready(running.backend))
            with json_log():
                server.run(sockets=[listener])
        finally:
            running.close(cancel=True)
    return INCOMPLETE if server.cut else 0
