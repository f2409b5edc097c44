"""`python -m benchmarks.studies.recipe_scan`: which size, cycles and schedule learn most from the same operations.

Successive halving: every candidate trains with `eqr train` at a constant rate to the first rung, the better ones go on
to the next, and so on. Rungs are operations of the training steps' matrix products, so that neither a candidate's speed
nor what else the machine does has a say. Each is judged by its averaged weights: the mean share of exact answers over
17-clue puzzles and the magictour list as published, and over all puzzles with 28 clues shown, at depths 16 and 64; the
loss on the forum's hardest, whose exact answers come late, stands beside it and breaks ties.

A rung that a candidate has reached, in --runs or in the results' file, is not trained again, so a scan may be stopped
with Control-C and called again, and goes on where only its results were kept.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gpu_check.child import ROOT
from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.atomic import atomic_write
from eqr_kernels.commit import code_commit
from eqr_kernels.config import TRM_FIELDS
from eqr_kernels.training.cycles import parse_cycles, stretches
from eqr_kernels.training.state import has_state, read_manifest
from eqr_kernels.training.throughput import training_operations

CURRICULUM = ((0, 34, 50), (115_200, 30, 46), (384_000, 20, 40), (624_000, 17, 38))
"""Samples seen, and the least and the most clues to show from then on."""
HARDER_SOONER = ((0, 34, 50), (32_000, 28, 44), (70_400, 22, 40), (192_000, 19, 36), (384_000, 17, 30))
_TWO = {"H_cycles": 1, "L_layers": 2}
WARMUP = 19_200  # samples
JUDGED = (("published", "17_clue"), ("published", "magictour_top1465"), ("28", "all"))
FORUM = ("published", "forum_hardest_1905_11plus")


@dataclass(frozen=True)
class Candidate:
    """A recipe: fields of the preset sudoku-small that are changed, and options of `eqr train`."""

    description: str
    fields: dict[str, Any]
    batch: int = 96
    lr: float = 1e-3
    weight_decay: float = 1.0
    points: tuple[tuple[int, int, int], ...] = CURRICULUM
    cycles: str = ""

    def config(self) -> EqRConfig:
        return EqRConfig.sudoku_small(**self.fields)

    @property
    def curriculum(self) -> str:
        """In training steps, so that the same samples show the same clues at every batch size."""
        return ",".join(f"{round(samples / self.batch)}:{low}-{high}" for samples, low, high in self.points)

    def steps(self, operations: float) -> int:
        """Training steps nearest to so many operations."""
        points, config, done, step = parse_cycles(self.cycles), self.config(), 0.0, 0
        for stretch, count in stretches(points, config, 10**9):
            each = self.batch * training_operations(stretch)
            if done + count * each >= operations:
                return step + round((operations - done) / each)
            done, step = done + count * each, step + count
        raise AssertionError("a billion steps hold fewer operations")

    @property
    def recipe(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "curriculum": self.curriculum,
            "cycles": self.cycles,
        }

    def check(self, settings: dict[str, Any], out: Path) -> None:
        """Raises a ValueError where a run is not of this recipe."""
        wanted = {
            "config": self.config().to_dict(),
            "batch_size": self.batch,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "curriculum": self.curriculum,
            "cycles": self.cycles,
        }
        differ = [name for name, value in wanted.items() if settings[name] != value]
        if differ:
            raise ValueError(f"{out} has another {', '.join(differ)}; move it away, or name another --runs")

    def command(self, train: Path, dev: Path, out: Path, steps: int, puzzles: int) -> list[str]:
        sets = [part for name, value in self.fields.items() for part in ("--set", f"{name}={json.dumps(value)}")]
        resume = ["--resume"] if has_state(out) else []
        return [
            "train",
            "--data",
            train,
            "--out",
            out,
            "--steps",
            steps,
            "--preset",
            "sudoku-small",
            *sets,
            "--batch-size",
            self.batch,
            "--lr",
            self.lr,
            "--warmup",
            round(WARMUP / self.batch),
            "--weight-decay",
            self.weight_decay,
            "--curriculum",
            self.curriculum,
            "--cycles",
            self.cycles,
            "--eval-data",
            dev,
            "--eval-puzzles",
            puzzles,
            "--eval-depths",
            "16,64",
            "--no-calibrate",
            "--no-compile",
            "--log-every",
            200,
            *resume,
        ]


CANDIDATES = {
    "small": Candidate("EqR, one block, H 2, L 3", {}),
    "small-trm": Candidate("small as a TRM", TRM_FIELDS),
    "two-trm": Candidate("TRM, two blocks, H 1, L 3", {**_TWO, **TRM_FIELDS}),
    "two": Candidate("EqR, two blocks, H 1, L 3", _TWO),
    "small-decay": Candidate("small, weight decay 0.1", {}, weight_decay=0.1),
    "small-batch": Candidate("small, batches of 32", {}, batch=32),
    "small-rate": Candidate("small, rate 2e-3", {}, lr=2e-3),
    "small-h1": Candidate("small, H 1", {"H_cycles": 1}),
    "noisy": Candidate(
        "two-trm, batches of 32, rate 2e-3, weight decay 0.1",
        {**_TWO, **TRM_FIELDS},
        batch=32,
        lr=2e-3,
        weight_decay=0.1,
    ),
    "sooner": Candidate("small, harder puzzles sooner", {}, points=HARDER_SOONER),
    "raw": Candidate("small, without a curriculum", {}, points=()),
    "growing": Candidate("small with cycles that grow", {}, cycles="0:1x3x8,500:2x3x16,3000:2x6x16"),
    "d192": Candidate("small, d 192", {"hidden_size": 192}),
}


def measured(out: Path) -> list[dict[str, str]]:
    """The rows of a candidate's learning curve."""
    path = out / "curve.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def result(out: Path, steps: int) -> dict[str, Any] | None:
    """What a candidate's curve says of a step; None where it does not get there."""
    rows = {(row["clues"], row["source"]): row for row in measured(out) if int(row["step"]) == steps}
    if not rows:
        return None
    exact = {
        f"{clues} {source}": {depth: float(rows[clues, source][f"exact_{depth}"]) for depth in ("16", "64")}
        for clues, source in (*JUDGED, FORUM)
    }
    judged = [share for clues, source in JUDGED for share in exact[f"{clues} {source}"].values()]
    row = rows[FORUM]
    return {
        "step": steps,
        "samples": int(row["samples"]),
        "operations": int(row["operations"]),
        "cpu_seconds": float(row["cpu_seconds"]),
        "puzzles": int(rows["published", "all"]["puzzles"]),
        "exact": exact,
        "score": sum(judged) / len(judged),
        "forum_loss": float(row["loss"]),
    }


def eqr(arguments: list[str], log: Path, threads: int) -> int:
    """Runs the command line in a process on so many threads; its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "eqr_kernels.cli", *arguments]
    with log.open("a") as file:
        # In this process's group: Control-C reaches it too, and it saves.
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment).returncode


def recorded(path: Path, puzzles: int) -> dict[tuple[float, str], dict[str, Any]]:
    """The rows of a results' file, by rung and candidate, that are of the present candidates and measure."""
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {
        (row["rung"], name): row
        for row in rows
        if (candidate := CANDIDATES.get(name := row["candidate"])) is not None
        and row["recipe"] == candidate.recipe
        and row["parameters"] == _parameters(candidate.config())
        and row["step"] == candidate.steps(row["rung"])
        and row["puzzles"] == puzzles
    }


def train_to(name: str, operations: float, options: argparse.Namespace) -> None:
    """Takes a candidate to a rung, in a process on `options.threads` threads, unless it is recorded.

    Raises:
        RuntimeError: it failed, or was interrupted.
        ValueError: what is there of it was trained by another recipe.
    """
    if (operations, name) in options.recorded:
        return
    candidate, out = CANDIDATES[name], options.runs / name
    steps = candidate.steps(operations)
    if result(out, steps) is None:
        out.mkdir(parents=True, exist_ok=True)
        train, dev = (options.data / f"{part}.csv.gz" for part in ("train", "dev"))
        command = candidate.command(train, dev, out, steps, options.puzzles)
        code = eqr([str(part) for part in command], out / "log.txt", options.threads)
        if code or result(out, steps) is None:
            raise RuntimeError(f"{name}: exit code {code}; see {out / 'log.txt'}")
    candidate.check(read_manifest(out)["settings"], out)
    print(f"{operations:.2g} {name}: {json.dumps(result(out, steps))}", flush=True)


def report(rungs: dict[float, list[str]], options: argparse.Namespace) -> dict[str, Any]:
    """All rungs, each with its candidates from the best to the worst."""
    rows = []
    for operations, names in rungs.items():
        for name in names:
            candidate = CANDIDATES[name]
            if (operations, name) in options.recorded:
                rows.append(options.recorded[operations, name])
            elif (measures := result(options.runs / name, candidate.steps(operations))) is not None:
                rows.append(
                    {
                        "rung": operations,
                        "candidate": name,
                        "about": candidate.description,
                        "parameters": _parameters(candidate.config()),
                        "recipe": candidate.recipe,
                        **measures,
                    }
                )
    rows.sort(key=lambda row: (row["rung"], *_rank(row)))
    return {
        "machine": machine.information(),
        "commit": code_commit(),
        "rungs": list(rungs),
        "seed": 0,
        "command": shlex.join(["python", "-m", "benchmarks.studies.recipe_scan", *sys.argv[1:]]),
        "rows": rows,
    }


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return -row["score"], row["forum_loss"]


def _parameters(config: EqRConfig) -> int:
    return sum(p.numel() for p in EquilibriumReasoner(config).parameters())


def markdown(content: dict[str, Any]) -> str:
    """A table for people: exact answers at depth 16 / 64 in per cent."""
    lines = [
        "| operations | candidate | samples | score | 17-clue | magictour | 28 clues | forum | forum loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        cells = [
            " / ".join(f"{100 * share:.0f}" for share in row["exact"][f"{c} {s}"].values()) for c, s in (*JUDGED, FORUM)
        ]
        lines.append(
            f"| {row['rung']:.2g} | {row['candidate']}: {row['about']} | {row['samples'] / 1e3:.0f}k | "
            f"{100 * row['score']:.1f} | {' | '.join(cells)} | {row['forum_loss']:.2f} |"
        )
    return "\n".join(lines)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks.studies.recipe_scan",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="candidates:\n" + "\n".join(f"  {name}: {c.description}" for name, c in CANDIDATES.items()),
    )
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES, metavar="NAME")
    parser.add_argument("--rungs", default="7e13:13,3e14:4,1e15:2", help="OPERATIONS:CANDIDATES,...")
    parser.add_argument("--processes", type=int, default=2, help="candidates at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--puzzles", type=int, default=120, help="of dev.csv.gz")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "data" / "sudoku",
        help="folder of train.csv.gz and dev.csv.gz",
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "recipe-scan", help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of <device>/recipe_scan.json; default: benchmarks/results")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of this file, and do no more")
    options = parser.parse_args(given)
    try:
        rungs = [part.split(":") for part in options.rungs.split(",")]
        options.rungs = {float(operations): int(count) for operations, count in rungs}
    except ValueError:
        parser.error(f"--rungs must be OPERATIONS:CANDIDATES,... as in 3e14:9,1e15:3, got {options.rungs!r}")
    if list(options.rungs) != sorted(options.rungs):
        parser.error("--rungs must rise")
    options.results = options.results or ROOT / "benchmarks" / "results"
    return options


def main() -> int:
    options = arguments()
    if options.table is not None:
        print(markdown(json.loads(options.table.read_text())))
        return 0
    path = options.results / machine.folder() / "recipe_scan.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    options.recorded = recorded(path, options.puzzles)
    names, done = list(options.candidates), {}
    for operations, count in options.rungs.items():
        names = names[:count]
        done[operations] = names
        with ThreadPoolExecutor(options.processes) as pool:
            try:
                for finished in [pool.submit(train_to, name, operations, options) for name in names]:
                    finished.result()
                    atomic_write(path, (json.dumps(report(done, options), indent=1) + "\n").encode())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        names = [row["candidate"] for row in json.loads(path.read_text())["rows"] if row["rung"] == operations]
    print(f"\n{markdown(json.loads(path.read_text()))}\n\n{path}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f"error: {error}")
