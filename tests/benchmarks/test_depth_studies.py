"""What maze_sizes, precision_depth, student, extreme_mix and breadth_needed count, with models of no size."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import machine
from benchmarks.studies import breadth_needed, extreme_mix, maze_sizes, precision_depth, student
from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.studies.scoring import Accuracy
from eqr_kernels.tasks import maze, sudoku, sudoku_generator
from eqr_kernels.tasks.common import ParseErrors
from tests.support.commands import TINY
from tests.support.recordings import made

CONFIG = EqRConfig.maze(**{**TINY, "seq_len": 49, "multiple_of": 8, "pos_encodings": "rope2d"})


@pytest.fixture
def model() -> EquilibriumReasoner:
    torch.manual_seed(0)
    return EquilibriumReasoner(CONFIG).eval()


def test_weights_of_attention_go_to_other_sizes(model):
    tokens = torch.from_numpy(maze.generate(2, size=7, seed=1).inputs.astype(np.int64))
    same = maze_sizes.resized(model, 7).solve(tokens, depth=3, halt="none")
    assert torch.equal(same.logits, model.solve(tokens, depth=3, halt="none").logits)
    larger = maze_sizes.resized(model, 9)
    assert larger.config.seq_len == 81 and larger.config.board == (9, 9)
    with pytest.raises(ValueError, match="by an MLP of fixed size"):
        maze_sizes.resized(EquilibriumReasoner(EqRConfig.sudoku(**TINY)), 7)


def test_what_becomes_of_mazes_is_counted():
    puzzles = maze.generate(4, size=7, seed=1)
    puzzles.rating[:] = [10, 30, 30, 50]
    # Right from step 2; from step 1; right at 2 alone; never right, and settled.
    correct = [[[0, 1, 1, 1]], [[1, 1, 1, 1]], [[0, 1, 0, 0]], [[0, 0, 0, 0]]]
    residual = [[[0.9, 0.9, 0.1, 0.1]], [[0.9, 0.1, 0.1, 0.1]], [[0.9] * 4], [[0.1] * 4]]
    row = maze_sizes.measured(puzzles, made(correct, residual), tol=0.2)
    assert {d: a["correct"] for d, a in row["accuracy"].items()} == {1: 1, 2: 3, 4: 2}
    assert (row["lost"], row["met_tolerance"], row["right_of_those"]) == (1, 3, 2)
    assert row["per_maze"]["steps"] == [3, 2, 4, 1] and row["per_maze"]["right"] == [True, True, False, False]
    short, middle, long = row["by_length"]
    assert (short["mazes"], short["right"], short["steps_to_tolerance"], short["steps_to_right"]) == (1, 1, 3.0, 2.0)
    assert (middle["mazes"], middle["right"], middle["steps_to_tolerance"], middle["steps_to_right"]) == (
        2,
        1,
        2.0,
        1.0,
    )
    assert (long["right"], long["steps_to_tolerance"], long["steps_to_right"]) == (0, None, None)


def test_the_study_of_mazes_writes_what_it_says(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    arguments = ["--model", str(tmp_path / "m"), "--sizes", "7", "9", "--mazes", "3", "--depth", "2", "--tol", "0.5"]
    picture = ["--results", str(tmp_path), "--picture", str(tmp_path / "p.png")]
    maze_sizes.main([*arguments, *picture])
    report = json.loads((tmp_path / machine.folder() / "maze_sizes.json").read_text())
    assert set(report["sizes"]) == {"7", "9"} and report["trained_on_side"] == 7
    assert (tmp_path / "p.png").stat().st_size > 1000
    trained_on = tmp_path / "mazes.npy"
    turned = maze.views(maze.generate(1, size=9, seed=maze_sizes.SEED).inputs, 8).inputs[0, 5]
    np.save(trained_on, turned[None])
    maze_sizes.main([*arguments, *picture, "--trained-on", str(trained_on)])
    left = json.loads((tmp_path / machine.folder() / "maze_sizes.json").read_text())
    assert {side: row["mazes"] for side, row in left["sizes"].items()} == {"7": 3, "9": 2}
    np.save(trained_on, maze.generate(3, size=9, seed=maze_sizes.SEED).inputs)
    with pytest.raises(SystemExit, match="all mazes of side 9 are among those of --trained-on"):
        maze_sizes.main([*arguments, "--trained-on", str(trained_on)])


def test_the_study_of_arithmetic_runs_what_it_is_asked_for(tmp_path):
    torch.manual_seed(0)
    EquilibriumReasoner(EqRConfig.sudoku(**TINY)).save_pretrained(tmp_path / "m")
    puzzles = sudoku_generator.generate(3, "easy", seed=1)
    rows = [f"{sudoku.decode(q)},{sudoku.decode(a)}" for q, a in zip(puzzles.inputs, puzzles.labels, strict=True)]
    (tmp_path / "p.csv").write_text("\n".join(["question,answer", *rows]) + "\n")
    arguments = [tmp_path / "p.csv", "--model", tmp_path / "m", "--layers", 40, "--results", tmp_path]
    precision_depth.main([str(a) for a in arguments])
    report = json.loads((tmp_path / machine.folder() / "precision_depth-m.json").read_text())
    assert report["layers_per_step"] == 2 and report["depths"] == [16, 20]
    assert list(report["runs"]) == ["fp32", "bf16", "int8", "eager bf16"]
    assert report["runs"]["eager bf16"]["backend"] == "reference"
    precision_depth.main([str(a) for a in [*arguments, "--runs", "bf16"]])
    report = json.loads((tmp_path / machine.folder() / "precision_depth-m.json").read_text())
    assert list(report["runs"]) == ["bf16"]


def test_what_an_arithmetic_loses_is_counted():
    report = made([[[1, 1]], [[1, 0]], [[0, 1]]], [[[0.3, 0.1]], [[0.5, 0.5]], [[0.3, 0.3]]])
    row = precision_depth.row_of(report, np.array([True, False, True]))
    assert row["lost"] == 1 and [a["correct"] for a in row["accuracy"].values()] == [2, 2]
    assert row["median_residual"] == {1: pytest.approx(0.3), 2: pytest.approx(0.2)}
    model = EquilibriumReasoner(EqRConfig.sudoku(**TINY))
    assert precision_depth.depths_of(model, 40_000) == (16, 64, 256, 1024, 4096, 16384, 20_000)


def teaching(n: int = 3) -> student.Taught:
    """The teacher has the first k + 1 blanks right after its step k, and 2 in the others."""
    puzzles = sudoku_generator.generate(n, "easy", seed=2)
    iterates = np.repeat(puzzles.labels[:, None], student.STEPS, 1)
    for row, inputs in enumerate(puzzles.inputs):
        blanks = np.flatnonzero(inputs == sudoku.BLANK)
        for k in range(student.STEPS):
            iterates[row, k, blanks[k + 1 :]] = 2
    return student.Taught(puzzles.inputs, puzzles.labels, iterates)


def test_each_student_is_asked_for_what_it_says():
    taught = teaching()
    known = taught.iterates == taught.labels[:, None]
    assert (taught.goals("labels") == taught.labels[:, None]).all()
    assert (taught.goals("iterates") == taught.iterates).all()
    as_far = taught.goals("as far")
    assert ((as_far == 0) == ~known).all() and (as_far[known] == taught.goals("labels")[known]).all()


@pytest.mark.parametrize("arm", student.ARMS)
def test_rows_are_puzzles_with_their_goals_under_one_symmetry(arm):
    taught = teaching()
    rows = student.Rows(taught, arm, 8, seed=0)
    assert set(rows.ends.tolist()) - {student.STEPS}
    before = rows.tokens.clone()
    rows.replace(torch.tensor([1, 4]))
    assert (rows.tokens != before).any(1).tolist() == [i in (1, 4) for i in range(8)]
    tokens, labels, targets = (t.numpy() for t in (rows.tokens, rows.labels, rows.targets))
    assert sudoku.is_solution(tokens, labels).all()
    given = tokens > sudoku.BLANK
    for k in range(student.STEPS):
        assert (targets[:, k][given] == labels[given]).all()  # the teacher has all givens
    right = (targets == labels[:, None]).sum(2)
    if arm == "labels":
        assert (right == 81).all()
    else:
        assert (np.diff(right, axis=1) >= 0).all() and (right[:, 0] < 81).all()
        assert (targets == 0).any() == (arm == "as far")


def test_a_student_is_half_as_wide_as_its_teacher_in_all_else_alike_but_h_and_blocks():
    teacher = EqRConfig.sudoku(hidden_size=64, L_layers=2, H_cycles=2, L_cycles=3, noise_scale=0.5)
    half = student.student_config("half width", teacher)
    assert half == replace(teacher, hidden_size=32, H_cycles=1)
    assert student.student_config("one block", teacher) == replace(half, L_layers=1)


def test_restarts_are_counted_by_how_many_end_right(monkeypatch):
    right = [[[1], [1]], [[1], [0]], [[0], [1]], [[0], [0]]]
    residual = [[[0.1], [0.1]], [[0.2], [0.4]], [[0.2], [0.1]], [[0.6], [0.5]]]
    monkeypatch.setattr(
        student, "record", lambda *_, **settings: made(right, residual) if settings["breadth"] == 8 else 0
    )
    puzzles = sudoku_generator.generate(4, "easy", seed=1)
    report = student.restarts_of(EquilibriumReasoner(EqRConfig.sudoku(**TINY)), puzzles)
    assert (report["none right"], report["some right"], report["all right"]) == (1, 2, 1)
    assert report["residual_auroc"] == pytest.approx(15.5 / 16)  # of 4 x 4 pairs one ties


def test_the_study_of_students_writes_what_it_says(tmp_path, monkeypatch):
    torch.manual_seed(0)
    EquilibriumReasoner(EqRConfig.sudoku(**TINY)).save_pretrained(tmp_path / "m")
    puzzles = sudoku_generator.generate(12, "easy", seed=1)
    rows = ["source,question,answer"]
    for i, source in enumerate([*student.MIX] * 4):
        rows.append(f"{source},{sudoku.decode(puzzles.inputs[i])},{sudoku.decode(puzzles.labels[i])}")
    (tmp_path / "p.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.setitem(student.STUDENTS, "one block", TINY)
    monkeypatch.setitem(student.RECIPE, "batch", 4)
    monkeypatch.setattr(student, "DEPTHS", (1, 16, 64))
    arguments = [tmp_path / "p.csv", tmp_path / "p.csv", "--teacher", tmp_path / "m", "--puzzles", 8, "--steps", 20]
    kept = ["--recording", tmp_path / "r.npz", "--results", tmp_path, "--judged", 6]
    student.main([str(a) for a in [*arguments, *kept]])
    report = json.loads((tmp_path / machine.folder() / "student.json").read_text())
    assert [row["arm"] for row in report["students"]] == list(student.ARMS) and report["puzzles"] == 8
    judged = {"parameters", "published", "28 clues", "28 clues, 8 restarts"}
    assert all(judged <= row.keys() for row in (report["teacher"], *report["students"]))
    assert len({row["loss"] for row in report["students"]}) == 3
    again = [*arguments[:-1], 1, *kept]
    student.main([str(a) for a in [*again, "--arms", "labels"]])  # what is there is taken
    for other in (["--seed", 1], ["--puzzles", 4], ["--clues", 30, 30]):
        with pytest.raises(SystemExit, match="holds another recording"):
            student.main([str(a) for a in [*again, *other]])
    with pytest.raises(SystemExit, match="--puzzles 30 needs 12 of 17_clue, and there are 4"):
        student.main([str(a) for a in [*again, "--puzzles", 30, "--recording", tmp_path / "s.npz"]])


def test_the_mix_of_sudoku_extreme_is_weighted_as_it_says(tmp_path, monkeypatch):
    assert sum(extreme_mix.MIX.values()) == pytest.approx(1) and sum(extreme_mix.MINIMAL.values()) == pytest.approx(1)
    parts = dict.fromkeys(extreme_mix.MIX, Accuracy(0, 96)) | {"forum": Accuracy(48, 96)}
    report = extreme_mix.weighted(parts)
    assert report["share"] == pytest.approx(0.734 / 2) and report["low"] < report["share"] < report["high"]
    reach = 1.959964 * 0.734 * np.sqrt(0.25 / 100)  # of the forum's alone
    assert reach < report["high"] - report["share"] < 1.1 * reach

    made = extreme_mix.minimal(30, 5, seed=3)
    assert made.labels is not None
    for inputs, source in zip(made.inputs, made.source.tolist(), strict=True):
        clues = int((inputs > sudoku.BLANK).sum())
        assert source == "unbiased, " + [*extreme_mix.MINIMAL][min(max(clues - 24, 0), 3)]
        fewer = inputs.copy()
        fewer[np.flatnonzero(inputs > sudoku.BLANK)[0]] = sudoku.BLANK
        assert sudoku_generator.count_solutions(inputs) == 1 and sudoku_generator.count_solutions(fewer) == 2

    torch.manual_seed(0)
    EquilibriumReasoner(EqRConfig.sudoku(**TINY)).save_pretrained(tmp_path / "m")
    curve = tmp_path / "curve.csv"
    curve.write_text(
        "step,clues,source,puzzles,exact_1,exact_2\n1,published,17_clue,10,0.0,0.0\n"
        "2,published,17_clue,10,0.1,0.5\n2,published,forum_hardest_1905_11plus,20,0.05,0.1\n2,28,all,20,1,1\n"
    )
    monkeypatch.setattr(extreme_mix, "MINIMAL", {"24 clues or fewer": 1.0})
    monkeypatch.setattr(extreme_mix, "MIX", {"forum": 0.5, "17 clues": 0.2, "kaggle": 0.1, "unbiased": 0.2})
    easy = sudoku_generator.generate(3, "easy", seed=1)
    monkeypatch.setattr(extreme_mix, "minimal", lambda *_, **__: replace(easy, source=np.full(3, "unbiased")))
    arguments = ["--known", curve, "--model", tmp_path / "m", "--most", 2, "--depths", 2, 1, "--halt", "none"]
    kept = ["--minimal", tmp_path / "minimal.csv", "--results", tmp_path]
    for _ in range(2):  # the second takes what the first has made
        extreme_mix.main([str(a) for a in [*arguments, *kept]])
        report = json.loads((tmp_path / machine.folder() / "extreme_mix-m-none.json").read_text())
        assert report["depths"] == [1, 2] and report["mean_steps"] == {"unbiased": 2.0, "kaggle": 2.0}
        assert [part["correct"] for part in report["parts"]["17 clues"]] == [1, 5]
        assert [part["total"] for part in report["parts"]["unbiased"]] == [2, 2]  # of --most 2
        wanted = [0.5 * 0.05 + 0.2 * 0.1, 0.5 * 0.1 + 0.2 * 0.5]
        assert [each["share"] for each in report["weighted"]] == pytest.approx(wanted)
    for refused in ([], [*arguments, "--turn-every", 1]):
        with pytest.raises(SystemExit):
            extreme_mix.main([str(a) for a in [*refused, "--model", tmp_path / "m"]])
    dev = ["source,question,answer,rating"]
    for source, question, answer in zip(extreme_mix.OF_DEV.values(), easy.inputs, easy.labels, strict=False):
        dev.append(f"{source},{sudoku.decode(question)},{sudoku.decode(answer)},0")
    (tmp_path / "dev.csv").write_text("\n".join(dev) + "\n")
    turned = [tmp_path / "dev.csv", *arguments[2:], "--turn-every", 1, *kept]
    extreme_mix.main([str(a) for a in turned])
    report = json.loads((tmp_path / machine.folder() / "extreme_mix-m-turn-1-none.json").read_text())
    assert report["turn_every"] == 1 and [part["total"] for part in report["parts"]["forum"]] == [1, 1]


@pytest.mark.parametrize("by", ["views", "starts"])
def test_trajectories_are_run_until_an_answer_is_called_right_and_go_on_where_they_were_stopped(
    by, tmp_path, monkeypatch
):
    """Puzzle i is called right at trajectory i + 1, the second wrongly, and the last one never."""
    made = sudoku_generator.generate(4, "easy", seed=1)
    puzzles = replace(made, source=np.array(["a", "a", "b", "b"]))
    torch.manual_seed(0)
    EquilibriumReasoner(EqRConfig.sudoku(**TINY)).save_pretrained(tmp_path / "m")
    ran = []

    def solve_views(model, views, **options):
        assert options == dict(select="first", halt="q", depth=5, turns=None)
        puzzle = original(views)
        same = np.array_equal(views.inputs[:, 0], sudoku.views(puzzle, 4).inputs[:, len(ran)])
        assert by == "views" and same
        return solved(puzzle)

    def solve(model, tokens, **options):
        assert by == "starts" and options == dict(seed=len(ran), halt="q", depth=5, turns=None)
        return solved(tokens.numpy())

    def solved(grids):
        ran.append(len(grids))
        rows = [np.flatnonzero((made.inputs == grid).all(1))[0] for grid in grids]
        called = torch.tensor([row + 1 == len(ran) and row < 3 for row in rows])
        preds = torch.from_numpy(made.labels[rows].astype(np.int64))
        preds[[row == 1 for row in rows], 0] += 1
        return SimpleNamespace(preds=preds, converged=called, nfe=torch.full((len(rows),), 5))

    def original(views):
        moved = np.take_along_axis(views.inputs, views.places, 2)
        return np.take_along_axis(views.meanings, moved.astype(np.int64), 2)[:, 0]

    monkeypatch.setattr(breadth_needed, "solve_views", solve_views)
    monkeypatch.setattr(EquilibriumReasoner, "solve", solve)
    monkeypatch.setattr(breadth_needed.sudoku, "load", lambda _: (puzzles, ParseErrors()))
    arguments = ["p.csv", "--model", tmp_path / "m", "--subset", 4, "--by", by, "--depth", 5]
    arguments += ["--state", tmp_path / "state.json"]
    for breadth in (2, 4):
        breadth_needed.main([str(a) for a in [*arguments, "--breadth", breadth, "--results", tmp_path]])
    assert ran == [4, 3, 2, 1]
    report = json.loads((tmp_path / machine.folder() / f"breadth_needed-m-{by}-5-called-4.json").read_text())
    assert report["command"].startswith("python -m benchmarks.studies.breadth_needed")
    assert report["mean_steps"] == (1 + 2 + 3 + 4) * 5 / 4
    rows = [(row["breadth"], row["right"]["correct"], row["taken_and_wrong"]) for row in report["at_most"]]
    assert rows == [(1, 1, 0), (2, 1, 1), (4, 2, 1)]
    assert {name: part["correct"] for name, part in report["at_most"][-1]["by_source"].items()} == {"a": 1, "b": 1}
    with pytest.raises(SystemExit, match="'depth': 5.* and this run is of .*'depth': 6"):
        breadth_needed.main([str(a) for a in [*arguments, "--depth", 6]])
    # The second puzzle's answers break the rules, so none of them is taken.
    ran.clear()
    checked = ["--until", "valid", "--state", tmp_path / "valid.json", "--breadth", 4, "--results", tmp_path]
    breadth_needed.main([str(a) for a in [*arguments, *checked]])
    assert ran == [4, 1, 1, 1]
    report = json.loads((tmp_path / machine.folder() / f"breadth_needed-m-{by}-5-valid-4.json").read_text())
    assert [(row["right"]["correct"], row["taken_and_wrong"]) for row in report["at_most"]] == [(3, 0)] * 3
