"""backend="cpu" as `solve` sees it: the choice, the packed weights' cache, agreement with the reference, threads."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eqr_kernels import EqRConfig, EquilibriumReasoner, SolveResult, Status, backends, ops
from eqr_kernels.backends import cpu
from eqr_kernels.precision import NAMED, Precision
from eqr_kernels.run_rules import HALTING_RULES
from tests.support.environment import BUILT, REPOSITORY, WHY_NOT_BUILT
from tests.support.models import make_contractive, tiny_config
from tests.support.results import FIELDS, same

pytestmark = pytest.mark.skipif(not BUILT, reason=WHY_NOT_BUILT)

ISAS = ops.cpu_isas() if BUILT else []
TOL = 0.02


def solve(model: EquilibriumReasoner, tokens: Tensor, **options: Any) -> SolveResult:
    result = model.solve(tokens, **{"tol": TOL, "backend": "cpu", "depth": 30, **options})
    assert result.backend == "cpu"
    return result


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_auto_takes_it_and_tells_how(contractive, puzzles, restore):
    torch.set_num_threads(2)
    result = contractive.solve(puzzles, tol=TOL, depth=2)
    isa = ops.cpu_isa()
    assert result.backend == "cpu"
    assert result.backend_reason.startswith(f"auto chose cpu: fused fixed-point kernel, {isa} fp32, 2 threads; cuda:")
    torch.set_num_threads(1)
    assert f"{isa} fp32, 1 thread" in solve(contractive, puzzles, depth=1).backend_reason
    torch.set_num_threads(1000)
    assert f"fp32, {2 * len(os.sched_getaffinity(0))} threads" in solve(contractive, puzzles, depth=1).backend_reason


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_reason_tells_what_is_emulated(contractive, puzzles, isa, precision, restore):
    ops.set_cpu_isa(isa)
    reason = solve(contractive, puzzles, depth=1, precision=precision).backend_reason
    assert f"fused fixed-point kernel, {isa} {precision}, " in reason
    native = isa in ("avx512_bf16", "amx") and ops.build_info()["avx512"] == "native"
    emulated = f"bf16 operands in fp32 arithmetic: {isa} has no bf16 instructions here)"
    assert (emulated in reason) == (precision != "fp32" and not native)


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (
            lambda m: m.double(),
            {},
            "weight .* is torch.float64, and the kernel takes float32 and bfloat16; use model.fl",
        ),
        (lambda m: m.half(), {}, "weight .* is torch.float16, .*or backend='reference'"),
        (lambda m: m.half(), {"precision": "fp32"}, "weight .* is torch.float16"),
    ],
)
def test_what_it_cannot_run_goes_to_the_next_one(contractive, puzzles, prepare, options, message):
    model = prepare(contractive)
    with pytest.raises(RuntimeError, match=f"backend='cpu' cannot run here: {message}.*; can run: reference"):
        model.solve(puzzles, depth=1, halt="none", backend="cpu", **options)
    result = model.solve(puzzles, depth=1, halt="none", **options)
    assert result.backend == "reference" and "auto chose reference" in result.backend_reason
    assert "; cpu: weight" in result.backend_reason


def test_weights_elsewhere_are_named():
    model = EquilibriumReasoner(tiny_config()).to("meta")
    why_not = backends.available(model, Precision.fp32)["cpu"]
    assert why_not is not None and "is on meta; move the model with model.cpu()" in why_not
    why_not = backends.available(EquilibriumReasoner(tiny_config()), Precision.fp64)["cpu"]
    assert why_not is not None and "computes in fp32, bf16, int8, not in fp64" in why_not


def test_one_weight_of_another_dtype_is_found(contractive, puzzles):
    contractive.q_head.double()
    with pytest.raises(RuntimeError, match="weight q_head.weight is torch.float64"):
        solve(contractive, puzzles)


def test_the_environment_asks_for_it(contractive, puzzles, monkeypatch):
    monkeypatch.setenv("EQR_BACKEND", "cpu")
    assert "EQR_BACKEND='cpu': fused" in contractive.solve(puzzles, tol=TOL, depth=1).backend_reason
    with pytest.raises(RuntimeError, match="EQR_BACKEND='cpu' cannot run here: weight"):
        contractive.double().solve(puzzles, tol=TOL, depth=1)
    monkeypatch.setenv("EQR_BACKEND", "reference")
    assert contractive.float().solve(puzzles, tol=TOL, depth=1).backend == "reference"


ENVIRONMENT = """
import sys, torch
sys.path.insert(0, {repository!r})
from tests.support.models import make_contractive, tiny_config
result = make_contractive(tiny_config()).solve(torch.ones(1, 6, dtype=torch.long), depth=1, halt="none")
print(result.backend_reason)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_forces_an_instruction_set(isa):
    script = ENVIRONMENT.format(repository=str(REPOSITORY))
    environment = {**os.environ, "EQR_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert f"kernel, {isa} fp32" in done.stdout, done.stderr


# ---- agreement with the reference ----------------------------------------------------------------------------------

CONFIGS = {
    "mlp_t": {},
    "mlp_t, two layers": dict(L_layers=2),
    "mlp_t, odd sizes": dict(hidden_size=23, num_heads=1),
    "rope": dict(mlp_t=False, pos_encodings="rope"),
    "rope2d": dict(mlp_t=False, pos_encodings="rope2d", board_height=2, board_width=3),
    "no positions": dict(mlp_t=False),
    "fixed start": dict(fixed_init=True, lambda_=1.0),
    "start std": dict(H_init_std=0.25, L_init_std=3.0),
}
# Relative norms of (logits, q_halt, residuals, scores) after 1 and 6 outer steps, measured: in fp32 at most 1.9e-7,
# 3.2e-7, 2.3e-7 and 1.8e-7; in bf16 and int8 at most 3.0e-3, 6.1e-3, 8.4e-4 and 2.1e-3 (the blocks here are weak).
LIMITS = {"fp32": (5e-7, 1e-6, 5e-7, 5e-7), "bf16": (5e-3, 1e-2, 2e-3, 4e-3), "int8": (5e-3, 1e-2, 2e-3, 4e-3)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("isa", ISAS)
def test_agrees_with_the_reference_over_a_few_steps(config, isa, puzzles, restore):
    ops.set_cpu_isa(isa)
    model = make_contractive(tiny_config(noise_scale=0.01, **config))
    for depth in (1, 6):
        options = dict(depth=depth, breadth=2, halt="none", return_all=True)
        want = model.solve(puzzles, backend="reference", **options)
        for precision, limits in LIMITS.items():
            got = solve(model, puzzles, precision=precision, **options)
            assert torch.equal(got.all_steps, want.all_steps) and torch.equal(got.all_status, want.all_status)
            assert torch.equal(got.restart, want.restart) and torch.equal(got.nfe, want.nfe)
            assert precision != "fp32" or torch.equal(got.all_preds, want.all_preds)
            for field, limit in zip(("logits", "all_q_halt", "all_residual", "all_score"), limits, strict=True):
                a, b = getattr(got, field), getattr(want, field)
                error = float((a - b).norm() / b.norm())
                assert error < limit, (precision, depth, field, error)
                if precision != "fp32" and field == "logits":
                    assert error > 1e-3, "this cannot have been computed in bf16"


def test_int8_is_not_bf16(contractive, puzzles):
    bf16, int8 = (solve(contractive, puzzles, precision=p, depth=4, halt="none").logits for p in ("bf16", "int8"))
    assert not torch.equal(bf16, int8)


RULES = [(s, h) for s in ("residual", "vote", "q", "first") for h in HALTING_RULES if (s, h) != ("first", "none")]


@pytest.mark.parametrize(("select", "halt"), RULES)
@pytest.mark.parametrize("threads", [1, 2])
def test_selects_and_halts_as_the_reference_does(contractive, puzzles, select, halt, threads, restore):
    puzzles, options = puzzles[:6], dict(breadth=4, select=select, halt=halt, depth=14, patience=2, return_all=True)
    want = contractive.solve(puzzles, tol=TOL, backend="reference", **options)
    torch.set_num_threads(threads)
    got = solve(contractive, puzzles, slots=3, **options)
    assert torch.equal(got.restart, want.restart) and torch.equal(got.steps, want.steps)
    assert torch.equal(got.preds, want.preds) and torch.equal(got.converged, want.converged)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    if select != "first":  # which siblings are cancelled, and when, depends on who ran first
        assert torch.equal(got.all_steps, want.all_steps) and torch.equal(got.all_status, want.all_status)
        assert torch.equal(got.all_preds, want.all_preds)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("slots", [1, 2, 64])
def test_races_and_their_checkpoints_on_several_threads(contractive, puzzles, threads, slots, restore):
    puzzles, options = puzzles[:4], dict(breadth=4, depth=16, select="first", slots=slots, checkpoints=(3, 9, 12, 16))
    want = contractive.solve(puzzles, tol=TOL, backend="reference", **options)
    torch.set_num_threads(threads)
    for _ in range(2):
        got = solve(contractive, puzzles, **options)
        assert torch.equal(got.restart, want.restart) and torch.equal(got.preds, want.preds)
        for depth, at in got.at.items():
            assert torch.equal(at.restart, want.at[depth].restart), depth
            assert torch.equal(at.preds, want.at[depth].preds), depth


# ---- models and inputs of every kind -------------------------------------------------------------------------------


def test_mode_gradients_and_inference_mode_change_nothing(contractive, puzzles):
    expected = solve(contractive, puzzles, breadth=2)
    assert same(solve(contractive.train(), puzzles, breadth=2), expected) and contractive.training
    with torch.inference_mode():
        assert same(solve(make_contractive(tiny_config()), puzzles, breadth=2), expected)
        assert same(solve(contractive, puzzles.clone(), breadth=2), expected)
    with torch.enable_grad():
        result = solve(contractive, puzzles, breadth=2)
        assert same(result, expected) and not result.logits.requires_grad
    assert all(p.grad is None and p.requires_grad for p in contractive.parameters())


def test_weights_packed_in_inference_mode_serve_outside_of_it(contractive, puzzles):
    with torch.inference_mode():
        inside = solve(contractive, puzzles)
    assert same(solve(contractive, puzzles), inside)
    _, logits, _ = contractive.train()(puzzles, contractive.initial_state(puzzles))
    logits.sum().backward()
    assert contractive.lm_head.weight.grad is not None


def test_bfloat16_weights(contractive, puzzles):
    rounded = make_contractive(tiny_config()).bfloat16()
    for precision in ("bf16", "fp32"):
        # The kernel keeps its state in float32 whatever the weights are, so that only their values matter.
        wide = make_contractive(tiny_config())
        wide.load_state_dict({name: w.float() for name, w in rounded.state_dict().items()})
        assert same(solve(rounded, puzzles, precision=precision), solve(wide, puzzles, precision=precision))
    assert f"{ops.cpu_isa()} bf16" in solve(rounded, puzzles).backend_reason
    assert same(solve(rounded, puzzles), solve(rounded, puzzles, precision="bf16"))


def test_weights_and_tokens_of_any_strides(contractive, puzzles):
    expected = solve(contractive, puzzles)
    for layer in contractive.L_level.layers:
        weight = layer.mlp.gate_up_proj.weight
        weight.data = weight.data.T.contiguous().T
        assert not weight.is_contiguous()
    wide = torch.zeros(12, 12, dtype=torch.int32)
    wide[:, ::2] = puzzles
    assert same(solve(contractive, wide[:, ::2]), expected)
    assert same(solve(contractive, puzzles.T.contiguous().T), expected)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("hidden_size", [16, 20, 36])
def test_a_row_that_diverges_leaves_its_neighbours_alone(puzzles, restore, isa, hidden_size):
    # Weights so large that sums overflow, but only where token 6 stands. (20 and 36 features leave padding in a panel.)
    ops.set_cpu_isa(isa)
    contractive = make_contractive(tiny_config(hidden_size=hidden_size))
    puzzles = puzzles.clone()
    puzzles[puzzles == 6] = 5
    with torch.no_grad():
        contractive.embed_tokens.embedding_weight[6] = 1e30
    poisoned = puzzles.clone()
    poisoned[[2, 7], 3] = 6
    others = [i for i in range(12) if i not in (2, 7)]
    for precision in ("fp32", "bf16", "int8"):
        torch.set_num_threads(1)
        options: dict[str, Any] = dict(breadth=3, precision=precision, depth=12)
        clean = solve(contractive, puzzles, **options)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = solve(contractive, poisoned, **options)
            assert (result.all_status[[2, 7]] == Status.DIVERGED).all() and result.logits.isfinite().all()
            assert (result.nfe[[2, 7]] == 3).all() and not result.converged[[2, 7]].any()
            for field in FIELDS:
                assert torch.equal(getattr(result, field)[others], getattr(clean, field)[others]), field


def test_a_blown_up_model_diverges_and_says_so(contractive, puzzles):
    with torch.no_grad():
        for weights in contractive.weights().blocks:
            weights.down.mul_(1e30)
            weights.gate_up.mul_(1e15)
    result = solve(contractive, puzzles, breadth=2)
    assert (result.all_status == Status.DIVERGED).all() and not result.converged.any()
    assert result.logits.isfinite().all()


# ---- the packed weights --------------------------------------------------------------------------------------------


def packed(model: EquilibriumReasoner, precision: Precision = Precision.fp32) -> ops.PackedWeights:
    return next(b for b in backends._BACKENDS if isinstance(b, cpu.CpuBackend)).packed(model, precision)


def test_weights_are_packed_once(contractive, puzzles):
    first = packed(contractive)
    solve(contractive, puzzles)
    contractive.train()
    contractive.load_state_dict(contractive.state_dict())
    assert packed(contractive) is first and packed(contractive.cpu()) is first


def by_copy(model: EquilibriumReasoner) -> None:
    model.lm_head.weight.data.copy_(model.lm_head.weight.data * 2)


def by_one_bit(model: EquilibriumReasoner) -> None:
    model.L_level.layers[0].mlp.down_proj.weight.data.view(torch.int32)[-1, -1] ^= 1 << 20


def by_numpy(model: EquilibriumReasoner) -> None:
    model.embed_tokens.embedding_weight.detach().numpy()[5] += 1


def in_place(model: EquilibriumReasoner) -> None:
    with torch.no_grad():
        model.q_head.bias.add_(1)


def by_optimizer(model: EquilibriumReasoner) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.ones(2, 6, dtype=torch.long)
    _, logits, q_halt = model(tokens, model.initial_state(tokens))
    (logits.square().sum() + q_halt.sum()).backward()
    optimizer.step()


def by_loading(model: EquilibriumReasoner) -> None:
    model.load_state_dict(make_contractive(model.config, seed=1).state_dict())


def by_assigning(model: EquilibriumReasoner) -> None:
    model.load_state_dict(make_contractive(model.config, seed=1).state_dict(), assign=True)


def by_swapping_rows(model: EquilibriumReasoner) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).contiguous()


def of_a_start_state(model: EquilibriumReasoner) -> None:
    assert model.H_init is not None
    model.H_init.add_(1)


def of_the_config(model: EquilibriumReasoner) -> None:
    model.config = EqRConfig.from_dict({**model.config.to_dict(), "lambda_": 0.5})


CHANGES = [
    by_copy,
    by_one_bit,
    by_numpy,
    in_place,
    by_optimizer,
    by_loading,
    by_assigning,
    by_swapping_rows,
    of_a_start_state,
    of_the_config,
]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
def test_every_change_of_the_weights_is_noticed(puzzles, change: Callable[[EquilibriumReasoner], None]):
    model = make_contractive(tiny_config(fixed_init=True))
    before, first = solve(model, puzzles), packed(model)
    change(model)
    after = solve(model, puzzles)
    assert not same(after, before) and packed(model) is not first
    twin = EquilibriumReasoner(model.config)
    twin.load_state_dict(model.state_dict())
    assert same(after, solve(twin, puzzles))


def test_a_change_of_dtype_is_noticed(contractive, puzzles):
    wide = packed(contractive)
    contractive.bfloat16()
    narrow = packed(contractive)
    assert narrow is not wide and not torch.equal(narrow.data, wide.data)
    assert packed(contractive.float()) is not narrow


def test_one_pack_for_each_instruction_set_and_precision(contractive, puzzles, restore):
    packs: dict[tuple[str, Precision], ops.PackedWeights] = {}
    for isa in ISAS:
        ops.set_cpu_isa(isa)
        for precision in NAMED:
            packs[isa, precision] = packed(contractive, precision)
    assert len({p.data.data_ptr() for p in packs.values()}) == 3 * len(ISAS)
    for isa in ISAS:
        ops.set_cpu_isa(isa)
        assert all(packed(contractive, precision) is packs[isa, precision] for precision in NAMED)
        # What runs is what was asked for: another instruction set rounds otherwise, or not at all.
        reason = solve(contractive, puzzles, depth=1).backend_reason
        assert isa in reason
    by_copy(contractive)
    before = sum(len(held._packs) for held in cache(contractive))
    packed(contractive)
    assert sum(len(held._packs) for held in cache(contractive)) == before == 3 * len(ISAS)


def cache(model: EquilibriumReasoner) -> list[cpu._Packs]:
    backend = next(b for b in backends._BACKENDS if isinstance(b, cpu.CpuBackend))
    return [held for key, held in backend._packs.items() if key is model]


def test_packed_weights_go_with_their_model(puzzles):
    model = make_contractive(tiny_config())
    solve(model, puzzles)
    backend = next(b for b in backends._BACKENDS if isinstance(b, cpu.CpuBackend))
    gc.collect()  # the models of other tests
    held = len(backend._packs)
    assert len(cache(model)) == 1
    del model
    gc.collect()
    assert len(backend._packs) == held - 1


def test_bytes_of_a_trajectory_in_flight(contractive):
    # Four states of float32 (z_H, z_L and those of the step before) would take 1.5 KiB; scratch space comes on top.
    assert 4 * 4 * 6 * 16 < ops.trajectory_bytes(packed(contractive)) < 1 << 20


# ---- several threads of Python -------------------------------------------------------------------------------------


def test_concurrent_solves_get_the_answers_they_get_alone(puzzles, restore):
    torch.set_num_threads(2)
    models = [make_contractive(tiny_config(noise_scale=0.002), seed=seed) for seed in range(2)]
    options: dict[str, Any] = dict(breadth=3, checkpoints=(3, 12))
    jobs = [(model, precision) for model in models for precision in ("fp32", "bf16")]
    expected = [solve(model, puzzles, precision=precision, **options) for model, precision in jobs]
    for model in models:
        by_copy(model)  # so that all find the cache stale at once
        by_copy(model)
        model.lm_head.weight.data.mul_(0.25)
    results: dict[tuple[int, int], SolveResult] = {}

    def work(i: int, repeat: int) -> None:
        model, precision = jobs[i]
        results[i, repeat] = solve(model, puzzles, precision=precision, **options)

    threads = [threading.Thread(target=work, args=(i, repeat)) for i in range(4) for repeat in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 8
    assert all(same(result, expected[i]) for (i, _), result in results.items())


def test_torch_ops_run_beside_it(contractive, puzzles, restore):
    torch.set_num_threads(2)
    expected, done = solve(contractive, puzzles, halt="none", depth=50), []

    def work() -> None:
        x = torch.randn(300, 300)
        while not done:
            x = torch.relu(x @ x).clamp(max=1)

    other = threading.Thread(target=work)
    other.start()
    try:
        assert same(solve(contractive, puzzles, halt="none", depth=50), expected)
    finally:
        done.append(True)
        other.join(60)


# ---- progress and interrupts ---------------------------------------------------------------------------------------


def test_progress_is_told_from_beginning_to_end(contractive, puzzles):
    seen: list[tuple[int, int, int]] = []
    result = solve(contractive, puzzles, breadth=2, depth=500, halt="none", progress=lambda *now: seen.append(now))
    assert seen[0] == (0, 24, 0) and seen[-1] == (24, 24, int(result.nfe.sum())) == (24, 24, 12000)
    assert seen == sorted(seen) and len(seen) > 3, "a run of a second should tell how far it is"


@pytest.mark.parametrize("threads", [1, 2])
def test_cancelling_keeps_what_there_is(contractive, puzzles, threads, restore):
    torch.set_num_threads(threads)
    checkpoints, deep = (1, 7, 20), 2**24 - 1
    full = solve(contractive, puzzles, depth=20, halt="none", checkpoints=checkpoints)
    result = solve(
        contractive,
        puzzles,
        depth=deep,
        halt="none",
        checkpoints=(*checkpoints, deep),
        progress=lambda finished, of, spent: spent < 100,
    )
    assert (result.all_status == Status.CANCELLED).all() and result.nfe.sum() >= 100
    started = result.all_steps > 0
    assert 0 < started.sum() <= threads and (result.preds[~started[:, 0]] == 0).all()
    assert result.score[started[:, 0]].isfinite().all() and result.score[~started[:, 0]].isnan().all()
    for depth in checkpoints:
        reached = result.all_steps[:, 0] >= depth
        at, want = result.at[depth], full.at[depth]
        for field in ("all_preds", "all_residual", "all_score", "all_steps", "all_status"):
            assert torch.equal(getattr(at, field)[reached], getattr(want, field)[reached]), (depth, field)
        assert (at.all_status[~reached] == Status.CANCELLED).all()
    assert (result.at[deep].all_status == Status.CANCELLED).all()
    assert torch.equal(result.at[deep].all_steps, result.all_steps)


def test_cancelled_at_the_beginning_costs_nothing(contractive, puzzles):
    result = solve(contractive, puzzles, halt="none", depth=2**24 - 1, progress=lambda *_: False)
    assert (result.all_status == Status.CANCELLED).all() and result.nfe.sum() == 0 and (result.preds == 0).all()


@pytest.mark.parametrize("when", [0, 1, 2])
def test_what_progress_raises_is_raised(contractive, puzzles, when):
    seen = []

    def progress(*_: int) -> None:
        seen.append(0)
        if len(seen) > when:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        solve(contractive, puzzles, halt="none", depth=2**24 - 1, progress=progress)
    assert len(seen) == when + 1
    assert (solve(contractive, puzzles, depth=2, halt="none").steps == 2).all()


def test_progress_may_solve_something_itself(contractive, puzzles, restore):
    torch.set_num_threads(2)
    expected, inner = solve(contractive, puzzles), []

    def progress(finished: int, of: int, spent: int) -> bool:
        if spent:
            inner.append(solve(contractive, puzzles))
        return not inner

    solve(contractive, puzzles, halt="none", depth=2**24 - 1, progress=progress)
    assert inner and same(inner[0], expected)


INTERRUPT = """
import signal, sys, threading, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it from the start
sys.path.insert(0, {repository!r})
from tests.support.models import make_contractive, tiny_config
torch.set_num_threads({threads})
model = make_contractive(tiny_config())
tokens = torch.ones({n}, 6, dtype=torch.long)
said = []

def progress(finished, of, spent):
    if spent and not said:
        said.append(print("running", flush=True))

try:
    if not {watched}:
        threading.Timer(1, print, ("running",), dict(flush=True)).start()
    model.solve(tokens, depth=2**24 - 1, halt="none", backend="cpu", progress=progress if {watched} else None)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize(("threads", "n", "watched"), [(1, 2, True), (2, 1, True), (2, 4, True), (2, 4, False)])
def test_ctrl_c_stops_a_solve(threads, n, watched):
    script = INTERRUPT.format(repository=str(REPOSITORY), threads=threads, n=n, watched=watched)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "running\n"  # and would for twenty minutes or more
        begun = time.perf_counter()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n", process.stderr.read()
        # An outer step takes a tenth of a millisecond here, and signals are looked for every 20 ms.
        assert time.perf_counter() - begun < 5
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


DAEMON = """
import sys, threading, torch
sys.path.insert(0, {repository!r})
from tests.support.models import make_contractive, tiny_config
torch.set_num_threads(2)
model, running = make_contractive(tiny_config()), threading.Event()

def work():
    model.solve(torch.ones(4, 6, dtype=torch.long), depth=2**24 - 1, halt="none", progress=lambda *_: running.set())

threading.Thread(target=work, daemon=True).start()
assert running.wait(60)
print("leaving", flush=True)
"""


@pytest.mark.slow
def test_the_interpreter_may_end_while_a_daemon_thread_solves():
    script = DAEMON.format(repository=str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")
