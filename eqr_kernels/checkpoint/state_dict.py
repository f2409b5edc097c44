"""State dicts by the official keys: what a config wants, and whether tensors are that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eqr_kernels.checkpoint.relatives import refuse_other_models
from eqr_kernels.config import EqRConfig

_PREFIXES = ("module.", "model.", "inner.")
START_BUFFERS = ("H_init", "L_init")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expected_shapes(config: EqRConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the state dict of an `EquilibriumReasoner` with this config."""
    d, vocabulary = config.hidden_size, config.vocab_size

    def swiglu(name: str, size: int) -> dict[str, tuple[int, ...]]:
        hidden = config.swiglu_size(size)
        return {f"{name}.gate_up_proj.weight": (2 * hidden, size), f"{name}.down_proj.weight": (size, hidden)}

    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.embedding_weight": (vocabulary, d),
        "lm_head.weight": (vocabulary, d),
        "q_head.weight": (2, d),
        "q_head.bias": (2,),
    }
    for layer in (f"L_level.layers.{i}" for i in range(config.L_layers)):
        if config.mlp_t:
            shapes |= swiglu(f"{layer}.mlp_t", config.seq_len)
        else:
            shapes |= {f"{layer}.self_attn.qkv_proj.weight": (3 * d, d), f"{layer}.self_attn.o_proj.weight": (d, d)}
        shapes |= swiglu(f"{layer}.mlp", d)
    return shapes | dict.fromkeys(START_BUFFERS if config.fixed_init else (), (d,))


def plain_name(key: str) -> str:
    """An official key without the prefixes that wrappers and older code put before it."""
    name = ".".join(part for part in key.split(".") if part != "_orig_mod")
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def clean(raw: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Official keys without prefixes, own copies of the tensors on the CPU, caches dropped.

    Raises:
        RuntimeError: a value is no tensor of floats, two keys are one, or the weights belong to another kind of model.
    """
    named: dict[str, str] = {}
    for key, value in raw.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise RuntimeError(
                f"{where}: {key!r} is a {type(value).__name__}, not a tensor; a checkpoint is a state dict, or a dict "
                "with 'model' and 'config'"
            )
        name = plain_name(key)
        if name.startswith("rotary_emb."):
            continue
        if name in named:
            raise RuntimeError(f"{where}: two tensors are named {name!r} once prefixes are removed; keep one of them")
        named[name] = key
    refuse_other_models({name: raw[key] for name, key in named.items()}, where)
    state_dict: dict[str, Tensor] = {}
    for name, key in named.items():
        value = raw[key]
        if value.layout != torch.strided or value.dtype not in _DTYPES or value.is_meta:
            raise RuntimeError(
                f"{where}: {key} is {value.dtype}, {value.layout}, on {value.device}; weights must be dense and one of "
                + ", ".join(map(str, _DTYPES))
            )
        state_dict[name] = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    if not state_dict:
        raise RuntimeError(f"{where}: holds no weights")
    return state_dict


def check(state_dict: Mapping[str, Tensor], config: EqRConfig, where: str) -> None:
    """Raises a RuntimeError where the weights do not fit the config or are not finite."""
    expected = expected_shapes(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    problems = {
        "missing": [name for name in expected if name not in shapes],
        "unexpected": [name for name in shapes if name not in expected],
        "of another shape": [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    details = "; ".join(f"{kind}: {some(names)}" for kind, names in problems.items() if names)
    if details:
        raise RuntimeError(
            f"{where}: the weights do not fit the config. {details}. "
            "Pass the config that they were trained with as config="
        )
    for name, tensor in state_dict.items():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise RuntimeError(
                f"{where}: {name} has {bad} of {tensor.numel()} values that are not finite; use an earlier checkpoint"
            )


def some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
