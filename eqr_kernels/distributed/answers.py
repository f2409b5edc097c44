"""`eqr solve` into a table: a row for each row of the input, in its order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eqr_kernels.distributed.job import Work
from eqr_kernels.distributed.optional import arrow
from eqr_kernels.distributed.units import Unit
from eqr_kernels.noise import hash_tokens
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies.scoring import exact_match
from eqr_kernels.tasks.common import rating_number
from eqr_kernels.tasks.registry import find_task
from eqr_kernels.tasks.task import CountsSolutions, Task, solutions_of, symmetries_of
from eqr_kernels.views import solve_puzzles

ERROR = "error"
"""Status of a row that could not be read."""

_COUNTED = ("valid", "correct", "solutions", "converged", "steps", "nfe")


def schema() -> Any:
    """Of the answers, as pyarrow has it; docs/distributed.md says what each column is."""
    pa = arrow()
    text, number, real = pa.string(), pa.int64(), pa.float32()
    return pa.schema(
        [
            *(("file", text), ("line", number), ("id", text), ("source", text), ("rating", pa.float64())),
            *(("puzzle", text), ("answer", text), ("prediction", text), ("valid", pa.bool_()), ("correct", pa.bool_())),
            ("solutions", text),
            *(("status", text), ("converged", pa.bool_()), ("steps", number), ("nfe", number), ("restart", number)),
            *(("residual", real), ("score", real), ("q_halt", real), ("random_id", number)),
            *(("error", text), ("text", text)),
        ]
    )


@dataclass(frozen=True)
class Answering:
    """Solves each unit.

    Attributes:
        task: as `find_task` takes it.
        settings: further arguments of `solve`. Those that `solve` would find out from its own rows (tol) are given.
        views: the trajectories of a puzzle get a view each, see `solve_views`.
        turn_every: outer steps between turns, see `turns` of `solve`; None: no turns.
        check: count the solutions of every puzzle, not only of those that are filled by the rules (of a task that can).
    """

    task: str
    settings: dict[str, Any]
    check: bool = False
    views: bool = False
    turn_every: int | None = None

    def work(self, model: EquilibriumReasoner) -> Work:
        task = find_task(self.task)
        return lambda unit: _answers(model, task, unit, self)


def _answers(model: EquilibriumReasoner, task: Task, unit: Unit, job: Answering) -> Any:
    rows: list[dict[str, Any]] = [
        {"file": unit.file, "line": error.line, "status": ERROR, "error": error.message, "text": error.text}
        for error in unit.errors
    ]
    if len(unit.puzzles):
        rows += _solved(model, task, unit, job)
    rows.sort(key=lambda row: row["line"])
    return arrow().Table.from_pylist(rows, schema())


def _solved(model: EquilibriumReasoner, task: Task, unit: Unit, job: Answering) -> list[dict[str, Any]]:
    p = unit.puzzles
    assert p.line is not None
    symmetries = symmetries_of(task, job.settings["seed"], views=job.views, turn_every=job.turn_every)
    result = solve_puzzles(model, p.inputs, **symmetries, **job.settings)
    preds = result.preds.cpu().numpy()
    labels = np.zeros_like(p.inputs) if p.labels is None else p.labels
    valid, right = task.check(p.inputs, preds), exact_match(preds, labels)
    labelled: list[bool] = np.asarray(labels.any(1)).tolist()
    solutions: list[str | None] = [None] * len(p)
    if isinstance(task, CountsSolutions):
        # What was filled is only solved where nothing else could have been.
        solutions = [solutions_of(task, p.inputs[i]) if job.check or valid[i] else None for i in range(len(p))]
    seen = p.inputs
    if symmetries["views"] is not None:
        seen = symmetries["views"](p.inputs, job.settings["breadth"]).inputs[
            np.arange(len(p)), result.restart.cpu().numpy()
        ]
    random_ids = hash_tokens(torch.from_numpy(seen)).tolist()
    return [
        {
            "file": unit.file,
            "line": int(p.line[i]),
            "id": None if p.id is None else str(p.id[i]),
            "source": str(p.source[i]),
            "rating": rating_number(p.rating[i]),
            "puzzle": task.decode(p.inputs[i]),
            "answer": task.decode(labels[i]) if labelled[i] else None,
            "prediction": task.decode(preds[i]),
            "valid": bool(valid[i]),
            "correct": bool(right[i]) if labelled[i] else None,
            "solutions": solutions[i],
            "random_id": random_ids[i],
            **row,  # float32 goes through Python's float64 and back unchanged
        }
        for i, row in enumerate(result.rows())
    ]


@dataclass
class Totals:
    """What came of all rows.

    Attributes:
        unread: rows that could not be read. valid: answers that keep the rules. The others: as in the summary of `eqr
            solve`.
    """

    puzzles: int = 0
    unread: int = 0
    valid: int = 0
    filled_ambiguous: int = 0
    with_answers: int = 0
    correct: int = 0
    other_valid: int = 0
    converged: int = 0
    converged_invalid: int = 0
    steps: int = 0
    nfe: int = 0

    def add(self, table: Any) -> None:
        """Counts the rows of a table of answers."""
        read = np.array([error is None for error in table["error"].to_pylist()], bool)
        known = {name: np.array(table[name].to_pylist(), object)[read] for name in _COUNTED}
        judged = np.array([value is not None for value in known["correct"]], bool)
        valid, correct, converged = (known[name].astype(bool) for name in ("valid", "correct", "converged"))
        self.puzzles += int(read.sum())
        self.unread += int((~read).sum())
        self.valid += int(valid.sum())
        self.filled_ambiguous += int((valid & (known["solutions"] == "several")).sum())
        self.with_answers += int(judged.sum())
        self.correct += int(correct.sum())
        self.other_valid += int((valid & judged & ~correct).sum())
        self.converged += int(converged.sum())
        self.converged_invalid += int((converged & ~valid).sum())
        self.steps += int(known["steps"].sum())
        self.nfe += int(known["nfe"].sum())


def totals(tables: Iterable[Any]) -> Totals:
    """Of tables of answers."""
    counted = Totals()
    for table in tables:
        counted.add(table)
    return counted


def errors_of(tables: Iterable[Any], limit: int) -> list[dict[str, Any]]:
    """The first rows that could not be read: file, line, text and message."""
    errors: list[dict[str, Any]] = []
    for table in tables:
        for row in table.select(["file", "line", "text", "error"]).to_pylist():
            if row["error"] is not None and len(errors) < limit:
                errors.append({**{k: row[k] for k in ("file", "line", "text")}, "message": row["error"]})
    return errors
