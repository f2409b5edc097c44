"""`python -m benchmarks.gpu_check`: all stages, a JSON file that grows with each, and a table at the end.

Needs a GPU; without one it goes through every stage on the CPU with tiny sizes, measures nothing, and (unless
--dry-run asked for that) says so by its exit code. Exit codes: 0 every stage did its work or was skipped for a reason,
1 one failed, 2 there is no GPU, 143 ended from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from . import GOALS, table
from .child import ROOT
from .stages import STAGES, Check, default_puzzles

FAILED, NO_GPU, ENDED = 1, 2, 128 + signal.SIGTERM


class Ending(BaseException):
    """Somebody wants this to end."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.gpu_check", description="Build, test and measure on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: what the stages do, no figures")
    parser.add_argument("--results", type=Path, help="folder of <device>.json; default: benchmarks/results")
    parser.add_argument(
        "--puzzles", type=Path, default=default_puzzles(), help="dev.csv.gz, or the folder that holds it"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="the time for all stages; default: 9")
    parser.add_argument(
        "--only", nargs="+", choices=[stage.__name__ for stage, _ in STAGES], help="these, environment and build only"
    )
    options = parser.parse_args(given)
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    return options


class Report:
    """What is known so far, written after every change."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.results: Path | None = options.results
        self.started = time.monotonic()
        self.content: dict[str, Any] = {
            "dry_run": options.dry_run,
            "label": "",
            "command": shlex.join(["python", "-m", "benchmarks.gpu_check", *sys.argv[1:]]),
            "commit": "",
            "seconds": 0.0,
            "goals": GOALS,
            "stages": {},
        }

    def dry(self) -> None:
        """From now on nothing is a measurement, nor goes where measurements are kept."""
        self.content |= {"dry_run": True, "label": "dry run, not measurements"}
        if self.results is None or self.results.resolve() == (ROOT / "benchmarks" / "results").resolve():
            self.results = Path(tempfile.mkdtemp(prefix="gpu-check-dry-run-"))

    @property
    def path(self) -> Path:
        device = self.content["stages"].get("environment", {}).get("device") or "no-gpu"
        folder = self.results or ROOT / "benchmarks" / "results"
        return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"

    def save(self) -> None:
        stages = self.content["stages"]
        self.content["seconds"] = round(time.monotonic() - self.started, 1)
        self.content["commit"] = stages.get("environment", {}).get("commit", "")
        table.compared(stages.get("outer_step", {}).get("rows", []), table.gemm_rate(self.content))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In one move: a run that is cut off leaves a whole file.
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(part, self.path)


def run(options: argparse.Namespace, report: Report) -> int:
    check = Check(options.dry_run, options.puzzles, report.save, results=report.content["stages"])
    scale = options.minutes * 60 / sum(seconds for _, seconds in STAGES) * 0.98
    end, code = report.started, 0
    if options.dry_run:
        report.dry()
        check.device = "cpu"
    for stage, seconds in STAGES:
        name = stage.__name__
        # Each ends when it and all before it would have ended with their own times: what one leaves, the next may use.
        end += seconds * scale
        check.ends = end
        if options.only and name not in (*options.only, "environment", "build"):
            continue
        print(f"== {name}, {check.left:.0f} s at most", flush=True)
        results = check.results[name] = {}
        start = time.monotonic()
        try:
            stage(check, results)
        except Exception as error:
            results["failed"] = f"{type(error).__name__}: {error}"
        finally:
            results["seconds"] = round(time.monotonic() - start, 1)
        if name == "environment" and results.get("device") is None and not check.dry_run:
            print("torch sees no GPU: this becomes a dry run, and measures nothing", flush=True)
            report.dry()
            check.dry_run, check.device, code = True, "cpu", NO_GPU
        report.save()
        print(json.dumps({name: {key: value for key, value in results.items() if key != "rows"}}), flush=True)
    failed = any("failed" in stage for stage in check.results.values())
    return code or (FAILED if failed else 0)


def main() -> int:
    options = arguments()
    report = Report(options)

    def end(number: int, _: FrameType | None) -> None:
        raise Ending(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    try:
        code = run(options, report)
    except Ending as reason:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for stage in list(report.content["stages"].values())[-1:]:
            stage["failed"] = f"ended from outside by {reason}"
        code = ENDED
    report.save()
    print(f"\n{table.text(report.content)}\n\n{report.path}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
