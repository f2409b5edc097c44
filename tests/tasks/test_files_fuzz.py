"""Mutated puzzle files, a few of each run of `tests.tasks.fuzz_files`, and bytes that never were one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eqr_kernels.tasks import sudoku
from tests.support.puzzle_files import A_ANSWER, A
from tests.tasks import fuzz_files

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(fuzz_files.SOURCES))
def test_an_undamaged_file_passes_its_own_check(name: str, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    nothing = fuzz_files.Mutation("insert", 0.0, 1, b"")
    fuzz_files.check(tmp_path / "fuzzed", name, [nothing], "auto", counts)
    assert counts["grids accepted"] + counts["refused whole"] > 0 and not counts["rows refused"]


def test_mutated_files_are_read_rightly_or_refused(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    fuzz_files.run(300, tmp_path, counts, derandomize=True)
    assert counts["files"] >= 300 and counts["grids accepted"] > 100 and counts["refused whole"] > 10


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["dataset.json", "all__inputs.npy", "all__labels.npy"]),
    st.lists(fuzz_files.mutations, min_size=1, max_size=3),
)
def test_mutated_folders_are_read_or_refused(tmp_path: Path, name: str, changes: list[fuzz_files.Mutation]) -> None:
    for file, grid in (("all__inputs.npy", A), ("all__labels.npy", A_ANSWER)):
        np.save(tmp_path / file, sudoku.encode(grid)[None])
    (tmp_path / "dataset.json").write_text(json.dumps({"seq_len": 81, "ignore_label_id": 0, "sets": ["all"]}))
    data = (tmp_path / name).read_bytes()
    for change in changes:
        data = fuzz_files.mutate(data, change)
    (tmp_path / name).write_bytes(data)
    try:
        puzzles, _ = sudoku.load(tmp_path)
    except fuzz_files.OWN as problem:
        assert str(problem)
    else:
        assert puzzles.inputs.shape[1] == 81 and sudoku.is_valid_grid(puzzles.inputs).all()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
)
def test_bytes_that_never_were_a_puzzle_hold_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "noise").write_bytes(data)
    try:
        puzzles, _ = sudoku.load(tmp_path / "noise")
    except fuzz_files.OWN as problem:
        assert str(problem).isprintable()
    else:
        assert len(puzzles) == 0
