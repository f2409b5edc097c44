"""The command line, end to end, with a model that copies, and so solves grids whose clues are all revealed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from eqr_kernels import EqRConfig, EquilibriumReasoner, studies
from eqr_kernels.checkpoint import load_checkpoint
from eqr_kernels.cli import COMMANDS, app
from eqr_kernels.tasks import maze, sudoku, sudoku_generator
from eqr_kernels.tasks.registry import SUDOKU
from eqr_kernels.training.plan import RunPlan
from eqr_kernels.training.processes import Process
from eqr_kernels.training.run import TrainingRun
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.trainer import Trainer
from tests.support.commands import TINY, eqr, eqr_json, make_copier
from tests.support.environment import REPOSITORY
from tests.support.models import copier
from tests.support.processes import free_ports, outputs_of

SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_copier(tmp_path_factory.mktemp("model"), EqRConfig.sudoku_paper(**TINY, noise_scale=0.0), tol=0.02)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight generated puzzles with answers, of two sources."""
    path = tmp_path_factory.mktemp("data") / "puzzles.csv"
    parts = [sudoku_generator.generate(4, difficulty, seed=5) for difficulty in ("easy", "medium")]
    rows = ["source,question,answer,rating"]
    for part in parts:
        for i in range(4):
            question, answer = sudoku.decode(part.inputs[i]), sudoku.decode(part.labels[i])
            rows.append(f"{part.source[i]},{question},{answer},{7 * i}")
    path.write_text("\n".join(rows) + "\n")
    return path


# solve ---------------------------------------------------------------------------------------------------------------


def test_solve_tells_what_became_of_each_puzzle_as_json(model):
    report = eqr_json("solve", "-", "--model", model, "--depth", 32, input=f"{SOLUTION},{SOLUTION}\n{PUZZLE}\n")
    assert set(report) == {
        "command",
        "model",
        "task",
        "settings",
        "backend",
        "backend_reason",
        "puzzles",
        "errors",
        "by_depth",
        "summary",
    }
    filled, puzzle = report["puzzles"]
    assert set(filled) == {
        "number",
        "line",
        "id",
        "source",
        "rating",
        "puzzle",
        "prediction",
        "answer",
        "valid",
        "correct",
        "other_valid",
        "solutions",
        "status",
        "steps",
        "residual",
        "score",
        "q_halt",
        "restart",
        "converged",
        "nfe",
    }
    assert filled["valid"] and filled["correct"] and filled["converged"] and filled["status"] == "converged"
    assert filled["prediction"] == filled["answer"] == SOLUTION and filled["rating"] is None
    assert 1 < filled["steps"] == filled["nfe"] < 32 and filled["residual"] <= 0.02
    assert puzzle["puzzle"] == PUZZLE and puzzle["line"] == 2 and "." not in puzzle["prediction"]
    assert not puzzle["valid"] and puzzle["correct"] is None and puzzle["answer"] is None
    assert report["settings"]["tol"] == 0.02 and report["task"] == "sudoku" and report["errors"] == []
    summary = report["summary"]
    assert (summary["puzzles"], summary["solved"], summary["with_answers"], summary["correct"]) == (2, 1, 1, 1)
    assert summary["nfe"] == filled["nfe"] + puzzle["nfe"] and summary["nfe_without_early_exit"] == 64
    assert summary["mean_steps"] == (filled["steps"] + puzzle["steps"]) / 2


@pytest.mark.parametrize(("halt", "tol"), [("residual", 0.02), ("q", None), ("residual+q", 0.02), ("residual|q", 0.02)])
def test_solve_takes_each_halting_rule(model, halt, tol):
    """The card's tolerance is that of the rules that look at the residual, and the status says which signal fired."""
    options = ["--model", model, "--depth", 32, "--halt", halt]
    report = eqr_json("solve", "-", *options, input=f"{SOLUTION}\n{PUZZLE}\n")
    assert (report["settings"]["halt"], report["settings"]["tol"]) == (halt, tol)
    for row in report["puzzles"]:
        low, positive = row["residual"] <= 0.02, row["q_halt"] > 0
        fired = {"residual": low, "q": positive, "residual+q": low and positive, "residual|q": low or positive}[halt]
        status = "halted" if halt == "q" or not low else "converged"
        assert (row["converged"], row["status"]) == (fired, status if fired else "max_depth")


def test_solve_agrees_with_the_library(model, data):
    report = eqr_json("solve", data, "--model", model, "--depth", 12, "--breadth", 3, "--seed", 9, "--tol", 0.05)
    tokens = torch.from_numpy(sudoku.load_csv(data).inputs).long()
    result = EquilibriumReasoner.from_pretrained(model).solve(tokens, depth=12, breadth=3, seed=9, tol=0.05)
    for name in ("steps", "restart", "nfe", "converged"):
        assert [p[name] for p in report["puzzles"]] == getattr(result, name).tolist()
    assert [p["residual"] for p in report["puzzles"]] == pytest.approx(result.residual.tolist())
    assert report["summary"]["nfe_without_early_exit"] == 12 * 3 * 8


def test_solve_reports_malformed_lines_and_solves_the_others(model, tmp_path):
    file = tmp_path / "puzzles.txt"
    file.write_text(f"{SOLUTION}\n123\n\n{PUZZLE.replace('.', '?')}\n11{PUZZLE[2:]}\n{PUZZLE}\n")
    result = eqr("solve", file, "--model", model, "--depth", 8, "--no-grids", code=1)
    assert [line.split(":")[0] for line in result.stdout.splitlines() if line.startswith("line ")] == [
        "line 1",
        "line 6",
    ]
    for expected in ("line 2: has 3 cells", "line 4: has '?' at cell 3", "line 5: the givens break the rules"):
        assert f"error: {expected}" in result.stderr
    assert "unreadable lines: 3" in result.stdout
    report = eqr_json("solve", file, "--model", model, "--depth", 8, code=1)
    assert [error["line"] for error in report["errors"]] == [2, 4, 5]
    assert report["errors"][0]["text"] == "123" and "81" in report["errors"][0]["message"]
    assert [p["line"] for p in report["puzzles"]] == [1, 6] and report["summary"]["unread"] == 3


def test_solve_with_only_malformed_lines_still_reports_them(model):
    report = eqr_json("solve", "--model", model, input="12\n34\n", code=2)
    assert report["puzzles"] == [] and [e["line"] for e in report["errors"]] == [1, 2]
    assert report["summary"]["mean_steps"] is None and report["backend"] is None
    assert "solved 0 of 0 (unreadable lines: 2)" in eqr("solve", "--model", model, input="12\n34\n", code=2).stdout


@pytest.mark.parametrize("lines", ["", "\n\n# only a comment\n"])
def test_solve_refuses_empty_input(model, lines):
    result = eqr("solve", "-", "--model", model, input=lines, code=2)
    assert "stdin holds no puzzles" in result.stderr and result.stdout == ""


def test_solve_limit_leaves_out_what_comes_later(model):
    lines = f"{SOLUTION}\nbad\n{PUZZLE}\nworse\n{SOLUTION}\n"
    report = eqr_json("solve", "--model", model, "--depth", 4, "--limit", 2, input=lines, code=1)
    assert [p["line"] for p in report["puzzles"]] == [1, 3] and [e["line"] for e in report["errors"]] == [2]


def test_solve_reveals_seeded_clues(model, data):
    def givens(*more: object) -> list[str]:
        return [
            p["puzzle"] for p in eqr_json("solve", data, "--model", model, "--depth", 1, "--tol", 1, *more)["puzzles"]
        ]

    plain, revealed = givens(), givens("--reveal", 50)
    assert revealed == givens("--reveal", 50) != givens("--reveal", 50, "--seed", 1)
    assert {81 - text.count(".") for text in revealed} == {50}
    assert all(
        p in (".", r) for text, more in zip(plain, revealed, strict=True) for p, r in zip(text, more, strict=True)
    )
    report = eqr_json("solve", data, "--model", model, "--reveal", 81)
    assert report["summary"]["solved"] == report["summary"]["correct"] == 8
    without_answers = eqr("solve", "--model", model, "--reveal", 40, input=PUZZLE, code=2)
    assert "--reveal shows clues of the answers" in without_answers.stderr


def test_solve_by_depth_counts_as_shallower_runs_do(model, data):
    arguments = ["solve", data, "--model", model, "--reveal", 81, "--halt", "none"]
    report = eqr_json(*arguments, "--depth", 9, "--by-depth", "9,1,3")
    assert [row["depth"] for row in report["by_depth"]] == [1, 3, 9]
    for row in report["by_depth"]:
        summary = eqr_json(*arguments, "--depth", row["depth"])["summary"]
        assert (row["valid"], row["correct"], row["nfe"]) == (summary["solved"], summary["correct"], summary["nfe"])
        assert row["puzzles"] == row["with_answers"] == 8
    assert report["by_depth"][0]["correct"] < report["by_depth"][2]["correct"] == 8
    table = eqr(*arguments, "--depth", 9, "--by-depth", "1,9", "--quiet").stdout
    assert "answers by depth" in table and "100.0 % (8/8)" in table
    assert "raise --depth" in eqr(*arguments, "--depth", 8, "--by-depth", "1,9", code=2).stderr


def test_solve_draws_what_was_filled_in(model, data):
    text = eqr("solve", data, "--model", model, "--depth", 20, "--reveal", 81, "--limit", 1).stdout
    answer = sudoku.format_grid(sudoku.load_csv(data).labels[0]).split("\n")
    assert all(f"{row}   {row}" in text for row in answer)
    for expected in ("line 2", "solved, ", "residual 0.0", "settled  ", "solved 1 of 1", "outer steps spent (NFE)"):
        assert expected in text
    quiet = eqr("solve", data, "--model", model, "--depth", 20, "--limit", 1, "-q").stdout
    assert "solved 0 of 1" in quiet and "------+" not in quiet


def test_grids_are_coloured_on_a_terminal(model, data, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = eqr("solve", data, "--model", model, "--depth", 2, "--tol", 1, "--limit", 1).stdout
    assert "\x1b[2m" in text and "\x1b[1;31m" in text  # dim givens, and red for digits that stand twice


def test_solve_demo_needs_no_file(model):
    report = eqr_json("solve", "--demo", "--model", model, "--depth", 2, "--tol", 1)
    puzzles = [sudoku.encode(p["puzzle"]) for p in report["puzzles"]]
    assert {p["source"] for p in report["puzzles"]} == {f"generated_{d}" for d in ("easy", "medium", "hard", "extreme")}
    assert len({p["answer"] for p in report["puzzles"]}) == len(puzzles) == 12
    assert all(sudoku_generator.count_solutions(puzzle) == 1 for puzzle in puzzles)
    assert "leave one out" in eqr("solve", "x.txt", "--demo", "--model", model, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tol", "tight"], "--tol must be auto, fast or a positive number"),
        (["--tol", "0"], "--tol must be positive and finite"),
        (["--tol", "fast", "--halt", "none"], "--tol is for halting by the residual, and --halt is none"),
        (["--tol", "0.1", "--halt", "q"], "--tol is for halting by the residual, and --halt is q; leave one out"),
        (["--by-depth", "1;2"], "--by-depth must be numbers"),
        (["--halt", "soon"], "halt must be one of residual, q, residual+q, residual|q, none"),
        (["--depth", "0"], "depth must be at least 1"),
        (["--backend", "cuda"], "backend='cuda' cannot run here"),
        (["--output", "missing/out.json"], "make it first"),
        (["--model", "no-such-model"], "no shipped model"),
        (["--noise-scale", "-1"], "noise_scale must be"),
    ],
)
def test_solve_names_bad_options(model, arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = eqr("solve", "--model", model, *arguments, input=PUZZLE, code=2)
    assert message in result.stderr.replace("\n", " ") and result.stdout == ""


def test_settled_is_said_of_answers_that_keep_the_rules(model):
    lines = f"{SOLUTION}\n{PUZZLE}\n{PUZZLE[::-1]}\n"
    arguments = ["solve", "--model", model, "--depth", 32]
    report = eqr_json(*arguments, "--by-depth", "1,32", input=lines)
    rows, summary = report["puzzles"], report["summary"]
    assert [(row["converged"], row["valid"]) for row in rows] == [(True, True), (True, False), (True, False)]
    assert (summary["converged"], summary["converged_invalid"]) == (3, 2)
    assert [row["converged_invalid"] for row in report["by_depth"]] == [0, 2]
    text = eqr(*arguments, "--no-grids", "--by-depth", "32", input=lines).stdout
    ends = [line.split(", ")[-1] for line in text.splitlines() if line.startswith("line ")]
    assert ends == ["settled", *["settled on an answer that breaks the rules"] * 2]
    assert "settled: 3 of 3, 2 of them on an answer that breaks the rules" in text and "2 break the rules" in text


UNCALIBRATED = [
    (dict(noise_scale=0.01), {}, 0.02828, "provisional, twice the residual", "it was never calibrated; halting at the"),
    (dict(noise_scale=0.0), {}, None, "provisional, twice the residual that its first", "it was never calibrated"),
    (dict(noise_scale=0.0), dict(tol_fast=0.05, tol_missing="3 of 9 right"), 0.05, "the model's card", "3 of 9 right"),
]


@pytest.mark.parametrize(("config", "card", "tol", "origin", "caveat"), UNCALIBRATED)
def test_where_converged_is_no_promise_every_command_says_so_once(tmp_path, data, config, card, tol, origin, caveat):
    model = make_copier(tmp_path / "m", EqRConfig.sudoku_paper(**TINY, **config), **card)
    for arguments in (
        ["solve", data, "--depth", 24],
        ["eval", data, "--depths", 24, "--halt", "residual"],
        ["diagnose", data, "--depth", 24, "--breadth", 1],
    ):
        result = eqr(*arguments, "--model", model, "--reveal", 81, "--json")
        settings = json.loads(result.stdout)["settings"]
        assert settings["tol"] == pytest.approx(tol, rel=1e-3) if tol else 0 < settings["tol"] < 0.01
        assert settings["tol_from"].startswith(origin)
        assert settings["tol_caveat"].startswith(f"converged is no promise for this model: {caveat}")
        assert [line for line in result.stderr.splitlines() if line.startswith("warning: ")] == [
            f"warning: {settings['tol_caveat']}"
        ]
    for given in ("fast", 0.04) if card else (0.04,):
        result = eqr("solve", data, "--model", model, "--depth", 24, "--tol", given, "--json")
        settings = json.loads(result.stdout)["settings"]
        assert settings["tol"] == (0.05 if given == "fast" else 0.04) and settings["tol_caveat"] is None
        assert result.stderr == ""


def test_warnings_are_one_line(model):
    result = eqr("solve", "--model", model, "--noise-scale", 0.5, "--depth", 1, "--quiet", input=PUZZLE)
    assert result.stderr.startswith("warning: tol=0.02 is below 0.707107") and result.stderr.count("\n") == 1


def test_traceback_on_demand(model):
    result = CliRunner().invoke(app, ["--traceback", "solve", "--model", str(model), "--depth", "0"], input=PUZZLE)
    assert isinstance(result.exception, ValueError) and "depth must be" in str(result.exception)
    eqr("solve", "--model", model, "--depth", 0, input=PUZZLE, code=2)


def test_an_interruption_leaves_no_half_written_output(model, tmp_path, monkeypatch):
    output = tmp_path / "report.json"
    output.write_text("before")

    def interrupted(self, *_args: object, progress: object = None, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EquilibriumReasoner, "solve", interrupted)
    result = eqr("solve", "--model", model, "--json", "--output", output, input=PUZZLE, code=130)
    assert "interrupted; nothing was written" in result.stderr and result.stdout == ""
    assert output.read_text() == "before" and list(tmp_path.iterdir()) == [output]


def test_output_holds_what_json_prints(model, tmp_path):
    output = tmp_path / "report.json"
    printed = eqr_json("solve", "--model", model, "--output", output, input=PUZZLE)
    assert json.loads(output.read_text()) == printed
    text = eqr("solve", "--model", model, "-o", output, input=PUZZLE).stdout
    assert "solved 0 of 1" in text and json.loads(output.read_text())["command"] == "solve"


def test_progress_goes_to_stderr_and_only_when_asked_for(model):
    arguments = ["solve", "--model", model, "--depth", 5, "--halt", "none", "--json"]
    assert eqr(*arguments, input=PUZZLE).stderr == ""
    forced = eqr(*arguments, "--progress", input=PUZZLE)
    assert forced.stderr.splitlines()[-1].startswith("solving: 100 %") and json.loads(forced.stdout)


def test_solve_reads_npy_and_folders(model, tmp_path):
    grid = sudoku.encode(SOLUTION)
    np.save(tmp_path / "digits.npy", sudoku.encode(PUZZLE)[None] - 1)
    assert eqr_json("solve", tmp_path / "digits.npy", "--model", model)["puzzles"][0]["puzzle"] == PUZZLE
    ambiguous = tmp_path / "ambiguous.npy"
    np.save(ambiguous, np.full((1, 81), 5) * 0 + 1)
    assert "values" in eqr("solve", ambiguous, "--model", model, code=2).stderr
    assert eqr_json("solve", ambiguous, "--model", model, "--values", "tokens")["puzzles"][0]["puzzle"] == "." * 81
    for split in ("train", "test"):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True)
        np.save(folder / "all__inputs.npy", grid[None])
        np.save(folder / "all__labels.npy", grid[None])
    report = eqr_json("solve", tmp_path / "set", "--split", "test", "--model", model)
    assert report["puzzles"][0]["correct"]


def test_solve_takes_maze_models(tmp_path):
    config = EqRConfig.maze(**TINY, seq_len=81, mlp_t=True, pos_encodings="none", noise_scale=0.0)
    model = make_copier(tmp_path / "model", config, tol=0.02)
    file = tmp_path / "mazes.txt"
    eqr("generate", "maze", "-n", 3, "--size", 9, "--answers", "-o", file)
    report = eqr_json("solve", file, "--model", model)
    assert report["task"] == "maze" and [p["valid"] for p in report["puzzles"]] == [False] * 3
    assert "not solved" in eqr("solve", file, "--model", model, "--limit", 1).stdout
    eqr("generate", "maze", "-n", 1, "--size", 7, "-o", file)
    assert "puzzles of 49 cells, and the model takes 81" in eqr("solve", file, "--model", model, code=2).stderr
    assert "--reveal is for Sudoku" in eqr("solve", "--demo", "--reveal", 3, "--model", model, code=2).stderr


def test_a_model_of_no_known_task_is_refused(tmp_path):
    model = make_copier(tmp_path, EqRConfig.from_dict({**TINY, "seq_len": 6, "vocab_size": 7}))
    assert "neither 9x9 Sudoku" in eqr("solve", "--model", model, input=PUZZLE, code=2).stderr.replace("\n", " ")


# eval ----------------------------------------------------------------------------------------------------------------


def test_eval_measures_accuracy_by_depth_source_and_rating(model, data):
    report = eqr_json("eval", data, "--model", model, "--reveal", 81, "--depths", "12,1")
    assert report["depths"] == [1, 12] and report["puzzles"] == 8
    first, last = report["accuracy"]
    assert first["correct"] < 8 and last == {
        "correct": 8,
        "total": 8,
        "share": 1.0,
        "wilson95": [pytest.approx(0.6755924), 1.0],
    }
    assert {k: v[1]["correct"] for k, v in report["by_source"].items()} == {"generated_easy": 4, "generated_medium": 4}
    assert {k: v[1]["total"] for k, v in report["by_rating"].items()} == {"0": 2, "1-9": 2, "10-29": 4}
    halted = eqr_json("solve", data, "--model", model, "--reveal", 81, "--depth", 12)["summary"]
    assert report["under_tolerance"] == {
        "tol": 0.02,
        "mean_steps": halted["mean_steps"],
        "converged": halted["converged"] / 8,
    }
    text = eqr("eval", data, "--model", model, "--reveal", 81, "--depths", "1,12").stdout
    for expected in ("all 8 puzzles", "by source", "by rating", "generated_easy", "67.6-100.0", "mean steps"):
        assert expected in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solve", "--views", 2, "--breadth", 3], "--views has a trajectory for each view, and --breadth 3 was given"),
        (["solve", "--views", 2, "--select", "first", "--by-depth", "1,2"], "--select first does not run all views"),
        (["solve", "--views", 2, "--breadth", 1], "--breadth 1 was given too"),
        (
            ["solve", "--turn-every", 8, "--depth", 8],
            "--turn-every must be less than the depth, 8, or",
        ),
        (["solve", "--turn-every", 2, "--patience", 3], "patience must be at most turns.every=2"),
        (["eval", "--views", 2, "--breadths", "1"], "--breadths 1 was given"),
        (["eval", "--views", 2, "--select", "first"], "--select first runs no view behind"),
        (["eval", "--views", 2, "--breadths", "1,3"], "--views has a trajectory for each view, and --breadths 1,3"),
        (["eval", "--views", 2, "--select", "first", "--halt", "residual"], "--select first runs no view behind"),
    ],
)
def test_options_of_symmetries_that_make_no_sense_are_refused(model, data, arguments, message):
    command, *options = arguments
    assert message in eqr(command, data, "--model", model, *options, code=2).stderr.replace("\n", " ")


def test_eval_does_not_count_puzzles_without_an_answer(model):
    lines = f"{SOLUTION},{SOLUTION}\n{PUZZLE}\nbad\n"
    report = eqr_json("eval", "-", "--model", model, "--depths", "12", input=lines, code=1)
    assert report["accuracy"][0]["total"] == report["accuracy"][0]["correct"] == 1
    assert [(e["line"], e["message"].split(",")[0]) for e in report["errors"]][0] == (2, "has no answer")
    assert "no puzzle comes with its answer" in eqr("eval", "--model", model, input=PUZZLE, code=2).stderr


SHIPPED = ["--model", "sudoku-small", "--reveal", 40]
GRID = [*SHIPPED, "--depths", "1,3,8", "--breadths", "1,3", "--seed", 4]


@pytest.mark.slow
@pytest.mark.parametrize("turning", [[], ["--turn-every", 2]], ids=["still", "turned"])
@pytest.mark.parametrize(("several", "one"), [("--breadths", "--breadth"), ("--views", "--views")])
def test_eval_measures_a_grid_whose_cells_are_runs_of_their_own(data, tmp_path, several, one, turning):
    """A shipped model, against `eqr solve` for each cell."""
    file = tmp_path / "report.json"
    grid = [*SHIPPED, "--depths", "1,3,8", several, "1,3", "--seed", 4, *turning]
    report = eqr_json("eval", data, *grid, "--select", "residual,vote,q,any", "--output", file)
    assert json.loads(file.read_text()) == report
    assert report["breadths"] == [1, 3] and report["rules"] == ["residual", "vote", "q", "any"]
    cells = {(cell["depth"], cell["breadth"]): cell for cell in report["grid"]}
    assert list(cells) == [(d, b) for d in (1, 3, 8) for b in (1, 3)]
    for (depth, breadth), cell in cells.items():
        solve = ["solve", data, *SHIPPED, "--seed", 4, "--halt", "none", "--depth", depth, one, breadth]
        solve += turning if depth > 2 else []
        assert cell["nfe"] == depth * breadth
        for rule in ("residual", "vote", "q"):
            alone = eqr_json(*solve, "--select", rule)["summary"]["correct"]
            assert cell["accuracy"][rule]["correct"] == alone, (depth, breadth, rule)
            assert cell["accuracy"][rule]["total"] == 8 and alone <= cell["accuracy"]["any"]["correct"]
    correct = [cell["accuracy"]["residual"]["correct"] for cell in cells.values()]
    assert correct[0] == 0 < correct[-1]
    assert report["accuracy"] == [cells[d, 3]["accuracy"]["residual"] for d in (1, 3, 8)]
    assert sum(row[-1]["correct"] for row in report["by_source"].values()) == correct[-1]


def test_eval_tells_coupling_modes_and_how_to_get_them_again(data):
    report = eqr_json("eval", data, *GRID, "--tol", 0.05, "--broad", 0.6)
    first, *_, last = report["coupling"]
    assert [row["depth"] for row in report["coupling"]] == [1, 3, 8] and first["trajectories"] == 24
    assert first["right"] == 0 and first["residual_auroc"] is None  # NaN is no JSON
    assert last["settled_right"] <= last["settled"] <= 24
    diagnosis = report["diagnosis"]
    assert (diagnosis["tol"], diagnosis["broad"], diagnosis["restarts"]) == (0.05, 0.6, 3)
    rows = diagnosis["per_puzzle"]
    assert [row["line"] for row in rows] == list(range(2, 10))
    assert sum(row["right"] for row in rows) == last["right"] and sum(row["settled"] for row in rows) == last["settled"]
    for mode, count in diagnosis["counts"].items():
        assert count == sum(row["mode"] == mode for row in rows)
        assert count == sum(source[mode] for source in diagnosis["by_source"].values())
    assert sum(diagnosis["counts"].values()) == 8
    again = report["reproduce"]
    assert again["command"].endswith(
        "eval --model sudoku-small --depths 1,3,8 --breadths 1,3 --tol 0.05 --broad 0.6 --seed 4 --reveal 40 --json "
        + str(data)
    )
    assert again["device"] == "cpu" and again["device_name"] and again["versions"]["torch"] == torch.__version__
    assert again["model_file_sha256"] == load_checkpoint("sudoku-small").card.sha256
    assert len(again["weights_sha256"]) == len(again["data_sha256"]) == 64


def test_eval_digests_follow_weights_and_data(model, data):
    def digests(*more: object) -> tuple[str, str]:
        again = eqr_json("eval", data, "--model", model, "--depths", 1, *more)["reproduce"]
        return again["weights_sha256"], again["data_sha256"]

    assert digests() == digests("--seed", 1)
    assert digests("--limit", 7)[1] != digests()[1] != digests("--reveal", 81)[1]
    assert digests("--limit", 7)[0] == digests()[0]
    shipped = eqr_json("eval", data, "--depths", 1)["reproduce"]
    assert shipped["weights_sha256"] != digests()[0] and shipped["data_sha256"] == digests()[1]


def test_eval_under_halting_spends_less_and_says_so(model, data):
    report = eqr_json(
        "eval", data, "--model", model, "--reveal", 81, "--depths", "2,30", "--breadth", 2, "--halt", "residual"
    )
    halted = eqr_json("solve", data, "--model", model, "--reveal", 81, "--depth", 30, "--breadth", 2)["summary"]
    assert report["grid"][1]["nfe"] == halted["nfe"] / 8 < 60
    assert report["accuracy"][1]["correct"] == halted["correct"]
    assert report["under_tolerance"]["converged"] == 1.0 and report["diagnosis"]["counts"]["broad"] == 8
    assert report["diagnosis"]["settled_means"] == "halted (halt=residual)"
    for halt in ("q", "residual+q", "residual|q"):
        text = eqr("eval", data, "--model", model, "--depths", 2, "--halt", halt).stdout
        assert f"halting by {halt}: mean steps" in text


def test_eval_draws_a_table_for_each_rule(model, data):
    arguments = ["eval", data, "--model", model, "--reveal", 81, "--depths", "1,12"]
    text = eqr(*arguments, "--breadths", "1,2", "--select", "residual,any").stdout
    for expected in (
        "selected by residual",
        "any trajectory right (an oracle)",
        "breadth 2",
        "by source, breadth 2, residual",
        "AUROC",
        "modes of 2 restarts at depth 12",
        "no correct",
        "competing",
        "narrow",
        "8 (100.0 %)",
    ):
        assert " ".join(expected.split()) in " ".join(text.split()), expected
    assert "modes of" not in eqr(*arguments).stdout  # one restart shows none


def test_eval_without_a_tolerance_has_no_modes_and_says_why(data, tmp_path):
    model = make_copier(tmp_path, EqRConfig.sudoku_paper(**TINY, noise_scale=0.0))
    arguments = ["eval", data, "--model", model, "--depths", "1,2", "--breadths", 2]
    report = eqr_json(*arguments)
    assert report["diagnosis"] is None and report["under_tolerance"] is None and report["card"]["tol"] is None
    assert report["coupling"][0]["settled"] is None
    assert "no --tol, and the model's card has no calibrated tolerance" in eqr(*arguments).stdout
    assert eqr_json(*arguments, "--tol", 0.1)["diagnosis"]["tol"] == 0.1
    assert "eqr calibrate" in eqr(*arguments, "--halt", "residual").stderr


def test_another_valid_solution_is_counted_apart_and_is_not_exact():
    # Four cells in two rows and two columns that take 1 and 4 in either order; the file once has one, once the other.
    question = "534678912672195348198342567859761423426853791713924856961.3728.287.1963.345286179"
    answers = SOLUTION, "534678912672195348198342567859761423426853791713924856961437285287519634345286179"
    lines = "\n".join(f"{question},{answer}" for answer in answers)
    report = eqr_json(
        "eval", "-", "--model", "sudoku-small", "--depths", "1,16", "--select", "residual,any", input=lines
    )
    assert report["accuracy"][-1]["correct"] == 1
    assert report["other_valid"] == [{"depth": 1, "puzzles": 1}, {"depth": 16, "puzzles": 1}]
    text = eqr("eval", "-", "--model", "sudoku-small", "--depths", "1,16", input=lines).stdout
    assert "another valid solution than the file's, not counted as exact: 1 at depth 1, 1 at depth 16" in text
    report = eqr_json("solve", "--model", "sudoku-small", "--depth", 16, input=lines)
    assert sorted(row["other_valid"] for row in report["puzzles"]) == [False, True]
    assert (report["summary"]["solved"], report["summary"]["correct"], report["summary"]["other_valid"]) == (0, 1, 1)
    text = eqr("solve", "--model", "sudoku-small", "--depth", 16, "--no-grids", input=lines).stdout
    assert "another solution" in text and "equal to the known answer: 1 of 2; 1 more are another valid solution" in text


def test_eval_takes_a_fixed_subset(model, data):
    report = eqr_json("eval", data, "--model", model, "--depths", 1, "--subset", 4)
    assert report["puzzles"] == 4 and report["subset"] == {"puzzles": 4, "of": 8, "seed": 20260605}
    assert {name: row[0]["total"] for name, row in report["by_source"].items()} == {
        "generated_easy": 2,
        "generated_medium": 2,
    }
    lines = [row["line"] for row in report["diagnosis"]["per_puzzle"]]
    other = eqr_json("eval", data, "--depths", 1, "--subset", 4, "--seed", 3, "--reveal", 50)
    assert lines == [row["line"] for row in other["diagnosis"]["per_puzzle"]] == sorted(lines)
    assert "4 of 8 puzzles" in eqr("eval", data, "--model", model, "--depths", 1, "--subset", 4).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--breadths", "1;2"], "--breadths must be numbers"),
        (["--breadths", "0,2"], "--breadths must be 1 or more, got 0"),
        (["--select", "residual,best"], "select must be of residual, vote, q, first, any, got 'residual', 'best'"),
        (["--select", "first"], 'select="first" needs a halting rule'),
        (["--halt", "soon"], "halt must be one of residual, q, residual+q, residual|q, none"),
        (["--halt", "q", "--tol", 0.1], "--tol is for halting by the residual, and --halt is q; leave one out"),
        (["--halt", "q", "--tol", "fast"], "--tol is for halting by the residual, and --halt is q; leave one out"),
        (["--tol", "tight"], "--tol must be auto, fast or a positive number"),
        (["--tol", "-1"], "tol must be positive"),
        (["--broad", "0"], "--broad must be a share"),
        (["--subset", "9"], "1 to all 8 of the puzzles, got 9"),
    ],
)
def test_eval_names_bad_options(model, data, arguments, message):
    result = eqr("eval", data, "--model", model, "--depths", 1, *arguments, code=2)
    assert message in result.stderr.replace("\n", " ") and result.stdout == ""


# calibrate -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hard_first(tmp_path_factory) -> Path:
    """A copier answers full grids alone: 40 open puzzles, of the hardest source, and then 104 full grids."""
    rows = ["source,question,answer,rating", *[f"hard,{PUZZLE},{SOLUTION},900"] * 40]
    digits = (
        str.maketrans("123456789", "".join(p)) for p in itertools.islice(itertools.permutations("123456789"), 104)
    )
    rows += [f"easy,{grid},{grid},0" for grid in map(SOLUTION.translate, digits)]
    path = tmp_path_factory.mktemp("data") / "hard_first.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_calibrate_finds_the_tolerance_that_is_a_promise_and_the_fast_one(tmp_path, hard_first):
    config = EqRConfig.sudoku_paper(**TINY, noise_scale=0.0)
    model = make_copier(tmp_path / "model", config, notes="kept", extra={"mine": 1})
    weights = (model / "model.safetensors").read_bytes()
    arguments = ["calibrate", hard_first, "--model", model, "--depth", 12]
    report = eqr_json(*arguments)
    trusted, fast = report["tol"], report["tol_fast"]
    assert report["written"] is None and report["tol_missing"] is None and load_checkpoint(model).card.tol is None
    assert report["correct_at_full_depth"] == trusted["correct"] == fast["correct"] == 104
    # Open grids come to rest too, on answers that are wrong, if less deep.
    assert (trusted["converged"], trusted["right_when_converged"]) == (104, 104)
    assert (fast["converged"], fast["right_when_converged"]) == (144, 104)
    assert trusted["tol"] < fast["tol"] and fast["mean_steps"] < trusted["mean_steps"] < 12
    looser = [c for c in report["candidates"] if c["tol"] > fast["tol"]]
    assert looser and looser[0]["correct"] < 104 and [c["tol"] for c in looser] == sorted(c["tol"] for c in looser)
    text = eqr(*arguments, "--write").stdout
    assert f"tol {trusted['tol']:g}: 104 of the 104 that settled are right (95 %: 96.4 to 100.0 %)" in text
    assert f"tol_fast {fast['tol']:g}: 104 of the 144 that settled are right" in text and "written to" in text
    card = load_checkpoint(model).card
    assert (card.tol, card.tol_fast, card.tol_missing) == (trusted["tol"], fast["tol"], "")
    assert card.noise_scale is None and card.notes == "kept" and card.extra["mine"] == 1
    stored = card.extra["calibration"]
    assert stored["puzzles"] == 144 and stored["tol"]["wilson95"][1] == 1.0 and stored["tol_fast"]["converged"] == 144
    assert (model / "model.safetensors").read_bytes() == weights
    for name, chosen in (("auto", trusted), ("fast", fast)):
        solved = eqr_json("solve", hard_first, "--model", model, "--depth", 12, "--tol", name)["summary"]
        assert solved["correct"] == 104 and solved["mean_steps"] == chosen["mean_steps"]
        assert solved["converged"] == chosen["converged"]


def test_calibrate_stores_the_tolerances_of_int8_beside_the_others(tmp_path, hard_first):
    model = make_copier(tmp_path / "model", EqRConfig.sudoku_paper(**TINY, noise_scale=0.0))
    arguments = ["calibrate", hard_first, "--model", model, "--depth", 12, "--write"]
    floats = eqr_json(*arguments)
    int8 = eqr_json(*arguments, "--precision", "int8")
    card = load_checkpoint(model).card
    assert (card.tol, card.tol_fast) == (floats["tol"]["tol"], floats["tol_fast"]["tol"])
    assert card.tol_by_precision["int8"]["tol"] == int8["tol"]["tol"]
    assert card.extra["calibration_by_precision"]["int8"]["puzzles"] == card.extra["calibration"]["puzzles"] == 144
    # A copier's are alike in both; others can be told apart.
    own = {"int8": {**card.tol_by_precision["int8"], "tol": 0.5 * card.tol}}
    (model / "model.json").write_text(dataclasses.replace(card, tol_by_precision=own).to_json())
    few = [hard_first, "--model", model, "--limit", 2]
    for precision, tol in (("auto", card.tol), ("fp32", card.tol), ("int8", 0.5 * card.tol)):
        for command in (["solve"], ["eval", "--depths", 2], ["diagnose", "--breadth", 1]):
            settings = eqr_json(*command, *few, "--precision", precision)["settings"]
            assert settings["tol"] == tol, (precision, command)
    refused = eqr(*arguments, "--precision", "int8", "--noise-scale", 0.01, code=2)
    assert "go with the noise_scale of the card, 0, got 0.01" in refused.stderr


def test_calibrate_with_few_puzzles_takes_of_every_kind_and_says_that_they_are_few(tmp_path, hard_first):
    model = make_copier(tmp_path / "model", EqRConfig.sudoku_paper(**TINY, noise_scale=0.0), tol=0.0237)
    arguments = ["calibrate", hard_first, "--model", model, "--depth", 12, "--limit", 40, "--write"]
    report = eqr_json(*arguments)
    assert report["subset"] == {"puzzles": 40, "of": 144, "seed": 20260605} and report["correct_at_full_depth"] == 29
    missing = "only 29 calibration puzzles were right at the full depth, and 100 must settle to tell"
    card = load_checkpoint(model).card
    assert report["tol"] is None and report["tol_missing"] == missing == card.tol_missing
    assert card.tol is None and card.tol_fast == report["tol_fast"]["tol"]
    caveat = f"warning: converged is no promise for this model: {missing}"
    assert eqr(*arguments).stderr == caveat + "\n"
    for command in (["solve"], ["eval"], ["diagnose", "--breadth", 1]):
        assert caveat in eqr(*command, hard_first, "--model", model, "--limit", 2).stderr


def test_calibrate_refuses_a_tolerance_that_is_met_at_the_first_step(tmp_path, hard_first):
    reasoner = copier(EqRConfig.sudoku_paper(**TINY, noise_scale=0.0, fixed_init=True, lambda_=1.0))
    with torch.no_grad():
        reasoner.H_init.zero_()  # nothing has to fade: what the last step answers the first one does
        reasoner.L_init.zero_()
    model = tmp_path / "model"
    reasoner.save_pretrained(model)
    result = eqr("calibrate", hard_first, "--model", model, "--depth", 6, "--write", code=2)
    missing = load_checkpoint(model).card.tol_missing
    assert "at their first step and no answer was lost, so no tolerance of this model means anything" in missing
    assert missing in result.stderr and load_checkpoint(model).card.tol_fast is None


def test_calibrate_stores_the_noise_that_the_tolerance_is_for(tmp_path, data):
    model = make_copier(tmp_path / "model", EqRConfig.sudoku_paper(**TINY, noise_scale=0.0))
    arguments = ["calibrate", data, "--model", model / "model.safetensors", "--depth", 10, "--reveal", 81]
    report = eqr_json(*arguments, "--noise-scale", 0.01, "--write")
    assert all(c["tol"] >= 2**0.5 * 0.01 for c in report["candidates"])
    card = load_checkpoint(model).card
    assert (card.noise_scale, card.tol_fast) == (0.01, report["tol_fast"]["tol"])


@pytest.mark.parametrize(
    "trained, chosen, card_noise",
    [(0.0, 0.0, None), (2.0, 0.0, 0.0)],
    ids=["as good as the trained one: that stays", "better than the trained one: the smallest"],
)
def test_calibrate_chooses_the_noise_by_what_it_answers(tmp_path, data, monkeypatch, trained, chosen, card_noise):
    config, ran, record = EqRConfig.sudoku_paper(**TINY, noise_scale=trained), [], studies.record

    def spied(*arguments, **settings):
        ran.append((settings["noise_scale"], settings["breadth"]))
        return record(*arguments, **settings)

    monkeypatch.setattr(studies, "record", spied)
    model = make_copier(tmp_path / "model", config, accuracies={"mine": 1})
    arguments = ["calibrate", data, "--model", model, "--depth", 10, "--reveal", 81, "--write"]
    report = eqr_json(*arguments, "--breadth", 2, "--noise-scales", "0.01,0")
    assert ran == [(scale, 2) for scale in sorted({0.0, 0.01, trained})]
    noise = report["noise"]
    trials = {t["noise_scale"]: t for t in noise["trials"]}
    assert (noise["trained"], noise["chosen"], noise["breadth"], noise["puzzles"]) == (trained, chosen, 2, 8)
    assert trials[chosen]["first"] == report["correct_at_full_depth"] == 8 and trials[chosen]["single"] == 1.0
    assert trials[trained]["selected_against_trained"] == {"gained": 0, "lost": 0, "mcnemar_p": 1.0}
    assert report["settings"]["noise_scale"] == chosen
    assert EquilibriumReasoner.from_pretrained(model).inference_noise_scale == chosen
    card = load_checkpoint(model).card
    assert card.noise_scale == card_noise and card.extra["calibration"]["noise"] == noise
    assert card.accuracies == ({"mine": 1} if chosen == trained else {})  # of the noise that they are said of

    eqr(*arguments)  # at the chosen noise again, and the card keeps why
    assert load_checkpoint(model).card.extra["calibration"]["noise"] == noise
    ran.clear()
    assert "chosen" in eqr(*arguments, "--noise-scales", "0.01").stdout
    assert ran == [(scale, 1) for scale in sorted({0.0, 0.01, trained})]  # the card's is among them
    eqr(*arguments, "--noise-scale", 0.02)
    assert "noise" not in load_checkpoint(model).card.extra["calibration"]


def test_a_comparison_of_noise_is_told_where_no_tolerance_is_found(model, data, tmp_path):
    arguments = ["calibrate", data, "--model", model, "--depth", 3, "--noise-scales", "0.1", "--output", tmp_path / "o"]
    failed = eqr(*arguments, code=2)
    assert "none of the 8 puzzles is right at depth 3" in failed.stderr and "noise, breadth 1" in failed.stdout
    report = json.loads((tmp_path / "o").read_text())
    assert [t["selected"] for t in report["noise"]["trials"]] == [0, 0] and "at depth 3" in report["error"]


def test_calibrate_says_why_it_cannot(model, data, tmp_path):
    unsolved = eqr("calibrate", data, "--model", model, "--depth", 3, code=2)
    assert "none of the 8 puzzles is right at depth 3" in unsolved.stderr
    assert "--max-loss" in eqr("calibrate", "--help").stdout
    lax = eqr("calibrate", data, "--model", model, "--trust", 0.9, "--write", code=2).stderr
    assert "--write stores a promise that 99 % are right, and --trust is 0.9" in lax
    torch.save({}, tmp_path / "official.pth")
    refused = eqr("calibrate", data, "--model", tmp_path / "official.pth", "--write", code=2)
    assert "--write needs --model" in refused.stderr
    for options, message in (
        (["--breadth", 2], "--breadth is for the comparison of --noise-scales"),
        (["--noise-scale", 0.1, "--noise-scales", "0,0.1"], "got 0.1 and '0,0.1'; give one of the two"),
        (["--max-loss", 2], "max_loss must be a share in 0..1, got 2.0"),
        (["--noise-scales", "0,-0.1"], "--noise-scales must be 0 or positive and finite, got '0,-0.1'"),
        (["--noise-scales", "auto"], "--noise-scales must be numbers, as in 0.02,0.03, got 'auto'"),
    ):
        assert message in eqr("calibrate", data, "--model", model, *options, code=2).stderr


# generate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.csv.gz", "p.npy"])
def test_generate_round_trip(name, tmp_path):
    file = tmp_path / name
    format = "text" if name == "p.txt" else "npy" if name == "p.npy" else "csv"
    eqr("generate", "sudoku", "-n", 3, "--difficulty", "easy", "--seed", 4, "--answers", "--format", format, "-o", file)
    puzzles, errors = sudoku.load(file)
    wanted = sudoku_generator.generate(3, "easy", seed=4)
    assert not errors and (puzzles.inputs == wanted.inputs).all()
    if format == "npy":
        assert (np.load(tmp_path / "p.answers.npy") == wanted.labels).all()
    else:
        assert (puzzles.labels == wanted.labels).all()
    if format == "csv":
        assert puzzles.rating.tolist() == wanted.rating.tolist() and set(puzzles.source) == {"generated_easy"}


def test_generate_to_stdout():
    lines = eqr("generate", "sudoku", "-n", 2, "--clues", "30-34").stdout.splitlines()
    assert len(lines) == 2 and all(30 <= 81 - line.count(".") <= 34 for line in lines)
    rows = eqr_json("generate", "sudoku", "-n", 2, "--guesses", "0", "--answers")
    assert [set(row) for row in rows] == [{"puzzle", "answer", "source", "rating"}] * 2
    assert [row["rating"] for row in rows] == [0, 0]
    mazes = eqr("generate", "maze", "-n", 2, "--size", 9, "--path-length", "10-").stdout
    puzzles, errors = maze.load(mazes.splitlines())
    assert not errors and (maze.path_lengths(puzzles.inputs) >= 10).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sudoku", "--difficulty", "nightmare"], "difficulty is 'nightmare'"),
        (["sudoku", "--size", 9], "--size is not for sudoku"),
        (["maze", "--clues", 30, "--difficulty", "easy"], "--difficulty and --clues are not for maze"),
        (["sudoku", "--clues", "many"], "--clues must be a number or a range"),
        (["sudoku", "--format", "npy"], "needs --output FILE.npy"),
    ],
)
def test_generate_names_bad_options(arguments, message):
    assert message in eqr("generate", *arguments, code=2).stderr
    assert eqr("generate", "chess", code=2).stdout == ""


# info ----------------------------------------------------------------------------------------------------------------


def test_info_tells_versions_backends_and_models():
    report = eqr_json("info")
    assert report["versions"]["torch"] == torch.__version__ and report["versions"]["eqr_kernels"]
    assert report["backends"]["reference"]["available"]
    assert not report["backends"]["cuda"]["available"] and report["backends"]["cuda"]["note"]
    assert isinstance(report["extension"]["loaded"], bool) and report["extension"]["status"]
    fused = report["backends"]["cpu"]
    assert fused["available"] == report["extension"]["loaded"] and ("fused" in fused["note"]) == fused["available"]
    assert report["cpu"]["name"] and isinstance(report["models"], list)
    assert report["tasks"][:2] == ["sudoku", "maze"]
    text = eqr("info").stdout
    for expected in ("versions", "compiled extension", "machine", "backends", "shipped models", torch.__version__):
        assert expected in text
    assert "eqr_kernels 0" in eqr("--version").stdout


def test_info_shows_shipped_models_and_those_that_are_damaged(model, tmp_path, monkeypatch):
    for name in ("sound", "damaged"):
        for suffix in (".safetensors", ".json"):
            (tmp_path / f"{name}{suffix}").write_bytes((model / f"model{suffix}").read_bytes())
    (tmp_path / "damaged.json").write_text("{")
    monkeypatch.setattr("eqr_kernels.checkpoint.sources.PRETRAINED", tmp_path)
    damaged, sound = eqr_json("info")["models"]
    assert sound["tol"] == 0.02 and "d 16" in sound["size"]
    assert damaged["name"] == "damaged" and "not a JSON file" in damaged["error"]
    assert "tol 0.02" in eqr("info").stdout


# train ---------------------------------------------------------------------------------------------------------------

TRAIN = ["train", "--no-compile", "--batch-size", 6, "--warmup", 2, "--curriculum", "0:40-60,8:30-50", "--log-every", 2]
SETS = [part for name, value in TINY.items() for part in ("--set", f"{name}={value}")]


def files(out: Path) -> dict[str, bytes]:
    """The state's parts and the model of a run, without what names the number of steps asked for."""
    state = sorted(out.glob("state-*/part-*"))
    return {str(path.relative_to(out)): path.read_bytes() for path in [*state, out / "model.safetensors"]}


def manifest_of(out: Path) -> dict:
    (path,) = out.glob("state-*/manifest.json")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_train_does_not_depend_on_the_default_dtype(data, tmp_path, dtype):
    train = [*TRAIN, *SETS, "--data", data, "--steps", 3, "--eval-data", data, "--eval-every", 3, "--eval-depths", 2]
    eqr(*train, "--out", tmp_path / "plain")
    torch.set_default_dtype(dtype)
    try:
        eqr(*train, "--out", tmp_path / "other")
    finally:
        torch.set_default_dtype(torch.float32)
    assert files(tmp_path / "plain") == files(tmp_path / "other")


@pytest.mark.slow
def test_train_resumes_to_the_same_result(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train = [*TRAIN, *SETS, "--slice-steps", 3, "--data", data]
    lines = eqr(*train, "--out", whole, "--steps", 6, "--json").stdout.splitlines()
    reports = [json.loads(line) for line in lines]
    assert [r["step"] for r in reports] == [2, 4, 6]
    assert set(reports[0]) == {
        "step",
        "loss",
        "exact",
        "steps",
        "residual",
        "samples_per_second",
        "lr",
        "operations_per_second",
        "share_of_gemm",
    }
    eqr(*train, "--out", parts, "--steps", 3)
    # The settings are the run's own unless they are given again.
    text = eqr("train", "--resume", "--no-compile", "--data", data, "--out", parts, "--steps", 6).stdout
    assert "from step 3" in text and "step       6" in text
    assert list(files(whole)) == list(files(parts)) and files(whole) == files(parts)
    card = load_checkpoint(parts).card
    assert card.steps == 6 and "puzzles.csv: 8 puzzles" in card.data and card.extra["training"]["batch_size"] == 6
    assert card.config == EqRConfig.sudoku_small(**TINY)


@pytest.mark.slow
def test_train_tells_its_rate_and_share_of_gemm(data, tmp_path, monkeypatch):
    monkeypatch.setattr("eqr_kernels.training.run.gemm_rate", lambda device, dtype: 2.5e9)
    monkeypatch.setattr("eqr_kernels.training.run.training_operations", lambda config: 3 * 10**12)
    train = [*TRAIN, *SETS, "--data", data, "--steps", 2]
    (line,) = eqr(*train, "--out", tmp_path / "json", "--json").stdout.splitlines()
    report = json.loads(line)
    assert report["operations_per_second"] == pytest.approx(3e12 * report["samples_per_second"], rel=1e-12)
    assert report["share_of_gemm"] == pytest.approx(1200 * report["samples_per_second"], rel=1e-12)
    *_, gemm, line = eqr(*train, "--out", tmp_path / "text").stdout.splitlines()
    assert gemm == "GEMM: 0.00 TFLOP/s in bfloat16 (torch.matmul)"
    samples, tera, percent = re.search(r"  +([\d.]+) samples/s  ([\d.]+) TFLOP/s  (\d+) % of GEMM$", line).groups()
    assert float(tera) == pytest.approx(3 * float(samples), abs=0.16)
    assert float(percent) == pytest.approx(120_000 * float(samples), abs=6001)


@pytest.mark.slow
def test_train_state_equals_uninterrupted_bit_for_bit_in_the_library(data, tmp_path):
    settings = TrainSettings(
        batch_size=4, lr_warmup_steps=2, compile=False, seed=3, curriculum="0:40-60", lr=1e-3, total_steps=None
    )
    puzzles, config = sudoku.load_csv(data), EqRConfig.sudoku_paper(**TINY)

    def run(folder: str) -> TrainingRun:
        plan = RunPlan(tmp_path / folder, SUDOKU, config, settings)
        return TrainingRun(plan, puzzles, Process(0, 1, torch.device("cpu")), "d")

    whole, before, after = run("whole"), run("parts"), run("parts")
    for each in (whole, before):
        for _ in range(2):
            each.trainer.train_step()
        each.save()
    after.load()
    for each in (whole, after):
        for _ in range(3):
            each.trainer.train_step()
    expected, actual = whole.trainer.state_dict(), after.trainer.state_dict()
    assert expected.keys() == actual.keys() and after.trainer.step == 5
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert whole.trainer.stream.state == after.trainer.stream.state
    untouched = run("other").trainer.state_dict()
    assert not torch.equal(untouched["model.lm_head.weight"], actual["model.lm_head.weight"])


@pytest.mark.slow
def test_train_saves_when_it_is_interrupted(data, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    arguments = [*TRAIN, *SETS, "--data", data, "--steps", 7, "--slice-steps", 3]
    eqr(*arguments, "--out", whole)
    step = Trainer.train_step

    def interrupt(self: Trainer) -> None:
        step(self)
        if self.step == at:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    for at in (3, 4):
        parts = tmp_path / f"parts{at}"
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", interrupt)
            result = eqr(*arguments, "--out", parts, code=130)
        assert f"interrupted at step {at}" in result.stderr and signal.getsignal(signal.SIGINT) is before
        assert load_checkpoint(parts).card.steps == at
        # A stop within a slice is a boundary that the whole run did not have, and says so.
        assert ("not bit for bit" in result.stderr) == (at == 4)
        eqr(*arguments, "--out", parts, "--resume")
        assert (files(whole) == files(parts)) == (at == 3)


class Clock:
    """Stands for the time module: ten seconds go by with every training step, and none otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 10.0) -> None:
        self.now, step = 1000.0, Trainer.train_step
        monkeypatch.setattr("eqr_kernels.training.slices.time", self)
        monkeypatch.setattr("eqr_kernels.training.run.time", self)

        def timed(trainer: Trainer) -> None:
            step(trainer)
            self.now += seconds

        monkeypatch.setattr(Trainer, "train_step", timed)

    def monotonic(self) -> float:
        return self.now


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "stops", "note"),
    [(15, 2, True), (25, 3, False), (85, 6, False), (90, 9, False), (115, 9, False), (120, 12, False)],
)
def test_train_minutes_end_with_the_last_slice_that_fits(data, tmp_path, monkeypatch, seconds, stops, note):
    arguments = [*TRAIN, *SETS, "--data", data, "--slice-steps", 3, "--out", tmp_path]
    with monkeypatch.context() as patch:
        Clock(patch)
        result = eqr(*arguments, "--minutes", seconds / 60)
        assert manifest_of(tmp_path)["step"] == stops
        assert (f"time was over at step {stops}" in result.stderr) == note
        # The next command's slices end where those of the first would have.
        eqr(*arguments, "--resume", "--minutes", 0.5)
        assert manifest_of(tmp_path)["step"] == stops + 3


@pytest.mark.slow
def test_train_chooses_slices_by_the_speed_of_the_first_steps(data, tmp_path, monkeypatch):
    arguments = [*TRAIN, *SETS, "--set", "halt_max_steps=4", "--data", data]
    for seconds, chosen, warned in ((1.4, 32, False), (0.25, 180, False), (6.4, 8, False), (8.0, 8, True)):
        out = tmp_path / str(seconds)
        with monkeypatch.context() as patch:
            Clock(patch, seconds)
            result = eqr(*arguments, "--out", out, "--steps", 33)
        assert manifest_of(out)["settings"]["slice_steps"] == chosen
        assert load_checkpoint(out).card.extra["training"]["slice_steps"] == chosen
        assert ("a slice of 8 steps, 2 lifetimes of a row, takes 64 s" in result.stderr) == warned
    out = tmp_path / "1.4"
    refused = eqr(*arguments, "--out", out, "--resume", "--steps", 34, "--slice-steps", 5, code=2)
    assert "--slice-steps (was 32, now 5)" in refused.stderr
    eqr(*arguments, "--out", out, "--resume", "--steps", 34)
    assert manifest_of(out)["settings"]["slice_steps"] == 32
    # Stopped before the speed was known: still to be chosen, by the command line too.
    early = tmp_path / "early"
    eqr(*arguments, "--out", early, "--steps", 2)
    assert manifest_of(early)["settings"]["slice_steps"] is None
    eqr(*arguments, "--out", early, "--resume", "--steps", 3, "--slice-steps", 5)
    assert manifest_of(early)["settings"]["slice_steps"] == 5


@pytest.mark.slow
def test_train_that_is_killed_loses_one_slice_at_most(data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [*TRAIN, *SETS, "--data", data, "--slice-steps", 4, "--log-every", 1]
    command = [sys.executable, "-m", "eqr_kernels.cli", *arguments, "--out", killed, "--steps", 100_000, "--json"]
    run = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        for line in run.stdout:
            if json.loads(line)["step"] == 18:
                run.kill()
                break
        last = [json.loads(line)["step"] for line in run.stdout if line.endswith("}\n")]
    finally:
        run.kill()
        run.wait()
    step = manifest_of(killed)["step"]
    assert step % 4 == 0 and step >= max([18, *last]) - 4
    end = step + 6
    # total_steps only says when to stop, as the rate is constant.
    eqr(*arguments, "--out", killed, "--resume", "--steps", end)
    eqr(*arguments, "--out", whole, "--steps", end)
    assert files(whole) == files(killed)


@pytest.mark.slow
def test_train_that_diverges_keeps_its_last_good_state(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    arguments = [*TRAIN, *SETS, "--data", data, "--out", out]
    eqr(*arguments, "--steps", 2)
    good = files(out)
    step = Trainer.train_step

    def poison(self: Trainer) -> None:
        step(self)
        self.model.lm_head.weight.data[0, 0] = torch.nan

    def poison_loss(self: Trainer) -> None:
        step(self)
        self._sums.values[0] = torch.inf

    message = f"the state of step 2 in {out} is kept"

    def poison_moment(self: Trainer) -> None:
        step(self)
        self.moments()["exp_avg_sq.lm_head.weight"][0, 0] = torch.inf

    for change, wrong in (
        (poison, "model.lm_head.weight is not finite"),
        (poison_loss, "the loss is inf"),
        (poison_moment, "optimizer.exp_avg_sq.lm_head.weight is not finite"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", change)
            stderr = eqr(*arguments, "--resume", "--steps", 3, code=2).stderr
        assert f"diverged at step 3: {wrong};" in stderr and message in stderr and "a lower --lr than 0.001" in stderr
        assert files(out) == good and load_checkpoint(out).card.steps == 2
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", poison)
        stderr = eqr(*arguments[:-1], tmp_path / "new", "--steps", 1, code=2).stderr
    assert "no state has been saved" in stderr and not list((tmp_path / "new").iterdir())


@pytest.mark.slow
def test_train_without_a_compiler_says_what_to_do(data, tmp_path):
    arguments = [part for part in TRAIN if part != "--no-compile"] + SETS + ["--dtype", "float32"]
    command = [sys.executable, "-m", "eqr_kernels.cli", *arguments, "--data", data, "--out", tmp_path, "--steps", 1]
    # In a process of its own, whose cache holds nothing compiled yet.
    environment = dict(os.environ, CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "needs a C++ compiler" in done.stderr and "--no-compile" in done.stderr, done.stderr


@pytest.mark.slow
def test_train_resume_is_strict_about_settings(data, tmp_path):
    out = tmp_path / "run"
    arguments = [*TRAIN, *SETS, "--data", data, "--out", out]
    eqr(*arguments, "--steps", 1)
    assert "holds a run already" in eqr(*arguments, "--steps", 1, code=2).stderr
    refused = eqr(
        "train", "--resume", "--data", data, "--out", out, "--steps", 2, "--lr", 0.5, "--set", "L_cycles=2", code=2
    )
    assert "--lr (was 0.001, now 0.5)" in refused.stderr and "L_cycles was 1, now 2" in refused.stderr
    other = tmp_path / "other.csv"
    other.write_text("\n".join(data.read_text().splitlines()[:-1]) + "\n")
    refused = eqr("train", "--resume", "--data", other, "--out", out, "--steps", 2, code=2)
    assert "the puzzles of --data (other puzzles, or another order)" in refused.stderr
    manifest = next(out.glob("state-*/manifest.json"))
    state = json.loads(manifest.read_text())
    del state["settings"]["lr"]
    del state["settings"]["fused"]  # as in a state from before there was a fused kernel
    state["settings"]["compile"] = True
    manifest.write_text(json.dumps(state))
    warned = eqr("train", "--resume", "--no-compile", "--data", data, "--out", out, "--steps", 2).stderr
    assert "does not say lr; taken from" in warned
    assert "--no-compile is not as before" in warned and "--fused is not as before" in warned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", 0], "--minutes must be positive"),
        ([], "give --steps or --minutes"),
        (["--steps", 1, "--preset", "chess"], "--preset must be one of sudoku-paper, sudoku, sudoku-small, maze"),
        (["--steps", 1, "--set", "hiden_size=4"], "did you mean 'hidden_size'"),
        (["--steps", 1, "--set", "hidden_size"], "--set must be FIELD=VALUE"),
        (["--steps", 1, "--curriculum", "34-50"], "is not STEP:LOW-HIGH"),
        (["--steps", 1, "--curriculum", "0:34-82"], "--curriculum shows up to 82 clues, and a puzzle has 81 cells"),
        (["--steps", 1, "--dtype", "float16"], "forward_dtype must be"),
        (["--minutes", 1, "--lr-min-ratio", 0.1], "--lr-min-ratio 0.1 needs --steps"),
        (["--steps", 1, "--eval-depths", "2,x", "--eval-data", "x"], "--eval-depths must be numbers"),
        (["--steps", 1, "--cycles", "1x3x16"], "is not STEP:HxLxSTEPS"),
        (["--steps", 1, "--mix", "hard=1"], "no puzzle is of the source 'hard'"),
        (["--steps", 1, "--resume"], "no training state"),
    ],
)
def test_train_names_bad_options(data, tmp_path, arguments, message):
    result = eqr("train", "--no-compile", "--data", data, "--out", tmp_path / "run", *arguments, code=2)
    assert message in result.stderr.replace("\n", " ") and not list(tmp_path.glob("run/state-*"))


def test_train_needs_whole_data(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text(f"question,answer\n{PUZZLE},{SOLUTION}\n{PUZZLE},\n")
    refused = eqr(*TRAIN, "--data", file, "--out", tmp_path / "run", "--steps", 1, code=2)
    assert "1 rows cannot be trained on, the first on line 3: has no answer" in refused.stderr


def test_train_tensorboard_says_how_to_install_it(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = [*TRAIN, *SETS, "--data", data, "--out", tmp_path / "run", "--steps", 1, "--tensorboard"]
    assert "pip install 'eqr_kernels[train]'" in eqr(*arguments, code=2).stderr


def test_train_makes_a_maze_model(tmp_path):
    file = tmp_path / "mazes.csv"
    eqr("generate", "maze", "-n", 4, "--size", 7, "--answers", "--format", "csv", "-o", file)
    sets = ["--set", "seq_len=49", "--set", "hidden_size=16", "--set", "num_heads=2", "--set", "H_cycles=1"]
    eqr(
        "train",
        "--no-compile",
        "--preset",
        "maze",
        *sets,
        "--data",
        file,
        "--out",
        tmp_path / "run",
        "--batch-size",
        2,
        "--steps",
        1,
        "--minutes",
        1,
    )
    assert load_checkpoint(tmp_path / "run").config.seq_len == 49
    eqr_json("solve", file, "--model", tmp_path / "run", "--halt", "none", "--depth", 2)


@pytest.mark.slow
def test_train_in_two_processes_resumes_to_the_same_result(data, tmp_path):
    """What torchrun starts: two processes with their own rows and puzzles, and the same weights.

    One of the two runs is measured as it goes, and a copy of it is annealed.
    """
    script = """
        import os, sys
        from eqr_kernels.cli import app
        data, whole, parts, auto, *ports = sys.argv[1:10]
        train = sys.argv[10:]
        measured = ["--eval-data", data, "--eval-every", "2", "--eval-depths", "1", "--eval-puzzles", "2"]
        runs = [[whole, "--steps", "4", *measured], [parts, "--steps", "2"], [parts, "--steps", "4", "--resume"]]
        runs = [[*train, "--slice-steps", "2", "--no-calibrate", "--out", *run] for run in runs]
        runs.append(["train", "--no-compile", "--out", whole, "--finish", "0.01"])
        runs.append([*train, "--steps", "10", "--out", auto])
        for port, run in zip(ports, runs, strict=True):
            os.environ["MASTER_PORT"] = port
            assert app([*run, "--data", data], standalone_mode=False) == 0
    """
    arguments = [data, *(tmp_path / name for name in ("whole", "parts", "auto")), *free_ports(5), *TRAIN, *SETS]
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    environment = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    started = [
        subprocess.Popen(command, env={**environment, "RANK": str(r)}, stdout=-1, stderr=-2, text=True) for r in (0, 1)
    ]
    outputs = outputs_of(started, timeout=300)
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert "2 process(es)" in outputs[0] and outputs[1] == ""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert files(whole) == files(parts)
    ranks = [sorted(p.relative_to(out) for p in out.glob("ranks/**/part-*")) for out in (whole, parts)]
    assert ranks[0] == ranks[1] and len(ranks[0]) == 1
    assert (whole / ranks[0][0]).read_bytes() == (parts / ranks[0][0]).read_bytes()
    # Ranks draw puzzles and starts of their own; weights and moments are rank 0's.
    first, own = (load_file(path) for path in (next(whole.glob("state-*/part-000")), whole / ranks[0][0]))
    assert list(own) == ["generator"] and not torch.equal(own["generator"], first["generator"])
    manifests = [json.loads(p.read_text()) for p in (tmp_path / "auto").rglob("manifest.json")]
    assert len(manifests) == 2 and manifests[0]["stream"] != manifests[1]["stream"]
    slices = [manifest["settings"]["slice_steps"] for manifest in manifests]
    assert slices[0] == slices[1] and slices[0] % 16 == 0
    annealed = [json.loads(p.read_text()) for p in (whole / "annealed-000000004").rglob("manifest.json")]
    assert len(annealed) == 2 and annealed[0]["step"] == annealed[1]["step"] > 12
    ends = [[each["settings"][name] for name in ("decay_from", "total_steps")] for each in annealed]
    assert ends[0] == ends[1] == [12, annealed[0]["step"]]
    steps = [line.split(",")[0] for line in (whole / "curve.csv").read_text().splitlines()[1:]]
    assert sorted(set(steps)) == ["2", "4"]


# the program ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_program_end_to_end(model):
    """As a process of its own, fed by a pipe."""
    command = [sys.executable, "-m", "eqr_kernels.cli", "solve", "-", "--model", str(model), "--json"]
    lines = f"{SOLUTION}\nbad\n"
    run = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert run.returncode == 1, run.stderr
    report = json.loads(run.stdout)
    assert report["summary"]["solved"] == 1 and report["errors"][0]["line"] == 2
    assert run.stderr.startswith("error: line 2: has 3 cells")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "sudoku", "-n", "1"]])
def test_what_needs_no_torch_does_not_wait_for_it(arguments):
    """Importing torch takes seconds."""
    script = f"""
        import sys
        from eqr_kernels.cli import app
        app({arguments}, standalone_mode=False)
        assert "torch" not in sys.modules
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout, run.stderr


@pytest.mark.parametrize(("command", "line"), [(name, line) for name, (_, line) in COMMANDS.items()])
def test_every_command_has_help_that_begins_with_its_line_in_the_list(command, line):
    shown = [" ".join(eqr(*arguments).stdout.replace("│", " ").split()) for arguments in ([command, "--help"], ["-h"])]
    assert "Usage" in shown[0] and all(line in text for text in shown)


def test_a_command_that_is_not_there_is_told_from_those_that_are():
    assert "No such command 'slove'" in eqr("slove", code=2).stderr


def test_no_arguments_shows_help():
    assert "Commands" in CliRunner().invoke(app, []).output
