"""`python -m benchmarks.studies.maze_sizes`: which mazes a model solves, of the size it was trained on and of others.

Attention has no sizes of its own, so the weights are taken as they are to grids of other sides. Mazes are perfect ones
of our own generator, none of which was trained on (another seed, and those that --trained-on has, in any of the eight
ways to turn and mirror them, are left out). For each size: exact answers by depth; what was right at one depth and
wrong at a greater one; and for each maze the outer step at which its residual meets the tolerance and that from which
on its answer stays right, against the length of the way.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks import machine
from eqr_kernels import EquilibriumReasoner
from eqr_kernels.cli.render import style
from eqr_kernels.studies.identity import weights_digest
from eqr_kernels.studies.recording import Recording, record
from eqr_kernels.studies.replay import first_converged
from eqr_kernels.studies.scoring import Accuracy
from eqr_kernels.tasks import maze
from eqr_kernels.tasks.common import PuzzleSet

SEED = 2026
SHOWN = (1, 2, 4, 8, 16, 32, 64)
_BINS = ((1, 20), (20, 40), (40, 60), (60, 80), (80, 120), (120, 10_000))
"""Moves from start to goal, from .. below."""


def resized(model: EquilibriumReasoner, side: int) -> EquilibriumReasoner:
    """The same weights for mazes of another side.

    Raises:
        ValueError: the model mixes tokens by an MLP, whose weights have a size.
    """
    if model.config.mlp_t:
        raise ValueError("the model mixes tokens by an MLP of fixed size; take one with attention (mlp_t=False)")
    config = dataclasses.replace(model.config, seq_len=side * side, board_height=None, board_width=None)
    other = EquilibriumReasoner(config)
    other.load_state_dict(model.state_dict())
    return other.to(next(model.parameters()).dtype).eval()


def measured(puzzles: PuzzleSet, recording: Recording, tol: float) -> dict[str, Any]:
    """What became of mazes that were recorded at every outer step of breadth 1."""
    right = recording.correct[:, 0]  # [N, D]
    steps, met = first_converged(recording.residuals[:, 0], tol)
    stays = np.logical_and.accumulate(right[:, ::-1], axis=1)[:, ::-1]  # right from here to the end
    since = np.where(stays.any(1), stays.argmax(1) + 1, 0)
    moves = puzzles.rating.astype(int)
    at_exit = right[np.arange(len(moves)), steps - 1]
    done = met & at_exit
    by_length = []
    for low, high in _BINS:
        rows = (moves >= low) & (moves < high)
        if rows.any():
            by_length.append(
                {
                    "moves": [low, high],
                    "mazes": int(rows.sum()),
                    "right": int(right[rows, -1].sum()),
                    "steps_to_tolerance": float(np.median(steps[rows & done])) if (rows & done).any() else None,
                    "steps_to_right": float(np.median(since[rows & stays[:, -1]])) if stays[rows, -1].any() else None,
                }
            )
    several = len(set(steps[done])) > 1 and len(set(moves[done])) > 1  # else there is no rank correlation
    return {
        "mazes": len(moves),
        "moves": {"median": float(np.median(moves)), "most": int(moves.max())},
        "accuracy": {d: Accuracy.of(right[:, d - 1]).as_json() for d in SHOWN if d <= recording.depth},
        "lost": int((right.any(1) & ~right[:, -1]).sum()),
        "met_tolerance": int(met.sum()),
        "right_of_those": int(done.sum()),
        "mean_steps": float(steps.mean()),
        "spearman_steps_moves": float(spearmanr(steps[done], moves[done]).statistic) if several else None,
        "by_length": by_length,
        "per_maze": {"moves": moves.tolist(), "steps": steps.tolist(), "met": met.tolist(), "right": at_exit.tolist()},
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """Outer steps to convergence against the length of the way, a panel for each size."""
    style.require()
    from matplotlib.figure import Figure

    with style.styled():
        figure = Figure(figsize=(style.WIDTH, 3.4), layout="constrained")
        panels = figure.subplots(1, len(report["sizes"]), sharey=True, squeeze=False)[0]
        rng = np.random.default_rng(0)
        for axes, (side, row) in zip(panels, report["sizes"].items(), strict=True):
            each = {name: np.array(values) for name, values in row["per_maze"].items()}
            steps = each["steps"] + rng.uniform(-0.3, 0.3, len(each["steps"]))
            for kind, color, name in ((True, style.BLUE, "right"), (False, style.VERMILLION, "wrong")):
                rows = each["right"] == kind
                axes.scatter(each["moves"][rows], steps[rows], s=7, c=color, alpha=0.4, linewidths=0, label=name)
            share = row["accuracy"][max(row["accuracy"], key=int)]
            axes.set_title(f"{side} × {side}: {100 * share['share']:.1f} % right", fontsize=10)
            axes.set_yscale("log")
            style.plain_ticks(axes.yaxis, log=True)
        panels[0].set_ylabel("outer steps to the tolerance")
        figure.supxlabel("moves from start to goal", fontsize=10)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2)
        path.write_bytes(style.save(figure, path.suffix[1:]))


def print_table(report: dict[str, Any]) -> None:
    table = Table("size", "mazes", "moves, median", *(f"depth {d}" for d in SHOWN), "lost", "met, right of these")
    for side, row in report["sizes"].items():
        cells = [f"{100 * row['accuracy'][d]['share']:.1f}" if d in row["accuracy"] else "" for d in SHOWN]
        met = f"{row['met_tolerance']}, {row['right_of_those']}"
        table.add_row(str(side), str(row["mazes"]), f"{row['moves']['median']:.0f}", *cells, str(row["lost"]), met)
    Console(width=160).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.studies.maze_sizes", description="Mazes of other sizes.")
    parser.add_argument("--model", required=True, help="of mazes; name, folder or file")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides; default the model's, and larger ones")
    parser.add_argument("--mazes", type=int, default=500, help="of each size")
    parser.add_argument("--depth", type=int, default=64)
    parser.add_argument("--tol", type=float, help="default the card's")
    parser.add_argument("--trained-on", type=Path, help="file of mazes, which are left out")
    parser.add_argument("--results", type=Path, help="folder of <device>/maze_sizes.json")
    parser.add_argument("--picture", type=Path, help="a .png or .svg")
    options = parser.parse_args(arguments)
    model = EquilibriumReasoner.from_pretrained(options.model)
    own = round(model.config.seq_len**0.5)
    card = model.card
    tol = options.tol
    if tol is None and card is not None:
        tol = card.tol or card.tol_fast
    if tol is None:
        raise SystemExit("the model's card has no tolerance; give --tol, or find one with eqr calibrate")
    seen: set[bytes] = set()
    if options.trained_on is not None:
        mazes, errors = maze.load(options.trained_on)
        if errors:
            raise SystemExit(f"--trained-on {options.trained_on}: {errors.total} rows cannot be read, {errors[0]}")
        seen = {row.tobytes() for row in mazes.inputs}
    sizes: dict[int, Any] = {}
    for side in options.sizes or (own, own + 2, own + 6):
        puzzles = maze.generate(options.mazes, size=side, seed=SEED)
        views = maze.views(puzzles.inputs, 8).inputs  # [N, 8, S]
        repeated = np.array([any(view.tobytes() in seen for view in of_one) for of_one in views])
        if repeated.all():
            raise SystemExit(f"all mazes of side {side} are among those of --trained-on; there is nothing to measure")
        puzzles = puzzles.subset(~repeated)
        assert puzzles.labels is not None
        here = resized(model, side)
        depths = range(1, options.depth + 1)
        as_calibrated: dict[str, Any] = dict(noise_scale=model.inference_noise_scale, window=model.inference_window)
        recording = record(here, puzzles.inputs, puzzles.labels, depths=depths, **as_calibrated)
        sizes[side] = measured(puzzles, recording, tol)
    report = {
        **machine.provenance("benchmarks.studies.maze_sizes"),
        "model": options.model,
        "weights_sha256": weights_digest(model),
        "trained_on_side": own,
        "tol": tol,
        "depth": options.depth,
        "seed": SEED,
        "torch_threads": torch.get_num_threads(),
        "sizes": sizes,
    }
    print_table(report)
    if options.picture is not None:
        draw(report, options.picture)
    for row in sizes.values():
        del row["per_maze"]  # thousands of lines, and the picture is drawn
    machine.write_report(options.results, "maze_sizes", report)


if __name__ == "__main__":
    main()
