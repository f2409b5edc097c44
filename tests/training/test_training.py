"""The objective, the optimizer, the batch that renews itself, and resuming."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.stream import PuzzleStream, parse_curriculum
from eqr_kernels.training.learning_rate import learning_rate
from eqr_kernels.training.objective import objective, stablemax_cross_entropy
from eqr_kernels.training.optim import EMA, AdamATan2
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.state import load_state, read_manifest, save_state
from eqr_kernels.training.trainer import Trainer
from tests.support.environment import REPOSITORY, needs_compiler, needs_extension
from tests.support.models import tiny_config
from tests.support.processes import free_ports, outputs_of
from tests.support.training import everything, keep, losses, make_trainer, states_equal, toy_puzzles


def test_stablemax_by_hand():
    # s(1) = 2, s(0) = 1, s(-1) = 1/2: probabilities 4/7, 2/7, 1/7. The third token is padding.
    logits = torch.tensor([[[1.0, 0.0, -1.0], [1.0, 0.0, -1.0], [9.0, 9.0, 9.0]]])
    labels = torch.tensor([[1, 2, 0]])
    expected = (math.log(7 / 2) + math.log(7 / 1)) / 2
    assert stablemax_cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-14)
    assert stablemax_cross_entropy(logits, torch.zeros(1, 3, dtype=torch.long)).item() == 0


def test_stablemax_gradient_is_finite_everywhere():
    logits = torch.tensor([[[1.0, 0.0, -1.0, 1e4, -1e4]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: stablemax_cross_entropy(x, torch.tensor([[1]])), (logits + 0.1,))
    stablemax_cross_entropy(logits, torch.tensor([[4]])).sum().backward()
    assert logits.grad.isfinite().all()


def test_objective_by_hand():
    logits = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    labels = torch.tensor([[1, 1], [1, 1], [0, 0]])  # right; second token wrong; all padding
    q = torch.tensor([2.0, 2.0, 2.0])
    loss, exact = objective(logits, q, labels)
    assert exact.tolist() == [True, False, False]
    token = [math.log(3 / 2), (math.log(3 / 2) + math.log(3)) / 2, 0]
    halting = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(2)), math.log(1 + math.exp(2))]
    assert loss.item() == pytest.approx((sum(token) + 0.5 * sum(halting)) / 3, rel=1e-6)


def test_adam_atan2_by_hand():
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = AdamATan2([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    expected, m, v = 2.0, 0.0, 0.0
    for t, gradient in enumerate([3.0, -1.0, 1e-30], start=1):
        p.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        expected *= 1 - 0.1 * 0.5
        expected -= 0.1 / (1 - 0.9**t) * math.atan2(m, math.sqrt(v) / math.sqrt(1 - 0.95**t))
        assert p.item() == pytest.approx(expected, rel=1e-14)
    # The very first step is scale-free: atan2(0.1 g, |g|) whatever g is.
    first = 2.0 * (1 - 0.05) - 0.1 / 0.1 * math.atan2(0.3, 3.0)
    q = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    q.grad = torch.tensor([3e-12], dtype=torch.float64)
    AdamATan2([q], lr=0.1, weight_decay=0.5).step()
    assert q.item() == pytest.approx(first, rel=1e-9)


def test_adam_atan2_moves_many_parameters_as_each_alone():
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (3,), (2, 33), (1,))]
    optimizer = AdamATan2(params, lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
    alone = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    ages = [0, 0, 0, 0]
    for present in ((0, 1, 2, 3), (0, 2, 3), (0, 1, 2)):  # so that their numbers of updates differ
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator) if i in present else None
        optimizer.step()
        for i in present:
            (p, m, v), grad = alone[i], params[i].grad
            ages[i] += 1
            m.lerp_(grad, 1 - 0.9)
            v.mul_(0.95).addcmul_(grad, grad, value=1 - 0.95)
            p.mul_(1 - 0.01 * 0.3)
            root = v.sqrt().div_(math.sqrt(1 - 0.95 ** ages[i]))
            p.add_(torch.atan2(m, root), alpha=-0.01 / (1 - 0.9 ** ages[i]))
    assert ages == [3, 2, 3, 2] == [optimizer.state[p]["step"] for p in params]
    for p, (expected, m, v) in zip(params, alone, strict=True):
        state = optimizer.state[p]
        assert torch.equal(p, expected) and torch.equal(state["exp_avg"], m) and torch.equal(state["exp_avg_sq"], v)


def test_muon_moves_the_matrices_of_the_blocks_and_adam_the_rest():
    options = dict(lr=1e-4, lr_warmup_steps=0, weight_decay=0.0)
    muon, adam = make_trainer(optimizer="muon", muon_lr=1e-2, **options), make_trainer(**options)
    before = {name: p.detach().clone() for name, p in muon.model.named_parameters()}
    for trainer in (muon, adam):
        trainer.train_step()
    for (name, p), q in zip(muon.model.named_parameters(), adam.model.parameters(), strict=True):
        if name.startswith("L_level."):
            # Singular values of about 1 before they are scaled: the root mean square is 0.2 times the rate.
            change = (p.detach() - before[name]).square().mean().sqrt() / 1e-2
            assert 0.12 < change < 0.26, name
            assert f"momentum_buffer.{name}" in muon.moments()
        else:
            assert torch.equal(p, q), name
    with pytest.raises(ValueError, match="optimizer must be one of adam_atan2, muon, got 'adamw'"):
        TrainSettings(optimizer="adamw")
    for wrong in (dict(), dict(optimizer="muon", lr=0.0)):
        with pytest.raises(ValueError, match="muon_lr must be positive, and needs optimizer 'muon' and an lr above 0"):
            TrainSettings(muon_lr=1e-3, **wrong)


def test_learning_rate_and_average():
    schedule = dict(lr=1.0, warmup=4, total=12, min_ratio=0.1)
    assert [learning_rate(s, **schedule) for s in (0, 2, 4, 12, 99)] == pytest.approx([0, 0.5, 1, 0.1, 0.1])
    assert learning_rate(8, **schedule) == pytest.approx(0.55)
    assert learning_rate(10**6, lr=2.0, warmup=4, total=None, min_ratio=0.1) == 2.0
    late = dict(schedule, decay_from=8)
    assert [learning_rate(s, **late) for s in (2, 4, 8, 10, 12)] == pytest.approx([0.5, 1, 1, 0.55, 0.1])
    # A decay cannot begin before the rate is there.
    assert learning_rate(3, **{**late, "decay_from": 0}) == 0.75
    assert [learning_rate(s, **{**late, "decay_from": 0}) for s in (5, 9)] == [
        learning_rate(s, **schedule) for s in (5, 9)
    ]


def test_the_average_forgets_where_it_started_however_few_the_updates():
    module = torch.nn.Linear(1, 1, bias=False)

    def averaged(rate: float, values: list[float]) -> list[float]:
        torch.nn.init.constant_(module.weight, 1.0)
        ema, results = EMA(module, rate), []
        for value in values:
            torch.nn.init.constant_(module.weight, value)
            ema.update(module)
            results.append(ema.shadow["weight"].item())
        assert ema.updates == len(values)
        return results

    # (1 + t) / (10 + t) of the average at update t, and never more than the rate.
    first, second = 2 / 11 * 1 + 9 / 11 * 5, 3 / 12
    assert averaged(0.999, [5.0, 9.0]) == pytest.approx([first, second * first + (1 - second) * 9])
    assert averaged(0.1, [5.0, 9.0]) == pytest.approx([4.6, 8.56])
    assert averaged(0.999, [5.0] * 500)[-1] == pytest.approx(5.0, abs=1e-6)
    assert EMA.warm_up(0.999) == 8990 and EMA.warm_up(0.0) == 0
    with pytest.raises(ValueError, match="rate must be in"):
        EMA(module, 1.0)


def test_only_the_last_latent_recursion_carries_a_gradient():
    trainer = make_trainer()
    trainer._replace_halted()
    rows = trainer.rows
    z_H, z_L = rows.z_H.clone().requires_grad_(), rows.z_L.clone().requires_grad_()
    loss, *_ = trainer._loss(z_H, z_L, rows.tokens, rows.labels, None, None)
    loss.backward()
    assert z_H.grad is None and z_L.grad is None
    assert all(p.grad is not None for p in trainer.model.parameters())


@pytest.mark.slow
def test_training_learns_the_toy():
    trainer = make_trainer(lr=1e-2, weight_decay=0.1, batch_size=32)
    reports = []
    while trainer.step < 600 and (not reports or reports[-1].exact < 0.95):
        for _ in range(40):
            trainer.train_step()
        reports.append(trainer.report())
    assert reports[-1].loss < reports[0].loss / 3 and reports[-1].exact > 0.9, reports


def test_rows_are_renewed_when_they_halt():
    trainer = make_trainer()
    trainer.model.q_head.bias.data.fill_(-50.0)  # never halts by itself
    ages, replaced = [], []
    for _ in range(9):
        before = trainer.rows.tokens.clone()
        halted = trainer.rows.halted.clone()
        trainer.train_step()
        ages.append(trainer.rows.steps.tolist())
        replaced.append((before != trainer.rows.tokens).any(1).tolist())
        assert not (torch.tensor(replaced[-1]) & ~halted).any()
        trainer.model.q_head.bias.data.fill_(-50.0)
    assert [a[0] for a in ages] == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    trainer.model.q_head.bias.data.fill_(50.0)  # wants to halt at once; some rows draw a minimum
    trainer.train_step()
    trainer._decide_halting(torch.full((8,), 1.0))
    assert trainer.rows.halted.any()


def test_exploration_keeps_a_share_of_the_rows():
    trainer = make_trainer(batch_size=4000)
    trainer.rows.steps.fill_(0)
    trainer._decide_halting(torch.ones(4000))  # age 1, wants to halt, minimum 2..4 with probability 0.1
    assert 0.07 < 1 - trainer.rows.halted.float().mean().item() < 0.13
    trainer.rows.steps.fill_(2)
    trainer._decide_halting(torch.ones(4000))  # age 3: only a minimum of 4 holds back
    assert 0.015 < 1 - trainer.rows.halted.float().mean().item() < 0.055


@pytest.mark.parametrize(("optimizer", "prefetch"), [("adam_atan2", False), ("adam_atan2", True), ("muon", False)])
@pytest.mark.parametrize(
    ("dtype", "fused"),
    [
        ("float32", False),
        pytest.param("float32", True, marks=needs_extension),
        pytest.param("bfloat16", True, marks=needs_extension),
    ],
)
def test_resuming_at_a_boundary_is_exact(tmp_path, dtype, fused, optimizer, prefetch):
    options = dict(fused=fused, forward_dtype=dtype, optimizer=optimizer, prefetch=prefetch)
    whole, first = (make_trainer(**options) for _ in range(2))
    assert whole.fused_recursions == (fused and dtype == "float32")
    assert (whole.fused_step is not None) == (fused and dtype == "bfloat16")
    assert losses(whole, 7) == losses(first, 7)
    assert not whole.rows.halted.all()
    whole.begin_slice()
    save_state(first, tmp_path, {"note": "seven"}, part_bytes=4096)
    states_equal(whole, first)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len(files) > 3 and all(f.stat().st_size <= 4096 for f in files if f.name.startswith("part"))
    second = make_trainer(**options)
    losses(second, 3)
    load_state(second, tmp_path)
    assert second.rows.halted.all()
    states_equal(first, second)
    tail = losses(whole, 5)
    assert len(set(tail)) == 5 and tail == losses(second, 5) == losses(first, 5)
    states_equal(whole, second)
    states_equal(whole, first)


def test_a_boundary_rounds_to_bfloat16_and_starts_every_row_afresh():
    trainer = make_trainer()
    losses(trainer, 2)
    name, weight = "lm_head.weight", trainer.model.lm_head.weight
    # bfloat16 has 7 bits behind the point: 1 + 2^-8 is halfway, and ties go to the even neighbour.
    weight.data[0, :3] = torch.tensor([0.5, 0.5, 1.0])
    trainer.ema.shadow[name][0, :3] = torch.tensor([1.5 + 2**-8, 1.5 + 3 * 2**-8, 1.0 + 2**-20])
    m, v = trainer.moments()[f"exp_avg.{name}"], trainer.moments()[f"exp_avg_sq.{name}"]
    m[0, :2] = torch.tensor([-1 - 2**-8, -3e-30])
    v[0, :2] = torch.tensor([1 + 2**-7 + 2**-9, 0.0])
    kept, before = weight.clone(), [p.data_ptr() for p in (m, v)]
    trainer.begin_slice()
    assert trainer.ema.shadow[name][0, :3].tolist() == [1.5, 1.5 + 2**-6, 1.0 + 2**-20]
    assert m[0, 0].item() == -1 and m[0, 1].item() == pytest.approx(-3e-30, rel=2**-8)
    assert v[0, :2].tolist() == [1 + 2**-7, 0]
    assert torch.equal(weight, kept) and [p.data_ptr() for p in (m, v)] == before
    tokens = trainer.rows.tokens.clone()
    assert trainer.rows.halted.all()
    trainer.train_step()
    assert (trainer.rows.tokens != tokens).any(1).all() and (trainer.rows.steps == 1).all()


def test_the_averages_keep_their_distance_from_the_weights_and_a_second_boundary_changes_nothing():
    """Distances of all sizes, from less than a rounding of the weights to many times the weights."""
    trainer = make_trainer()
    losses(trainer, 2)
    generator = torch.Generator().manual_seed(3)
    exact = {}
    for name, p in trainer.model.named_parameters():
        p.data.normal_(generator=generator)
        share = 2.0 ** (-26 + 30 * torch.rand(p.shape, generator=generator))
        share = torch.where(torch.rand(p.shape, generator=generator) < 0.5, share, -share)
        trainer.ema.shadow[name].copy_(p.detach() * (1 + share))
        exact[name] = trainer.ema.shadow[name].double()
    trainer.begin_slice()
    once = {name: value.clone() for name, value in everything(trainer).items()}
    for name, p in trainer.model.named_parameters():
        distance = (exact[name] - p.detach().double()).abs()
        error = (once[f"ema.{name}"].double() - exact[name]).abs()
        bound = 2.0**-8 * distance + 2.0**-23 * torch.maximum(exact[name].abs(), p.detach().double().abs())
        assert (error <= bound).all(), name
        assert error.max() > 0
    trainer.begin_slice()
    for name, value in everything(trainer).items():
        assert torch.equal(value, once[name]), name


def test_the_state_of_the_sudoku_preset_is_small(tmp_path):
    model = EquilibriumReasoner(EqRConfig.sudoku_paper())
    sudoku_like = PuzzleSet(*(np.full((1, 81), value, np.uint8) for value in (1, 2)), np.array(["toy"]), np.zeros(1))
    trainer = Trainer(model, PuzzleStream(sudoku_like, keep), TrainSettings(batch_size=1, compile=False))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    trainer.optimizer.step()
    trainer.step = 1
    path = save_state(trainer, tmp_path, {})
    sizes = [f.stat().st_size for f in path.iterdir()]
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(4.86e6, rel=0.01)
    assert len(sizes) == 5 and max(sizes) <= 15 * 2**20
    assert 10 * parameters < sum(sizes) < 10 * parameters + 20_000 < 50 * 2**20


def test_a_crash_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
    trainer = make_trainer()
    trainer.train_step()
    save_state(trainer, tmp_path, {})
    trainer.train_step()

    def crash(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("eqr_kernels.training.state.json.dumps", crash)
    with pytest.raises(KeyboardInterrupt):
        save_state(trainer, tmp_path, {})
    monkeypatch.undo()
    assert read_manifest(tmp_path)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 1
    for name in ("incomplete-abc", "state-000000000"):  # by runs that were killed while they wrote and removed
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-000").write_bytes(b"half")
    assert read_manifest(tmp_path)["step"] == 1
    save_state(trainer, tmp_path, {})
    assert read_manifest(tmp_path)["step"] == 2 and len(list(tmp_path.iterdir())) == 1


def test_saving_a_step_again_never_lacks_a_state(tmp_path, monkeypatch):
    trainer = make_trainer()
    save_state(trainer, tmp_path, {"note": "first"})
    trainer.model.lm_head.weight.data.fill_(0.5)
    rename = Path.rename

    def crash(self: Path, target: Path) -> Path:
        if self.name.startswith("incomplete-"):
            # Until the new state is in its place, the one before must be somewhere.
            notes = [json.loads(m.read_text())["settings"]["note"] for m in tmp_path.glob("replaced-*/manifest.json")]
            assert notes == ["first"]
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        save_state(trainer, tmp_path, {"note": "second"})
    monkeypatch.undo()
    assert read_manifest(tmp_path)["settings"] == {"note": "first"} and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "replaced-state-000000000" / "left").mkdir(parents=True)  # by a run that was killed
    save_state(trainer, tmp_path, {"note": "second"})
    assert read_manifest(tmp_path)["settings"] == {"note": "second"} and len(list(tmp_path.iterdir())) == 1
    other = make_trainer(seed=5)
    load_state(other, tmp_path)
    assert (other.model.lm_head.weight == 0.5).all()


def test_damaged_states_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no training state under"):
        load_state(make_trainer(), tmp_path)
    trainer = make_trainer()
    path = save_state(trainer, tmp_path, {}, part_bytes=4096)
    model = EquilibriumReasoner(tiny_config(vocab_size=8))
    other = Trainer(model, PuzzleStream(toy_puzzles(), keep), TrainSettings(batch_size=8, compile=False))
    with pytest.raises(RuntimeError, match=r"should be torch.float32 \[8, 16\], got torch.float32 \[7, 16\]"):
        load_state(other, tmp_path)
    part = path / "part-001"
    content = bytearray(part.read_bytes())
    content[7] ^= 1
    part.write_bytes(content)
    with pytest.raises(RuntimeError, match="part-001 is damaged"):
        load_state(make_trainer(), tmp_path)
    part.unlink()
    with pytest.raises(RuntimeError, match="part-001 is missing"):
        load_state(make_trainer(), tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["format"]  # as before there was one
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RuntimeError, match=r"format 1, .* reads format 2; finish the run with the version that began"):
        load_state(make_trainer(), tmp_path)


def test_a_state_without_moments_is_refused():
    trainer = make_trainer()
    state = trainer.state_dict()
    with pytest.raises(RuntimeError, match=r"optimizer.exp_avg.* should be torch.bfloat16 .*, got nothing"):
        trainer.load_state_dict(state, 1)
    trainer.load_state_dict(state, 0)


def test_the_streams_of_a_process_come_from_its_own_state(tmp_path):
    first, second = make_trainer(), make_trainer()
    second.generator.manual_seed(77)
    second.stream.draw(3, 0)
    losses(first, 2)
    save_state(first, tmp_path / "out", {})
    second.step = 2
    own = save_state(second, tmp_path / "own", {}, shared=False)
    assert sum(f.stat().st_size for f in own.iterdir()) < 10_000
    loaded = make_trainer(seed=5)
    load_state(loaded, tmp_path / "out", own=tmp_path / "own")
    assert torch.equal(loaded.model.lm_head.weight, first.model.lm_head.weight)
    assert torch.equal(loaded.generator.get_state(), second.generator.get_state())
    assert loaded.stream.state == second.stream.state != first.stream.state
    second.step = 3
    save_state(second, tmp_path / "own", {}, shared=False)
    with pytest.raises(RuntimeError, match="own is of step 3, but .*out of step 2"):
        load_state(loaded, tmp_path / "out", own=tmp_path / "own")


def test_curriculum():
    points = parse_curriculum("0:34-50,100:20-40")
    stream = PuzzleStream(toy_puzzles(), keep, reveal=lambda i, lab, c, r: i, curriculum=points)
    assert [stream.clue_range(s) for s in (0, 50, 100, 999)] == [(34, 50), (27, 45), (20, 40), (20, 40)]
    for text in ("", "5:1-2", "0:9-3", "0:1-2,0:3-4", "0:a-b", "0-3"):
        with pytest.raises(ValueError, match="curriculum"):
            parse_curriculum(text)


def test_stream_needs_answers():
    unlabelled = replace(toy_puzzles(), labels=None)
    with pytest.raises(ValueError, match="must have labels"):
        PuzzleStream(unlabelled, keep)


def test_a_model_of_another_dtype_is_refused():
    with pytest.raises(TypeError, match="float32 parameters"):
        model = EquilibriumReasoner(tiny_config()).bfloat16()
        Trainer(model, PuzzleStream(toy_puzzles(), keep), TrainSettings())


def test_bfloat16_forward_keeps_float32_weights():
    trainer = make_trainer(forward_dtype="bfloat16", fused=False)
    before = trainer.model.lm_head.weight.clone()
    trainer.train_step()
    trainer.train_step()
    assert trainer.rows.z_H.dtype == torch.bfloat16
    assert trainer.model.lm_head.weight.dtype == torch.float32
    assert (trainer.model.lm_head.weight != before).any() and trainer.report().loss < 10


@pytest.mark.slow
@needs_compiler
def test_compiled_step_trains_like_the_eager_one():
    eager, compiled = make_trainer(), make_trainer(compile=True)
    for _ in range(3):
        eager.train_step()
        compiled.train_step()
    for (name, p), (_, q) in zip(eager.model.named_parameters(), compiled.model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)
    assert torch.equal(eager.rows.tokens, compiled.rows.tokens)


@needs_extension
def test_fused_recursions_train_like_those_of_pytorch():
    fused, plain = make_trainer(), make_trainer(fused=False)
    assert "latent recursions" in fused.kernel and plain.kernel == "PyTorch, as fused is off"
    for _ in range(3):
        fused.train_step()
        plain.train_step()
    for (name, p), (_, q) in zip(fused.model.named_parameters(), plain.model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(fused.rows.z_H, plain.rows.z_H, rtol=1e-4, atol=1e-4)
    assert torch.equal(fused.rows.tokens, plain.rows.tokens)


@needs_extension
def test_fused_outer_step_trains_like_pytorch_in_bfloat16():
    # Without noise, which is drawn from another stream.
    fused, plain, exact = (
        make_trainer(noise_scale=0.0, forward_dtype=dtype, fused=is_fused, lr=1e-3)
        for dtype, is_fused in (("bfloat16", True), ("bfloat16", False), ("float32", False))
    )
    assert fused.kernel == "fused CPU kernel, forward and backward" and "fused is off" in plain.kernel
    for _ in range(2):
        for trainer in (fused, plain, exact):
            trainer._replace_halted()
            trainer.optimizer.zero_grad()
        ids = fused.rows.ids
        # They draw the ids too, so that their starts are others from the second step on.
        for trainer in (plain, exact):
            for name in ("tokens", "labels", "z_H", "z_L"):
                getattr(trainer.rows, name).copy_(getattr(fused.rows, name))
        results = [trainer._outer_step() for trainer in (fused, plain, exact)]
        assert len(set(ids.tolist())) == len(ids)
        gradients = [torch.cat([p.grad.flatten() for p in t.model.parameters()]) for t in (fused, plain, exact)]
        errors = [(g - gradients[2]).norm() for g in gradients[:2]]
        assert errors[0] <= 1.1 * errors[1] and errors[1] > 0
        assert results[0].loss.item() == pytest.approx(results[2].loss.item(), rel=1e-2)
        assert results[0].exact.equal(results[2].exact)


@needs_extension
def test_fused_outer_step_learns_the_toy():
    trainer = make_trainer(forward_dtype="bfloat16", lr=1e-2)
    losses = []
    for _ in range(200):
        trainer.train_step()
        losses.append(trainer.report().loss)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_a_mixer_without_a_fused_kernel_trains_in_pytorch_and_says_so():
    torch.manual_seed(0)
    config = tiny_config(mlp_t=False, pos_encodings="none", num_heads=1)
    stream = PuzzleStream(toy_puzzles(), keep, seed=0)
    trainer = Trainer(
        EquilibriumReasoner(config), stream, TrainSettings(batch_size=4, forward_dtype="bfloat16", compile=False)
    )
    assert "PyTorch: " in trainer.kernel and trainer.fused_step is None
    trainer.train_step()


RANK = """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, {repository!r})
torch.set_num_threads(1)
from tests.support.training import make_trainer, toy_puzzles, keep
from eqr_kernels.tasks.stream import PuzzleStream
dist.init_process_group("gloo")
trainer = make_trainer(prefetch={prefetch})
trainer.stream = PuzzleStream(toy_puzzles(), keep, seed=[0, dist.get_rank()])
for _ in range(3):
    trainer.train_step()
print(json.dumps([float(p.double().sum()) for p in trainer.model.parameters()] + [trainer.rows.tokens.tolist()]))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [False, True])
def test_ranks_keep_the_same_weights_on_different_data(prefetch):
    script = RANK.format(repository=str(REPOSITORY), prefetch=prefetch)
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0], "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], env={**env, "RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    outputs = [json.loads(output) for output in outputs_of(ranks, timeout=240)]
    assert outputs[0][:-1] == outputs[1][:-1]
    assert outputs[0][-1] != outputs[1][-1]


def test_a_state_that_was_being_replaced_is_found(tmp_path):
    trainer = make_trainer()
    losses(trainer, 2)
    state = save_state(trainer, tmp_path, {})
    state.rename(tmp_path / f"replaced-{state.name}")  # as a kill between the two renames leaves it
    assert read_manifest(tmp_path)["step"] == 2
    load_state(make_trainer(), tmp_path)
    save_state(trainer, tmp_path, {})
    assert [p.name for p in tmp_path.iterdir()] == [state.name]


def test_frozen_weights_stay(tmp_path):
    trainer = make_trainer(forward_dtype="bfloat16")
    frozen = trainer.model.lm_head.weight.requires_grad_(False)
    before = frozen.clone()
    losses(trainer, 2)
    assert torch.equal(frozen, before)
