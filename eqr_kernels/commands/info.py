"""`eqr info`."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from typing import Any

from eqr_kernels.commands import options as opt
from eqr_kernels.commands.console import code_commit, command, emit

_EXTRAS = {"huggingface_hub": "hub", "tensorboard": "train", "matplotlib": "plot"}


@command
def info(as_json: opt.AsJson = False, output: opt.Output = None) -> None:
    """Tell versions, the compiled extension, CPU features, backends and why one is unavailable, and shipped models."""
    import torch

    import eqr_kernels
    from eqr_kernels import ops

    built, status = ops.extension_status()
    report: dict[str, Any] = {
        "command": "info",
        "versions": {
            "eqr_kernels": eqr_kernels.__version__,
            "commit": code_commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "extension": {"loaded": built, "status": status, "build": ops.build_info() if built else None},
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "isas": ops.cpu_isas() if built else [],
            "isa": ops.cpu_isa() if built else None,
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": _backends(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("EQR_") or k == "OMP_NUM_THREADS"},
        "extras": {name: importlib.util.find_spec(name) is not None for name in _EXTRAS},
        "models": _models(),
    }
    emit(report, as_json, output)
    if not as_json:
        _draw(report)


def _cpu_name() -> str:
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
                names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
            return names[0] if names else platform.machine()
        except OSError:
            pass
    return platform.processor() or platform.machine()


def _backends() -> dict[str, dict[str, Any]]:
    """Which backends can run the smallest preset in the weights' usual dtype, and why the others cannot."""
    import torch

    from eqr_kernels import backends
    from eqr_kernels.config import EqRConfig
    from eqr_kernels.modules import EquilibriumReasoner

    model = EquilibriumReasoner(EqRConfig.sudoku_small())
    reasons = backends.available(model, torch.float32)
    usable = {
        name: backends.choose(name, model, torch.float32)[0].describe(model, torch.float32)
        for name, why_not in reasons.items()
        if why_not is None
    }
    return {name: {"available": name in usable, "note": usable.get(name, why_not)} for name, why_not in reasons.items()}


def _models() -> list[dict[str, Any]]:
    """The cards of the shipped models, in short; one that cannot be read says so."""
    from eqr_kernels.checkpoint import PRETRAINED, ModelCard, available_models

    models: list[dict[str, Any]] = []
    for name in available_models():
        path = PRETRAINED / f"{name}.json"
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
                "bytes": (PRETRAINED / f"{name}.safetensors").stat().st_size,
                "data": card.data,
                "steps": card.steps,
                "tol": card.tol,
                "accuracies": card.accuracies,
                "notes": card.notes,
                "commit": card.commit,
            }
        )
    return models


def _draw(report: dict[str, Any]) -> None:
    from eqr_kernels.commands import drawing

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
            "GPUs": ", ".join(report["gpus"]) or "none that torch sees",
            "environment": ", ".join(f"{k}={v}" for k, v in report["environment"].items()) or "nothing set",
        },
    )
    told = {name: ("yes: " if b["available"] else "no: ") + b["note"] for name, b in report["backends"].items()}
    drawing.facts("backends", told)
    extras = {
        name: "installed" if there else f"not installed: pip install 'eqr_kernels[{_EXTRAS[name]}]'"
        for name, there in report["extras"].items()
    }
    drawing.facts("optional packages", extras)
    models = {model["name"]: _headline(model) for model in report["models"]}
    drawing.facts("shipped models", models or {"none": "in this installation"})


def _headline(model: dict[str, Any]) -> str:
    if "error" in model:
        return str(model["error"])
    tol = "not calibrated" if model["tol"] is None else f"tol {model['tol']:g}"
    steps = "" if model["steps"] is None else f"{model['steps']:,} training steps; "
    notes = f"\n{model['notes']}" if model["notes"] else ""
    return f"{model['size']}; {steps}{tol}; {model['bytes'] / 1e6:.1f} MB{notes}"
