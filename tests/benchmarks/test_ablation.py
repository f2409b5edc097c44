"""The rows of the ablation: what they cost and compute, that they train, and that a run can be taken up again."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.modules import LatentState
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.sudoku_generator import generate
from tests.support import oracle
from tests.support.environment import REPOSITORY

rows = importlib.import_module("benchmarks.studies.ablation.rows")
settings_of = importlib.import_module("benchmarks.studies.ablation.settings")
stack = importlib.import_module("benchmarks.studies.ablation.stack")
training = importlib.import_module("benchmarks.studies.ablation.training")
evaluation = importlib.import_module("benchmarks.studies.ablation.evaluation")
table = importlib.import_module("benchmarks.studies.ablation.table")
main = importlib.import_module("benchmarks.studies.ablation.__main__")

F_SMALL = 47_775_744
"""2 * 3 * 81 * 128 * (256 + 512): two SwiGLUs of three products, k(81) = 256 and k(128) = 512."""
BLOCK = 258_816  # 3 * 81 * 256 + 3 * 128 * 512 weights
OTHERS = 3_074  # embedding and head of 11 * 128, q head of 2 * 128 + 2
TINY = EqRConfig.sudoku_small(hidden_size=16, num_heads=2, H_cycles=2, L_cycles=1, halt_max_steps=2)


def small(**changes):
    return settings_of.TrainingSettings(**{"config": EqRConfig.sudoku_small(), "budget": 1e12, **changes})


def tiny(**changes):
    values = dict(config=TINY, budget=1.0, layers=3, batch_size=4, micro_batch=2, compile=False, lr=1e-2)
    return settings_of.TrainingSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def puzzles():
    return generate(6, clues=(30, 40), seed=1)


# cost ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("feed-forward", 3 * 42),
        ("tied", 3 * 42),
        ("tied-online", 3 * 8),  # an outer step has 2 * (3 + 1) applications
        ("trm", 4 + 3 * 4),
        ("trm+ri", 4 + 3 * 4),
        ("trm+ni", 4 + 3 * 4),
        ("eqr", 4 + 3 * 4),
    ],
)
def test_cost_by_hand(name, times):
    assert rows.step_operations(rows.ROWS[name], small()) == times * F_SMALL


def test_cost_of_the_published_size():
    # 42 applications, 14 with gradient, of 446 MFLOP: the 31 GFLOP that a sample's training step is said to take.
    published = small(config=EqRConfig.sudoku_paper())
    assert rows.step_operations(rows.ROWS["eqr"], published) == 70 * 2 * 3 * 81 * 512 * (256 + 1536)
    assert rows.step_operations(rows.ROWS["eqr"], published) == pytest.approx(31.2e9, rel=2e-3)
    assert rows.shape(rows.ROWS["tied-online"], published) == rows.Shape(2, 42, 0)


def test_attention_costs_its_projections_and_products():
    config = EqRConfig.maze()  # S 900, d 128, k(d) 512
    by_hand = 2 * (4 * 900 * 128**2 + 2 * 900**2 * 128 + 3 * 900 * 128 * 512)
    assert rows.block_operations(config) == by_hand


def test_every_row_gets_the_same_budget():
    common = small(budget=5e13)
    for name, steps in {"feed-forward": 86, "tied-online": 454, "eqr": 681}.items():  # 5e13 / 96 / cost, rounded down
        assert rows.training_steps(rows.ROWS[name], common) == steps
    with pytest.raises(ValueError, match="pays for no step"):
        rows.training_steps(rows.ROWS["eqr"], small(budget=1e9))


def test_schedules_are_shares_of_a_rows_own_steps():
    published = small().train_config(50_000)
    assert published.lr_warmup_steps == 2000 and published.ema_rate == pytest.approx(0.999)
    short = small().train_config(500)
    assert short.lr_warmup_steps == 20 and short.ema_rate == pytest.approx(0.9) and short.total_steps == 500
    assert small().train_config(10).ema_rate == 0
    points = settings_of.parse_curriculum("0:34-50,0.5:30-46,1:24-42", 200)
    assert [(p.step, p.low, p.high) for p in points] == [(0, 34, 50), (100, 30, 46), (200, 24, 42)]
    for wrong in ("0.1:3-4", "0:3-4,0:3-4", "0:4-3", "0:3-82", "0:3-4,2:3-4", "0:3"):
        with pytest.raises(ValueError, match="curriculum"):
            settings_of.parse_curriculum(wrong, 10)


# networks ------------------------------------------------------------------------------------------------------------


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_distinct_blocks_are_distinct_and_tied_ones_tied():
    free = training.build(rows.parse_row("feed-forward"), small())
    blocks = free.net.weights().blocks
    assert count(free) == 42 * BLOCK + OTHERS and len(blocks) == 42 and free.iterations == 1
    assert len({w.data_ptr() for block in blocks for w in block}) == 4 * 42
    assert len({w.flatten()[0].item() for block in blocks for w in block}) == 4 * 42
    tied = training.build(rows.parse_row("tied"), small())
    assert count(tied) == BLOCK + OTHERS and tied.iterations == 42
    assert count(training.build(rows.parse_row("tied-online"), small())) == BLOCK + OTHERS
    assert count(training.build(rows.parse_row("eqr"), small())) == BLOCK + OTHERS
    two = small(config=EqRConfig.sudoku_paper(hidden_size=16))
    assert training.build(rows.parse_row("tied"), two).iterations == 21  # as in the paper: 2 blocks, 21 iterations
    with pytest.raises(ValueError, match="multiple of L_layers=2"):
        training.build(rows.parse_row("tied:layers=7"), rows.parse_row("tied:layers=7").settings(two))


@pytest.mark.parametrize("name", ["feed-forward", "tied"])
def test_forward_by_hand(name):
    config = dataclasses.replace(TINY, L_layers=2)
    model = training.build(rows.parse_row(name), tiny(config=config, layers=6)).double()
    w = {key.removeprefix("net."): value.numpy() for key, value in model.state_dict().items()}
    tokens = np.random.default_rng(0).integers(1, 11, (3, 81))
    e = 4.0 * w["embed_tokens.embedding_weight"][tokens]  # sqrt(16)
    z = np.zeros_like(e)
    layers = [range(6)] if name == "feed-forward" else [range(2)] * 3
    shape = SimpleNamespace(**model.config.to_dict())
    for iteration in layers:
        z = z + e
        for layer in iteration:
            z = oracle.block(w, shape, layer, z)
    given = torch.from_numpy(tokens)
    with torch.no_grad():
        ours, logits, q_halt = model(given, model.start(3))
    np.testing.assert_allclose(ours.numpy(), z, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(logits.numpy(), z @ w["lm_head.weight"].T, rtol=1e-10, atol=1e-12)
    assert q_halt.tolist() == [-5.0] * 3


def test_configs_of_the_reasoners():
    def config(name):
        c = rows.operator_config(rows.ROWS[name], small())
        assert (c.H_cycles, c.L_cycles, c.L_layers, c.hidden_size) == (2, 3, 1, 128)
        return c.fixed_init, c.lambda_, c.noise_scale

    assert config("trm") == (True, 1.0, 0.0)
    assert config("trm+ri") == (False, 1.0, 0.0)
    assert config("trm+ni") == (True, 0.95, 0.01)
    assert config("eqr") == (False, 0.95, 0.01)
    assert rows.operator_config(rows.ROWS["eqr"], small()) == EqRConfig.sudoku_small()
    trm = training.build(rows.parse_row("trm"), tiny())
    state = trm.initial_state(2, seed=3)
    assert isinstance(state, LatentState) and torch.equal(state.z_H, trm.H_init.expand(2, 81, 16))


def test_row_names():
    choice = rows.parse_row("feed-forward:layers=8,lr=3e-4")
    assert choice.settings(small()).layers == 8 and choice.settings(small()).lr == 3e-4
    assert rows.parse_row(choice.key) == choice and choice.folder == "feed-forward-layers-8-lr-0.0003"
    for wrong in ("mlp", "eqr:layers=8", "tied-online:layers=8", "eqr:depth=3", "eqr:lr=fast"):
        with pytest.raises(ValueError, match="rows:"):
            rows.parse_row(wrong)


# training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(rows.ROWS))
def test_each_row_trains_all_its_parameters(name, puzzles):
    trainer = training.trainer_of(rows.parse_row(name), tiny(weight_decay=0.0), puzzles, 3)
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    losses = []
    moved = {key: torch.zeros_like(p, dtype=torch.bool) for key, p in before.items()}
    for _ in range(3):
        held = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
        trainer.train_step()
        losses.append(trainer.report().loss)
        for key, p in trainer.model.named_parameters():
            moved[key] |= p != held[key]
    assert np.isfinite(losses).all() and all(0 < loss < 20 for loss in losses)
    for key, p in trainer.model.named_parameters():
        assert not torch.equal(p, before[key]), key
        if "layers" in key:
            # AdamATan2 moves whatever has a gradient; three moves of one size may end where they began.
            assert moved[key].all(), key
    assert trainer.step == 3


def test_online_training_goes_on_from_the_detached_state(puzzles):
    config = dataclasses.replace(TINY, halt_max_steps=3)
    trainer = training.trainer_of(rows.parse_row("tied-online"), tiny(config=config), puzzles, 10)
    assert trainer.segments == 3 and trainer.model.iterations == 4
    drawn = []
    for step in range(7):
        tokens, start = trainer.tokens.clone(), trainer.z.clone()
        fresh = step % 3 == 0
        with torch.no_grad():
            if fresh:
                start = torch.zeros_like(start)
            weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        trainer.train_step()
        drawn.append(trainer.stream.drawn)
        if not fresh:
            assert torch.equal(tokens, trainer.tokens)
        copy = training.build(rows.parse_row("tied-online"), tiny(config=config))
        copy.load_state_dict(weights)  # the segment ran under the weights from before its update
        with torch.no_grad():
            expected = copy(trainer.tokens, start)[0]
        torch.testing.assert_close(trainer.z, expected, rtol=1e-5, atol=1e-5)
        assert not trainer.z.requires_grad
    assert drawn == [4, 4, 4, 8, 8, 8, 12]


def test_a_single_pass_takes_fresh_puzzles_every_step(puzzles):
    trainer = training.trainer_of(rows.parse_row("tied"), tiny(), puzzles, 3)
    for step in range(3):
        trainer.train_step()
        assert trainer.stream.drawn == 4 * (step + 1)
    assert trainer.report().steps == 1


@pytest.mark.parametrize("name", ["feed-forward", "tied-online"])
def test_micro_batches_add_up_to_the_batch(name, puzzles):
    gradients = []
    for micro in (1, 2, 4):
        trainer = training.trainer_of(rows.parse_row(name), tiny(micro_batch=micro), puzzles, 3)
        seen = {}

        def keep(trainer=trainer, seen=seen):
            seen.update({key: p.grad.clone() for key, p in trainer.model.named_parameters()})

        trainer.optimizer.step = keep
        trainer.train_step()
        gradients.append((trainer.report().loss, seen))
    for loss, seen in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-6)
        for key, gradient in seen.items():
            torch.testing.assert_close(gradient, gradients[0][1][key], rtol=1e-4, atol=1e-6)


def test_a_finished_row_is_not_trained_again(puzzles, tmp_path, monkeypatch):
    choice, cost = rows.parse_row("tied-online"), 3 * 4 * 4 * 2 * 3 * 81 * 16 * (256 + 256)
    common = tiny(budget=2.5 * cost)
    record = training.train(choice, common, puzzles, tmp_path / "row")
    assert record["steps"] == 2 and record["samples"] == 8 and record["puzzles_drawn"] == 4
    assert record["operations"] == 2 * cost
    monkeypatch.setattr(training, "trainer_of", lambda *_: pytest.fail("trained again"))
    assert training.train(choice, common, puzzles, tmp_path / "row") == json.loads(json.dumps(record))
    with pytest.raises(ValueError, match=r"other settings: lr \(was 0.01, now 0.5\)"):
        training.train(choice, dataclasses.replace(common, lr=0.5), puzzles, tmp_path / "row")


@pytest.mark.parametrize("name", ["tied", "trm", "eqr"])
def test_what_is_kept_is_the_average(name, puzzles, tmp_path, monkeypatch):
    choice, common = rows.parse_row(name), tiny(budget=1e9, ema_horizon=1.0)
    trainers = []
    make = training.trainer_of
    monkeypatch.setattr(training, "trainer_of", lambda *a: trainers.append(make(*a)) or trainers[0])
    training.train(choice, common, puzzles, tmp_path)
    model = training.load(choice, common, tmp_path)
    assert isinstance(model, EquilibriumReasoner if name in ("trm", "eqr") else stack.BlockStack)
    assert trainers[0].step > 1
    for key, p in model.named_parameters():
        assert torch.equal(p, trainers[0].ema.shadow[key]), key
        assert not torch.equal(p, dict(trainers[0].model.named_parameters())[key]), key


# evaluation ----------------------------------------------------------------------------------------------------------


def test_levels_show_more_and_more_of_the_same_puzzles(puzzles):
    settings = settings_of.EvaluationSettings(puzzles=4, clues=(60, 45, 0))
    levels = evaluation.draw_levels(puzzles, settings)
    shown = {clues: (inputs > sudoku.BLANK) for clues, (inputs, _) in levels.items()}
    assert (shown[60].sum(1) == 60).all() and (shown[45].sum(1) == 45).all()
    assert (shown[60] >= shown[45]).all() and (shown[45] >= shown[0]).all()
    assert {row.tobytes() for row in levels[0][0]} <= {row.tobytes() for row in puzzles.inputs}
    assert all(np.array_equal(labels, levels[0][1]) for _, labels in levels.values())
    with pytest.raises(ValueError, match="7 puzzles"):
        evaluation.draw_levels(puzzles, dataclasses.replace(settings, puzzles=7))


def test_a_stack_is_measured_pass_by_pass(puzzles):
    model = training.build(rows.parse_row("tied"), tiny()).eval()
    tokens = torch.from_numpy(puzzles.inputs.astype(np.int64))
    states, answers = [model.start(6)], []
    with torch.no_grad():
        for _ in range(3):
            z, logits, _ = model(tokens, states[-1])
            states.append(z)
            answers.append(logits.argmax(-1).numpy())
    labels = answers[2].astype(np.uint8)  # so that the third pass is right, whatever it says
    result = evaluation.measure(model, puzzles.inputs, labels, (1, 3), settings_of.EvaluationSettings())
    assert result.exact[1][:, 1].all() and result.depths == (1, 3)
    assert result.exact[1][:, 0].tolist() == [np.array_equal(a, b) for a, b in zip(answers[0], labels, strict=True)]
    change = (states[3] - states[2]).flatten(1).norm(dim=1) / states[3].flatten(1).norm(dim=1)
    np.testing.assert_allclose(result.residuals, change.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("name", "breadths"), [("trm", [1]), ("trm+ni", [1, 3]), ("eqr", [1, 3])])
def test_a_reasoner_is_measured_by_one_deep_and_wide_solve(name, breadths, puzzles):
    model = training.build(rows.parse_row(name), tiny()).eval()
    settings = settings_of.EvaluationSettings(breadth=3, seed=5)
    tokens = torch.from_numpy(puzzles.inputs.astype(np.int64))
    alone = {d: model.solve(tokens, depth=d, halt="none", seed=5, backend="reference") for d in (1, 2)}
    labels = alone[1].preds.numpy().astype(np.uint8)
    result = evaluation.measure(model, puzzles.inputs, labels, (1, 2), settings)
    assert list(result.exact) == breadths and result.exact[1][:, 0].all()
    np.testing.assert_allclose(result.residuals, alone[2].residual.numpy(), rtol=1e-3)


def test_tables():
    def level(share, **more):
        cell = {"correct": 0, "total": 8, "share": share, "wilson95": [share / 2, (1 + share) / 2]}
        return {"clues": 40, "exact": {"1": {"1": cell}, **more}, "residual": 0.25, "auroc": None}

    def row(title, measured):
        record = {
            "title": title,
            "parameters": 261_890,
            "blocks": 1,
            "applications": 8,
            "without_gradient": 4,
            "steps": 1234,
            "puzzles_drawn": 5678,
            "operations": 5e13,
            "seconds": 90,
            "loss": 0.5,
        }
        return {"training": record, "evaluation": {"levels": [measured]}}

    wide = level(1.0)["exact"]["1"]
    report = {"rows": [row("one", level(0.5)), row("two", level(0.0, **{"4": wide}))], "left_out": ["trm"]}
    text = table.markdown(report)
    assert "| one | 0.26 M | 1 | 8 | 4 | 1,234 | 5,678 | 50 | 1.5 | 0.500 |" in text
    assert "8 puzzles, 40 clues" in text and "| | 1 | 1 x 4 | last residual | AUROC |" in text.replace("|  |", "| |")
    assert "| one | 50.0 % (25.0-75.0) | - | 0.250 | - |" in text
    assert "| two | 0.0 % (0.0-50.0) | 100.0 % (50.0-100.0) | 0.250 | - |" in text
    assert "other settings: trm" in text and "DRY RUN" not in text


# the whole -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(puzzles, tmp_path):
    """A folder of train.csv.gz and dev.csv.gz."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [
        f"made,{sudoku.decode(q)},{sudoku.decode(a)},0" for q, a in zip(puzzles.inputs, puzzles.labels, strict=True)
    ]
    for name in ("train", "dev"):
        with gzip.open(folder / f"{name}.csv.gz", "wt") as file:
            file.write("\n".join(["source,question,answer,rating", *lines]) + "\n")
    return folder


def test_minutes_are_measured_once(data, tmp_path, monkeypatch):
    def child(runs, choice, on_line, *more):
        assert choice.name == "eqr" and more == ("--rate",)
        calls.append(choice)
        on_line('{"rate": 123456789.0}')

    calls: list[object] = []
    monkeypatch.setattr(main, "_child", child)
    options = main.arguments(["--minutes", "2", "--rows", "trm", "eqr", "--data", str(data)])
    first = main.with_budget(main.plan_of(options), tmp_path)
    assert first.training.budget == 1.48e10  # 123,456,789 * 120, three digits
    first.write(tmp_path)
    assert main.with_budget(main.plan_of(options), tmp_path) == first and len(calls) == 1


def test_bad_command_lines(data, capsys):
    for wrong in ([], ["--minutes", "1", "--petaflop", "1"], ["--minutes", "0"], ["--petaflop", "-1"]):
        with pytest.raises(SystemExit):
            main.arguments(wrong)
    for wrong, message in (
        (["--rows", "mlp"], "'mlp'"),
        (["--set", "hidden=3"], "hidden_size"),
        (["--batch", "33"], "multiple of micro_batch"),
        (["--curriculum", "1:2-3"], "curriculum"),
        (["--depths", "2,4"], "rise from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            main.plan_of(main.arguments(["--petaflop", "1", "--data", str(data), *wrong]))
    with pytest.raises(FileNotFoundError, match="train.csv.gz"):
        main.plan_of(main.arguments(["--petaflop", "1", "--data", "nowhere"]))


@pytest.mark.slow
def test_dry_run_and_taking_it_up_again(data, tmp_path):
    def ablation(*names):
        command = [sys.executable, "-m", "benchmarks.studies.ablation", "--dry-run", "--data", str(data), "--runs"]
        done = subprocess.run(
            [*command, str(tmp_path / "runs"), "--rows", *names],
            cwd=REPOSITORY,
            text=True,
            capture_output=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (path,) = (tmp_path / "runs" / "results").glob("*/ablation.json")
        return done.stdout, json.loads(path.read_text())

    kept = {path: path.read_bytes() for path in (REPOSITORY / "benchmarks" / "results").rglob("ablation*")}
    said, report = ablation("tied-online", "eqr")
    assert "DRY RUN, NOT MEASUREMENTS" in said and "| (e) EqR |" in said and "eqr: step 3 of 3" in said
    assert report["dry_run"] and [row["row"] for row in report["rows"]] == ["tied-online", "eqr"]
    for row in report["rows"]:
        assert row["training"]["operations"] <= report["budget"] == 4e8
        assert list(row["evaluation"]["levels"][0]["exact"]) == (["1", "2"] if row["row"] == "eqr" else ["1"])
    assert "device" in report["machine"] and "--dry-run" in report["command"] and report["formula"]
    again, second = ablation("eqr", "feed-forward:layers=4")
    assert "eqr: step" not in again and "feed-forward:layers=4: step" in again
    assert [row["row"] for row in second["rows"]] == ["feed-forward:layers=4", "tied-online", "eqr"]
    assert second["rows"][1:] == report["rows"]
    assert kept == {path: path.read_bytes() for path in (REPOSITORY / "benchmarks" / "results").rglob("ablation*")}
