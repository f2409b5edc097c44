"""What an op and its fake kernel ask of tensors before the op runs: dtypes, shapes, devices.

These are what the shapes of results follow from. They run under torch.compile too, where sizes may be symbols: they
compare them, put them into words only in an error, and never look at a tensor's values. Numbers and values are checked
in C++, once, and what `solve` tells its users in `eqr_kernels.solver`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eqr_kernels.ops.operator import Operator


def tensor(
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


def packed(data: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    """The bytes of packed weights."""
    if not isinstance(data, Tensor) or data.dtype != torch.uint8:
        got = str(data.dtype) if isinstance(data, Tensor) else type(data).__name__
        raise TypeError(f"packed must be a uint8 tensor [bytes], got {got}; make it with pack_weights")
    tensor("packed", data, torch.uint8, ("bytes",), like)


def rng(rng: Tensor) -> None:
    """Keys of the random streams, int64 [n, 4]."""
    if not isinstance(rng, Tensor) or rng.dtype != torch.int64:
        got = str(rng.dtype) if isinstance(rng, Tensor) else type(rng).__name__
        raise TypeError(f"rng must be an int64 tensor [n, 4], got {got}; build it with eqr_kernels.noise.make_rng")
    if rng.ndim != 2 or rng.shape[1] != 4 or not rng.is_contiguous():
        raise ValueError(
            f"rng must be contiguous [n, 4] (seed, restart, id, step), got shape {list(rng.shape)}; "
            "build it with eqr_kernels.noise.make_rng"
        )


def weights(
    operator: Operator, embedding: Tensor, lm_head: Tensor, q_weight: Tensor, q_bias: Tensor, blocks: Sequence[Tensor]
) -> None:
    """An operator's weights, the four of each layer one after another in `blocks`: float32, all on one device."""
    operator.check()
    tokens, features, vocabulary, mixer_hidden, hidden, heads, layers = operator.sizes[:7]
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
        *((f"blocks[{i}]", weight, of_block[i % 4]) for i, weight in enumerate(blocks)),
    ]
    for name, weight, shape in required:
        tensor(name, weight, torch.float32, shape, ("embedding", embedding))


def training_rows(
    op: str, operator: Operator, all_weights: Sequence[Any], tokens: Tensor, z_H: Tensor, z_L: Tensor, keys: Tensor
) -> None:
    """What the ops of training take: weights, those of the blocks in a list, and n rows; on CPU."""
    weights(operator, *all_weights)
    on_cpu("embedding", all_weights[0])
    length, features, heads = operator.sizes[0], operator.sizes[1], operator.sizes[5]
    if heads != 0:
        raise ValueError(f"sizes[5] (heads) must be 0: {op} takes token mixing by a SwiGLU only, got {heads}")
    tensor("tokens", tokens, torch.int64, ("n", length))
    n = tokens.shape[0]
    tensor("z_H", z_H, torch.float32, (n, length, features))
    tensor("z_L", z_L, torch.float32, (n, length, features))
    rng(keys)
    tensor("rng", keys, torch.int64, (n, 4))


def no_gradient(op: str, instead: str, **tensors: Tensor | None) -> None:
    """No tensor requires a gradient where one would be recorded."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires a gradient, and {op} has none; call it under torch.no_grad(), or use {instead}"
            )
