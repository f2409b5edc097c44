"""`python -m benchmarks.serving`: what four ways to serve requests make of the same load; see docs/serving.md."""

from __future__ import annotations

import json
import os
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import machine
from benchmarks.peers.process import REPOSITORY, Process
from benchmarks.serving import drawing, simulator
from benchmarks.serving.servers import BATCHES, FIFO, FULL_DEPTH, LEAST_SERVICE, SERVERS
from benchmarks.serving.workload import EASY, Workload

_LOADS = (0.4, 0.7, 0.9, 1.1)
_DECISIVE = 0.7
_MACHINES = (1, 3, 10, 30, 100, 300, 1000)
_DATA = Path(os.environ.get("EQR_SUDOKU_DATA", REPOSITORY.parent / "shared" / "data" / "sudoku"))

console = Console(stderr=True)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    puzzles: Annotated[Path, typer.Option(help="A CSV file of puzzles with answers.")] = _DATA / "dev.csv.gz",
    results: Annotated[Path | None, typer.Option(help="Folder of <device>/serving.json.")] = None,
    picture: Annotated[Path | None, typer.Option(help="A PNG or SVG file of the curves.")] = None,
    seconds: Annotated[float, typer.Option(help="Of each point.")] = 60.0,
    requests: Annotated[int, typer.Option(help="That are there at once, for the saturation.")] = 320,
    deadline: Annotated[float, typer.Option(help="Seconds within which an answer is goodput.")] = 2.0,
    price: Annotated[float, typer.Option(help="Of such a machine, for an hour.")] = 0.10,
    pool: Annotated[int, typer.Option(help="Different puzzles of each kind.")] = Workload.pool,
    quick: Annotated[bool, typer.Option("--quick", help="Few and short points: a try, no measurement.")] = False,
    show: Annotated[Path | None, typer.Option(help="Draw a JSON file that was measured, and do no more.")] = None,
) -> None:
    """Measure saturation, then open loops of Poisson arrivals at shares of the first server's saturation."""
    if show is not None:
        report = json.loads(show.read_text())
    else:
        if not puzzles.is_file():
            raise typer.BadParameter(f"{puzzles} is not there; name a CSV file of puzzles in --puzzles")
        workload = Workload(str(puzzles), pool=8 if quick else pool)
        loads = (0.3, _DECISIVE) if quick else _LOADS
        seconds, requests = (6.0, 40) if quick else (seconds, requests)
        report = measure(workload, loads, seconds, requests, deadline, price)
    drawing.print_tables(report)
    if picture is not None:
        drawing.draw(report, picture)
    machine.write_report(results, "serving", report)


def measure(
    workload: Workload, loads: tuple[float, ...], seconds: float, requests: int, deadline: float, price: float
) -> dict[str, Any]:
    given = json.dumps(vars(workload))
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        servers: dict[str, Process] = {}
        for name in SERVERS:
            console.print(f"starting: {name}")
            servers[name] = stack.enter_context(Process("benchmarks.serving.child", name, given, threads=threads))
        saturation = _saturation(servers, requests)
        full = saturation[LEAST_SERVICE]["requests_per_second"]
        offered = []
        for load in loads:
            for name in SERVERS:
                if name == FULL_DEPTH and load != _DECISIVE:
                    continue
                offered.append(_offered(servers, name, load, load * full, seconds, deadline))
        # What the last one can do at all.
        own = saturation[FULL_DEPTH]["requests_per_second"]
        offered.append(_offered(servers, FULL_DEPTH, _DECISIVE * own / full, _DECISIVE * own, seconds, deadline))
        beside = {n: servers[n].request(measure="beside", hard=64, depth=1024) for n in (LEAST_SERVICE, FIFO)}
        steps = servers[LEAST_SERVICE].info["steps"]
    alone = beside[LEAST_SERVICE]["alone"] / steps[0]
    speed = simulator.Speed(threads / saturation[LEAST_SERVICE]["steps_per_second"], alone, threads)
    requested = workload.ask(20_000, stream=0)
    return {
        **machine.provenance("benchmarks.serving"),
        "workload": workload.as_json(),
        "seconds": seconds,
        "deadline": deadline,
        "steps": {"easy": steps[: workload.pool], "hard": steps[workload.pool :]},
        "saturation": saturation,
        "offered": offered,
        "beside": beside,
        "goals": _goals(offered, saturation, beside),
        "speed": vars(speed),
        "simulated": [_simulated(row, workload, steps, speed, seconds) for row in offered if row["server"] in _ENGINES],
        "price_per_hour": price,
        "scaling": simulator.scaling(
            requested, steps, speed, full, _DECISIVE, _MACHINES, price, requests=4000, seed=workload.seed
        ),
    }


_ENGINES = (LEAST_SERVICE, FIFO)


def _saturation(servers: dict[str, Process], requests: int) -> dict[str, dict[str, float]]:
    """The median of three turns each, in an order that changes; one turn of full depth, whose steps do not vary."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for turn in range(3):
        for name in list(servers)[:: 1 if turn % 2 == 0 else -1]:
            if turn and name == FULL_DEPTH:
                continue
            count = round(requests / 8) if name == FULL_DEPTH else requests
            turns[name].append(servers[name].request(measure="saturation", count=count))
            console.print(f"saturation, {name}: {turns[name][-1]['requests_per_second']:.2f} answers/s")
    return {
        name: {key: statistics.median(turn[key] for turn in rows) for key in rows[0]} for name, rows in turns.items()
    }


def _offered(
    servers: dict[str, Process], name: str, load: float, rate: float, seconds: float, deadline: float
) -> dict[str, Any]:
    row = servers[name].request(measure="offered", rate=rate, seconds=seconds, deadline=deadline)
    console.print(f"{name} at {100 * load:.0f} %: easy p99 {1000 * row['latency'][EASY]['p99']:,.0f} ms")
    return {"server": name, "load": load, **row}


def _goals(offered: list[dict[str, Any]], saturation: dict[str, Any], beside: dict[str, Any]) -> dict[str, float]:
    """What is compared with the goals: times as low, times as much, times as long."""
    p99 = {row["server"]: row["latency"][EASY]["p99"] for row in offered if row["load"] == _DECISIVE}
    rate = {name: row["requests_per_second"] for name, row in saturation.items()}
    return {
        "easy_p99_against_batches": p99[BATCHES] / p99[LEAST_SERVICE],
        "easy_p99_against_full_depth": p99[FULL_DEPTH] / p99[LEAST_SERVICE],
        "saturation_against_batches": rate[LEAST_SERVICE] / rate[BATCHES],
        "beside_64_hard_against_alone": beside[LEAST_SERVICE]["beside"] / beside[LEAST_SERVICE]["alone"],
    }


def _simulated(
    row: dict[str, Any], workload: Workload, steps: list[int], speed: simulator.Speed, seconds: float
) -> dict[str, Any]:
    """A measured point replayed: the same requests at the same times."""
    stream = round(row["offered_per_second"] * 1000)
    came = workload.arrivals(row["offered_per_second"], seconds, stream)
    requested = workload.ask(len(came), stream)
    latency = simulator.simulate(came, [steps[p] for p in requested], speed, 1, fifo=row["server"] == FIFO)
    easy = (requested < workload.pool) & (came >= seconds / 5)
    return {
        "server": row["server"],
        "load": row["load"],
        "easy": simulator.percentiles(latency[easy]),
        "measured": row["latency"][EASY],
    }


if __name__ == "__main__":
    app()
