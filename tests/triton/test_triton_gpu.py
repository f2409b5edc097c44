"""backend="triton" on a real GPU: error budgets, early exit, the queue, streams, devices, cancelling, the tuner."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eqr_kernels import EqRConfig, EquilibriumReasoner, SolveResult, Status
from eqr_kernels.tasks import sudoku_generator
from tests.support import oracle
from tests.support.models import make_contractive, tiny_config
from tests.support.oracle_cases import BF16, IDS, ROPE2D, SEED, build_open, make_config, make_tokens, relative, to_numpy
from tests.support.results import FIELDS, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is false"),
]

TOL = 0.02


@pytest.fixture(autouse=True, scope="module")
def first_choice():
    """Timing the tiles of every shape here would take long; one test does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQR_TRITON_TUNE", "0")
        yield


def solve(model: EquilibriumReasoner, tokens: Tensor, **options: Any) -> SolveResult:
    result = model.solve(tokens.to(model.device), **{"tol": TOL, "backend": "triton", "depth": 30, **options})
    assert result.backend == "triton"
    return result


@pytest.fixture
def contractive() -> EquilibriumReasoner:
    return make_contractive(tiny_config()).cuda()


@pytest.fixture
def puzzles() -> Tensor:
    return torch.randint(1, 7, (12, 6), generator=torch.Generator().manual_seed(1)).cuda()


def one_step(model, w, backend, precision, n=2):
    """What one outer step gives on the GPU, and what the oracle gives: (z_H, q_halt, residual) each."""
    cfg, tokens = model.config, make_tokens(model.config, n)
    rng = [(SEED, 0, i, 0) for i in IDS[:n].tolist()]
    start = oracle.start(cfg, rng, w, cfg.fixed_init)
    z_H, z_L, logits, q_halt = oracle.outer_step(w, cfg, tokens.numpy(), *start, rng)
    options = dict(depth=1, halt="none", seed=SEED, ids=IDS[:n], noise_scale=cfg.noise_scale)
    got = model.cuda().solve(tokens, backend=backend, precision=precision, **options)
    result = (got.logits.cpu(), got.q_halt.cpu(), got.residual.cpu())
    return result, (logits, q_halt, oracle.residual(z_H, z_L, *start))


CONFIGS = {
    "mlp_t": make_config(),
    "mlp_t, two layers": make_config(L_layers=2),
    "mlp_t, odd sizes": make_config(seq_len=7, hidden_size=23, vocab_size=3, H_cycles=3, L_cycles=2, L_layers=2),
    "mlp_t, more tokens than a tile": make_config(seq_len=200, hidden_size=40, H_cycles=1, L_cycles=1),
    "rope": make_config(mlp_t=False, pos_encodings="rope"),
    "rope2d": make_config(**ROPE2D, seq_len=35, board_height=5, board_width=7, hidden_size=40, num_heads=2),
    "more keys than a tile": make_config(seq_len=270, hidden_size=36, num_heads=2, mlp_t=False, H_cycles=1),
    "fixed start": make_config(lambda_=1.0, noise_scale=0.0, fixed_init=True),
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_fp32_matches_the_oracle(cfg):
    model, w = build_open(cfg)
    got, want = one_step(model, w, "triton", "fp32")
    assert max(relative(*pair) for pair in zip(got, want, strict=True)) < 2e-5


PRESETS = {
    "sudoku-paper": EqRConfig.sudoku_paper(),
    "sudoku-small": EqRConfig.sudoku_small(),
    "maze, one cycle": EqRConfig.maze(H_cycles=1, L_cycles=1),
}


@pytest.mark.parametrize("cfg", PRESETS.values(), ids=PRESETS.keys())
def test_fp32_presets_match_the_oracle(cfg):
    model, w = build_open(cfg)
    got, want = one_step(model, w, "triton", "fp32", n=1)
    assert max(relative(*pair) for pair in zip(got, want, strict=True)) < 2e-5


def bf16_errors(cfg, seed, n=2):
    model, _ = build_open(cfg, seed)
    model = model.bfloat16()
    w = {key: to_numpy(value) for key, value in model.state_dict().items()}
    errors = []
    for backend in ("triton", "reference"):
        got, want = one_step(model, w, backend, "bf16", n)
        errors.append(relative(got[0], want[0]))
    return errors


@pytest.mark.parametrize("cfg", BF16.values(), ids=BF16.keys())
def test_bf16_error_is_within_that_of_pytorch(cfg):
    ours, torchs = np.array([bf16_errors(cfg, seed) for seed in range(4)]).T
    assert np.sqrt((ours**2).mean()) <= 1.1 * np.sqrt((torchs**2).mean()), (ours, torchs)
    assert ours.min() > 1e-3, "not computed in bf16"


@pytest.mark.parametrize("cfg", PRESETS.values(), ids=PRESETS.keys())
def test_bf16_presets_are_within_the_error_of_pytorch(cfg):
    ours, torchs = bf16_errors(cfg, seed=0, n=1)
    assert 1e-3 < ours <= 1.1 * torchs


# ---- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("select", ["residual", "vote", "q"])
def test_early_exit_as_the_reference(contractive, puzzles, patience, select):
    options = dict(breadth=3, patience=patience, select=select, checkpoints=(1, 9, 30), return_all=True, trace=True)
    want = contractive.cpu().solve(puzzles.cpu(), tol=TOL, depth=30, backend="reference", **options)
    got = solve(contractive.cuda(), puzzles, **options)
    assert len(want.all_steps.unique()) > 2
    for field in ("preds", "restart", "steps", "nfe", "all_steps", "all_status", "all_preds"):
        assert torch.equal(getattr(got, field).cpu(), getattr(want, field)), field
    for field in ("logits", "all_residual", "all_score", "all_q_halt", "residuals"):
        torch.testing.assert_close(
            getattr(got, field).cpu(), getattr(want, field), rtol=1e-3, atol=1e-4, equal_nan=True
        )
    for depth, at in got.at.items():
        assert torch.equal(at.all_preds.cpu(), want.at[depth].all_preds)


def test_trained_weights_settle_on_the_same_answers():
    model = EquilibriumReasoner.from_pretrained("sudoku-small").cuda()
    tokens = torch.from_numpy(sudoku_generator.generate(64, "easy", seed=3).inputs).long().cuda()
    want = model.solve(tokens, depth=32, backend="reference")
    for precision in ("fp32", "bf16"):
        got = solve(model, tokens, depth=32, tol="auto", precision=precision)
        both = got.converged & want.converged
        assert both.sum() >= 0.9 * want.converged.sum() > 0
        assert (got.preds[both] == want.preds[both]).all(1).float().mean() >= 0.999


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_alone_or_together_in_any_order_and_slots(precision):
    model = make_contractive(tiny_config(noise_scale=0.002)).cuda()
    puzzles = torch.randint(1, 7, (40, 6), generator=torch.Generator().manual_seed(1))
    options = dict(breadth=5, seed=11, precision=precision)
    together = solve(model, puzzles, **options)
    assert len(together.all_steps.unique()) > 2
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert same(solve(model, puzzles, **options), together)
    for slots in (1, 7, 63, 500):
        assert same(solve(model, puzzles, slots=slots, **options), together), slots
    assert same(solve(model, puzzles[order], **options), together, order)
    assert same(solve(model, puzzles[5:6], **options), together, slice(5, 6))


def test_a_race_has_the_same_winner(contractive, puzzles):
    everyone = solve(contractive, puzzles, breadth=16, return_all=True)
    for slots in (1, 10, 192):
        race = solve(contractive, puzzles, breadth=16, select="first", slots=slots)
        fewest = everyone.all_steps.min(1)
        assert torch.equal(race.steps, fewest.values) and torch.equal(race.restart, fewest.indices)
        assert race.nfe.sum() < everyone.nfe.sum() and (race.all_status == Status.CANCELLED).any()


def test_a_row_that_diverges_leaves_its_neighbours_alone(contractive, puzzles):
    puzzles = puzzles.clone()
    puzzles[puzzles == 6] = 5
    with torch.no_grad():
        contractive.embed_tokens.embedding_weight[6] = 3e38
    poisoned = puzzles.clone()
    poisoned[4, 2] = 6
    others = [i for i in range(12) if i != 4]
    for precision in ("fp32", "bf16"):
        options = dict(breadth=4, precision=precision, slots=2)
        clean, result = (solve(contractive, tokens, **options) for tokens in (puzzles, poisoned))
        assert (result.all_status[4] == Status.DIVERGED).all() and result.logits.isfinite().all()
        for field in FIELDS:
            assert torch.equal(getattr(result, field)[others], getattr(clean, field)[others]), field


# ---- streams, devices, modes -----------------------------------------------------------------------------------------


def test_it_runs_on_the_current_stream(contractive, puzzles):
    expected = solve(contractive, puzzles)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        weight = contractive.lm_head.weight.data
        kept = weight.clone()
        torch.cuda._sleep(100_000_000)
        # Only a launch behind the sleep, on the same stream, sees the weights as they are put back.
        weight.zero_()
        weight.copy_(kept)
        assert same(solve(contractive, puzzles), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_it_runs_on_the_models_device(contractive, puzzles):
    expected = solve(contractive, puzzles)
    torch.cuda.set_device(0)
    other = solve(contractive.to("cuda:1"), puzzles.to("cuda:1"))
    assert other.preds.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(other.preds.cpu(), expected.preds.cpu())


def test_inference_mode_and_strides(contractive, puzzles):
    expected = solve(contractive, puzzles)
    with torch.inference_mode():
        assert same(solve(contractive.train(), puzzles.clone()), expected)
    for layer in contractive.L_level.layers:
        weight = layer.mlp.gate_up_proj.weight
        weight.data = weight.data.T.contiguous().T
    wide = torch.zeros(12, 13, dtype=torch.int32, device="cuda")
    wide[:, 1::2] = puzzles
    assert same(solve(contractive, wide[:, 1::2]), expected)


def test_several_threads_of_python(contractive, puzzles):
    expected = [solve(contractive, puzzles, seed=seed) for seed in range(4)]
    results: dict[int, SolveResult] = {}

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results[seed] = solve(contractive, puzzles, seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(same(results[seed], expected[seed]) for seed in range(4))


# ---- progress and cancelling -----------------------------------------------------------------------------------------


def test_progress_is_told_while_it_runs(contractive, puzzles):
    seen: list[tuple[int, int, int]] = []
    result = solve(contractive, puzzles, depth=20_000, halt="none", progress=lambda *now: seen.append(now))
    assert seen[0] == (0, 12, 0) and seen[-1] == (12, 12, int(result.nfe.sum())) == (12, 12, 240_000)
    assert seen == sorted(seen) and len(set(seen)) > 3


def test_cancelling_keeps_what_there_is(contractive, puzzles):
    full = solve(contractive, puzzles, depth=20, halt="none", checkpoints=(1, 7))
    result = solve(
        contractive,
        puzzles,
        depth=2**24 - 1,
        halt="none",
        checkpoints=(1, 7),
        slots=4,
        progress=lambda finished, of, spent: spent < 1000,
    )
    assert (result.all_status == Status.CANCELLED).all() and result.nfe.sum() >= 1000
    started = result.all_steps[:, 0] > 0
    assert 0 < started.sum() <= 4 and (result.preds[~started] == 0).all()
    for depth in (1, 7):
        reached = result.all_steps[:, 0] >= depth
        for field in ("all_preds", "all_residual", "all_score", "all_steps"):
            assert torch.equal(getattr(result.at[depth], field)[reached], getattr(full.at[depth], field)[reached])


def test_what_progress_raises_is_raised_and_nothing_is_left_running(contractive, puzzles):
    def progress(finished: int, of: int, spent: int) -> None:
        if spent:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(contractive, puzzles, depth=2**24 - 1, halt="none", progress=progress)
    assert (solve(contractive, puzzles, depth=2, halt="none").steps == 2).all()


# ---- the tuner -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tiles_are_timed_once_and_kept(monkeypatch, tmp_path):
    from eqr_kernels.backends.triton import tuner

    monkeypatch.delenv("EQR_TRITON_TUNE")
    monkeypatch.setenv("EQR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuner, "_chosen", {})
    model = EquilibriumReasoner.from_pretrained("sudoku-small").cuda()
    tokens = torch.from_numpy(sudoku_generator.generate(4, "easy", seed=3).inputs).long()
    first = solve(model, tokens, tol="auto", precision="bf16")
    assert "chosen now: " in first.backend_reason and (tmp_path / "triton.json").exists()
    again = solve(model, tokens, tol="auto", precision="bf16")
    assert "chosen now: " not in again.backend_reason and "warps, tiles " in again.backend_reason
    assert same(again, first)
