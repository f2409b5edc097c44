"""Does `eqr bench compare` find a slowdown, and nothing where there is none? One op, twice as it is and once slowed.

python -m benchmarks.compare_trial                              # latent_recursions, 15 %
python -m benchmarks.compare_trial --op damped_update --percent 15 --repeats 3

Every run is a fresh process. Two runs as they are must compare without a finding (exit code 0), and the slowed run must
be found slower than either (1). The last lines say so, and how far runs of the same code lay apart, which is what
--between-runs of `eqr bench compare` stands for. Only on a quiet machine does any of it mean anything.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from eqr_kernels.benchmarking import Comparison, Settings, compare, read
from eqr_kernels.benchmarking.measures import NORMAL

from .slowed import OP, PERCENT
from .suites import REPOSITORY

FILES = {
    "damped_update": "damped_update",
    "philox_words": "philox",
    "philox_normal": "philox",
    "pack_weights": "pack_weights",
    "fingerprint": "fingerprint",
    "latent_recursions": "latent_recursions",
    "fixed_point": "fixed_point",
    "training_step": "training_step",
    "adam_atan2_": "adam_atan2",
}


def measured(op: str, folder: Path, percent: float | None, options: argparse.Namespace) -> Path:
    """The JSON of one run of the op's benchmark.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "pytest", f"benchmarks/test_{FILES[op]}.py", "-q", "--results", str(folder)]
    command += [] if options.full else ["--quick"]
    command += ["-k", "test_op"] if op == "training_step" else []
    environment = dict(os.environ)
    if percent is not None:
        command += ["-p", "benchmarks.slowed"]
        environment |= {OP: op, PERCENT: str(percent)}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    files = list(folder.rglob("*.json"))
    if run.returncode or len(files) != 1:
        sys.exit(f"{' '.join(command)} ended with {run.returncode}\n{run.stdout}\n{run.stderr}")
    return files[0]


def told(before: Path, after: Path, settings: Settings, expected: str) -> tuple[bool, Comparison]:
    """Whether the comparison is as expected, "nothing" or "slower"; prints what was found."""
    result = compare([(read(before), read(after))], settings)
    slower, faster = result.counted("slower"), result.counted("faster")
    right = bool(slower) and not faster if expected == "slower" else not slower and not faster
    found = ", ".join(f"{item.row} {item.factor - 1:+.1%}" for item in (*slower, *faster)) or "nothing"
    ours = [item for item in result.items if not item.peer and item.error]
    noise = max((result.limit * item.error for item in ours if item.error), default=0.0)
    found += f", noise up to {noise:.1%}"
    print(f"{'ok' if right else 'WRONG':6s}{before.parts[-3]} -> {after.parts[-3]}: {found} (expected: {expected})")
    return right, result


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.compare_trial", description="Plant a slowdown and look for it.")
    parser.add_argument("--op", choices=FILES, default="latent_recursions")
    parser.add_argument("--percent", type=float, default=15.0, help="by how much the op is slowed down")
    parser.add_argument("--repeats", type=int, default=2, help="runs as it is; each two of them are compared")
    parser.add_argument("--between-runs", type=float, default=1.0, help="as of eqr bench compare, in percent")
    parser.add_argument("--full", action="store_true", help="all sizes and rounds, not those of --quick")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats must be 2 or more, got {options.repeats}")
    settings = Settings(between_runs=options.between_runs / 100)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"run-{number + 1}" for number in range(options.repeats)]
        plain = [measured(options.op, Path(folder) / name, None, options) for name in names]
        slow = measured(options.op, Path(folder) / f"slowed by {options.percent:g} %", options.percent, options)
        again = [told(*pair, settings, "nothing") for pair in itertools.combinations(plain, 2)]
        planted = [told(run, slow, settings, "slower") for run in plain]
    moves = [abs(math.log(item.factor)) for _, result in again for item in result.items if not item.peer]
    # The median of |a - b| of two normal values is 0.954 standard deviations of one.
    apart = statistics.median(moves) / (math.sqrt(2) * NORMAL.inv_cdf(0.75))
    print(f"runs of the same code lie {apart:.1%} apart (standard deviation, noise of the rounds included)")
    return 0 if all(right for right, _ in (*again, *planted)) else 1


if __name__ == "__main__":
    sys.exit(main())
