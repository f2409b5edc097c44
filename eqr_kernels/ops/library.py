"""Loads the compiled extension eqr_kernels._C, and says what it is or why it is not there."""

from __future__ import annotations

import importlib.machinery
import os
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DISABLE = "EQR_DISABLE_EXTENSION"
_PACKAGE = Path(__file__).parents[1]
_NOTE = _PACKAGE / "_no_extension.txt"


def _build_command(*settings: str) -> str:
    """How to build the extension for the package that runs, where settings are of the environment."""
    command = " ".join([*settings, "pip install --no-build-isolation"])
    if (_PACKAGE.parent / "CMakeLists.txt").is_file():
        return f"`{command} -e {shlex.quote(str(_PACKAGE.parent))}`"
    return f"`{command} FOLDER`, FOLDER being a checkout of eqr_kernels or its unpacked sdist"


_REMEDY = f"build it beside the torch you use: {_build_command()}"


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get(DISABLE, "0").strip() not in ("", "0"):
        return None, f"the compiled extension is switched off by {DISABLE}={os.environ[DISABLE]}; unset it to use it"
    # In this folder and nowhere else: the hook of an editable install would find another copy's.
    if importlib.machinery.PathFinder.find_spec("eqr_kernels._C", [str(_PACKAGE)]) is None:
        note = _NOTE.read_text(encoding="utf-8").strip() if _NOTE.is_file() else "eqr_kernels._C has not been built"
        return None, f"{note}; {_REMEDY}"
    try:
        # torch's libraries are loaded by now, which is how this one finds their symbols.
        from eqr_kernels import _C
    except ImportError as error:
        reason = f"eqr_kernels._C was built but does not load with torch {torch.__version__} ({error}); {_REMEDY}"
        warnings.warn(f"eqr_kernels runs without its compiled extension: {reason}", RuntimeWarning, stacklevel=3)
        return None, reason
    info = _C.build_info()
    return _C, f"eqr_kernels._C {info['version']}, built by {info['compiler']} with torch {info['torch_headers']}"


_extension, _status = _load()
# Asked once, since torch.compile traces what asks for the kernels, and cannot trace a function of the extension.
_has_cuda = _extension is not None and _extension.build_info()["cuda"] is not None


def extension_status() -> tuple[bool, str]:
    """Whether the compiled extension is loaded, and what it is or why it is not."""
    return _extension is not None, _status


def require() -> Any:
    if _extension is None:
        raise RuntimeError(f"this needs the compiled extension: {_status}; or use backend='reference'")
    return _extension


def require_cuda(tensor: Tensor) -> None:
    """That the extension has kernels for the device of a tensor, where that is a CUDA device."""
    if isinstance(tensor, Tensor) and tensor.device.type == "cuda" and (why_not := why_not_cuda()):
        raise RuntimeError(why_not)


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the fake kernel of an op, where the extension that defines the op is loaded."""
    if _extension is None:
        return lambda function: function
    register: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.library.register_fake(f"eqr_kernels::{name}")
    return register


def why_not_cuda() -> str | None:
    """Why the extension has no CUDA kernels, with the remedy; None where it has them."""
    if _extension is None:
        return _status
    if not _has_cuda:
        return (
            "eqr_kernels._C was built without CUDA kernels; put nvcc of the CUDA toolkit on PATH (or set CUDACXX) and "
            f"run {_build_command('EQR_BUILD_CUDA=ON')}"
        )
    return None


def build_info() -> dict[str, Any]:
    """What the extension was built with: version, compiler, build_type, torch_headers, torch_target, avx512, cuda and
    cuda_architectures (None without CUDA kernels).

    Raises:
        RuntimeError: there is no extension.
    """
    return dict(require().build_info())


def cpu_isas() -> list[str]:
    """The instruction sets that the CPU kernels can use here, best last: of portable, avx2, avx512, avx512_bf16,
    amx.

    Raises:
        RuntimeError: there is no extension.
    """
    return list(require().cpu_isas())


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: the best, or what EQR_CPU_ISA or `set_cpu_isa` asked for.

    Raises:
        RuntimeError: there is no extension.
        ValueError: EQR_CPU_ISA names an instruction set that is not available.
    """
    return str(require().cpu_isa())


def set_cpu_isa(name: str) -> None:
    """Chooses the instruction set of the CPU kernels, for the whole process.

    Raises:
        RuntimeError: there is no extension.
        ValueError: `name` is not one of `cpu_isas()`.
    """
    require().set_cpu_isa(name)
