"""Runs benchmark files one after the other, each in a fresh process, and says in a line each what came of them.

python -m benchmarks.suites --quick --results benchmarks/results          # what `make bench-quick` does

Exit code 0: every file ran and every result was right (parts that cannot run here are skipped, with the reason); 1: a
result was wrong or a file did not run; 130: interrupted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
NOTHING_RUN = 5
"""pytest's exit code where no test was collected."""
SLOW_FIRST = ("outer_step", "solve", "training_step", "memory", "end_to_end")
QUICK_LEAVES_OUT = ("end_to_end",)
"""Real puzzles and minutes at full depth: it has a --quick of its own, for when it is named."""


def files(quick: bool) -> list[str]:
    """All benchmark files, the quickest first; with `quick` those that together take minutes."""
    found = {path.stem.removeprefix("test_"): path for path in (REPOSITORY / "benchmarks").glob("test_*.py")}
    order = [*sorted(set(found) - set(SLOW_FIRST)), *reversed(SLOW_FIRST)]
    return [f"benchmarks/{found[name].name}" for name in order if not (quick and name in QUICK_LEAVES_OUT)]


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.suites", description="Run benchmark files, each in a fresh process.")
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="default: all, or with --quick all but end_to_end"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, rounds and peers")
    parser.add_argument("--results", metavar="DIR", help="write JSON to DIR/<device>/")
    options, rest = parser.parse_known_args()  # the rest is for pytest
    passed = ["--quick"] * options.quick + (["--results", options.results] if options.results else []) + rest
    start, failed = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "summary"
        told.touch()
        for file in options.files or files(options.quick):
            before = len(told.read_text().splitlines())
            command = [sys.executable, "-m", "pytest", file, *passed, "--summary", str(told)]
            code = subprocess.run(command, cwd=REPOSITORY).returncode
            if code == 2:
                break
            if code not in (0, NOTHING_RUN):
                failed.append(file)
            if len(told.read_text().splitlines()) == before:
                with told.open("a") as lines:
                    print(f"{Path(file).name}: did not run, pytest's exit code {code}", file=lines)
        print("\n" + told.read_text(), end="")
    took = f"{time.perf_counter() - start:.0f} s in all"
    if code == 2:
        print(f"interrupted; {took}")
        return 130
    print(f"{took}; {'failed: ' + ', '.join(failed) if failed else 'all results are right'}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted")
        sys.exit(130)
