"""Tables of puzzles for runs that write Parquet: a few puzzles with answers, some of them filled in, and bad rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from eqr_kernels.tasks import sudoku, sudoku_generator

BAD = (3, 7)
"""Rows of `rows` that are no puzzles, from 0."""


def rows(count: int) -> list[dict[str, Any]]:
    """Puzzles under the columns id, source, question, answer, rating; every other one is its own answer."""
    puzzles = sudoku_generator.generate(count, "easy", seed=7)
    assert puzzles.labels is not None
    made = []
    for i in range(count):
        question, answer = sudoku.decode(puzzles.inputs[i]), sudoku.decode(puzzles.labels[i])
        question = "12345" if i in BAD else answer if i % 2 else question
        made.append(dict(id=f"name {i}", source=f"source {i % 3}", question=question, answer=answer, rating=i / 2))
    return made


def write_csv(path: Path, table: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def write_parquet(path: Path, table: list[dict[str, Any]]) -> Path:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(table), path)
    return path


def shards_of(folder: Path) -> dict[str, bytes]:
    """What the shards of a folder hold, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


def same_report(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two reports of `eqr eval` agree in all but the command and the time that it took."""

    def plain(report: dict[str, Any]) -> str:
        kept = {**report, "seconds": 0, "reproduce": {**report["reproduce"], "command": ""}}
        return json.dumps(kept, sort_keys=True)

    return plain(one) == plain(other)
