"""What the arguments of the compiled ops must be, told before the op runs; the ops check the same in C++.

These run under torch.compile too, where sizes and numbers may be symbols: they compare them, put them into words only
in an error, and never look at a tensor's values.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

HALTING_RULES = ("residual", "q", "none")
SELECTION_RULES = ("residual", "vote", "q", "first")
PRECISIONS = ("fp32", "bf16", "int8")
SIZES = (
    "tokens",
    "features",
    "vocabulary",
    "mixer_hidden",
    "hidden",
    "heads",
    "layers",
    "H_cycles",
    "L_cycles",
    "rope_parts",
)
CONSTANTS = ("lambda_", "rms_norm_eps", "H_init_std", "L_init_std")


def rng_and_stream(rng: Tensor, stream: int) -> None:
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


def damped_update(
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
    rng_and_stream(rng, stream)
    if rng.shape[0] != z.shape[0]:
        raise ValueError(f"rng must have one row for each of the {z.shape[0]} rows of z, got {rng.shape[0]}")
    if not -math.inf < lambda_ < math.inf:
        raise ValueError(f"lambda_ must be finite, got {lambda_}")
    _noise_scale(noise_scale)


def _noise_scale(noise_scale: float) -> None:
    if not 0 <= noise_scale < math.inf:
        raise ValueError(f"noise_scale must be finite and at least 0, got {noise_scale}")


def _tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | str, ...], like: tuple[str, Tensor] | None = None
) -> None:
    """`tensor` is of this dtype and shape, where a letter stands for any size, contiguous and on CPU.

    Or where the tensor of `like`, a name and a tensor, is: on CPU or on a CUDA device.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        got = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a {dtype} tensor {_text(shape)}, got {got}; convert it with .to({dtype})")
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(not isinstance(b, str) and a != b for a, b in zip(sizes, shape, strict=True)):
        raise ValueError(f"{name} must have shape {_text(shape)}, got {list(sizes)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got shape {list(sizes)}, strides {tensor.stride()}; use {name}.contiguous()"
        )
    if like is None:
        on_cpu(name, tensor)
    else:
        _beside(name, tensor, *like)


def _beside(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    device = other.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{other_name} is on {device}, and this op runs on CPU and on CUDA devices; move it with .cpu() or .cuda()"
        )
    if tensor.device != device:
        move = ".cpu()" if device.type == "cpu" else f".to({str(device)!r})"
        raise ValueError(f"{name} is on {tensor.device} and {other_name} on {device}; move it with {move}")


def _text(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def on_cpu(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, and this op runs on CPU only; move it with .cpu()")


def no_gradient(op: str, instead: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires a gradient, and {op} has none; call it under torch.no_grad(), or use {instead}"
            )


def _choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _count(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} must be in {low}..{high}, got {value}")


def _operator(sizes: Sequence[int], constants: Sequence[float]) -> None:
    # What they may be is checked where they are first used, in C++.
    if len(sizes) != len(SIZES):
        raise ValueError(f"sizes must be {len(SIZES)} integers ({', '.join(SIZES)}), got {len(sizes)}")
    if len(constants) != len(CONSTANTS):
        raise ValueError(f"constants must be {len(CONSTANTS)} numbers ({', '.join(CONSTANTS)}), got {len(constants)}")


def pack_weights(
    embedding: Tensor,
    lm_head: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    blocks: Sequence[Tensor],
    rope_cos: Tensor | None,
    rope_sin: Tensor | None,
    H_start: Tensor | None,
    L_start: Tensor | None,
    sizes: Sequence[int],
    constants: Sequence[float],
    precision: str,
) -> None:
    _operator(sizes, constants)
    _choice("precision", precision, PRECISIONS)
    tokens, features, vocabulary, mixer_hidden, hidden, heads, layers, _, _, rope_parts = sizes
    if len(blocks) != 4 * layers:
        raise ValueError(
            f"blocks must be 4 tensors (mixer_in, mixer_out, gate_up, down) for each of the {layers} layers, "
            f"got {len(blocks)}"
        )
    mixer = ((3 * features, features), (features, features))
    if not heads:
        mixer = ((2 * mixer_hidden, tokens), (tokens, mixer_hidden))
    of_block = (*mixer, (2 * hidden, features), (features, hidden))
    required: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("embedding", embedding, (vocabulary, features)),
        ("lm_head", lm_head, (vocabulary, features)),
        ("q_weight", q_weight, (2, features)),
        ("q_bias", q_bias, (2,)),
        *((f"blocks[{i}]", tensor, of_block[i % 4]) for i, tensor in enumerate(blocks)),
    ]
    like = ("embedding", embedding)
    for name, tensor, shape in required:
        _tensor(name, tensor, torch.float32, shape, like)
    twins = (("rope_cos", rope_cos, "rope_sin", rope_sin), ("H_start", H_start, "L_start", L_start))
    for name, one, twin_name, twin in twins:
        if (one is None) != (twin is None):
            raise ValueError(f"{name} and {twin_name} must both be given or both be None, got one of them")
    if rope_parts != 0 if rope_cos is None else rope_parts == 0:
        raise ValueError(
            f"rope_cos and rope_sin must be given where rope_parts is not 0 and only there, got rope_parts {rope_parts}"
        )
    for name, one, twin_name, twin in twins:
        shape = (tokens, features // heads if heads else 0) if name == "rope_cos" else (features,)
        if one is not None and twin is not None:
            _tensor(name, one, torch.float32, shape, like)
            _tensor(twin_name, twin, torch.float32, shape, like)


def packed(packed: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        got = str(packed.dtype) if isinstance(packed, Tensor) else type(packed).__name__
        raise TypeError(f"packed must be a uint8 tensor [bytes], got {got}; make it with pack_weights")
    _tensor("packed", packed, torch.uint8, ("bytes",), like)


def fixed_point(
    packed_weights: Tensor,
    tokens: Tensor,
    ids: Tensor,
    control: Tensor,
    sizes: Sequence[int],
    constants: Sequence[float],
    seed: int,
    breadth: int,
    depth: int,
    halt: str,
    tol: float,
    patience: int,
    select: str,
    window: int,
    noise_scale: float,
    checkpoints: Sequence[int],
    slots: int,
) -> None:
    _operator(sizes, constants)
    like = ("tokens", tokens)
    _tensor("tokens", tokens, torch.int64, ("N", sizes[0]), like)
    packed(packed_weights, like)
    _tensor("ids", ids, torch.int64, (tokens.shape[0],), like)
    # On a CUDA device it may also be of the host, whose memory the device sees: the op says which.
    _tensor("control", control, torch.int64, (3,), like if control.device.type == "cuda" else None)
    most = (1 << 63) - 1
    for name, value, low, high in (
        ("seed", seed, 0, (1 << 32) - 1),
        ("breadth", breadth, 1, (1 << 32) - 1),
        ("depth", depth, 1, (1 << 24) - 1),
        ("patience", patience, 1, most),
        ("window", window, 1, most),
        ("slots", slots, 1, most),
    ):
        _count(name, value, low, high)
    _choice("halt", halt, HALTING_RULES)
    _choice("select", select, SELECTION_RULES)
    if select == "first" and halt == "none":
        raise ValueError("select='first' needs a halting rule, got halt='none'; use halt='residual' or halt='q'")
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}")
    _noise_scale(noise_scale)
    rising = all(a < b for a, b in zip(checkpoints, checkpoints[1:], strict=False))
    if not rising or any(not 1 <= c <= depth for c in checkpoints):
        raise ValueError(f"checkpoints must rise and be in 1..depth={depth}, got {list(checkpoints)}")


def latent_recursions(
    packed_weights: Tensor, tokens: Tensor, z_H: Tensor, z_L: Tensor, eps: Tensor | None, noise_scale: float, count: int
) -> None:
    packed(packed_weights)
    _tensor("tokens", tokens, torch.int64, ("n", "S"))
    n, length = tokens.shape
    _tensor("z_H", z_H, torch.float32, (n, length, "d"))
    _tensor("z_L", z_L, torch.float32, (n, length, z_H.shape[2]))
    if eps is not None:
        _tensor("eps", eps, torch.float32, ("updates", n, length, z_H.shape[2]))
    _noise_scale(noise_scale)
    _count("count", count, 0, 254)


def training_batch(
    tokens: Tensor,
    labels: Tensor,
    z_H: Tensor,
    z_L: Tensor,
    rng: Tensor,
    scratch: Tensor,
    sizes: Sequence[int],
    noise_scale: float,
) -> None:
    if sizes[5] != 0:
        raise ValueError(
            f"sizes[5] (heads) must be 0: training_step takes token mixing by a SwiGLU only, got {sizes[5]}"
        )
    length, features = sizes[:2]
    _tensor("tokens", tokens, torch.int64, ("n", length))
    n = tokens.shape[0]
    _tensor("labels", labels, torch.int64, (n, length))
    _tensor("z_H", z_H, torch.float32, (n, length, features))
    _tensor("z_L", z_L, torch.float32, (n, length, features))
    rng_and_stream(rng, 0)
    _tensor("rng", rng, torch.int64, (n, 4))
    _tensor("scratch", scratch, torch.uint8, ("workers", "scratch_bytes(sizes, constants)"))
    _noise_scale(noise_scale)


def fingerprint(tensors: Sequence[Tensor]) -> None:
    if not len(tensors):
        raise ValueError("tensors must hold at least one tensor, got none")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{i}] must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            raise ValueError(
                f"tensors[{i}] must be contiguous, got shape {list(tensor.shape)}; use tensors[{i}].contiguous()"
            )
        on_cpu(f"tensors[{i}]", tensor)
