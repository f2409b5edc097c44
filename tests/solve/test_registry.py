"""The registry of backends and what `eqr info` tells of them: the order, the remedies, and that nobody wakes a GPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from eqr_kernels import EquilibriumReasoner, backends
from eqr_kernels.cli import app, info
from eqr_kernels.precision import Precision
from tests.support.commands import eqr_json
from tests.support.models import make_contractive, tiny_config

NAMES = ("cuda", "triton", "cpu", "reference")


def test_auto_prefers_the_fused_kernels_in_this_order():
    order = [backend.name for backend in backends._BACKENDS]
    assert order == sorted(order, key=NAMES.index), "the order is cuda, triton, cpu, reference"
    assert set(backends.available(EquilibriumReasoner(tiny_config()), Precision.fp32)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_explicit_backend_on_the_wrong_device_names_the_remedy(name):
    """On a device that no kernel was written for, whatever this machine has."""
    model = EquilibriumReasoner(tiny_config()).to("meta")
    why_not = backends.available(model, Precision.fp32)[name]
    if name == "reference":
        assert why_not is None
        return
    assert why_not is not None
    remedies = ("model.cpu()", "model.cuda()", "model.to(", "backend=", "install", "EQR_", "planned")
    assert any(remedy in why_not for remedy in remedies), why_not
    with pytest.raises(RuntimeError, match=f"backend={name!r} cannot run here: .*; can run: .*reference") as raised:
        backends.choose(name, model, Precision.fp32)
    assert why_not in str(raised.value)


def test_the_environment_is_asked_by_auto_alone(monkeypatch):
    model = make_contractive(tiny_config())
    monkeypatch.setenv("EQR_BACKEND", "reference")
    chosen, reason = backends.choose("auto", model, Precision.fp32)
    assert chosen.name == "reference" and reason.startswith("EQR_BACKEND='reference': plain PyTorch")
    monkeypatch.setenv("EQR_BACKEND", "gpu")
    with pytest.raises(ValueError, match="EQR_BACKEND='gpu' is not a backend; known: auto, .*reference"):
        backends.choose("auto", model, Precision.fp32)
    assert backends.choose("reference", model, Precision.fp32)[1].startswith("backend='reference'")
    monkeypatch.setenv("EQR_BACKEND", "auto")
    assert backends.choose("auto", model, Precision.fp32)[1].startswith("auto chose")


ASLEEP = """
import pkgutil, sys, importlib
import torch

def woken(*_, **__):
    raise SystemExit("CUDA was initialised")

torch.cuda._lazy_init = woken
import eqr_kernels
for module in pkgutil.walk_packages(eqr_kernels.__path__, "eqr_kernels."):
    if ".triton" not in module.name and module.name != "eqr_kernels._C":
        importlib.import_module(module.name)
for name in ("triton", "ray", "pyarrow"):
    assert name not in sys.modules, f"{name} was imported"
from eqr_kernels import EqRConfig, EquilibriumReasoner, backends
model = EquilibriumReasoner(EqRConfig.sudoku_small())
result = model.solve(torch.ones(1, 81, dtype=torch.long), depth=1, halt="none")
assert not torch.cuda.is_initialized()
print(result.backend)
"""


@pytest.mark.slow
def test_neither_imports_nor_a_solve_on_the_cpu_wake_a_gpu():
    done = subprocess.run([sys.executable, "-c", ASLEEP], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() in ("cpu", "reference")


# ---- eqr info ------------------------------------------------------------------------------------------------------


def test_info_tells_for_each_device_what_auto_takes(monkeypatch):
    report = eqr_json("info")
    assert set(report["auto"]) >= {"cpu"} and set(report["auto"]["cpu"]) == {"fp32", "bf16", "int8"}
    for backend in report["backends"].values():
        assert set(backend["on"]) == set(report["auto"]) and backend["note"]
        assert backend["available"] == any(on["available"] for on in backend["on"].values())
    assert report["auto"]["cpu"]["fp32"].startswith("auto chose ")
    assert set(report["cuda"]) >= {"torch_runtime", "driver", "driver_takes", "compiled_with", "compiled_architectures"}
    monkeypatch.setenv("EQR_BACKEND", "reference")
    assert eqr_json("info")["auto"]["cpu"]["bf16"].startswith("EQR_BACKEND='reference'")
    assert eqr_json("info")["auto"]["cpu"]["int8"].startswith("none: EQR_BACKEND='reference' cannot run here")


def test_info_describes_a_gpu_and_survives_one_that_cannot_be_used(monkeypatch):
    card = SimpleNamespace(
        name="Card", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)

    def refuse(model: EquilibriumReasoner, device: str) -> EquilibriumReasoner:
        if device == "cpu":
            return model
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(EquilibriumReasoner, "to", refuse)
    report = eqr_json("info")
    assert report["gpus"] == [
        {
            "device": "cuda:0",
            "name": "Card",
            "capability": "9.0",
            "multiprocessors": 132,
            "memory": 80 << 30,
            "l2": 50 << 20,
        }
    ]
    assert report["auto"]["cuda:0"]["bf16"] == "torch cannot use cuda:0: CUDA error: no kernel image is available"
    assert report["backends"]["reference"]["available"] and report["backends"]["reference"]["device"] == "cpu"
    text = " ".join(CliRunner().invoke(app, ["info"]).stdout.replace("│", " ").split())
    assert "Card, compute capability 9.0, 132 multiprocessors, 80.0 GiB, L2 50 MiB" in text
    assert "backends on cuda:0" in text and "torch cannot use cuda:0" in text

    def broken(index: int) -> None:
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert eqr_json("info")["gpus"] == [{"device": "cuda:0", "error": "the driver is too old"}]
    assert "cannot be asked: the driver is too old" in " ".join(CliRunner().invoke(app, ["info"]).stdout.split())


def test_info_reads_the_drivers_version(monkeypatch):
    class Driver:
        @staticmethod
        def cuDriverGetVersion(version: Any) -> int:
            version._obj.value = 13020
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver)
    assert info._driver_takes() == "13.2"

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert info._driver_takes() is None
