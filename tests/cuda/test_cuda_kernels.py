"""The CUDA kernels' bodies, run on the host, against the float64 oracle and the reference backend.

The host has no idea of a GPU's memory model nor of its speed; what it does check: arithmetic, layouts, barriers under
shuffled schedules with late copies, the queue, halting, recording. test_cuda_backend_gpu.py has what needs a device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner, Status, backends
from eqr_kernels.results import SolveResult
from eqr_kernels.tasks import sudoku_generator
from eqr_kernels.trajectory import settled
from tests.support.cuda import SMALL, TOL, same
from tests.support.emulated_cuda import KERNELS, EmulatedCuda
from tests.support.environment import needs_compiler
from tests.support.models import make_contractive
from tests.support.oracle_cases import build, build_open, make_config, one_step, relative, to_numpy
from tests.support.serving import assert_equal

pytestmark = [needs_compiler, pytest.mark.parametrize("kernel", KERNELS)]


def solve(model: EquilibriumReasoner, tokens: torch.Tensor, kernel: str | EmulatedCuda, **options: Any) -> SolveResult:
    """`model.solve` on a kernel, or on what "reference" and "cpu" name."""
    if isinstance(kernel, str) and kernel in KERNELS:
        kernel = EmulatedCuda(kernel)
    if isinstance(kernel, str):
        return model.solve(tokens, backend=kernel, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "choose", lambda *_, **__: (kernel, "on the host"))
        return model.solve(tokens, **options)


@pytest.fixture(autouse=True)
def emulated(monkeypatch, kernel):
    """Puts the kernel in the place of the backend that a test calls "emulated"."""
    known = backends.choose

    def choose(name, *arguments, **options):
        return (EmulatedCuda(kernel), "on the host") if name == "emulated" else known(name, *arguments, **options)

    monkeypatch.setattr(backends, "choose", choose)


CONFIGS = {
    "two modules": make_config(**SMALL),
    "an outer step": make_config(**{**SMALL, "H_cycles": 2, "L_cycles": 2}),
    "two layers, one token": make_config(**{**SMALL, "seq_len": 1, "L_layers": 2}),
    "88 tokens": make_config(**{**SMALL, "seq_len": 88}),
    "81 tokens, 256 features": make_config(**{**SMALL, "seq_len": 81, "hidden_size": 256}),
    "512 features": make_config(**{**SMALL, "hidden_size": 512}),
    "fixed start, other damping": make_config(**{**SMALL, "fixed_init": True, "lambda_": 0.6}),
    "more words than a tile": make_config(**{**SMALL, "vocab_size": 40}),
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_one_step_is_within_the_error_of_pytorch_in_bf16(cfg):
    """Against float64, on weights that are bf16 on all sides, so that only arithmetic shows."""
    model, _ = build(cfg)
    model = model.bfloat16()
    w = {key: to_numpy(value) for key, value in model.state_dict().items()}
    (logits, q_halt, residual), want = one_step(model, w, "emulated", "bf16", n=1)
    (of_torch, *_), _ = one_step(model, w, "reference", "bf16", n=1)
    ours = relative(logits, want[0])
    assert ours <= 1.1 * relative(of_torch, want[0])
    assert ours > 1e-4, "not computed in bf16"
    assert residual.tolist() == pytest.approx(want[2], rel=2e-3)
    assert q_halt.tolist() == pytest.approx(want[1], abs=0.1)
    if cfg.seq_len > 80:
        assert ours < 0.05


def test_the_state_is_that_of_the_oracle():
    """z_H itself, by an lm_head that is the identity; and noise that is not rounded away."""
    model, w = build_open(make_config(**SMALL, noise_scale=0.5), seed=2)
    (z_H, *_), (want, *_) = one_step(model, w, "emulated", "bf16", n=1)
    assert relative(z_H, want) < 6e-3


@pytest.fixture(scope="module")
def model() -> EquilibriumReasoner:
    return make_contractive(EqRConfig.from_dict({**SMALL, "vocab_size": 7, "num_heads": 2, "noise_scale": 0.0}))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, 7, (5, 9), generator=torch.Generator().manual_seed(1))


RULES = {
    "residual": dict(halt="residual", tol=TOL),
    "residual, twice": dict(halt="residual", tol=TOL, patience=2),
    "fixed depth": dict(halt="none", depth=3),
    "q": dict(halt="q"),
    "both signals": dict(halt="residual+q", tol=TOL),
    "either signal": dict(halt="residual|q", tol=TOL),
}

STATUSES = {
    "residual": {Status.CONVERGED},
    "none": {Status.MAX_DEPTH},
    "q": {Status.HALTED, Status.MAX_DEPTH},
    "residual+q": {Status.CONVERGED, Status.MAX_DEPTH},
    "residual|q": {Status.CONVERGED, Status.HALTED},
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_halts_and_records_as_the_reference(model, tokens, kernel, rule):
    options = dict(depth=7, breadth=2, window=2, checkpoints=(1, 3), trace=True, return_all=True) | rule
    tokens = tokens[:3]
    got, want = solve(model, tokens, kernel, **options), solve(model, tokens, "reference", **options)
    assert torch.equal(got.all_steps, want.all_steps) and torch.equal(got.all_status, want.all_status)
    assert set(map(Status, got.all_status.flatten().tolist())) == STATUSES[rule["halt"]]
    assert torch.equal(got.restart, want.restart) and torch.equal(got.preds, got.logits.argmax(-1))
    top = want.logits.topk(2).values
    clear = top[..., 0] - top[..., 1] > 0.1  # more than bf16 moves a logit
    assert clear.float().mean() > 0.8 and torch.equal(got.preds[clear], want.preds[clear])
    chosen = got.all_preds[torch.arange(3), got.restart]
    assert torch.equal(chosen, got.preds) and (got.all_preds == want.all_preds).float().mean() > 0.95
    if rule["halt"] == "residual":
        assert got.all_steps.unique().numel() > 1
    # The reference computes in float32 here, and q_halt comes of as many roundings to bf16 as there are features.
    close = {"all_residual": 5e-3, "residuals": 5e-3, "all_score": 0.05, "all_q_halt": 0.15}
    for field, error in close.items():
        torch.testing.assert_close(
            getattr(got, field), getattr(want, field), rtol=error, atol=error, equal_nan=True, msg=field
        )
    assert relative(got.logits, to_numpy(want.logits)) < 0.03
    for depth, at in want.at.items():
        assert torch.equal(got.at[depth].all_steps, at.all_steps)
        assert torch.equal(got.at[depth].all_status, at.all_status)
        torch.testing.assert_close(got.at[depth].all_score, at.all_score, rtol=0.05, atol=0.05, equal_nan=True)


@pytest.mark.slow
def test_results_depend_on_nobody_else(model, tokens, kernel):
    """Bitwise the same for any slots, order, company and schedule, with noise."""
    options = dict(depth=6, tol=TOL, noise_scale=0.001)
    once = solve(model, tokens, EmulatedCuda(kernel, slots=1, ctas=1), **options)
    assert len(once.all_steps.unique()) > 1
    for schedule, (slots, ctas) in enumerate(((3, 4), (10, 7))):
        crowd = EmulatedCuda(kernel, slots, ctas, schedule=schedule)
        assert same(once, solve(model, tokens, crowd, **options))
    alone = solve(model, tokens[2:3], EmulatedCuda(kernel), **options)
    assert torch.equal(alone.logits[0], once.logits[2]) and torch.equal(alone.all_score[0], once.all_score[2])
    turned = solve(model, tokens.flip(0), EmulatedCuda(kernel, slots=4), **options)
    assert torch.equal(turned.logits.flip(0), once.logits)


@pytest.mark.slow
def test_launches_of_quanta_give_the_bits_of_one(model, tokens, kernel):
    options = dict(depth=6, tol=TOL, window=2, checkpoints=(1, 4), trace=True, return_all=True, noise_scale=0.001)
    whole = solve(model, tokens[:3], EmulatedCuda(kernel), **options)
    assert_equal(solve(model, tokens[:3], EmulatedCuda(kernel, quantum=2), **options), whole)


@pytest.mark.slow
def test_clusters_of_any_size_give_the_same(model, tokens, kernel):
    if kernel != "throughput_wgmma":
        pytest.skip("only throughput_wgmma has clusters")
    options = dict(depth=5, tol=TOL)
    alone = solve(model, tokens, EmulatedCuda(kernel, slots=1), **options)
    for slots, cluster in ((2, 2), (4, 2), (4, 4)):
        assert same(alone, solve(model, tokens, EmulatedCuda(kernel, slots, cluster=cluster), **options))


@pytest.mark.slow
def test_a_diverged_row_hurts_nobody(model, tokens, kernel):
    broken = make_contractive(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.embed_tokens.embedding_weight[6] = torch.finfo(torch.float32).max
    bad = (tokens == 6).any(1)
    assert 0 < bad.sum() < len(bad)
    options = dict(depth=5, tol=TOL)
    got, clean = solve(broken, tokens, kernel, **options), solve(model, tokens, kernel, **options)
    assert (got.all_status[bad] == Status.DIVERGED).all() and (got.steps[bad] == 1).all()
    assert got.logits.isfinite().all()
    assert torch.equal(got.logits[~bad], clean.logits[~bad]) and torch.equal(got.steps[~bad], clean.steps[~bad])


@pytest.mark.slow
@pytest.mark.parametrize("halt", ["residual", "residual|q"])
def test_a_race_cancels_who_cannot_win(model, tokens, kernel, halt):
    options, tokens = dict(depth=6, breadth=3, tol=TOL, halt=halt), tokens[:3]
    every = solve(model, tokens, kernel, **options)
    race = solve(model, tokens, EmulatedCuda(kernel, slots=3), select="first", **options)
    assert torch.equal(race.steps, every.all_steps.min(1).values)
    assert torch.equal(race.restart, every.all_steps.argmin(1))
    ended = race.all_status != Status.CANCELLED
    assert not ended.all()
    for field in ("all_steps", "all_status"):
        assert torch.equal(getattr(race, field)[ended], getattr(every, field)[ended]), field
    assert settled(every.all_status).all()


def test_the_caller_can_stop_it(model, tokens, kernel):
    got = solve(model, tokens, kernel, depth=4, tol=TOL, progress=lambda *_: False)
    assert (got.all_status == Status.CANCELLED).all() and (got.all_steps == 0).all()
    assert got.residual.isnan().all() and not got.preds.any()


@pytest.mark.slow
def test_real_weights_settle_on_the_same_answers(kernel):
    """The shipped model on puzzles, with noise and early exit: answers and the work they take."""
    if kernel == "throughput_mma":
        pytest.skip("its bits are those of throughput_wgmma: all_throughput_kernels_give_the_same")
    model = EquilibriumReasoner.from_pretrained("sudoku-small")
    tokens = torch.from_numpy(sudoku_generator.generate(3, "easy", seed=3).inputs).long()
    got = solve(model, tokens, EmulatedCuda(kernel, slots=3, ctas=4), depth=8)
    want = solve(model, tokens, "reference", depth=8, precision="bf16")
    both = got.converged & want.converged
    assert both.any() and torch.equal(got.converged, want.converged)
    assert torch.equal(got.preds[both], want.preds[both])
    assert (got.steps - want.steps).abs().max() <= 1
