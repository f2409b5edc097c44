"""`python -m benchmarks.studies.precision_depth FILE`: what an arithmetic does to answers that are iterated for long.

The same puzzles go to depths of up to 40,000 layer equivalents in fp32, bf16 and int8 by the compiled kernel, whose
states are float32 in all three, and in bf16 by PyTorch's eager modules, whose states are bf16 as in research code.
Nothing halts. For each: exact answers by depth, the median residual (of the puzzles that the first of --runs answers
right at the last depth: the floor that rounding leaves), and the puzzles that were right at one depth and wrong at the
last.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from eqr_kernels import EquilibriumReasoner
from eqr_kernels.cli import puzzles as puz
from eqr_kernels.studies.identity import weights_digest
from eqr_kernels.studies.recording import Recording, record
from eqr_kernels.studies.scoring import Accuracy
from eqr_kernels.studies.subset import digest
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.registry import SUDOKU

LAYERS = 40_000
RUNS: dict[str, dict[str, Any]] = {
    "fp32": dict(precision="fp32"),
    "bf16": dict(precision="bf16"),
    "int8": dict(precision="int8"),
    "eager bf16": dict(precision="bf16", backend="reference"),
}


def depths_of(model: EquilibriumReasoner, layers: int) -> tuple[int, ...]:
    """16 outer steps and each fourfold, to as many as make so many layer equivalents."""
    last = -(-layers // model.config.layers_per_step)
    return tuple(sorted({min(16 * 4**k, last) for k in range(12)}))


def row_of(recording: Recording, right_at_last: np.ndarray[Any, np.dtype[np.bool_]]) -> dict[str, Any]:
    """Of one arithmetic; right_at_last bool [N]: what the first answers right at the last depth."""
    right = recording.correct[:, 0]  # [N, K]
    floor = np.median(recording.residual[right_at_last, 0], axis=0) if right_at_last.any() else None
    return {
        "accuracy": {d: Accuracy.of(right[:, k]).as_json() for k, d in enumerate(recording.depths)},
        "median_residual": None if floor is None else dict(zip(recording.depths, floor.tolist(), strict=True)),
        "lost": int((right.any(1) & ~right[:, -1]).sum()),
        "diverged": int(recording.diverged[..., -1].sum()),
        "backend": recording.backend,
        "backend_reason": recording.backend_reason,
    }


def chosen(options: argparse.Namespace) -> PuzzleSet:
    puzzles, _ = sudoku.load(options.file)
    some = puz.stratified(puzzles, min(options.puzzles, len(puzzles)))
    return puz.reveal_clues(SUDOKU, some, options.reveal, seed=0)


def print_table(report: dict[str, Any]) -> None:
    depths = report["depths"]
    table = Table("arithmetic", *(f"depth {d:,}" for d in depths), "lost", "residual at the last", "seconds")
    for name, row in report["runs"].items():
        cells = [f"{100 * row['accuracy'][d]['share']:.1f} %" for d in depths]
        residual = row["median_residual"]
        floor = "-" if residual is None else f"{residual[depths[-1]]:.3g}"
        table.add_row(name, *cells, str(row["lost"]), floor, f"{row['seconds']:.0f}")
    Console(width=160).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.studies.precision_depth", description="Arithmetic at great depth.")
    parser.add_argument("file", type=Path, help="Sudokus with answers")
    parser.add_argument("--model", default="sudoku")
    parser.add_argument("--puzzles", type=int, default=200, help="a stratified subset of so many")
    parser.add_argument("--reveal", type=int, metavar="CLUES", help="show random clues until there are so many")
    parser.add_argument("--layers", type=int, default=LAYERS, help="layer equivalents of the last depth")
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=list(RUNS), help="the first gives the residuals' puzzles"
    )
    parser.add_argument("--results", type=Path, help="folder of <device>/precision_depth-MODEL.json")
    options = parser.parse_args(arguments)
    model = EquilibriumReasoner.from_pretrained(options.model)
    puzzles, depths = chosen(options), depths_of(model, options.layers)
    assert puzzles.labels is not None
    recordings: dict[str, Recording] = {}
    seconds: dict[str, float] = {}
    for name in options.runs:
        begun = time.perf_counter()
        recordings[name] = record(model, puzzles.inputs, puzzles.labels, depths=depths, trace=False, **RUNS[name])
        seconds[name] = time.perf_counter() - begun
    right = recordings[options.runs[0]].correct[:, 0, -1]
    report = {
        **machine.provenance("benchmarks.studies.precision_depth"),
        "model": options.model,
        "weights_sha256": weights_digest(model),
        "data_sha256": digest(puzzles.inputs, puzzles.labels),
        "puzzles": len(puzzles),
        "reveal": options.reveal,
        "layers_per_step": model.config.layers_per_step,
        "depths": depths,
        "runs": {
            name: {**row_of(each, right), "seconds": round(seconds[name], 1)} for name, each in recordings.items()
        },
    }
    print_table(report)
    machine.write_report(options.results, f"precision_depth-{Path(options.model).stem}", report)


if __name__ == "__main__":
    main()
