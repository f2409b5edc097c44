"""`eqr info`."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from typing import Any

import torch

import eqr_kernels
from eqr_kernels import backends, ops
from eqr_kernels.checkpoint import ModelCard, available_models, sources
from eqr_kernels.cli import options as opt
from eqr_kernels.cli.console import command, emit
from eqr_kernels.cli.render import terminal as drawing
from eqr_kernels.commit import code_commit
from eqr_kernels.config import EqRConfig
from eqr_kernels.precision import NAMED, Precision
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.tasks.registry import known_tasks

_EXTRAS = {"huggingface_hub": "hub", "tensorboard": "train", "matplotlib": "plot", "fastapi": "serve"}


@command
def info(as_json: opt.AsJson = False, output: opt.Output = None) -> None:
    """Tell versions, the compiled extension, the machine, backends and why one is unavailable, and shipped models."""
    built, status = ops.extension_status()
    report: dict[str, Any] = {
        "command": "info",
        "versions": versions(),
        "extension": {"loaded": built, "status": status, "build": ops.build_info() if built else None},
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "isas": ops.cpu_isas() if built else [],
            "isa": ops.cpu_isa() if built else None,
        },
        "cuda": cuda_report(),
        "gpus": [gpu_report(i) for i in range(torch.cuda.device_count())],
        **_backends(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("EQR_") or k == "OMP_NUM_THREADS"},
        "extras": {name: importlib.util.find_spec(name) is not None for name in _EXTRAS},
        "tasks": known_tasks(),
        "models": _models(),
    }
    emit(report, as_json, output)
    if not as_json:
        _draw(report)


def versions() -> dict[str, str | None]:
    """Versions of this package and of what it runs on."""
    return {
        "eqr_kernels": eqr_kernels.__version__,
        "commit": code_commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def cpu_name() -> str:
    """The CPU's name as its maker gives it, or its architecture."""
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
                names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
            return names[0] if names else platform.machine()
        except OSError:
            pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """What is installed, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_report() -> dict[str, Any]:
    """The CUDA that torch was built with, what the driver takes, and what the extension was compiled for."""
    build = ops.build_info() if ops.extension_status()[0] else {}
    return {
        "torch_runtime": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "torch_architectures": torch.cuda.get_arch_list(),
        "driver": _driver(),
        "driver_takes": _driver_takes(),
        "compiled_with": build.get("cuda"),
        "compiled_architectures": build.get("cuda_architectures"),
    }


def _driver() -> str | None:
    """The version of NVIDIA's kernel driver, as the kernel tells it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as file:
            match = re.search(r"Kernel Module\D*([\d.]+)", file.read())
    except OSError:
        return None
    return match[1] if match else None


def _driver_takes() -> str | None:
    """The highest CUDA version that the driver takes; None where there is no driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def gpu_report(index: int) -> dict[str, Any]:
    """What torch tells of a GPU; one that cannot be asked says why."""
    try:
        gpu = torch.cuda.get_device_properties(index)
    except (AssertionError, RuntimeError) as error:
        return {"device": f"cuda:{index}", "error": _headline(error)}
    return {
        "device": f"cuda:{index}",
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory": gpu.total_memory,
        "l2": getattr(gpu, "L2_cache_size", None),
    }


def _backends() -> dict[str, Any]:
    """For each device and backend whether it can run the smallest preset in fp32 or why not, and what auto takes.

    `backends[name]` is that of the best device: a GPU on which it can run, else the CPU.
    """
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    on: dict[str, dict[str, dict[str, Any]]] = {}
    auto: dict[str, dict[str, str]] = {}
    for device in devices:
        try:
            model = EquilibriumReasoner(EqRConfig.sudoku_small()).to(device)
        except (AssertionError, RuntimeError) as error:
            why_not = f"torch cannot use {device}: {_headline(error)}"
            on[device] = {name: {"available": False, "note": why_not} for name in on["cpu"]}
            auto[device] = {precision.name: why_not for precision in NAMED}
            continue
        on[device] = _runs_on(model)
        auto[device] = {precision.name: _chosen(model, precision) for precision in NAMED}
    by_name = {}
    for name in on["cpu"]:
        best = next((d for d in (*devices[1:], "cpu") if on[d][name]["available"]), "cpu")
        by_name[name] = {**on[best][name], "device": best, "on": {device: on[device][name] for device in devices}}
    return {"backends": by_name, "auto": auto}


def _runs_on(model: EquilibriumReasoner) -> dict[str, dict[str, Any]]:
    reasons = backends.available(model, Precision.fp32)
    usable = {
        name: backends.choose(name, model, Precision.fp32)[0].describe(model, Precision.fp32)
        for name, why_not in reasons.items()
        if why_not is None
    }
    return {name: {"available": name in usable, "note": usable.get(name, why_not)} for name, why_not in reasons.items()}


def _chosen(model: EquilibriumReasoner, precision: Precision) -> str:
    """What `solve` would take by itself on the model's device, and why; EQR_BACKEND has its say."""
    try:
        return backends.choose("auto", model, precision)[1]
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"


def _headline(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _models() -> list[dict[str, Any]]:
    """The cards of the shipped models, in short; one that cannot be read says so."""
    models: list[dict[str, Any]] = []
    for name in available_models():
        path = sources.PRETRAINED / f"{name}.json"
        try:
            card = ModelCard.from_json(path.read_text(encoding="utf-8"), path)
        except (OSError, TypeError, ValueError) as error:
            models.append({"name": name, "error": str(error)})
            continue
        c = card.config
        models.append(
            {
                "name": name,
                "size": f"d {c.hidden_size}, {c.L_layers} layers, H {c.H_cycles}, L {c.L_cycles}, "
                f"{c.layers_per_step} layer equivalents a step",
                "bytes": (sources.PRETRAINED / f"{name}.safetensors").stat().st_size,
                "data": card.data,
                "steps": card.steps,
                "tol": card.tol,
                "tol_fast": card.tol_fast,
                "tol_missing": card.tol_missing or None,
                "accuracies": card.accuracies,
                "notes": card.notes,
                "commit": card.commit,
            }
        )
    return models


def _draw(report: dict[str, Any]) -> None:
    extension, cpu = report["extension"], report["cpu"]
    build = extension["build"] or {}
    drawing.facts("versions", {name: str(value or "unknown") for name, value in report["versions"].items()})
    drawing.facts(
        "compiled extension",
        {
            "loaded": ("yes: " if extension["loaded"] else "no: ") + extension["status"],
            **{name: str(value) for name, value in build.items()},
        },
    )
    drawing.facts(
        "machine",
        {
            "CPU": f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['torch_threads']} threads",
            "torch's CPU kernels": cpu["torch_capability"],
            "our CPU kernels": f"{cpu['isa']} (of {', '.join(cpu['isas'])})" if cpu["isa"] else "need the extension",
            **({gpu["device"]: _gpu_line(gpu) for gpu in report["gpus"]} or {"GPUs": "none that torch sees"}),
            "CUDA": _cuda_line(report["cuda"]),
            "environment": ", ".join(f"{k}={v}" for k, v in report["environment"].items()) or "nothing set",
        },
    )
    for device, choices in report["auto"].items():
        on = {name: backend["on"][device] for name, backend in report["backends"].items()}
        notes = {name: ("yes: " if b["available"] else "no: ") + b["note"] for name, b in on.items()}
        for precision, choice in choices.items():
            # Why the others are passed over stands above, each in its own line.
            notes[f"auto, {precision}"] = choice if choice.startswith("none") else choice.partition("; ")[0]
        drawing.facts("backends" if len(report["auto"]) == 1 else f"backends on {device}", notes)
    extras = {
        name: "installed" if there else f"not installed: pip install 'eqr_kernels[{_EXTRAS[name]}]'"
        for name, there in report["extras"].items()
    }
    drawing.facts("optional packages", extras)
    drawing.facts("tasks", {"by name": ", ".join(report["tasks"])})
    models = {model["name"]: _model_line(model) for model in report["models"]}
    drawing.facts("shipped models", models or {"none": "in this installation"})


def _gpu_line(gpu: dict[str, Any]) -> str:
    if "error" in gpu:
        return f"cannot be asked: {gpu['error']}"
    l2 = "" if gpu["l2"] is None else f", L2 {gpu['l2'] / 2**20:.0f} MiB"
    size = f"{gpu['memory'] / 2**30:.1f} GiB{l2}"
    return f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, {size}"


def _cuda_line(cuda: dict[str, Any]) -> str:
    torch_has = f"torch built with {cuda['torch_runtime']}" if cuda["torch_runtime"] else "torch built without it"
    driver = (
        "no driver" if cuda["driver_takes"] is None else f"driver {cuda['driver']} takes up to {cuda['driver_takes']}"
    )
    if cuda["compiled_with"] is None:
        return f"{torch_has}, {driver}, no kernels compiled"
    architectures = cuda["compiled_architectures"] or "architectures not recorded"
    return f"{torch_has}, {driver}, kernels compiled with {cuda['compiled_with']} for {architectures}"


def _model_line(model: dict[str, Any]) -> str:
    if "error" in model:
        return str(model["error"])
    names = [name for name in ("tol", "tol_fast") if model[name] is not None]
    tol = ", ".join(f"{name} {model[name]:g}" for name in names) or "no tolerance"
    if model["tol"] is None:
        tol += f", converged is no promise: {model['tol_missing'] or 'not calibrated'}"
    steps = "" if model["steps"] is None else f"{model['steps']:,} training steps; "
    notes = f"\n{model['notes']}" if model["notes"] else ""
    return f"{model['size']}; {steps}{tol}; {model['bytes'] / 1e6:.1f} MB{notes}"
