"""`python -m benchmarks.studies.serving_soak`: `eqr serve` under load for long, among clients that behave badly.

A model of no size, so that HTTP and the engine are what is loaded, is served by a process of its own on loopback. Its
saturation is measured; then requests come at a share of it, each for one of some hundred puzzle and seed pairs whose
answers are known. Beside them, and beside the measurement of the saturation, go clients that hang up in the middle,
read slowly, send what is no JSON or ten megabytes, and a thousand connections that say nothing. Every request must be
answered once and rightly, and the memory of the server must stay as it is after the warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks import machine
from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.tasks import sudoku, sudoku_generator

DEPTH, TOL, PAIRS, CONNECTIONS = 16, 0.05, 200, 64
IDLE_CONNECTIONS, BIG = 1000, 10_000_000
SATURATION_SECONDS = 60.0


@dataclass
class Soak:
    """What was sent and what came back."""

    url: str
    requested: list[tuple[str, int]]
    answers: list[str]
    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    nuisances: Counter[str] = field(default_factory=Counter)

    async def ask(self, client: httpx.AsyncClient, which: int) -> None:
        puzzle, seed = self.requested[which]
        self.sent += 1
        try:
            answer = await client.post("/v1/solve", json={"puzzles": [puzzle], "seed": seed})
        except httpx.HTTPError as error:
            self.errors[type(error).__name__] += 1
            return
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200 and answer.json()["results"][0]["prediction"] != self.answers[which]:
            self.wrong += 1


def prepare(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """Writes a small model with random weights, and gives puzzles with seeds and its answers to them."""
    torch.manual_seed(0)
    config = EqRConfig.sudoku_small()
    model = EquilibriumReasoner(
        type(config)(**{**vars(config), "hidden_size": 32, "num_heads": 2, "H_cycles": 1, "L_cycles": 1})
    ).eval()
    model.save_pretrained(folder)
    made = sudoku_generator.generate(PAIRS, "easy", seed=1)
    tokens = torch.from_numpy(made.inputs.astype(np.int64))
    puzzles = [sudoku.decode(row) for row in made.inputs]
    seeds = [i % 7 for i in range(PAIRS)]
    answers = [
        sudoku.decode(model.solve(tokens[i : i + 1], depth=DEPTH, tol=TOL, seed=seeds[i]).preds[0].numpy())
        for i in range(PAIRS)
    ]
    return list(zip(puzzles, seeds, strict=True)), answers


def start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "eqr_kernels", "serve", str(folder), "--port", "0"]
    options = ["--depth", str(DEPTH), "--tol", str(TOL)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "http://" in line:
            return process, "http://" + line.split("http://")[1].split()[0].rstrip("/")
    raise SystemExit("eqr serve ended before it listened")


def resident(pid: int) -> float:
    """Mebibytes that a process has in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def connections(soak: Soak, timeout: float) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    return httpx.AsyncClient(base_url=soak.url, timeout=timeout, limits=limits)


async def saturation(soak: Soak, seconds: float) -> float:
    """Answers a second where each connection asks one thing after another."""
    until, done = time.perf_counter() + seconds, 0

    async def ask_on(client: httpx.AsyncClient, first: int) -> None:
        nonlocal done
        while time.perf_counter() < until:
            await soak.ask(client, (first + done) % PAIRS)
            done += 1

    async with connections(soak, 60) as client:
        await asyncio.gather(*(ask_on(client, i) for i in range(CONNECTIONS)))
    return done / seconds


async def offer(soak: Soak, rate: float, seconds: float, rng: np.random.Generator) -> None:
    """Poisson arrivals; returns when all are answered."""
    begun, due = time.perf_counter(), 0.0
    tasks: set[asyncio.Task[None]] = set()
    async with connections(soak, 120) as client:
        while (due := due + rng.exponential(1 / rate)) < seconds:
            await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
            task = asyncio.create_task(soak.ask(client, int(rng.integers(PAIRS))))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)


async def annoy(soak: Soak, until: float, rng: np.random.Generator) -> None:
    """One bad client after another."""
    host, port = soak.url.removeprefix("http://").split(":")
    good = json.dumps({"puzzles": [soak.requested[0][0]] * 8, "breadth": 4, "stream": True}).encode()
    kinds = {
        "hangs up": (good, len(good)),
        "reads slowly": (good, len(good)),
        "no JSON": (b'{"puzzles": [', 13),
        "ten megabytes": (b" " * 65536, BIG),
        "half a body": (good[:40], len(good)),
    }
    while time.perf_counter() < until:
        kind = list(kinds)[int(rng.integers(len(kinds)))]
        body, length = kinds[kind]
        soak.nuisances[kind] += 1
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            head = ["POST /v1/solve HTTP/1.1", "Host: here", "Content-Type: application/json"]
            writer.write("\r\n".join([*head, f"Content-Length: {length}", "", ""]).encode() + body)
            await writer.drain()
            if kind == "reads slowly":
                for _ in range(5):
                    await reader.read(64)
                    await asyncio.sleep(0.2)
            elif kind in ("no JSON", "ten megabytes"):
                line = await asyncio.wait_for(reader.readline(), 30)
                soak.nuisances[f"{kind}: {line.decode().split(' ')[1]}"] += 1
            writer.close()
        except (TimeoutError, OSError, IndexError) as error:
            soak.nuisances[f"{kind}: {type(error).__name__}"] += 1
        await asyncio.sleep(float(rng.exponential(1.0)))


async def crowd(soak: Soak) -> int:
    """A thousand connections that say nothing, and a request among them; how many there were."""
    host, port = soak.url.removeprefix("http://").split(":")
    writers = [(await asyncio.open_connection(host, int(port)))[1] for _ in range(IDLE_CONNECTIONS)]
    async with httpx.AsyncClient(base_url=soak.url, timeout=60) as client:
        await soak.ask(client, 0)
    for writer in writers:
        writer.close()
    return len(writers)


async def watch(pid: int, until: float, memory: list[tuple[float, float]]) -> None:
    begun = time.perf_counter()
    while time.perf_counter() < until:
        memory.append((time.perf_counter() - begun, resident(pid)))
        await asyncio.sleep(5)


async def soaked(soak: Soak, pid: int, seconds: float, share: float) -> dict[str, Any]:
    rng = np.random.default_rng(18)
    measuring = min(SATURATION_SECONDS, seconds / 4)
    full, _ = await asyncio.gather(saturation(soak, measuring), annoy(soak, time.perf_counter() + measuring, rng))
    idle = await crowd(soak)
    before = Soak(soak.url, soak.requested, soak.answers)
    begun = time.perf_counter()
    until, memory = begun + seconds, list[tuple[float, float]]()
    await asyncio.gather(
        offer(before, share * full, seconds, rng), annoy(before, until, rng), watch(pid, until, memory)
    )
    warm = [mib for at, mib in memory if at > seconds / 4]
    async with httpx.AsyncClient(base_url=soak.url) as client:
        metrics = (await client.get("/metrics")).text
    return {
        "saturation_per_second": full,
        "share": share,
        "seconds": seconds,
        "sent": before.sent,
        "answered_per_second": before.sent / (time.perf_counter() - begun),
        "statuses": dict(before.statuses),
        "errors": dict(before.errors),
        "wrong": before.wrong + soak.wrong,
        "nuisances": dict(sorted(before.nuisances.items())),
        "idle_connections": idle,
        "memory_mib": {"first": warm[0], "last": warm[-1], "least": min(warm), "most": max(warm)},
        "memory_growth": warm[-1] / warm[0] - 1,
        "engine": {
            line.split()[0]: float(line.split()[1])
            for line in metrics.splitlines()
            if line.startswith("eqr_engine_") and "{" not in line
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.studies.serving_soak", description="eqr serve under load for long.")
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--share", type=float, default=0.8, help="of the saturation")
    parser.add_argument("--results", type=Path, help="folder of <device>/serving_soak.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        requested, answers = prepare(Path(folder) / "model")
        server, url = start(Path(folder) / "model")
        try:
            report = asyncio.run(soaked(Soak(url, requested, answers), server.pid, options.seconds, options.share))
        finally:
            server.terminate()
        report["exit_code"] = server.wait(60)
    report = {**machine.provenance("benchmarks.studies.serving_soak"), **report}
    print(json.dumps(report, indent=1))
    machine.write_report(options.results, "serving_soak", report)
    good = report["statuses"].get(200, 0)
    if report["wrong"] or report["errors"] or good != report["sent"] or abs(report["memory_growth"]) > 0.02:
        raise SystemExit("not every request was answered once and rightly, or the memory changed; see above")


if __name__ == "__main__":
    main()
