"""`eqr serve`."""

from __future__ import annotations

import os
from typing import Annotated

import numpy as np
import typer

from eqr_kernels.cli import options as opt
from eqr_kernels.cli import puzzles as puz
from eqr_kernels.cli.console import INCOMPLETE, busy, command, complain, to_json
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
    as_json: Annotated[bool, typer.Option("--json", help="Print where it listens as one JSON object.")] = False,
) -> int:
    """Solve puzzles over HTTP, with a page that shows one settle.

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
    defaults = Defaults(depth=depth, breadth=breadth, tol=parse_tolerance(tol), select=select)
    listener = listening_socket(host, port)
    with listener:
        if not is_loopback(listener) and token is None:
            complain(
                f"{address_of(listener)} can be reached from other machines, and no token is asked for; set EQR_TOKEN",
                "warning",
            )
        reasoner = puz.load_model(model, device)
        its_task = puz.task_for(task, reasoner)
        with busy("starting the engine"):
            engine = Engine(
                reasoner, max_in_flight=max_in_flight, max_queued=max_queued, backend=backend, precision=precision
            )
        try:
            open_cells = np.full(reasoner.config.seq_len, its_task.open_token, np.uint8)
            app = create_app(
                engine,
                reasoner,
                its_task,
                name=os.path.basename(model.rstrip("/")) or model,
                limits=limits,
                defaults=defaults,
                token=token,
                example=its_task.decode(open_cells),
            )

            def ready() -> None:
                about = {"command": "serve", "address": address_of(listener), "pid": os.getpid(), "model": model}
                text = f"{about['address']} serves {model} ({engine.backend}); Ctrl-C stops\n"
                typer.echo(to_json({**about, "backend": engine.backend}) if as_json else text, nl=False)

            server = Server(app, grace=grace, ready=ready)
            with json_log():
                server.run(sockets=[listener])
        finally:
            engine.close(cancel=True)
    return INCOMPLETE if server.cut else 0
