"""What changes along a training run: cycles, the mix of sources, the decay of the rate, and what is measured of it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.checkpoint import ModelCard, load_checkpoint
from eqr_kernels.tasks import sudoku, sudoku_generator
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.registry import MAZE, SUDOKU
from eqr_kernels.tasks.stream import PuzzleStream, parse_mix
from eqr_kernels.training.cycles import CyclePoint, config_at, parse_cycles, stretches
from eqr_kernels.training.evaluation import Evaluator, evaluation_sets
from eqr_kernels.training.objective import stablemax_cross_entropy
from eqr_kernels.training.state import copy_state, load_state, read_manifest, save_state
from eqr_kernels.training.throughput import training_operations
from eqr_kernels.training.trainer import Trainer
from tests.support.commands import eqr
from tests.support.environment import needs_extension
from tests.support.models import copier
from tests.support.training import keep, losses, make_trainer, states_equal, toy_puzzles

TINY = dict(hidden_size=16, num_heads=2, H_cycles=1, L_cycles=1, L_layers=1, halt_max_steps=4)
TRAIN = ["train", "--no-compile", "--batch-size", 4, "--warmup", 2, "--lr", 1e-3, "--slice-steps", 3, "--log-every", 2]
SETS = [part for name, value in TINY.items() for part in ("--set", f"{name}={value}")]


def write_puzzles(path: Path, questions: np.ndarray, answers: np.ndarray, sources: list[str]) -> Path:
    rows = zip(sources, map(sudoku.decode, questions), map(sudoku.decode, answers), strict=True)
    path.write_text("source,question,answer\n" + "".join(f"{s},{q},{a}\n" for s, q, a in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight puzzles of two sources."""
    easy, medium = (sudoku_generator.generate(4, difficulty, seed=5) for difficulty in ("easy", "medium"))
    inputs, labels = (np.concatenate([getattr(p, name) for p in (easy, medium)]) for name in ("inputs", "labels"))
    return write_puzzles(tmp_path_factory.mktemp("data") / "puzzles.csv", inputs, labels, ["easy"] * 4 + ["medium"] * 4)


def state_of(out: Path) -> dict[str, bytes]:
    """The state's parts and the model of a run."""
    files = [*sorted(out.glob("state-*/part-*")), out / "model.safetensors"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def settings_of(out: Path) -> dict:
    return read_manifest(out)["settings"]


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "curve.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# cycles --------------------------------------------------------------------------------------------------------------


def test_cycles_are_those_of_the_last_point_that_has_begun():
    points = parse_cycles("0:1x3x16,20:2x6x32")
    assert points == (CyclePoint(0, 1, 3, 16), CyclePoint(20, 2, 6, 32)) and parse_cycles("") == ()
    base = EqRConfig.sudoku_small()
    configs = [config_at(points, base, step) for step in (0, 19, 20, 500)]
    assert [(c.H_cycles, c.L_cycles, c.halt_max_steps) for c in configs] == [(1, 3, 16)] * 2 + [(2, 6, 32)] * 2
    assert config_at((), base, 7) is base
    assert [(c.L_cycles, n) for c, n in stretches(points, base, 50)] == [(3, 20), (6, 30)]
    assert [(c.L_cycles, n) for c, n in stretches(points, base, 20)] == [(3, 20)]
    assert stretches((), base, 9) == [(base, 9)]


@pytest.mark.parametrize(
    "text", ["1:1x1x1", "0:1x1", "0:1x1x1x1", "0:1x1x1,0:2x1x1", "0:0x1x1", "0:1x1x0", "0:axbxc", "1x1x1", "0:1x1x1,5"]
)
def test_cycles_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="cycles"):
        parse_cycles(text)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_extension)])
def test_cycles_change_at_their_step_and_a_resumed_run_has_those_of_its_own(tmp_path, dtype):
    options = dict(cycles="0:1x1x2,3:2x2x4", forward_dtype=dtype)
    whole, first = (make_trainer(**options) for _ in range(2))
    assert whole.longest_lifetime == 4
    seen = []
    for _ in range(5):
        whole.train_step()
        c = whole.model.config
        seen.append((c.H_cycles, c.L_cycles, c.halt_max_steps))
    assert seen == [(1, 1, 2)] * 3 + [(2, 2, 4)] * 2
    short, long = (config_at(parse_cycles(options["cycles"]), whole.model.config, step) for step in (0, 3))
    assert whole.operations == 8 * (3 * training_operations(short) + 2 * training_operations(long))
    whole.begin_slice()
    whole.report()
    losses(first, 5)
    save_state(first, tmp_path, {})
    second = make_trainer(**options)
    load_state(second, tmp_path)
    assert second.model.config == long
    assert losses(whole, 4) == losses(second, 4)
    states_equal(whole, second)


# the mix of sources --------------------------------------------------------------------------------------------------


def test_a_mix_draws_each_source_by_its_share():
    toy, source = toy_puzzles(60), np.array(["a"] * 50 + ["b"] * 8 + ["c"] * 2)
    puzzles = PuzzleSet(np.tile(np.arange(60, dtype=np.uint8)[:, None], 6), toy.labels, source, toy.rating)
    stream = PuzzleStream(puzzles, keep, mix=parse_mix("c=3,b=1"), seed=0)
    rows = stream.draw(4000, 0)[0][:, 0]
    assert set(rows.tolist()) == set(range(50, 60))  # every puzzle of both
    assert abs((source[rows] == "c").mean() - 0.75) < 0.03
    state = stream.state
    again = PuzzleStream(puzzles, keep, mix=parse_mix("c=3,b=1"), seed=9)
    again.state = state
    assert all(np.array_equal(x, y) for x, y in zip(stream.draw(5, 0), again.draw(5, 0), strict=True))
    with pytest.raises(ValueError, match="no puzzle is of the source 'd'; there are a, b, c"):
        PuzzleStream(puzzles, keep, mix={"d": 1.0})


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=0", "a=-1", "a=x", "a=1,a=2", "a=inf", "a=nan"])
def test_a_mix_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="mix: .*SOURCE=SHARE"):
        parse_mix(text)


@pytest.mark.slow
def test_a_mix_takes_the_place_of_the_curriculum(data, tmp_path):
    train = [*TRAIN, *SETS, "--data", data, "--steps", 2, "--no-calibrate"]
    eqr(*train, "--out", tmp_path / "mixed", "--mix", "easy=0.25,medium=0.75")
    assert settings_of(tmp_path / "mixed")["mix"] == "easy=0.25,medium=0.75"
    assert settings_of(tmp_path / "mixed")["curriculum"] == ""
    eqr(*train, "--out", tmp_path / "both", "--mix", "easy=1", "--curriculum", "0:40-60")
    assert settings_of(tmp_path / "both")["curriculum"] == "0:40-60"
    eqr(*train, "--out", tmp_path / "neither")
    assert settings_of(tmp_path / "neither")["curriculum"].startswith("0:34-50")


# the decay -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_finish_anneals_a_copy_and_the_run_goes_on_as_if_it_had_not(data, tmp_path):
    run, untouched = tmp_path / "run", tmp_path / "untouched"
    train = [*TRAIN, *SETS, "--data", data, "--no-calibrate"]
    for out in (run, untouched):
        eqr(*train, "--out", out, "--steps", 6)
    before = state_of(run)
    result = eqr("train", "--no-compile", "--data", data, "--out", run, "--finish", 0.02, "--no-calibrate", "--json")
    copy = run / "annealed-000000006"
    settings, last = settings_of(copy), json.loads(result.stdout.splitlines()[-1])
    assert state_of(run) == before and settings["decay_from"] == 14  # after the steps that measured the speed
    assert read_manifest(copy)["step"] == settings["total_steps"] == last["step"] > 14
    assert last["lr"] == pytest.approx(0.03e-3) and load_checkpoint(copy).card.steps == last["step"]
    for out in (run, untouched):
        eqr("train", "--no-compile", "--data", data, "--out", out, "--resume", "--steps", 12, "--no-calibrate")
    assert state_of(run) == state_of(untouched)
    refused = eqr("train", "--no-compile", "--data", data, "--out", copy, "--finish", 1, code=2).stderr
    assert "lets its rate fall from step 14 on" in refused
    again = ["train", "--no-compile", "--data", data, "--out", copy, "--resume", "--no-calibrate"]
    eqr(*again)  # it is over
    assert read_manifest(copy)["step"] == last["step"]
    refused = eqr(*again, "--steps", last["step"] + 5, code=2).stderr
    assert f"--steps (was {last['step']}, now {last['step'] + 5})" in refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--finish", 0], "--finish must be positive"),
        (["--finish", 1, "--resume"], "leave out --resume"),
        (["--finish", 1, "--steps", 9, "--minutes", 1], "leave out --minutes, --steps"),
        (["--finish", 1, "--lr-min-ratio", 1], "--lr-min-ratio must be below 1"),
        (["--finish", 1, "--lr", 0.5], "--lr (was 0.001, now 0.5)"),
        (["--finish", 1, "--preset", "sudoku", "--set", "L_cycles=2"], "leave out --preset, --set"),
        (["--resume", "--decay-from", 3], "--decay-from 3 needs --steps beyond it"),
        (["--resume", "--decay-from", 8, "--steps", 8], "--decay-from 8 needs --steps beyond it"),
        (["--resume", "--decay-from", 0, "--steps", 2], "beyond the warm-up of 2"),
        (["--resume", "--steps", 8, "--eval-every", 2], "--eval-every without --eval-data"),
        (["--resume", "--decay-from", 1, "--steps", 8], "--decay-from (was None, now 1)"),
        (["--resume", "--steps", 8, "--mix", "easy=1"], "--mix (was '', now 'easy=1')"),
        (["--resume", "--steps", 8, "--cycles", "0:1x2x4"], "--cycles (was '', now '0:1x2x4')"),
    ],
)
def test_what_would_spoil_a_run_is_refused(data, tmp_path, arguments, message):
    out = tmp_path / "run"
    eqr(*TRAIN, *SETS, "--data", data, "--no-calibrate", "--out", out, "--steps", 3)
    before = state_of(out)
    result = eqr("train", "--no-compile", "--data", data, "--out", out, *arguments, code=2)
    assert message in result.stderr.replace("\n", " ") and state_of(out) == before


@pytest.mark.slow
def test_a_copy_that_was_stopped_before_its_rate_fell_may_be_annealed_still(data, tmp_path, monkeypatch):
    eqr(*TRAIN, *SETS, "--data", data, "--no-calibrate", "--out", tmp_path, "--steps", 6)
    finish = ["train", "--no-compile", "--data", data, "--out", tmp_path, "--finish", 0.02, "--no-calibrate"]
    step = Trainer.train_step

    def interrupt(self: Trainer) -> None:
        step(self)
        if self.step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupt)
        assert "interrupted at step 10" in eqr(*finish, code=130).stderr
    eqr(*finish)
    settings = settings_of(tmp_path / "annealed-000000006")
    assert settings["decay_from"] == 18 and settings["total_steps"] > 18
    assert f"--out {tmp_path / 'annealed-000000006'} --resume" in eqr(*finish, code=2).stderr.replace("\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("at", [4, 8])
def test_what_an_evaluation_takes_is_not_taken_for_the_speed_of_training(data, tmp_path, monkeypatch, at):
    """A clock that goes on by a second with every step, and by a thousand with every evaluation."""
    clock = SimpleNamespace(now=0.0)
    clock.monotonic, clock.perf_counter, clock.process_time = (lambda: clock.now for _ in range(3))
    for name in ("slices", "run", "evaluation"):
        monkeypatch.setattr(f"eqr_kernels.training.{name}.time", clock)
    step, measure = Trainer.train_step, Evaluator.__call__

    def timed(self: Trainer) -> None:
        step(self)
        clock.now += 1

    def slow(self: Evaluator, model: EquilibriumReasoner) -> list:
        clock.now += 1000
        return measure(self, model)

    monkeypatch.setattr(Trainer, "train_step", timed)
    monkeypatch.setattr(Evaluator, "__call__", slow)
    train = [*TRAIN, *SETS, "--data", data, "--no-calibrate"]
    train[train.index("--slice-steps") : train.index("--slice-steps") + 2] = []
    evaluate = ["--eval-data", data, "--eval-every", at, "--eval-depths", "1", "--eval-puzzles", 2]
    eqr(*train, "--out", tmp_path, "--steps", 12, *evaluate)
    assert settings_of(tmp_path)["slice_steps"] == 44  # 45 seconds, in whole lifetimes of 4 steps
    assert [float(row["seconds"]) for row in rows_of(tmp_path) if row["source"] == "all"][-1] == 12
    eqr("train", "--no-compile", "--data", data, "--out", tmp_path, "--finish", 0.5, "--no-calibrate", *evaluate)
    settings = settings_of(tmp_path / "annealed-000000012")
    assert settings["total_steps"] - settings["decay_from"] == 30


def test_finish_waits_for_the_warm_up_and_for_a_run(data, tmp_path):
    train = ["train", "--no-compile", "--data", data, "--out", tmp_path, "--finish", 1]
    assert "no training state" in eqr(*train, code=2).stderr
    eqr(*TRAIN, *SETS, "--data", data, "--no-calibrate", "--out", tmp_path, "--steps", 1)
    assert "step 1 of its warm-up of 2; train on first" in eqr(*train, code=2).stderr


@pytest.mark.slow
def test_a_resumed_run_may_be_told_to_decay_and_equals_one_that_was_told_before(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train = [*TRAIN, *SETS, "--data", data, "--no-calibrate"]
    decay = ["--decay-from", 6, "--steps", 12, "--lr-min-ratio", 0.1]
    eqr(*train, "--out", whole, *decay)
    eqr(*train, "--out", parts, "--steps", 6)
    text = eqr("train", "--no-compile", "--resume", "--data", data, "--out", parts, "--no-calibrate", *decay).stdout
    assert "lr 1.00e-04" in text.splitlines()[-1] and state_of(whole) == state_of(parts)


@pytest.mark.slow
def test_schedules_of_the_steps_to_come_may_be_given_anew(data, tmp_path):
    out = tmp_path / "run"
    train = [*TRAIN, *SETS, "--data", data, "--no-calibrate", "--out", out]
    eqr(*train, "--steps", 4, "--cycles", "0:1x1x4,9:1x2x4", "--curriculum", "0:40-60,3:30-50,8:20-40")
    resume = ["train", "--no-compile", "--data", data, "--no-calibrate", "--out", out, "--resume", "--steps", 6]
    for changed in (
        ["--cycles", "0:1x1x4,3:1x2x4"],
        ["--cycles", "0:1x2x4"],
        ["--curriculum", "0:40-60,2:30-50"],
        ["--curriculum", ""],
        ["--curriculum", "0:40-60,4:30-50"],
    ):
        assert f"{changed[0]} (was" in eqr(*resume, *changed, code=2).stderr
    eqr(*resume, "--cycles", "0:1x1x4,4:1x3x4", "--curriculum", "0:40-60,3:30-50,8:20-40,20:17-30")
    assert settings_of(out)["cycles"] == "0:1x1x4,4:1x3x4" and load_checkpoint(out).card.config.L_cycles == 3


def test_a_state_that_gives_way_while_it_is_copied_is_copied_anew(tmp_path, monkeypatch):
    run, copy = tmp_path / "run", tmp_path / "copy"
    trainer = make_trainer()
    losses(trainer, 2)
    save_state(trainer, run, {})
    copytree, gone_on = shutil.copytree, threading.Event()

    def meanwhile(*arguments: object, **options: object) -> object:
        if not gone_on.is_set():
            gone_on.set()
            losses(trainer, 1)
            save_state(trainer, run, {})
        return copytree(*arguments, **options)

    monkeypatch.setattr(shutil, "copytree", meanwhile)
    copy_state(run, copy)
    assert read_manifest(copy)["step"] == 3 and len(list(copy.iterdir())) == 1
    other = make_trainer(seed=5)
    load_state(other, copy)
    states_equal(trainer, other)
    with pytest.raises(FileNotFoundError, match="no training state under"):
        copy_state(tmp_path / "nothing", copy)


# what is measured ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_adds_a_curve_and_changes_nothing_else(data, tmp_path):
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    train = [*TRAIN, *SETS, "--data", data, "--no-calibrate", "--steps", 7]
    evaluate = ["--eval-data", data, "--eval-every", 3, "--eval-depths", "1,4", "--eval-puzzles", 6]
    eqr(*train, "--out", plain)
    text = eqr(*train, "--out", measured, *evaluate).stdout
    assert state_of(plain) == state_of(measured) and "exact at depth 1/4: easy 0.0/0.0 %" in text
    rows = rows_of(measured)
    assert [int(row["step"]) for row in rows] == [3] * 6 + [6] * 6 + [7] * 6
    assert [(row["clues"], row["source"], row["puzzles"]) for row in rows[:6]] == [
        (clues, source, puzzles)
        for clues in ("published", "28")
        for source, puzzles in (("easy", "3"), ("medium", "3"), ("all", "6"))
    ]
    config = EqRConfig.sudoku_small(**TINY)
    assert all(int(row["operations"]) == 4 * int(row["step"]) * training_operations(config) for row in rows)
    assert all(int(row["samples"]) == 4 * int(row["step"]) for row in rows)
    seconds = [float(row["cpu_seconds"]) for row in rows]
    assert 0 < seconds[0] < settings_of(measured)["cpu_seconds"] and seconds == sorted(seconds)
    shares = [float(row[f"{name}_{depth}"]) for row in rows for name in ("exact", "cells") for depth in (1, 4)]
    assert all(0 <= share <= 1 for share in shares)
    # A run that was killed behind its last save comes by its steps again.
    (measured / "curve.csv").write_text((measured / "curve.csv").read_text().replace("\n7,", "\n99,"))
    eqr(*train[:-1], 9, "--resume", "--out", measured, *evaluate)
    assert sorted({int(row["step"]) for row in rows_of(measured)}) == [3, 6, 9]
    again = ["train", "--no-compile", "--resume", "--data", data, "--out", measured, "--steps", 12, *evaluate[:-4]]
    assert "give the same --eval-depths" in eqr(*again, code=2).stderr
    assert "it is not given now, so nothing is measured\n" in eqr(*train[:-1], 10, "--resume", "--out", measured).stderr
    assert "--eval-data" not in eqr(*train[:-1], 8, "--resume", "--out", plain).stderr


def test_measurements_are_those_of_the_operator_by_hand():
    """The token loss at the greatest depth and exact answers at each, by source, of a model that copies its input."""
    config = EqRConfig.sudoku_paper(**TINY, noise_scale=0.0)
    model = copier(config)
    puzzles = sudoku_generator.generate(4, "easy", seed=3)
    inputs = puzzles.inputs.copy()
    inputs[:2] = puzzles.labels[:2]  # nothing is left to fill
    puzzles = PuzzleSet(inputs, puzzles.labels, np.array(["whole", "whole", "open", "open"]), puzzles.rating)
    (published, revealed) = evaluation_sets(SUDOKU, puzzles, None)
    by = {(m.clues, m.source): m for m in Evaluator([published, revealed], (1, 12), "fp32")(model)}
    assert by["published", "whole"].exact[12] == by["published", "whole"].cells[12] == 1
    assert by["published", "open"].exact[12] == 0 and by["published", "all"].exact[12] == 0.5
    result = model.solve(torch.from_numpy(inputs).long(), depth=12, halt="none")
    labels = torch.from_numpy(puzzles.labels).long()
    assert by["published", "all"].loss == pytest.approx(stablemax_cross_entropy(result.logits, labels).mean().item())
    right = (result.preds == labels).float().mean(1)
    assert by["published", "open"].cells[12] == pytest.approx(right[2:].mean().item())
    shown = (revealed.puzzles.inputs != sudoku.BLANK).sum(1)
    assert revealed.clues == "28" and (shown >= 28).all() and by["28", "all"].puzzles == 4


def test_the_subset_has_as_many_of_each_source_as_there_are():
    toy = toy_puzzles(40)
    puzzles = PuzzleSet(toy.inputs, toy.labels, np.array(["few"] * 3 + ["some"] * 10 + ["many"] * 27), toy.rating)
    (one,) = evaluation_sets(MAZE, puzzles, 20)
    assert {name: (one.puzzles.source == name).sum() for name in ("few", "some", "many")} == dict(few=3, some=8, many=9)
    (again,) = evaluation_sets(MAZE, puzzles, 20)
    assert np.array_equal(one.puzzles.inputs, again.puzzles.inputs)
    assert len(evaluation_sets(MAZE, puzzles, 99)[0].puzzles) == 40


@pytest.mark.slow
@pytest.mark.parametrize(("solved", "held_out"), [(True, False), (True, True), (False, False)])
def test_a_trained_model_gets_its_tolerance_where_it_means_something(tmp_path, solved, held_out):
    config = EqRConfig.sudoku_paper(**TINY, noise_scale=0.0)
    model = copier(config)
    model.card = ModelCard(config)
    model.save_pretrained(tmp_path / "start")
    puzzles = sudoku_generator.generate(60, "easy", seed=5)
    questions = puzzles.labels if solved else puzzles.inputs
    file = write_puzzles(tmp_path / "puzzles.csv", questions, puzzles.labels, ["x"] * 60)
    out = tmp_path / "run"
    train = ["train", "--no-compile", "--batch-size", 4, "--lr", 0, "--steps", 2, "--init", tmp_path / "start"]
    more = ["--eval-data", file, "--eval-depths", "4", "--eval-puzzles", 55] if held_out else []
    message = eqr(*train, "--data", file, "--out", out, *more).stderr
    card = load_checkpoint(out).card
    if not solved:
        why = "only 0 of 120 calibration puzzles were right at depth 64"
        assert (card.tol, card.tol_fast, card.tol_missing) == (None, None, why)
        assert f"converged is no promise for this model: {why}; the card has no tolerance" in message
        return
    calibration = card.extra["calibration"]
    for name in ("tol", "tol_fast"):
        assert f"{name} {getattr(card, name):g} is stored in the card" in message
    assert calibration["trust"] == 0.99 and card.tol_fast >= card.tol
    assert calibration["tol"]["right_when_converged"] == calibration["tol"]["converged"] >= 100
    assert calibration["data"].startswith("puzzles.csv") and calibration["puzzles"] == (110 if held_out else 120)
    tokens = torch.from_numpy(puzzles.labels).long()
    result = EquilibriumReasoner.from_pretrained(out).solve(tokens, depth=64)
    assert result.converged.any() and torch.equal(result.preds, tokens)


@pytest.mark.slow
def test_a_run_too_short_for_its_averages_is_told_so(data, tmp_path):
    train = [*TRAIN, *SETS, "--data", data, "--no-calibrate", "--steps", 8]
    message = eqr(*train, "--out", tmp_path / "short").stderr
    assert "8 steps are too few for --ema-rate 0.999, which the averages reach at step 8990" in message
    assert "too few" not in eqr(*train, "--out", tmp_path / "enough", "--ema-rate", 0.4).stderr
