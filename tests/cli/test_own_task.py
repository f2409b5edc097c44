"""A task of one's own on the command line, from its puzzles to its report: the Latin squares of examples/."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eqr_kernels import EqRConfig
from eqr_kernels.checkpoint import load_checkpoint
from eqr_kernels.tasks.registry import find_task
from eqr_kernels.training.state import read_manifest
from tests.support.commands import TINY, eqr, eqr_json, make_copier
from tests.support.environment import REPOSITORY

FILE = REPOSITORY / "examples" / "latin_squares.py"
PLACE = f"{FILE}:LATIN"
SIZES = [part for name, value in {**TINY, "multiple_of": 8}.items() for part in ("--set", f"{name}={value}")]
TRAIN = ["train", "--no-compile", "--no-calibrate", "--batch-size", 4, "--warmup", 2, "--dtype", "float32", *SIZES]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "latin.csv"
    eqr("generate", PLACE, "-n", 40, "--answers", "--format", "csv", "-o", path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Copies its givens, so that it solves what has no blank."""
    config = EqRConfig(seq_len=16, vocab_size=6, hidden_size=16, num_heads=2, H_cycles=1, L_cycles=1, noise_scale=0.0)
    return make_copier(tmp_path_factory.mktemp("model"), config, tol=0.02, task="latin", task_object="mine:LATIN")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    eqr(*TRAIN, "--task", PLACE, "--data", data, "--out", out, "--steps", 2)
    return out


def test_generated_puzzles_are_those_of_the_task(data):
    task = find_task(PLACE)
    puzzles, errors = task.load(data)
    assert not errors and len(puzzles) == 40 and task.check(puzzles.inputs, puzzles.labels).all()
    for option in (["--size", 4], ["--difficulty", "easy"], ["--path-length", 3]):
        assert f"{option[0]} is not for latin" in eqr("generate", PLACE, *option, code=2).stderr


def test_texts_with_commas_are_quoted_and_refused_in_lines(tmp_path):
    module = tmp_path / "commas.py"
    module.write_text(
        FILE.read_text()
        + """
class Commas(LatinSquares):
    def decode(self, tokens):
        return ",".join(super().decode(tokens))

    def encode(self, text):
        return super().encode(text.replace(",", ""))

OBJECT = Commas()
"""
    )
    written = tmp_path / "commas.csv"
    eqr("generate", f"{module}:OBJECT", "-n", 3, "--answers", "--format", "csv", "-o", written)
    puzzles, errors = find_task(f"{module}:OBJECT").load(written)
    assert not errors and len(puzzles) == 3
    assert "a line may hold no comma" in eqr("generate", f"{module}:OBJECT", "-n", 3, code=2).stderr


def test_training_takes_the_sizes_of_the_task_and_remembers_it(trained, data):
    card = load_checkpoint(trained).card
    assert (card.config.seq_len, card.config.vocab_size, card.config.multiple_of) == (16, 6, 8)
    assert (card.task, card.task_object) == ("latin", PLACE)
    settings = read_manifest(trained)["settings"]
    assert settings["curriculum"] == "" and settings["task"] == "latin"
    for command in ("solve", "eval", "diagnose", "calibrate", "curve"):
        refused = eqr(command, data, "--model", trained, code=2).stderr
        assert f"the model was trained on the task 'latin' of {PLACE}" in refused and f"give --task {PLACE}" in refused


def test_a_run_goes_on_with_its_task_named_again(data, tmp_path):
    out = tmp_path / "run"
    eqr(*TRAIN, "--task", PLACE, "--data", data, "--out", out, "--steps", 1)
    resume = ["train", "--no-compile", "--no-calibrate", "--data", data, "--out", out, "--resume", "--steps", 2]
    assert f"give --task {PLACE}" in eqr(*resume, code=2).stderr
    other = tmp_path / "other.py"
    other.write_text(FILE.read_text().replace('name = "latin"', 'name = "squares"'))
    refused = eqr(*resume, "--task", f"{other}:LATIN", code=2).stderr
    assert "these differ: --task (was 'latin', now 'squares')" in refused
    moved = tmp_path / "moved.py"
    moved.write_text(FILE.read_text())
    eqr(*resume, "--task", f"{moved}:LATIN")
    card = load_checkpoint(out).card
    assert card.steps == 2 and card.task_object == f"{moved}:LATIN"
    tuned = tmp_path / "tuned"
    begin = ["train", "--no-compile", "--no-calibrate", "--data", data, "--out", tuned, "--init", out, "--steps", 1]
    assert f"give --task {moved}:LATIN" in eqr(*begin, code=2).stderr
    eqr(*begin, "--task", PLACE)
    assert load_checkpoint(tuned).card.task == "latin"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "latn"], "--task 'latn' is not known"),
        (["--task", PLACE, "--set", "seq_len=25"], "has 16 tokens of a vocabulary of 6 (seq_len, vocab_size), and the"),
        (["--task", PLACE, "--curriculum", "0:4-8"], "and the run trains the latin task"),
        (["--task", "sudoku"], "none of 40 rows could be read, the first on line 2: has 16 cells; it needs 81"),
    ],
)
def test_training_names_what_does_not_fit(data, tmp_path, arguments, message):
    refused = eqr(*TRAIN, "--data", data, "--out", tmp_path / "run", "--steps", 1, *arguments, code=2).stderr
    assert message in refused.replace("\n", " ")


def test_a_task_that_breaks_its_contract_is_told_before_training(data, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(FILE.read_text().replace("return moved(inputs), moved(labels)", "return moved(inputs), labels"))
    train = [*TRAIN, "--task", f"{broken}:LATIN", "--data", data, "--out", tmp_path / "run", "--steps", 1]
    assert "after augment, which must turn both alike" in eqr(*train, code=2).stderr


def test_every_command_runs_on_it(model, data, tmp_path):
    task = ["--model", model, "--task", PLACE]
    answers = tmp_path / "answers.csv"
    rows = [line.split(",") for line in data.read_text().splitlines()[1:]]
    answers.write_text("".join(f"{answer},{answer}\n" for _, _, answer, _ in rows[:20]))
    solved = eqr_json("solve", answers, *task, "--depth", 16)
    assert solved["task"] == "latin" and solved["summary"]["solved"] == solved["summary"]["correct"] == 20
    assert solved["puzzles"][0]["prediction"] == rows[0][2] and solved["puzzles"][0]["solutions"] is None
    unsolved = eqr_json("solve", data, *task, "--depth", 4)["summary"]
    assert unsolved["puzzles"] == 40 and unsolved["solved"] == 0
    assert eqr_json("eval", answers, *task, "--depths", 16)["accuracy"][0]["correct"] == 20
    report = eqr_json("diagnose", answers, *task, "--depth", 16, "--breadth", 2)
    assert report["task"] == "latin" and report["modes"]["counts"]["broad"] == 20
    assert PLACE in report["reproduce"]["command"]
    assert eqr_json("calibrate", answers, *task, "--depth", 16)["tol_fast"]
    demo = eqr_json("solve", "--demo", *task, "--depth", 2)
    assert len(demo["puzzles"]) == 12 and demo["puzzles"][0]["source"] == "generated"


def test_grids_are_drawn_as_the_task_draws_them(model, data):
    text = eqr("solve", data, "--model", model, "--task", PLACE, "--limit", 1, "--depth", 2).stdout
    question = data.read_text().splitlines()[1].split(",")[1]
    rows = [re.escape(question[i : i + 4]) for i in range(0, 16, 4)]
    assert re.search(r"[^a-d]*\n[^a-d.]*".join(rf"{row} +[a-d]{{4}}" for row in rows), text)


@pytest.mark.slow
def test_the_cost_map_of_it(model, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "curve"
    eqr("curve", "--model", model, "--task", PLACE, "--quick", "--limit", 8, "--depth", 4, "--breadth", 2, "--out", out)
    assert json.loads((out / "curve.json").read_text())["task"] == "latin"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reveal", 3], "--reveal is for Sudoku and tasks with a `reveal`, and this model solves the latin task"),
        (["--check"], "--check is for Sudoku and tasks with a `count_solutions`, and this model solves the latin task"),
        (["--views", 2], "the latin task has no `views`"),
        (["--turn-every", 2], "--turn-every 2: the latin task has no `views`"),
        (["--values", "digits"], "arrays of the latin task hold tokens"),
        (["--task", "sudoku"], "the sudoku task has 81 tokens of a vocabulary of 11"),
        (["--task", f"{FILE}:LATINS"], "has no LATINS; did you mean LATIN?"),
    ],
)
def test_what_a_task_cannot_is_told(model, data, arguments, message):
    task = [] if "--task" in arguments else ["--task", PLACE]
    refused = eqr("solve", data, "--model", model, *task, *arguments, code=2)
    assert message in refused.stderr.replace("\n", " ") and not refused.stdout


def test_a_task_that_reveals_has_a_curriculum_and_easier_puzzles(model, data, tmp_path):
    revealing = tmp_path / "revealing.py"
    revealing.write_text(
        FILE.read_text()
        + """
class Revealing(LatinSquares):
    easier_clues = 12

    def reveal(self, inputs, labels, clues, rng):
        ranks = np.where(inputs == BLANK, rng.random(inputs.shape), -1).argsort(1).argsort(1)
        return np.where(ranks < np.reshape(clues, (-1, 1)), labels, inputs)

    def count_solutions(self, inputs):
        return int(((_all_squares() == inputs) | (inputs == BLANK)).all(1).sum())

OBJECT = Revealing()
"""
    )
    task, out = ["--task", f"{revealing}:OBJECT"], tmp_path / "run"
    train = [*TRAIN, *task, "--data", data, "--out", out, "--steps", 1]
    eqr(*train, "--curriculum", "0:10-12", "--eval-data", data, "--eval-depths", "2")
    assert {line.split(",")[6] for line in (out / "curve.csv").read_text().splitlines()[1:]} == {"published", "12"}
    assert read_manifest(out)["settings"]["curriculum"] == "0:10-12"
    report = eqr_json("solve", data, "--model", model, *task, "--reveal", 16, "--depth", 16)
    assert report["summary"]["solved"] == 40 and {p["solutions"] for p in report["puzzles"]} == {"one"}


def test_a_task_without_a_generator_says_so(model, tmp_path):
    bare = tmp_path / "bare.py"
    bare.write_text(FILE.read_text().replace("def generate(", "def _generate("))
    for arguments in (["generate", f"{bare}:LATIN"], ["solve", "--demo", "--model", model, "--task", f"{bare}:LATIN"]):
        assert "the latin task has no `generate` and makes no puzzles" in eqr(*arguments, code=2).stderr


def test_a_model_of_a_task_that_is_not_installed_says_so(tmp_path, data):
    config = EqRConfig(seq_len=16, vocab_size=6, hidden_size=16, num_heads=2)
    model = make_copier(tmp_path / "m", config, task="latin")
    refused = eqr("solve", data, "--model", model, code=2).stderr
    assert "trained on the task 'latin', which is not known here (sudoku, maze)" in refused
