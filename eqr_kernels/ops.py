"""The compiled ops, `torch.ops.eqr_kernels.*`: checks, fake kernels and what to do when they are not there.

`import eqr_kernels.ops` works without the compiled extension; `extension_status` tells whether it is there, and if not,
why. The ops have no autograd formula: they serve inference.
"""

from __future__ import annotations

import importlib.machinery
import math
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DISABLE = "EQR_DISABLE_EXTENSION"
_REMEDY = "build it with `pip install --no-build-isolation .` in the source folder, beside the torch you use"
_NOTE = Path(__file__).with_name("_no_extension.txt")


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get(DISABLE, "0").strip() not in ("", "0"):
        return None, f"the compiled extension is switched off by {DISABLE}={os.environ[DISABLE]}; unset it to use it"
    # In this folder and nowhere else: the hook of an editable install would find another copy's.
    if importlib.machinery.PathFinder.find_spec("eqr_kernels._C", [str(Path(__file__).parent)]) is None:
        note = _NOTE.read_text().strip() if _NOTE.is_file() else "eqr_kernels._C has not been built"
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


def extension_status() -> tuple[bool, str]:
    """Whether the compiled extension is loaded, and what it is or why it is not."""
    return _extension is not None, _status


def _require() -> Any:
    if _extension is None:
        raise RuntimeError(f"this needs the compiled extension: {_status}; or use backend='reference'")
    return _extension


def build_info() -> dict[str, Any]:
    """What the extension was built with: version, compiler, build_type, torch_headers, torch_target, cuda (or None).

    Raises:
        RuntimeError: there is no extension.
    """
    return dict(_require().build_info())


def cpu_isas() -> list[str]:
    """The instruction sets that the CPU kernels can use here, best last: of portable, avx2, avx512.

    Raises:
        RuntimeError: there is no extension.
    """
    return list(_require().cpu_isas())


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: the best, or what EQR_CPU_ISA or `set_cpu_isa` asked for.

    Raises:
        RuntimeError: there is no extension.
        ValueError: EQR_CPU_ISA names an instruction set that is not available.
    """
    return str(_require().cpu_isa())


def set_cpu_isa(name: str) -> None:
    """Chooses the instruction set of the CPU kernels, for the whole process.

    Raises:
        RuntimeError: there is no extension.
        ValueError: `name` is not one of `cpu_isas()`.
    """
    _require().set_cpu_isa(name)


def damped_update(
    z: Tensor, u: Tensor, rng: Tensor, stream: int, lambda_: float, noise_scale: float, z_prev: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The state update of one module application, in one pass: out = (1 - lambda_) z + lambda_ u + noise_scale eps.

    eps are the standard normals of (`rng`, `stream`) as `eqr_kernels.noise.normal` defines them (equal to rounding, the
    words behind them bit for bit), drawn inside. All arithmetic is in float32, with one rounding to the dtype of z. The
    result does not depend, bit for bit, on the number of threads, on the instruction set or on the other rows.

    Args:
        z, u: [n, S, d] contiguous, float32 or bfloat16, the same for both.
        rng: [n, 4] int64: (seed, restart, id, step) of each row.
        stream: 0..255.
        lambda_, noise_scale: finite; noise_scale >= 0, and 0 draws nothing.
        z_prev: like z, the state to measure the residual against, or None.

    Returns:
        out, like z; with z_prev also diff_sq and norm_sq, float32 [n]: sum (out - z_prev)^2 and sum out^2 over the
        rounded out, accumulated in float32 in a fixed order; else both are of shape [0]. Values that are not finite
        pass through, each in its own row.

    Raises:
        RuntimeError: there is no extension, or a gradient is asked for.
        TypeError, ValueError: an argument is not as above.
    """
    _require()
    _check_damped_update(z, u, rng, stream, lambda_, noise_scale, z_prev)
    for name, tensor in (("z", z), ("u", u), ("z_prev", z_prev)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires a gradient, and damped_update has none; call it under torch.no_grad(), "
                "or use eqr_kernels.reference.damped_update to train"
            )
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, and damped_update runs on CPU only; move it with .cpu()")
    out, diff_sq, norm_sq = torch.ops.eqr_kernels.damped_update.default(z, u, rng, stream, lambda_, noise_scale, z_prev)
    return out, diff_sq, norm_sq


def philox_words(rng: Tensor, stream: int, numel: int) -> Tensor:
    """The first `numel` random words of each row's stream, as `eqr_kernels.noise.philox_words`: int64 [n, numel].

    Args:
        rng: [n, 4] int64: (seed, restart, id, step) of each row.
        stream: 0..255.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is out of range.
    """
    _require()
    _check_rng(rng, stream)
    words: Tensor = torch.ops.eqr_kernels.philox_words.default(rng, stream, numel)
    return words


def philox_normal(rng: Tensor, stream: int, numel: int) -> Tensor:
    """The first `numel` standard normals of each row's stream, as `damped_update` draws them: float32 [n, numel].

    Arguments and errors are those of `philox_words`.
    """
    _require()
    _check_rng(rng, stream)
    normals: Tensor = torch.ops.eqr_kernels.philox_normal.default(rng, stream, numel)
    return normals


def _check_rng(rng: Tensor, stream: int) -> None:
    # The ranges of the columns are checked in the kernel: here they would cost a synchronisation and a graph break.
    if not isinstance(rng, Tensor) or rng.dtype != torch.int64:
        got = str(rng.dtype) if isinstance(rng, Tensor) else type(rng).__name__
        raise TypeError(f"rng must be an int64 tensor [n, 4], got {got}; build it with eqr_kernels.noise.make_rng")
    if rng.ndim != 2 or rng.shape[1] != 4 or not rng.is_contiguous():
        raise ValueError(
            f"rng must be contiguous [n, 4] (seed, restart, id, step), got shape {list(rng.shape)}; "
            "build it with eqr_kernels.noise.make_rng"
        )
    if not 0 <= stream <= 255:
        raise ValueError(f"stream must be in 0..255, got {stream}")


def _check_damped_update(
    z: Tensor, u: Tensor, rng: Tensor, stream: int, lambda_: float, noise_scale: float, z_prev: Tensor | None
) -> None:
    if not isinstance(z, Tensor) or z.dtype not in (torch.float32, torch.bfloat16):
        got = str(z.dtype) if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(f"z must be a float32 or bfloat16 tensor, got {got}; convert it, or use backend='reference'")
    if z.ndim != 3 or not z.is_contiguous():
        raise ValueError(f"z must be contiguous [n, S, d], got shape {list(z.shape)}, strides {z.stride()}")
    for name, tensor in (("u", u), ("z_prev", z_prev)):
        if tensor is None and name == "z_prev":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != z.dtype:
            got = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of the dtype of z, {z.dtype}, got {got}")
        if tensor.shape != z.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and of the shape of z, {list(z.shape)}, got shape {list(tensor.shape)}, "
                f"strides {tensor.stride()}; use {name}.contiguous()"
            )
    _check_rng(rng, stream)
    if rng.shape[0] != z.shape[0]:
        raise ValueError(f"rng must have one row for each of the {z.shape[0]} rows of z, got {rng.shape[0]}")
    if not math.isfinite(lambda_):
        raise ValueError(f"lambda_ must be finite, got {lambda_}")
    if not math.isfinite(noise_scale) or noise_scale < 0:
        raise ValueError(f"noise_scale must be finite and at least 0, got {noise_scale}")


if _extension is not None:

    @torch.library.register_fake("eqr_kernels::damped_update")
    def _(
        z: Tensor, u: Tensor, rng: Tensor, stream: int, lambda_: float, noise_scale: float, z_prev: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        _check_damped_update(z, u, rng, stream, lambda_, noise_scale, z_prev)
        rows = 0 if z_prev is None else z.shape[0]
        sums = z.new_empty(rows, dtype=torch.float32)
        return torch.empty_like(z), sums, torch.empty_like(sums)

    @torch.library.register_fake("eqr_kernels::philox_words")
    def _(rng: Tensor, stream: int, numel: int) -> Tensor:
        _check_rng(rng, stream)
        return rng.new_empty((rng.shape[0], numel))

    @torch.library.register_fake("eqr_kernels::philox_normal")
    def _(rng: Tensor, stream: int, numel: int) -> Tensor:
        _check_rng(rng, stream)
        return rng.new_empty((rng.shape[0], numel), dtype=torch.float32)
