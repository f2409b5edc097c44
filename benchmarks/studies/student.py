"""`python -m benchmarks.studies.student TRAIN DEV`: can a small reasoner be taught by a large one's trajectories?

The teacher's answers after each of its first outer steps are recorded on training puzzles. Students of half the width,
with its blocks or with one, H 1, then take the same number of training steps on the same puzzles, and differ in what
they are asked for at their own outer step k:

    labels      the answer, at every step, as in any training
    iterates    the teacher's grid after its step k, with its mistakes
    as far      the answer in the cells that the teacher has right after its step k; the others are not scored

Rows are of mixed ages and symmetries, as in `eqr train`, and steps are in bfloat16. The halting head always learns
whether the answer is right.
Teacher and students are then judged alike, in float32: exact answers by depth and source, how well the residual tells
right from wrong, and how many of a puzzle's restarts end right.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.atomic import atomic_write
from eqr_kernels.cli import puzzles as puz
from eqr_kernels.modules import LatentState
from eqr_kernels.studies.identity import weights_digest
from eqr_kernels.studies.recording import Recording, record
from eqr_kernels.studies.scoring import Accuracy
from eqr_kernels.studies.statistics import auroc
from eqr_kernels.studies.subset import digest
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.registry import SUDOKU
from eqr_kernels.training.learning_rate import learning_rate
from eqr_kernels.training.objective import stablemax_cross_entropy
from eqr_kernels.training.optim import EMA, AdamATan2
from eqr_kernels.training.throughput import training_operations

Tokens = npt.NDArray[np.uint8]

ARMS = ("labels", "iterates", "as far")
STEPS = 16
"""Outer steps that are recorded, and that a row is trained for."""
MIX = {"17_clue": 0.4, "forum_hardest_1905_11plus": 0.5, "magictour_top1465": 0.1}
DEPTHS = (1, 4, 16, 64)
STUDENTS: dict[str, dict[str, Any]] = {"half width": dict(), "one block": dict(L_layers=1)}
"""Fields of the config that differ from the teacher's, beside the width and H_cycles."""
RESTARTS = 8
JUDGED: dict[str, Any] = dict(precision="fp32", halt="none", trace=False)
RECIPE: dict[str, Any] = dict(
    dtype="bfloat16", batch=64, lr=1e-3, warmup=100, min_ratio=0.03, weight_decay=1.0, ema=0.998
)


@dataclass(frozen=True)
class Taught:
    """Training puzzles and what the teacher made of them: inputs, labels [M, S], iterates [M, STEPS, S], all uint8."""

    inputs: Tokens
    labels: Tokens
    iterates: Tokens

    def goals(self, arm: str) -> Tokens:
        """What a student is asked for at each of its steps, [M, STEPS, S]; 0 is not scored."""
        labels = np.broadcast_to(self.labels[:, None], self.iterates.shape)
        if arm == "labels":
            return labels
        if arm == "iterates":
            return self.iterates
        return np.where(self.iterates == labels, labels, 0).astype(np.uint8)


def student_config(name: str, teacher: EqRConfig) -> EqRConfig:
    return replace(teacher, **{"hidden_size": teacher.hidden_size // 2, "H_cycles": 1, **STUDENTS[name]})


def taught_by(
    teacher: EquilibriumReasoner, puzzles: PuzzleSet, count: int, clues: tuple[int, int], seed: int
) -> Taught:
    """Draws puzzles by source, shows clues until each has a number of the range, and records the teacher on them."""
    assert puzzles.labels is not None
    rng, drawn = np.random.default_rng(seed), []
    for source, share in MIX.items():
        of_source, wanted = np.flatnonzero(puzzles.source == source), round(share * count)
        if wanted > len(of_source):
            raise SystemExit(f"--puzzles {count} needs {wanted} of {source}, and there are {len(of_source)}")
        drawn.append(rng.choice(of_source, wanted, replace=False))
    rows = np.concatenate(drawn)
    labels = puzzles.labels[rows]
    inputs = sudoku.reveal(puzzles.inputs[rows], labels, rng.integers(clues[0], clues[1] + 1, len(rows)), rng)
    parts = []
    for start in range(0, len(rows), 64):
        tokens = torch.from_numpy(inputs[start : start + 64].astype(np.int64))
        result = teacher.solve(tokens, depth=STEPS, halt="none", checkpoints=range(1, STEPS + 1))
        grids = [result.at[k].all_preds[:, 0] for k in range(1, STEPS + 1)]
        parts.append(torch.stack(grids, 1).to(torch.uint8).numpy())
    return Taught(inputs, labels, np.concatenate(parts))


def kept_or_taught(
    teacher: EquilibriumReasoner, puzzles: PuzzleSet, count: int, clues: tuple[int, int], seed: int, path: Path
) -> Taught:
    """What `path` holds of `taught_by`, or else what that gives, which is kept there.

    Raises:
        SystemExit: it holds what another teacher, or the same on other puzzles, was recorded on.
    """
    assert puzzles.labels is not None
    identity = json.dumps([weights_digest(teacher), digest(puzzles.inputs, puzzles.labels), count, clues, seed])
    if path.exists():
        with np.load(path) as kept:
            if str(kept["identity"]) != identity:
                raise SystemExit(
                    f"{path} holds another recording (teacher, puzzles, their number, clues or the seed differ); "
                    "name another --recording, or remove it"
                )
            return Taught(kept["inputs"], kept["labels"], kept["iterates"])
    taught, file = taught_by(teacher, puzzles, count, clues, seed), io.BytesIO()
    np.savez_compressed(file, identity=identity, **vars(taught))
    atomic_write(path, file.getvalue())
    return taught


class Rows:
    """The rows of a batch, of mixed ages, each with the goals of its steps."""

    def __init__(self, taught: Taught, arm: str, n: int, seed: int) -> None:
        self.taught, self.goals, self.rng = taught, taught.goals(arm), np.random.default_rng(seed)
        self.tokens = torch.zeros(n, sudoku.SEQ_LEN, dtype=torch.int64)
        self.labels = torch.zeros_like(self.tokens)
        self.targets = torch.zeros(n, STEPS, sudoku.SEQ_LEN, dtype=torch.int64)
        # All ages from the first step on, so that no batch is of one.
        self.ends = torch.from_numpy(self.rng.integers(1, STEPS + 1, n))
        self.replace(torch.arange(n))

    def replace(self, rows: torch.Tensor) -> None:
        """Fresh puzzles, each under a symmetry of its own, in the rows, int64 [n]."""
        drawn = self.rng.integers(len(self.goals), size=len(rows))
        views = sudoku.views(self.taught.inputs[drawn], 2, seed=int(self.rng.integers(1 << 32)))
        cells, names = views.cells[:, 1], views.names[:, 1]

        def moved(grids: Tokens) -> torch.Tensor:
            """[n, K, S]"""
            seen = np.take_along_axis(grids, cells[:, None].astype(np.int64), 2)
            return torch.from_numpy(np.take_along_axis(names[:, None], seen.astype(np.int64), 2).astype(np.int64))

        self.tokens[rows] = torch.from_numpy(views.inputs[:, 1].astype(np.int64))
        self.labels[rows] = moved(self.taught.labels[drawn][:, None])[:, 0]
        self.targets[rows] = moved(self.goals[drawn])


def trained(config: EqRConfig, taught: Taught, arm: str, steps: int, seed: int) -> tuple[EquilibriumReasoner, float]:
    """A student with averaged weights, and the mean loss of its last tenth."""
    torch.manual_seed(seed)
    model = EquilibriumReasoner(config)
    optimizer = AdamATan2(model.parameters(), lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
    average, n = EMA(model, RECIPE["ema"]), int(RECIPE["batch"])
    rows = Rows(taught, arm, n, seed)
    state, ids, losses = model.initial_state(n, seed=seed), n, []
    for step in range(1, steps + 1):
        with torch.autocast("cpu", getattr(torch, RECIPE["dtype"])):
            state, logits, q_halt = model(rows.tokens, state)
        targets = rows.targets[torch.arange(n), state.step - 1]
        with torch.no_grad():
            exact = (logits.argmax(-1) == rows.labels).all(1)
        halting = F.binary_cross_entropy_with_logits(q_halt, exact.to(q_halt.dtype))
        loss = stablemax_cross_entropy(logits, targets).mean() + 0.5 * halting
        schedule = dict(lr=RECIPE["lr"], warmup=int(RECIPE["warmup"]), min_ratio=RECIPE["min_ratio"])
        optimizer.param_groups[0]["lr"] = learning_rate(step, total=steps, **schedule)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        losses.append(float(loss.detach()))
        state = LatentState(*(part.detach() for part in state))
        ended = torch.nonzero(state.step >= rows.ends)[:, 0]
        if len(ended):
            rows.replace(ended)
            rows.ends[ended] = STEPS
            fresh = model.initial_state(len(ended), seed=seed, ids=torch.arange(ids, ids + len(ended)))
            ids += len(ended)
            state = LatentState(*(_put(old, ended, new) for old, new in zip(state, fresh, strict=True)))
    model.load_state_dict(average.shadow, strict=False)
    return model.eval(), float(np.mean(losses[-max(1, steps // 10) :]))


def _put(old: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    old = old.clone()
    old[rows] = new
    return old


def residual_auroc(recording: Recording) -> float | None:
    """Of all trajectories at the last depth; None where all or none are right."""
    area = auroc(recording.residual[..., -1].ravel(), recording.correct[..., -1].ravel())
    return None if np.isnan(area) else float(area)


def judged(model: EquilibriumReasoner, puzzles: PuzzleSet) -> dict[str, Any]:
    """Exact answers by depth and source, and how well the residual tells right from wrong at the last depth."""
    assert puzzles.labels is not None
    recording = record(model, puzzles.inputs, puzzles.labels, depths=DEPTHS, **JUDGED)
    right = recording.correct[:, 0]

    def accuracy(rows: npt.NDArray[np.bool_]) -> dict[int, Any]:
        return {d: Accuracy.of(right[rows, k]).as_json() for k, d in enumerate(DEPTHS)}

    return {
        "all": accuracy(np.ones(len(right), bool)),
        **{str(source): accuracy(puzzles.source == source) for source in np.unique(puzzles.source)},
        "residual_auroc": residual_auroc(recording),
        "median_residual": float(np.median(recording.residual[:, 0, -1])),
    }


def restarts_of(model: EquilibriumReasoner, puzzles: PuzzleSet) -> dict[str, Any]:
    """Puzzles by how many of their restarts end right at the last depth, and what the residual tells of these."""
    assert puzzles.labels is not None
    recording = record(model, puzzles.inputs, puzzles.labels, depths=DEPTHS[-1:], breadth=RESTARTS, **JUDGED)
    right = recording.correct[..., -1]  # [N, B]
    return {
        "none right": int((~right).all(1).sum()),
        "some right": int((right.any(1) & ~right.all(1)).sum()),
        "all right": int(right.all(1).sum()),
        "residual_auroc": residual_auroc(recording),
    }


def examined(model: EquilibriumReasoner, dev: PuzzleSet, restarted: int) -> dict[str, Any]:
    """What teacher and students are compared by."""
    easier = puz.reveal_clues(SUDOKU, dev, 28, seed=0)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_operations_per_row": training_operations(model.config),
        "published": judged(model, dev),
        "28 clues": judged(model, easier),
        f"28 clues, {RESTARTS} restarts": restarts_of(model, puz.stratified(easier, min(restarted, len(easier)))),
    }


def print_table(report: dict[str, Any]) -> None:
    table = Table("model", "asked for", "17 clues, depth 16", "64", "28 clues, depth 16", "64", "AUROC", "loss")
    for row in [{"student": report["teacher"]["name"], "arm": "-", **report["teacher"]}, *report["students"]]:
        published, easier = row["published"], row["28 clues"]
        seventeen = published.get("17_clue", published["all"])
        cells = [f"{100 * part[d]['share']:.1f}" for part in (seventeen, easier["all"]) for d in (16, 64)]
        area = easier["residual_auroc"]
        last = ["-" if area is None else f"{area:.3f}", f"{row['loss']:.3f}" if "loss" in row else "-"]
        table.add_row(row["student"], row["arm"], *cells, *last)
    Console(width=160).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.studies.student", description="Students of a reasoner.")
    parser.add_argument("train", type=Path, help="puzzles with answers to be taught on")
    parser.add_argument("dev", type=Path, help="puzzles with answers to be judged on")
    parser.add_argument("--teacher", default="sudoku")
    parser.add_argument("--puzzles", type=int, default=4000, help="that the teacher is recorded on")
    parser.add_argument("--clues", type=int, nargs=2, default=[20, 36], metavar=("LEAST", "MOST"), help="they show")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of each student")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=["one block"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--judged", type=int, default=300, help="puzzles of dev, a stratified subset")
    parser.add_argument("--restarted", type=int, default=60, help=f"of these, that are run {RESTARTS} times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recording", type=Path, default=Path("student.npz"), help="kept there, and taken from there")
    parser.add_argument("--results", type=Path, help="folder of <device>/student.json")
    options = parser.parse_args(arguments)
    teacher = EquilibriumReasoner.from_pretrained(options.teacher)
    clues = (options.clues[0], options.clues[1])
    if not 0 <= clues[0] <= clues[1] <= sudoku.SEQ_LEN:
        parser.error(f"--clues must be LEAST <= MOST, both in 0..{sudoku.SEQ_LEN}, got {clues[0]} {clues[1]}")
    train = sudoku.load(options.train)[0]
    taught = kept_or_taught(teacher, train, options.puzzles, clues, options.seed, options.recording)
    dev, _ = sudoku.load(options.dev)
    dev = puz.stratified(dev, min(options.judged, len(dev)))
    last = (taught.iterates[:, -1] == taught.labels).all(1)
    report: dict[str, Any] = {
        **machine.provenance("benchmarks.studies.student"),
        "teacher": {
            "name": options.teacher,
            "sha256": weights_digest(teacher),
            "right_of_taught": int(last.sum()),
            **examined(teacher, dev, options.restarted),
        },
        "puzzles": len(taught.labels),
        "recipe": {**RECIPE, "steps": options.steps, "row_steps": STEPS, "clues": clues, "mix": MIX},
        "students": [],
    }
    machine.write_report(options.results, "student", report)
    for student in options.students:
        config = student_config(student, teacher.config)
        for arm in options.arms:
            begun = time.perf_counter()
            model, loss = trained(config, taught, arm, options.steps, options.seed)
            took = round(time.perf_counter() - begun)
            operations = options.steps * int(RECIPE["batch"]) * training_operations(config)
            report["students"].append(
                {"student": student, "arm": arm, "operations": operations, "loss": loss, "seconds": took}
                | examined(model, dev, options.restarted)
            )
            machine.write_report(options.results, "student", report)
    print_table(report)


if __name__ == "__main__":
    main()
