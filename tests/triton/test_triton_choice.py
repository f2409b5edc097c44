"""What backend="triton" says where it cannot run, how it chooses tiles and keeps the choice. Needs no GPU."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner, backends
from eqr_kernels.backends import base
from eqr_kernels.backends.triton import adapter
from eqr_kernels.backends.triton.plan import INTERPRETED, Plan, Tiles, candidates
from eqr_kernels.precision import Precision
from tests.support.models import make_contractive, tiny_config

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")
BACKEND = adapter.TritonBackend()


@pytest.fixture(autouse=True)
def not_interpreting(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def why_not(model: EquilibriumReasoner, precision: Precision = Precision.fp32) -> str:
    reason = BACKEND.why_not(model, precision)
    assert reason is not None
    return reason


# ---- where it cannot run -------------------------------------------------------------------------------------------


@needs_triton
def test_a_model_on_the_cpu_names_a_remedy_that_can_be_followed(contractive, puzzles, monkeypatch):
    remedy = f"torch {torch.__version__} sees no GPU here, so use backend='auto'"
    for seen, message in ((True, "move the model with model.cuda()"), (False, remedy)):
        monkeypatch.setattr(base, "gpu_is_seen", lambda seen=seen: seen)
        assert why_not(contractive) == f"the model is on cpu, and Triton needs a GPU; {message}"
    with pytest.raises(RuntimeError, match="backend='triton' cannot run here: the model is on cpu.*; can run: "):
        contractive.solve(puzzles, depth=1, halt="none", backend="triton")
    result = contractive.solve(puzzles, depth=1, halt="none")
    assert result.backend in ("cpu", "reference") and "; triton: the model is on cpu" in result.backend_reason


@needs_triton
def test_the_interpreter_makes_the_cpu_a_device(contractive, monkeypatch):
    for value in ("1", "true"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert BACKEND.why_not(contractive, Precision.fp32) is None
        assert "in Triton's interpreter on the CPU: for tests, slow" in BACKEND.describe(contractive, Precision.bf16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "the model is on cpu" in why_not(contractive)


def test_without_triton_it_says_how_to_get_it(contractive, monkeypatch):
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    assert why_not(contractive) == "Triton is not installed; pip install triton (Linux only)"
    assert backends.available(contractive, Precision.fp32)["triton"] == why_not(contractive)


@pytest.mark.parametrize("name", ["int8", "fp16", "fp64"])
def test_other_precisions_name_those_it_has(contractive, name):
    reason = why_not(contractive, Precision[name])
    assert reason.startswith(f"the Triton kernel computes in fp32, bf16, not in {name}; use precision=")


@needs_triton
def test_an_old_gpu_is_told_by_its_capability(contractive, monkeypatch):
    monkeypatch.setattr(EquilibriumReasoner, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(EquilibriumReasoner, "state_dict", lambda *_, **__: {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    for capability, runs in (((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        if runs:
            assert BACKEND.why_not(contractive, Precision.fp32) is None
        else:
            message = "Old GPU has compute capability 7.5, and the kernel needs 8.0; use backend='reference'"
            assert why_not(contractive) == message
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is set" in why_not(contractive)


@needs_triton
def test_a_weight_elsewhere_is_named(contractive):
    contractive.q_head.to("meta")
    assert why_not(contractive).startswith("weight q_head.weight is on meta, others are on cpu; ")


LAZY = """
import sys, torch
import eqr_kernels
from eqr_kernels import EqRConfig, EquilibriumReasoner, backends
from eqr_kernels.precision import Precision
backends.available(EquilibriumReasoner(EqRConfig.sudoku_small()), Precision.fp32)
print("triton" in sys.modules, torch.cuda.is_initialized())
"""


@pytest.mark.slow
def test_triton_is_not_imported_before_it_is_used():
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False False\n", done.stderr


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        EqRConfig.sudoku_paper(),
        EqRConfig.maze(),
        EqRConfig(seq_len=1, hidden_size=1),
        EqRConfig(seq_len=300, hidden_size=65),
        EqRConfig(seq_len=35, hidden_size=21, num_heads=7, mlp_t=False),
    ],
    ids=["sudoku-paper", "maze", "smallest", "odd", "odd attention"],
)
def test_tiles_divide_what_they_cut(config, dtype):
    plans = [*candidates(config, dtype), Plan.of(config, INTERPRETED)]
    assert len(set(plans)) == len(plans) >= 2
    for p in plans:
        for tile in (p.tile.columns, p.inner, p.tile.mix_features, p.tile.row_features):
            assert p.width % tile == 0
        assert p.hidden % p.tile.hidden == 0 and p.hidden % p.tile.inner == 0
        assert p.token_hidden % p.tile.mix_units == 0 and p.token_hidden % p.tile.tokens == 0
        assert p.one_pass or p.span % p.inner_tokens == 0
        assert p.span % 16 == p.work % 16 == p.squares_size % 16 == 0, "rows should begin where vectors may"
        assert p.width >= p.d and p.tile_S >= p.S and p.work >= p.S * p.hidden


def test_presets_need_no_padding():
    for config in (EqRConfig.sudoku_paper(), EqRConfig.sudoku_small(), EqRConfig.maze()):
        assert {plan.width for plan in candidates(config, torch.bfloat16)} == {config.hidden_size}


def test_tiles_from_a_file_are_checked():
    tiles = asdict(INTERPRETED)
    assert Tiles.from_dict(tiles) == INTERPRETED
    for broken in ({**tiles, "warps": 0}, {**tiles, "warps": True}, {**tiles, "warps": "8"}):
        with pytest.raises(ValueError, match="warps must be a positive int"):
            Tiles.from_dict(broken)
    with pytest.raises(TypeError):
        Tiles.from_dict({**tiles, "more": 1})


# ---- the tuner -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    from eqr_kernels.backends.triton import tuner

    monkeypatch.setenv("EQR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("EQR_TRITON_TUNE", raising=False)
    monkeypatch.setattr(tuner, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda _: adapter.nullcontext())
    return tuner


MODEL = make_contractive(tiny_config())
PLANS = candidates(MODEL.config, torch.bfloat16)
LOGITS = torch.ones(6, 7)


def test_the_fastest_that_runs_and_agrees_is_taken(tuner, caplog):
    def time(plan):
        match PLANS.index(plan):
            case 0:
                return 3.0, LOGITS
            case 1:
                raise RuntimeError("out of resource: shared memory")
            case 2:
                return 1.0, -LOGITS
            case 3:
                return 0.5, LOGITS * torch.nan
        return 2.0, LOGITS * 1.01

    with caplog.at_level(logging.DEBUG, "eqr_kernels"):
        assert tuner.fastest(PLANS, torch.bfloat16, time) == PLANS[4]
    for message in ("shared memory", "differ from the first candidate's by 2", "not finite", "2.000 ms with tiles"):
        assert message in caplog.text


@pytest.mark.parametrize("tuning", ["0", "1"])
def test_models_of_one_size_share_their_tiles_and_nothing_else(tuner, monkeypatch, tuning):
    monkeypatch.setenv("EQR_TRITON_TUNE", tuning)
    monkeypatch.setattr(tuner, "_fits", lambda *_: True)
    monkeypatch.setattr(tuner, "_time", lambda *_: (1.0, LOGITS))
    for fixed in (False, True, False):
        model = EquilibriumReasoner(tiny_config(fixed_init=fixed))
        plan = tuner.plan_for(model, torch.bfloat16)
        assert plan == tuner.known_plan(model, torch.bfloat16)
        assert plan.fixed_start == fixed


def test_nothing_that_fits_tells_every_reason(tuner):
    def fails(plan):
        raise RuntimeError(f"no room for {PLANS.index(plan)}")

    for choose in (lambda: tuner.fastest(PLANS, torch.bfloat16, fails), lambda: tuner.first_that_fits(PLANS, fails)):
        with pytest.raises(RuntimeError, match="use backend='reference'.*no room for 0.*no room for 1"):
            choose()


def test_a_choice_is_kept_in_memory_and_file(tuner, monkeypatch, tmp_path):
    timed = []

    def time(model, dtype, plan):
        timed.append(plan)
        return float(-PLANS.index(plan)), LOGITS

    monkeypatch.setattr(tuner, "_time", time)
    assert tuner.known_plan(MODEL, torch.bfloat16) is None
    assert tuner.plan_for(MODEL, torch.bfloat16) == PLANS[-1] and timed == list(PLANS)
    assert tuner.plan_for(MODEL, torch.bfloat16) == tuner.known_plan(MODEL, torch.bfloat16) == PLANS[-1]
    tuner._chosen.clear()
    assert tuner.plan_for(MODEL, torch.bfloat16) == PLANS[-1] and len(timed) == len(PLANS)
    choices = json.loads((tmp_path / "triton.json").read_text())["choices"]
    (key,) = choices
    assert key.startswith(f"Some GPU, triton {tuner.launch.VERSION}, bfloat16, S=6 d=16 V=7 hidden=256")
    # Another shape, dtype or device is another choice; tiles that are no candidate any more are none.
    other = make_contractive(tiny_config(hidden_size=32))
    assert tuner.known_plan(other, torch.bfloat16) is None and tuner.known_plan(MODEL, torch.float32) is None
    tuner._chosen.clear()
    (tmp_path / "triton.json").write_text(json.dumps({"choices": {key: asdict(replace(INTERPRETED, warps=2))}}))
    assert tuner.known_plan(MODEL, torch.bfloat16) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"choices": 3}', '{"choices": {"a": 1}}', "\x00\xff"])
def test_a_broken_file_is_no_error(tuner, monkeypatch, tmp_path, text):
    (tmp_path / "triton.json").write_text(text)
    monkeypatch.setattr(tuner, "_time", lambda model, dtype, plan: (1.0, LOGITS))
    assert tuner.plan_for(MODEL, torch.bfloat16) == PLANS[0]
    tuner._chosen.clear()
    assert tuner.known_plan(MODEL, torch.bfloat16) == PLANS[0], "it should have been written anew"


def test_a_file_that_cannot_be_written_is_no_error(tuner, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EQR_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(tuner, "_time", lambda model, dtype, plan: (1.0, LOGITS))
    assert tuner.plan_for(MODEL, torch.bfloat16) == PLANS[0]
    assert "cannot be kept in" in caplog.text and "set EQR_CACHE_DIR" in caplog.text
    monkeypatch.delenv("EQR_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuner.cache_file() == tmp_path / ".cache" / "eqr_kernels" / "triton.json"


def test_untimed_takes_the_first_that_fits(tuner, monkeypatch, tmp_path):
    tried = []

    def fits(model, dtype, plan):
        tried.append(plan)
        if plan == PLANS[0]:
            raise RuntimeError("too large")

    monkeypatch.setattr(tuner, "_fits", fits)
    monkeypatch.setattr(tuner, "_time", lambda *_: pytest.fail("it was timed"))
    monkeypatch.setenv("EQR_TRITON_TUNE", "0")
    for _ in range(2):
        assert tuner.plan_for(MODEL, torch.bfloat16) == PLANS[1] and tried == list(PLANS[:2])
    monkeypatch.delenv("EQR_TRITON_TUNE")
    assert tuner.known_plan(MODEL, torch.bfloat16) is None, "what was not timed must not pass for the fastest"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuner.plan_for(MODEL, torch.bfloat16) == PLANS[1]
    assert not (tmp_path / "triton.json").exists()
