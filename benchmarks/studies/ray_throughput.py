"""`python -m benchmarks.studies.ray_throughput`: `--engine ray` on two nodes of this machine, one of them lost midway.

Puzzles from Parquet are solved in this process on one thread, and then on a Ray cluster of two nodes of one CPU each,
whose second node is killed when half of the shards are there: all shards must equal those of this process, byte for
byte. What two workers do in a second against one is measured on a part of the puzzles in turns, from the first shard
that is finished to the last, so that the start of the workers, seconds on each run, does not count.

The workers share one machine, so the ratio also says how its cores share caches and memory. Close everything else.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu_check.child import ROOT
from eqr_kernels import EquilibriumReasoner
from eqr_kernels.atomic import atomic_write
from eqr_kernels.commit import code_commit
from eqr_kernels.distributed.answers import Answering, totals
from eqr_kernels.distributed.engines import Engine, Finished, Local
from eqr_kernels.distributed.on_ray import OnRay
from eqr_kernels.distributed.optional import arrow
from eqr_kernels.distributed.optional import ray as imported_ray
from eqr_kernels.distributed.reading import TableReader, find_tables
from eqr_kernels.distributed.shards import Shards
from eqr_kernels.distributed.units import Key
from eqr_kernels.tasks import sudoku, sudoku_generator

NODE: dict[str, Any] = dict(num_cpus=1, object_store_memory=100 << 20)
Progress = Callable[[Finished], object]


def puzzles_of(source: Path | None, count: int) -> list[dict[str, Any]]:
    """So many rows of a .csv.gz, or of the generator's where there is none."""
    if source is not None:
        with gzip.open(source, "rt") as file:
            rows = [row for _, row in zip(range(count), csv.DictReader(file), strict=False)]
        if len(rows) < count:
            raise SystemExit(f"{source} holds {len(rows)} puzzles, and --puzzles is {count}")
        return rows
    made = sudoku_generator.generate(count, "easy", seed=1)
    assert made.labels is not None
    pairs = zip(made.inputs, made.labels, strict=True)
    return [dict(question=sudoku.decode(question), answer=sudoku.decode(answer)) for question, answer in pairs]


def rate(ends: Sequence[tuple[float, int]]) -> float:
    """Rows a second, from (seconds, rows) of each unit as it was finished: of those behind the first."""
    if len(ends) < 2:
        raise ValueError(f"a rate takes two units or more, got {len(ends)}; lower --shard-rows")
    return sum(rows for _, rows in ends[1:]) / (ends[-1][0] - ends[0][0])


def run(
    engine: Engine, reader: TableReader, model: EquilibriumReasoner, job: Answering, into: Shards, each: Progress
) -> list[tuple[float, int]]:
    """All units into shards; when each was finished, and its rows."""
    ends = []
    for done in engine.run(reader, frozenset(), model, job):
        ends.append((time.perf_counter(), done.rows))
        into.write(done.key, done.table)
        each(done)
    return ends


@contextmanager
def cluster_of_two() -> Any:
    """A head without CPUs, and two nodes of one."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray = imported_ray()
    made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    try:
        made.add_node(**NODE)
        second = made.add_node(**NODE)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made, second
    finally:
        ray.shutdown()
        made.shutdown()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole study; what it found, ready for JSON."""
    torch.set_num_threads(1)
    model = EquilibriumReasoner.from_pretrained(options.model)
    job = Answering("sudoku", dict(depth=options.depth, halt="none", seed=0))

    def table(name: str, count: int) -> TableReader:
        path = folder / f"{name}.parquet"
        arrow().parquet.write_table(arrow().Table.from_pylist(rows[:count]), path)
        return TableReader(find_tables(str(path), "parquet"), "sudoku", model.config.seq_len, options.shard_rows)

    rows = puzzles_of(options.data, options.puzzles)
    reader, part = table("puzzles", options.puzzles), table("part", options.part)
    units = -(-options.puzzles // options.shard_rows)

    def progress_of(text: str) -> Progress:
        finished: list[Key] = []

        def one_more(done: Finished) -> None:
            finished.append(done.key)
            if len(finished) % max(1, units // 20) == 0:
                print(f"{text}: {len(finished)} shards", file=sys.stderr, flush=True)

        return one_more

    here = Shards(folder / "here", {})
    local = rate(run(Local(), reader, model, job, here, progress_of("this process")))
    rates: dict[int, list[float]] = {1: [], 2: []}
    with cluster_of_two() as (cluster, second):
        for round_ in range(options.rounds):
            for workers in (1, 2) if round_ % 2 == 0 else (2, 1):
                into = Shards(folder / f"part-{round_}-{workers}", {})
                ends = run(OnRay(workers=workers), part, model, job, into, progress_of(f"{workers} workers"))
                rates[workers].append(rate(ends))
        there = Shards(folder / "there", {})
        lost_after: list[int] = []

        def lose(done: Finished) -> None:
            shown(done)
            if len(there.finished) >= units // 2 and not lost_after:
                lost_after.append(len(there.finished))
                cluster.remove_node(second, allow_graceful=False)

        shown = progress_of("with a lost node")
        begun = time.perf_counter()
        ends = run(OnRay(workers=2), reader, model, job, there, lose)
        seconds = time.perf_counter() - begun
        nodes = sum(node["Alive"] for node in imported_ray().nodes())
    equal = here.finished == there.finished and all(
        here.path(key).read_bytes() == there.path(key).read_bytes() for key in here.finished
    )
    counted = totals(there.tables())
    one, two = (statistics.median(rates[workers]) for workers in (1, 2))
    return {
        "puzzles": options.puzzles,
        "shards": len(there.finished),
        "answered": counted.puzzles,
        "solved": counted.valid,
        "lost_node": {
            "after_shards": lost_after[0] if lost_after else None,
            "nodes_left": nodes,
            "units_given_back": len(ends),
            "equal_to_this_process": equal,
            "seconds": seconds,
        },
        "puzzles_a_second": {"this_process": local, "one_worker": rates[1], "two_workers": rates[2]},
        "two_workers_against_one": two / one,
        "one_worker_against_this_process": one / local,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a .csv.gz of Sudoku; without, generated ones")
    parser.add_argument("--puzzles", type=int, default=20_000)
    parser.add_argument("--part", type=int, default=2000, help="puzzles of a run that is timed")
    parser.add_argument("--rounds", type=int, default=3, help="runs with one worker, and with two, in turns")
    parser.add_argument("--shard-rows", type=int, default=100)
    parser.add_argument("--model", default="sudoku-small")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / machine.folder())
    options = parser.parse_args(arguments)
    busy = machine.busy()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options, Path(folder))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    settings.pop("results")
    provenance = {"machine": machine.information(), "commit": code_commit(), "others_share_of_cpu_before": busy}
    report = {"study": "ray_throughput", "settings": settings, **provenance, **measured}
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "ray_throughput.json"
    atomic_write(path, (json.dumps(report, indent=1) + "\n").encode())
    print(json.dumps(measured, indent=1))
    print(f"written: {path}", file=sys.stderr)
    lost = measured["lost_node"]
    return 0 if lost["equal_to_this_process"] and measured["answered"] == options.puzzles else 1


if __name__ == "__main__":
    sys.exit(main())
