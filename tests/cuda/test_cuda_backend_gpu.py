"""backend="cuda" on a GPU: error budget, halting, selection, any company, streams, graphs, cancelling."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eqr_kernels import EqRConfig, EquilibriumReasoner, SolveResult, Status, ops, selection
from eqr_kernels.backends import cuda
from eqr_kernels.backends.packing import PackArguments, operator_of
from eqr_kernels.precision import Precision
from eqr_kernels.run_rules import RunRules
from eqr_kernels.tasks import sudoku_generator
from tests.support import oracle
from tests.support.cuda import SMALL, TOL, same
from tests.support.fixed_point_op import grids
from tests.support.models import make_contractive
from tests.support.oracle_cases import IDS, SEED, build, make_config, make_tokens, relative, to_numpy

DEVICE, BACKEND = "cuda", "cuda"
WITHOUT = ops.why_not_cuda()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch sees"),
    pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT)),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(params=["throughput", "latency"], autouse=True)
def regime(request, monkeypatch) -> str:
    monkeypatch.setenv("EQR_CUDA_REGIME", request.param)
    return request.param


def contractive(**changes: Any) -> EquilibriumReasoner:
    config = EqRConfig.from_dict({**SMALL, "vocab_size": 7, "num_heads": 2, "noise_scale": 0.0, **changes})
    return make_contractive(config).to(DEVICE)


@pytest.fixture
def model() -> EquilibriumReasoner:
    return contractive()


def draw(n: int = 5, length: int = 9) -> Tensor:
    return torch.randint(1, 7, (n, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.fixture
def tokens() -> Tensor:
    return draw()


def solve(model: EquilibriumReasoner, tokens: Tensor, **options: Any) -> SolveResult:
    result = model.solve(tokens, **{"backend": BACKEND, "precision": "bf16", "tol": TOL, "depth": 7, **options})
    assert result.backend == options.get("backend", BACKEND)
    return result


# ---- arithmetic ----------------------------------------------------------------------------------------------------

CONFIGS = {
    "128 features": make_config(**SMALL),
    "128 features, an outer step": make_config(**{**SMALL, "H_cycles": 2, "L_cycles": 2, "L_layers": 2}),
    "256 features, 88 tokens": make_config(**{**SMALL, "hidden_size": 256, "seq_len": 88}),
    "512 features, 81 tokens": make_config(**{**SMALL, "hidden_size": 512, "seq_len": 81}),
    "one token": make_config(**{**SMALL, "seq_len": 1}),
    "fixed start, other damping": make_config(**{**SMALL, "fixed_init": True, "lambda_": 0.6}),
    "more words than a tile": make_config(**{**SMALL, "vocab_size": 40}),
    "noise": make_config(**{**SMALL, "noise_scale": 0.1}),
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_one_step_is_within_the_error_of_pytorch_in_bf16(cfg):
    """Against float64, on weights that are bf16 on all sides, so that only arithmetic shows."""
    model, _ = build(cfg)
    model = model.bfloat16()
    w = {key: to_numpy(value) for key, value in model.state_dict().items()}
    tokens, rng = make_tokens(cfg, 2), [(SEED, 0, i, 0) for i in IDS.tolist()]
    start = oracle.start(cfg, rng, w, cfg.fixed_init)
    z_H, z_L, logits, q_halt = oracle.outer_step(w, cfg, tokens.numpy(), *start, rng)
    model, errors = model.to(DEVICE), {}
    for backend in (BACKEND, "reference"):
        options = dict(depth=1, halt="none", seed=SEED, ids=IDS.to(DEVICE), noise_scale=cfg.noise_scale)
        got = solve(model, tokens.to(DEVICE), backend=backend, **options)
        errors[backend] = relative(got.logits.cpu(), logits)
        if backend == BACKEND:
            residual = oracle.residual(z_H, z_L, *start).tolist()
            assert got.residual.tolist() == pytest.approx(residual, rel=5e-3)
            assert got.q_halt.tolist() == pytest.approx(q_halt.tolist(), abs=0.15)
    assert 1e-4 < errors[BACKEND] <= 1.1 * errors["reference"], errors


def test_real_weights_settle_on_the_same_answers():
    model = EquilibriumReasoner.from_pretrained("sudoku-small").to(DEVICE)
    tokens = torch.from_numpy(sudoku_generator.generate(64, "easy", seed=3).inputs).long().to(DEVICE)
    got, want = (solve(model, tokens, tol="auto", depth=32, backend=name) for name in (BACKEND, "reference"))
    both = got.converged & want.converged
    assert both.float().mean() > 0.5
    assert (got.preds[both] == want.preds[both]).all(1).float().mean() > 0.95


# ---- rules ---------------------------------------------------------------------------------------------------------

RULES = {
    "residual": dict(halt="residual"),
    "residual, twice": dict(halt="residual", patience=2),
    "fixed depth": dict(halt="none", depth=3),
    "q": dict(halt="q"),
    "both signals": dict(halt="residual+q"),
    "either signal": dict(halt="residual|q"),
}


@pytest.mark.parametrize("select", ["residual", "vote", "q", "first"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_halts_selects_and_records_as_the_reference(model, tokens, rule, select):
    if select == "first" and rule["halt"] == "none":
        pytest.skip("a race needs a halting rule")
    options = dict(breadth=3, window=2, checkpoints=(1, 3), select=select, return_all=True, trace=True) | rule
    got = solve(model, tokens, **options)
    want = solve(model, tokens, **options, backend="reference", precision="fp32")
    # Selection itself confirms the restart (`solve` raises otherwise), and which is best may hang on a rounding.
    assert torch.equal(got.preds, got.logits.argmax(-1))
    assert torch.equal(got.all_preds[torch.arange(5), got.restart], got.preds)
    every = got.all_status != Status.CANCELLED
    assert every.all() or select == "first"
    # Where the residual is not so near the tolerance that a rounding decides.
    clear = ~((want.residuals / TOL - 1).abs() < 0.01).any(-1)
    both = every & (want.all_status != Status.CANCELLED) & clear
    assert both.float().mean() > 0.5 or select == "first"
    for field in ("all_steps", "all_status"):
        assert torch.equal(getattr(got, field)[both], getattr(want, field)[both]), field
    if rule["halt"] == "residual":
        assert got.all_steps[every].unique().numel() > 1 and (got.all_status == Status.CONVERGED).any()
    close = {"all_residual": 5e-3, "residuals": 5e-3, "all_score": 0.05, "all_q_halt": 0.15}
    for field, error in close.items():
        a, b = getattr(got, field)[both], getattr(want, field)[both]
        torch.testing.assert_close(a, b, rtol=error, atol=error, equal_nan=True, msg=field)
    for depth, at in want.at.items():
        for field in ("all_steps", "all_status"):
            assert torch.equal(getattr(got.at[depth], field)[both], getattr(at, field)[both]), (depth, field)


def test_a_race_is_won_as_without_one(model):
    tokens = draw(24)
    every, race = (solve(model, tokens, breadth=6, select=s) for s in ("residual", "first"))
    assert torch.equal(race.steps, every.all_steps.min(1).values)
    assert torch.equal(race.restart, every.all_steps.argmin(1))
    ended = race.all_status == Status.CONVERGED
    assert torch.equal(race.all_steps[ended], every.all_steps[ended])
    assert ((race.all_status == Status.CANCELLED) | ended).all()


def test_a_diverged_row_hurts_nobody(model, tokens):
    broken = contractive()
    with torch.no_grad():
        broken.embed_tokens.embedding_weight[6] = torch.finfo(torch.float32).max
    bad = (tokens == 6).any(1)
    assert 0 < bad.sum() < len(bad)
    got, clean = solve(broken, tokens), solve(model, tokens)
    assert (got.all_status[bad] == Status.DIVERGED).all() and (got.steps[bad] == 1).all()
    assert got.logits.isfinite().all()
    assert torch.equal(got.logits[~bad], clean.logits[~bad]) and torch.equal(got.steps[~bad], clean.steps[~bad])


def test_results_depend_on_nobody_else(model):
    """Bitwise the same for any slots, order and company, with noise; in each regime."""
    tokens = draw(300)
    options = dict(noise_scale=0.001, breadth=2)
    once = solve(model, tokens, slots=1, **options)
    assert len(once.all_steps.unique()) > 1
    for slots in (2, 3, 50, None):
        assert same(once, solve(model, tokens, slots=slots, **options)), slots
    turned = solve(model, tokens.flip(0), **options)
    assert torch.equal(turned.logits.flip(0), once.logits) and torch.equal(turned.all_score.flip(0), once.all_score)
    alone = solve(model, tokens[7:8], **options)
    assert torch.equal(alone.logits[0], once.logits[7])


# ---- ways of calling it --------------------------------------------------------------------------------------------


def test_inputs_of_every_kind(model, tokens):
    expected = solve(model, tokens)
    wide = torch.zeros(5, 18, dtype=torch.int32, device=DEVICE)
    wide[:, ::2] = tokens
    assert same(solve(model, wide[:, ::2]), expected) and same(solve(model, tokens.T.contiguous().T), expected)
    assert same(solve(model, tokens.cpu()), expected)
    with torch.inference_mode():
        assert same(solve(model, tokens.clone()), expected)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert same(solve(model, tokens), expected)
    for layer in model.L_level.layers:
        weight = layer.mlp.gate_up_proj.weight
        weight.data = weight.data.T.contiguous().T
    assert same(solve(model, tokens), expected)
    assert same(solve(model.bfloat16().float(), tokens), solve(model.bfloat16(), tokens))


def test_changed_weights_are_packed_anew(model, tokens):
    before = solve(model, tokens)
    model.lm_head.weight.data.mul_(0.5)
    assert not torch.equal(solve(model, tokens).logits, before.logits)


def test_no_rows_are_no_mistake(model, tokens):
    out = run_op(model, tokens[:0])
    assert out.logits.shape == (0, 9, 7) and out.steps.shape == (0,)


@needs_two
def test_another_device_than_the_current_one(model, tokens):
    expected = solve(model, tokens)
    got = solve(model.to("cuda:1"), tokens)
    assert got.logits.device == torch.device("cuda:1") and torch.equal(got.logits.cpu(), expected.logits.cpu())
    assert torch.cuda.current_device() == 0


def test_progress_and_cancelling(model, regime):
    tokens, seen = draw(20), []
    depth = 20_000 if regime == "throughput" else 1000  # some tenths of a second
    solve(model, tokens, halt="none", depth=depth, progress=lambda *now: seen.append(now))
    assert seen[0] == (0, 20, 0) and seen[-1] == (20, 20, 20 * depth) and seen == sorted(seen) and len(seen) > 2
    begun = time.perf_counter()
    got = solve(model, tokens, halt="none", depth=2**24 - 1, progress=lambda finished, of, spent: spent == 0)
    assert time.perf_counter() - begun < 30 and (got.all_status == Status.CANCELLED).all()
    assert 0 < got.nfe.sum() and got.score[got.steps > 1].isfinite().all()

    def raises(finished: int, of: int, spent: int) -> None:
        if spent:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        solve(model, tokens, halt="none", depth=2**24 - 1, progress=raises)
    assert (solve(model, tokens[:3], depth=2, halt="none").steps == 2).all()


# ---- the op itself -------------------------------------------------------------------------------------------------


def op_arguments(model: EquilibriumReasoner, tokens: Tensor, **changes: Any) -> dict[str, Any]:
    """Of `ops.fixed_point`, with weights for the kernel that the environment asks for."""
    chosen = cuda.plan(operator_of(model), cuda._limits(tokens.device), **cuda._run(cuda.regime(), 1 << 20))
    rules = RunRules(
        seed=3,
        breadth=2,
        depth=7,
        halt="residual",
        tol=TOL,
        patience=1,
        select="residual",
        window=3,
        noise_scale=0.001,
        checkpoints=(2, 5),
        slots=1 << 20,
        trace=False,
    )
    arguments = dict(
        packed=PackArguments.of(model).pack(Precision.bf16, chosen["kernel"]),
        tokens=tokens,
        ids=torch.arange(len(tokens), device=DEVICE),
        control=torch.zeros(3, dtype=torch.int64, pin_memory=True),
    )
    given = {name: changes.pop(name) for name in list(changes) if name in arguments}
    return {**arguments, **given, "rules": replace(rules, **changes)}


@torch.no_grad()
def run_op(model: EquilibriumReasoner, tokens: Tensor, **changes: Any) -> ops.FixedPointOutput:
    return ops.fixed_point(**op_arguments(model, tokens, **changes))


def equal(a: ops.FixedPointOutput, b: ops.FixedPointOutput) -> bool:
    return all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("rule", selection.RULES)
def test_the_winner_is_the_one_that_selection_chooses(model, tokens, rule):
    out = run_op(model, tokens, breadth=16, depth=12, select=rule, checkpoints=())
    assert torch.equal(out.winner, selection.select(rule, *grids(out, 16)))
    assert torch.equal(out.logits.argmax(-1), out.preds.unflatten(0, (-1, 16))[range(len(tokens)), out.winner.tolist()])


def test_another_thread_cancels(model, tokens):
    arguments = op_arguments(model, tokens, depth=2**24 - 1, halt="none", checkpoints=())
    control = arguments["control"]

    def watch() -> None:
        while int(control[2]) < 50:
            time.sleep(0.001)
        control[0] = 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    with torch.no_grad():
        out = ops.fixed_point(**arguments)
    torch.cuda.synchronize()
    watcher.join(60)
    assert (out.status == Status.CANCELLED).all() and int(out.steps.sum()) >= 50


@torch.no_grad()
def test_it_is_captured_and_replayed(model, tokens):
    arguments = op_arguments(model, tokens, control=torch.zeros(3, dtype=torch.int64, device=DEVICE))
    expected = ops.fixed_point(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.fixed_point(**arguments)
    for field in captured:
        field.zero_()
    first, other = tokens.clone(), tokens.flip(0)
    for rows in (other, first):
        arguments["tokens"].copy_(rows)
        graph.replay()
        torch.cuda.synchronize()
        alone = ops.fixed_point(**arguments)
        assert equal(captured, alone)
    assert equal(captured, expected)


@torch.no_grad()
def test_it_compiles_in_one_graph(model, tokens):
    arguments = op_arguments(model, tokens)
    control = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    packed, tokens, ids, rules = (arguments[name] for name in ("packed", "tokens", "ids", "rules"))

    def answer(packed: ops.PackedWeights, tokens: Tensor, ids: Tensor, control: Tensor) -> Any:
        return ops.fixed_point(packed, tokens + 0, ids, control, rules)

    compiled = torch.compile(answer, fullgraph=True, backend="aot_eager")
    try:
        got = compiled(packed, tokens, ids, control)
    finally:
        torch._dynamo.reset()
    assert equal(got, answer(packed, tokens, ids, torch.zeros_like(control)))
    assert int(control[0]) == 0 and 0 < int(control[1]) <= 10


def test_what_the_device_cannot_take_is_told(model, tokens, regime):
    plain = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"control must be in page-locked memory.*pin_memory=True"):
        run_op(model, tokens, control=plain)
    with pytest.raises(ValueError, match="checkpoints must be at most 64 on a CUDA device, got 65"):
        run_op(model, tokens, depth=100, checkpoints=tuple(range(1, 66)))
    packed = op_arguments(model, tokens)["packed"]
    with pytest.raises(ValueError, match=r"multiple of 128 bytes.*use packed.clone\(\)"):
        run_op(model, tokens, packed=packed._replace(data=torch.cat([packed.data[:1], packed.data])[1:]))
    with pytest.raises(ValueError, match="packed has 7 bytes, and pack_weights gives no such number"):
        run_op(model, tokens, packed=packed._replace(data=packed.data[:7].clone()))
    major = torch.cuda.get_device_capability()[0]
    if regime == "throughput":
        foreign = "throughput_mma" if major == 9 else "throughput_wgmma"
        other = PackArguments.of(model).pack(Precision.bf16, foreign)
        with pytest.raises(ValueError, match=f"packed has the layout of {foreign}, and on cuda:0 runs"):
            run_op(model, tokens, packed=other)
    with pytest.raises(ValueError, match="compute in bf16, not in fp32"):
        PackArguments.of(model).pack(Precision.fp32, "latency")
