"""backend="cuda" and its ops as far as no GPU is needed: refusals, plans, fake kernels, the host beside a run.

test_cuda_backend_gpu.py has what needs a device, test_cuda_kernels.py runs the kernels' bodies on the host.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from eqr_kernels import EqRConfig, EquilibriumReasoner, Status, backends, ops
from eqr_kernels.backends import base, cuda, watch
from eqr_kernels.backends.cuda import CudaBackend
from eqr_kernels.backends.packing import operator_of
from eqr_kernels.precision import Precision
from eqr_kernels.reference import BlockWeights, OperatorWeights
from eqr_kernels.run_rules import RunRules
from tests.support.environment import BUILT, REPOSITORY, WHY_NOT_BUILT
from tests.support.fixed_point_op import pack, problem, weights
from tests.support.models import make_contractive, tiny_config

pytestmark = pytest.mark.skipif(not BUILT, reason=WHY_NOT_BUILT)
WITHOUT = ops.why_not_cuda()
needs_kernels = pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT))

H100 = dict(major=9, minor=0, multiprocessors=132, shared_bytes=232448)
A100 = dict(major=8, minor=0, multiprocessors=108, shared_bytes=166912)
ADA = dict(major=8, minor=9, multiprocessors=128, shared_bytes=101376)
SUDOKU = ops.Operator((81, 512, 11, 256, 1536, 0, 2, 3, 6, 0), (0.95, 1e-5, 1.0, 1.0), False)
KERNELS = ("throughput_mma", "throughput_wgmma", "latency")


def plan(limits: dict[str, int] = H100, operator: ops.Operator = SUDOKU, **changes: Any) -> dict[str, Any]:
    run = dict(regime="auto", trajectories=1000, slots=10**6, window=3, depth=16, puzzles=1000, race=False)
    return cuda.plan(operator, limits, **{**run, **changes})


# ---- plans ---------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(
    ("limits", "changes", "kernel", "ctas", "cluster", "slots"),
    [
        (H100, {}, "throughput_wgmma", 132, 2, 132),
        (H100, dict(trajectories=9), "throughput_wgmma", 10, 2, 10),
        (H100, dict(slots=7), "throughput_wgmma", 6, 2, 6),
        (H100, dict(slots=1), "throughput_wgmma", 1, 1, 1),
        ({**H100, "multiprocessors": 131}, {}, "throughput_wgmma", 130, 2, 130),
        (H100, dict(trajectories=8), "latency", 128, 1, 1),
        (H100, dict(trajectories=8, regime="throughput"), "throughput_wgmma", 8, 2, 8),
        (H100, dict(regime="latency"), "latency", 128, 1, 1),
        (H100, dict(trajectories=0), "latency", 128, 1, 1),
        (A100, {}, "throughput_mma", 108, 1, 108),
        (A100, dict(slots=7), "throughput_mma", 7, 1, 7),
        (A100, dict(trajectories=1), "latency", 108, 1, 1),
        ({**H100, "multiprocessors": 16}, dict(trajectories=1), "latency", 16, 1, 1),
    ],
)
def test_plans(limits, changes, kernel, ctas, cluster, slots):
    got = plan(limits, **changes)
    assert (got["kernel"], got["ctas"], got["cluster"], got["slots"]) == (kernel, ctas, cluster, slots)
    assert 0 < got["shared_bytes"] <= limits["shared_bytes"] and got["threads"] in (256, 384)
    assert got["slot_bytes"] % 256 == 0 and got["workspace_bytes"] > slots * got["slot_bytes"]


@needs_kernels
def test_memory_grows_with_the_window_and_a_race_and_nothing_else():
    plain, deep = plan(), plan(depth=2**24 - 1)
    assert deep == plain
    assert plan(window=1000, depth=1000)["slot_bytes"] >= plain["slot_bytes"] + 997 * 4 - 256
    assert plan(race=True)["workspace_bytes"] - plain["workspace_bytes"] == -(-1000 * 8 // 256) * 256


@needs_kernels
@pytest.mark.parametrize("features", [128, 256, 512])
@pytest.mark.parametrize("regime", ["throughput", "latency"])
def test_every_size_fits_the_devices_it_is_for(features, regime):
    operator = SUDOKU._replace(sizes=(81, features, 11, 256, -(-features // 256) * 768, 0, 2, 3, 6, 0))
    for limits in (H100, A100):
        assert plan(limits, operator, regime=regime)["shared_bytes"] <= limits["shared_bytes"]


@needs_kernels
@pytest.mark.parametrize(
    ("limits", "changes", "message"),
    [
        (ADA, {}, "kernel throughput_mma needs .* shared memory for hidden_size 512, .* 101376 .*backend='triton'"),
        ({**H100, "major": 7, "minor": 5}, {}, "capability 8.x and 9.0, and the device has 7.5; use backend='ref"),
        ({**H100, "major": 12}, {}, "the device has 12.0; use backend='triton' or backend='reference'"),
        (H100, dict(regime="fast"), "regime must be one of auto, throughput, latency, got 'fast'"),
        (
            H100,
            dict(operator=SUDOKU._replace(sizes=(89, *SUDOKU.sizes[1:]))),
            "seq_len up to 88, got 89; use backend='t",
        ),
    ],
)
def test_plans_that_cannot_be(limits, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(limits, **changes)


# ---- refusals of the backend ---------------------------------------------------------------------------------------


def on_a_gpu(config: EqRConfig, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """What `why_not` asks of a model that lies on a GPU."""
    device = torch.device("cuda", 0)
    known = {"weight": SimpleNamespace(device=device, dtype=dtype)} | changes
    return SimpleNamespace(config=config, device=device, H_init=None, state_dict=lambda **_: known)


def small(**changes: Any) -> EqRConfig:
    return tiny_config(**{"hidden_size": 128, **changes})


def see_gpu(monkeypatch: pytest.MonkeyPatch, seen: bool) -> None:
    for module in (base, cuda):
        monkeypatch.setattr(module, "gpu_is_seen", lambda: seen)


def test_an_extension_without_the_kernels_says_how_to_build_them(monkeypatch):
    monkeypatch.setattr(ops.library, "_has_cuda", False)
    on_the_cpu = EquilibriumReasoner(tiny_config())
    for model, seen in ((on_a_gpu(small()), False), (on_the_cpu, True)):
        see_gpu(monkeypatch, seen)
        why_not = CudaBackend().why_not(model, Precision.bf16) or ""
        assert "built without CUDA kernels" in why_not and "EQR_BUILD_CUDA=ON pip install" in why_not
    see_gpu(monkeypatch, False)
    why_not = CudaBackend().why_not(on_the_cpu, Precision.bf16) or ""
    assert why_not.endswith(f"is on cpu; torch {torch.__version__} sees no GPU here, so use backend='auto'")
    with FakeTensorMode(), pytest.raises(RuntimeError, match="EQR_BUILD_CUDA=ON pip install"):
        weights = OperatorWeights(torch.empty(7, 16, device="cuda"), *[None] * 4)  # type: ignore[arg-type]
        ops.pack_weights(weights, SUDOKU, Precision.bf16)


def test_no_extension_at_all(monkeypatch):
    monkeypatch.setattr(ops.library, "_extension", None)
    assert CudaBackend().why_not(on_a_gpu(small()), Precision.bf16) == ops.extension_status()[1]


@needs_kernels
@pytest.mark.parametrize(
    ("model", "precision", "message"),
    [
        (EquilibriumReasoner(tiny_config()), Precision.bf16, "weight .* is on cpu; move the model with model.cuda()"),
        (on_a_gpu(small(), torch.float16), Precision.bf16, "weight weight is torch.float16, .*use model.float()"),
        (
            on_a_gpu(small(), other=SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.bfloat16)),
            Precision.bf16,
            "weight other is on cuda:1 and others on cuda:0; use model.to",
        ),
        (on_a_gpu(small()), Precision.fp32, "compute in bf16, not in fp32; use precision='bf16', or backend='triton'"),
        (on_a_gpu(small()), Precision.int8, "compute in bf16, not in int8"),
        (on_a_gpu(small()), Precision.fp64, "compute in bf16, not in fp64"),
        (on_a_gpu(small(mlp_t=False)), Precision.bf16, r"token SwiGLU \(mlp_t=True\) and no attention; use backend='t"),
        (on_a_gpu(small(hidden_size=64)), Precision.bf16, "hidden_size 128, 256 and 512, got 64; use backend='triton'"),
        (on_a_gpu(small(seq_len=89)), Precision.bf16, "take seq_len up to 88, got 89; use backend='triton' or backend"),
    ],
)
def test_what_it_cannot_run_is_told_with_the_remedy(monkeypatch, model, precision, message):
    monkeypatch.setattr(cuda, "_limits", lambda device: H100)
    see_gpu(monkeypatch, True)
    why_not = CudaBackend().why_not(model, precision)
    assert why_not is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(why_not)


@needs_kernels
def test_what_it_can_run_and_how(monkeypatch):
    limits = H100
    monkeypatch.setattr(cuda, "_limits", lambda device: limits)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    model = on_a_gpu(small())
    assert CudaBackend().why_not(model, Precision.bf16) is None
    description = CudaBackend().describe(model, Precision.bf16)
    assert (
        "bf16, throughput_wgmma in clusters of 2, or for few trajectories latency, on Card (9.0, 132 mult"
        in description
    )
    monkeypatch.setenv("EQR_CUDA_REGIME", "latency")
    assert "bf16, latency (EQR_CUDA_REGIME=latency), on Card" in CudaBackend().describe(model, Precision.bf16)
    limits = {**H100, "major": 7}
    assert "the device has 7.0" in (CudaBackend().why_not(model, Precision.bf16) or "")
    limits = ADA
    assert CudaBackend().why_not(on_a_gpu(small(hidden_size=512)), Precision.bf16) is None
    monkeypatch.setenv("EQR_CUDA_REGIME", "auto")
    assert "shared memory" in (CudaBackend().why_not(on_a_gpu(small(hidden_size=512)), Precision.bf16) or "")
    monkeypatch.setenv("EQR_CUDA_REGIME", "both")
    expected = "the environment variable EQR_CUDA_REGIME must be one of auto, throughput, latency, got 'both'"
    assert expected in (CudaBackend().why_not(model, Precision.bf16) or "")


def test_it_is_preferred_and_asked_for_by_name(contractive, puzzles):
    assert next(iter(backends.available(contractive, Precision.bf16))) == "cuda"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run here: .*; can run: .*reference"):
        contractive.solve(puzzles, depth=1, halt="none", backend="cuda")


# ---- the ops without a device --------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("layout", KERNELS)
def test_fake_kernels_on_a_gpu(layout):
    S, d, V, k_S, k_d = SUDOKU.sizes[:5]
    rules = RunRules(*list(problem().values())[6:])
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        blocks = [empty(*shape) for shape in ((2 * k_S, S), (S, k_S), (2 * k_d, d), (d, k_d))] * 2
        layers = (BlockWeights(*blocks[:4]), BlockWeights(*blocks[4:]))
        given = OperatorWeights(empty(V, d), empty(V, d), empty(2, d), empty(2), layers)
        packed = ops.pack_weights(given, SUDOKU, Precision.bf16, layout=layout)
        assert packed.data.device.type == "cuda" and packed.data.dtype == torch.uint8
        assert len(packed.data) == ops.library.require().packed_bytes(*SUDOKU, "bf16", layout)
        control = torch.zeros(3, dtype=torch.int64)
        tokens, ids = empty(4, S, dtype=torch.int64), empty(4, dtype=torch.int64)
        for where in (control, empty(3, dtype=torch.int64)):
            out = ops.fixed_point(packed, tokens, ids, where, rules)
            assert all(t.device == packed.data.device for t in out)
            assert out.logits.shape == (4, S, V) and out.at_preds.shape == (2, 12, S) and out.residuals.shape == (12, 6)
        with pytest.raises(ValueError, match="ask is for runs on CPU.*look at control"):
            ops.fixed_point(packed, tokens, ids, control, rules, ask=lambda: None)
        with pytest.raises(ValueError, match=r"ids is on cpu and tokens on cuda:0; move it with .to\('cuda:0'\)"):
            ops.fixed_point(packed, tokens, torch.empty(4, dtype=torch.int64), control, rules)
        with pytest.raises(ValueError, match=r"packed is on cuda:0 and tokens on cpu; move it with .cpu\(\)"):
            ops.fixed_point(packed, torch.empty(4, S, dtype=torch.int64), ids, control, rules)
        with pytest.raises(ValueError, match="layout must be one of throughput_mma, throughput_wgmma, latency"):
            ops.pack_weights(given, SUDOKU, Precision.bf16, layout="best")


@needs_kernels
def test_layouts_are_told_apart_by_their_length():
    lengths = {ops.library.require().packed_bytes(*SUDOKU, "bf16", layout) for layout in KERNELS}
    assert len(lengths) == 3 and max(lengths) - min(lengths) == 256


def test_other_devices_are_refused():
    arguments = {**weights(), "embedding": weights()["embedding"].to("meta")}
    with pytest.raises(ValueError, match="embedding is on meta, and this op runs on CPU and on CUDA devices"):
        pack(**arguments)


def test_the_layout_means_nothing_on_the_cpu():
    assert torch.equal(pack(**weights()).data, pack(**weights(), layout="any").data)
    arguments = (*weights().values(), "latency")
    torch.library.opcheck(torch.ops.eqr_kernels.pack_weights.default, arguments)


# ---- the host beside a run -----------------------------------------------------------------------------------------


class Event:
    """One that has happened after some looks at it."""

    looks, synchronized = 0, False

    def record(self) -> None:
        Event.looks, Event.synchronized = 0, False

    def query(self) -> bool:
        Event.looks += 1
        return Event.looks > 20

    def synchronize(self) -> None:
        Event.synchronized = True


@pytest.fixture
def standing_in(monkeypatch):
    """The CPU's op in the place of the device's, and an H100 that is asked for its limits."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(cuda, "_limits", lambda device: H100)
    monkeypatch.setattr(watch, "_REPORT", 0.0)
    monkeypatch.setattr(CudaBackend, "why_not", lambda *_: None)


@needs_kernels
@pytest.mark.parametrize("options", [dict(select="vote", checkpoints=(1, 4)), dict(select="first"), dict(trace=True)])
def test_what_it_hands_over(standing_in, puzzles, options):
    model = make_contractive(small())
    options = dict(depth=8, tol=0.05, breadth=3, precision="bf16", return_all=True, **options)
    seen: list[tuple[int, ...]] = []
    got = model.solve(puzzles, backend="cuda", progress=lambda *now: seen.append(now), **options)
    want = model.solve(puzzles, backend="cpu", **options)
    assert got.backend == "cuda" and "throughput_wgmma with 36 CTAs, 36 in flight" in got.backend_reason
    for field in ("preds", "logits", "restart", "all_preds", "residuals"):
        assert getattr(got, field) is None or torch.equal(
            getattr(got, field).nan_to_num(7), getattr(want, field).nan_to_num(7)
        )
    for depth, at in want.at.items():
        assert torch.equal(got.at[depth].all_preds, at.all_preds)
    assert seen[0] == (0, 36, 0) and seen[-1] == (36, 36, int(got.nfe.sum())) and seen == sorted(seen)
    assert len(seen) > 10
    limited = model.solve(puzzles, backend="cuda", slots=5, **options)
    assert "throughput_wgmma with 4 CTAs" in limited.backend_reason


@needs_kernels
def test_regimes_are_chosen_by_the_environment(standing_in, puzzles, monkeypatch):
    model = make_contractive(small())
    for regime, kernel in (("latency", "latency"), ("throughput", "throughput_wgmma")):
        monkeypatch.setenv("EQR_CUDA_REGIME", regime)
        for n in (1, 12):
            reason = model.solve(puzzles[:n], backend="cuda", depth=1, halt="none", precision="bf16").backend_reason
            assert f"{kernel} with " in reason and f"EQR_CUDA_REGIME={regime}" in reason


@needs_kernels
def test_cancelling_and_raising(standing_in, puzzles):
    model = make_contractive(small())
    options = dict(backend="cuda", depth=3, halt="none", precision="bf16")
    none = model.solve(puzzles, progress=lambda *_: False, **options)
    assert (none.all_status == Status.CANCELLED).all() and none.nfe.sum() == 0
    calls = []

    def enough(*_: int) -> None:
        calls.append(0)
        if len(calls) == 3:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        model.solve(puzzles, progress=enough, **options)
    assert Event.synchronized and len(calls) == 3


def test_counts_never_go_back(standing_in):
    seen = []
    run = watch.Watch(torch.device("cpu"), lambda *now: seen.append(now) or True)
    for counts in ([0, 2, 9], [0, 1, 11], [0, 3, 10]):
        run.control.copy_(torch.tensor(counts))
        assert run.report()
    assert seen == [(0, 0), (2, 9), (2, 11), (3, 11)]


def test_the_operator_is_told_without_its_weights():
    operator = operator_of(EquilibriumReasoner(EqRConfig.sudoku_paper()))
    assert operator == SUDOKU
    maze = operator_of(EquilibriumReasoner(EqRConfig.maze(seq_len=4)))
    assert maze.sizes[5] == 8 and maze.sizes[3] == 0 and maze.sizes[9] == 1


def test_as_many_depths_are_recorded_as_the_kernel_has_room_for():
    header = (REPOSITORY / "csrc" / "cuda" / "problem.h").read_text()
    assert f"constexpr int kMostCheckpoints = {CudaBackend.max_checkpoints};" in header
