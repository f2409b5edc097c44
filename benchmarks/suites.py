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
    by_name = {path.stem.removeprefix("test_"): path for path in (REPOSITORY / "benchmarks").glob("test_*.py")}
    order = [*sorted(set(by_name) - set(SLOW_FIRST)), *reversed(SLOW_FIRST)]
    return [f"benchmarks/{by_name[name].name}" for name in order if not (quick and name in QUICK_LEAVES_OUT)]


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.suites", description="Run benchmark files, each in a fresh process.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="default: all, or with --quick all but end_to_end")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, rounds and peers")
    parser.add_argument("--results", metavar="DIR", help="write JSON to DIR/<device>/")
    options, rest = parser.parse_known_args()  # the rest is for pytest
    passed = ["--quick"] * options.quick + (["--results", options.results] if options.results else []) + rest
    start, failed, interrupted = time.perf_counter(), [], False
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "summary"
        summary.touch()
        try:
            for file in options.files or files(options.quick):
                if not _ran(file, passed, summary):
                    failed.append(file)
        except KeyboardInterrupt:
            interrupted = True
        print("\n" + summary.read_text(), end="")
    outcome = f"failed: {', '.join(failed)}" if failed else "all results are right"
    print(f"{time.perf_counter() - start:.0f} s in all; {'interrupted' if interrupted else outcome}")
    return 130 if interrupted else 1 if failed else 0


def _ran(file: str, arguments: list[str], summary: Path) -> bool:
    """Whether a file ran and its results are right; a line of `told` says what came of it, whatever did."""
    before = summary.read_text()
    command = [sys.executable, "-m", "pytest", file, *arguments, "--summary", str(summary)]
    code = subprocess.run(command, cwd=REPOSITORY).returncode
    if summary.read_text() == before:
        summary.write_text(f"{before}{Path(file).name}: did not run, pytest's exit code is {code}\n")
    return code in (0, NOTHING_RUN)


if __name__ == "__main__":
    sys.exit(main())
