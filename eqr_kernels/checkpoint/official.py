"""Official `.pth` files and bare state dicts saved by torch; nothing in a file is ever executed.

Pickles go through `torch.load(weights_only=True)`; classes of the training code that lie about in official files (the
carry, NumPy's generator state, configuration objects) become `Inert` objects, and a file that names anything else is
refused before it is unpickled.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqr_kernels.checkpoint.card import ModelCard
from eqr_kernels.checkpoint.errors import MissingConfigError
from eqr_kernels.checkpoint.state_dict import START_BUFFERS, clean, plain_name, some
from eqr_kernels.config import TRM_FIELDS, EqRConfig
from eqr_kernels.forking import fork_safe_lock

# Classes of the official training code and its dependencies: what an official file may name beside tensors.
_INERT_NAMES = (
    "models.*",
    "utils.*",
    "dataset.*",
    "evaluators.*",
    "config.*",
    "pretrain.*",
    "__main__.*",
    "adam_atan2.*",
    "omegaconf.*",
    "pydantic.*",
    "pydantic_core.*",
    "argdantic.*",
    "pathlib.*",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.*",
    "numpy.random.*",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "typing.Any",
    "collections.defaultdict",
    "builtins.int",
    "builtins.float",
    "builtins.bool",
    "builtins.str",
    "builtins.list",
    "builtins.dict",
    "builtins.tuple",
)
# Where averaged weights are kept: by EqR's code, and by TRM's present one. They are what is evaluated.
_AVERAGES = ("ema", "ema_helper")
# torch's allow-list is one for the whole process, so only one load at a time may replace it.
_ALLOW_LIST_LOCK = fork_safe_lock()


class Inert:
    """Stands for an object of a file's that is not needed: takes any arguments, keeps its state, runs nothing."""

    __slots__ = ("state",)
    state: Any

    def __new__(cls, *_: Any) -> Inert:
        inert = super().__new__(cls)
        inert.state = None
        return inert

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return "<object of a class that is not loaded>"


def read_torch(path: Path, config: EqRConfig | None) -> tuple[dict[str, Tensor], ModelCard]:
    where, loaded = str(path), _unpickle(path)
    if not isinstance(loaded, Mapping):
        raise RuntimeError(f"{where}: holds a {type(loaded).__name__}, not a checkpoint dict or a state dict")
    model = loaded.get("model")
    taken, shadow = next(((key, s) for key in _AVERAGES if (s := _shadow(_member(loaded, key)))), (None, {}))
    if not isinstance(model, Mapping) and not shadow:
        state_dict, kind = clean(loaded, where), "a bare state dict"
        loaded = {}
    else:
        state_dict, kind = (clean(model, where) if isinstance(model, Mapping) else {}), "model"
        if shadow:
            averaged, kind = clean(shadow, where), "EMA"
            lacking = sorted(set(state_dict) - set(averaged) - set(START_BUFFERS))
            if lacking:
                warnings.warn(f"{where}: the EMA lacks {some(lacking)}; took the last trained values", stacklevel=3)
            state_dict |= averaged
    _tell_other_weights(loaded, {"model", taken}, state_dict, where)
    step = loaded.get("step")
    steps = step if isinstance(step, int) and step >= 0 else None
    config = config or _infer_config(state_dict, loaded, where)
    return state_dict, ModelCard(config, steps=steps, notes=f"Weights from {path.name} ({kind}).")


def _unpickle(path: Path) -> Any:
    """`torch.load` with nothing allowed but torch's own safe types and `Inert` for the names in `_INERT_NAMES`."""
    remedy = "re-save it where it was made as {'model': state_dict, 'config': dict}, or get an undamaged copy"
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with _own_allow_list():
            named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
            refused = sorted(name for name in named if not any(fnmatchcase(name, inert) for inert in _INERT_NAMES))
            if not refused:
                with torch.serialization.safe_globals([(Inert, name) for name in named]):
                    # Memory-mapped: an official file's optimizer state and carry are many times its weights.
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise RuntimeError(
            f"{path}: not loadable as tensors and plain data, and nothing in it was run "
            f"({type(error).__name__}: {first}); {remedy}"
        ) from error
    raise RuntimeError(
        f"{path}: refused, and nothing in it was run: it names {some([repr(name) for name in refused])}, which no EqR "
        f"checkpoint needs. If you trust where it comes from, {remedy}"
    )


@contextlib.contextmanager
def _own_allow_list() -> Iterator[None]:
    # What the process has allowed elsewhere would be called for real, so it is set aside.
    with _ALLOW_LIST_LOCK:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            yield
        finally:
            torch.serialization.add_safe_globals(others)


def _member(value: Any, name: str) -> Any:
    """`value[name]`, also of the state that an inert object keeps; None where there is none."""
    value = value.state if isinstance(value, Inert) else value
    return value.get(name) if isinstance(value, Mapping) else None


def _shadow(averages: Any) -> Mapping[str, Tensor]:
    """The averaged weights by their names; empty where there are none."""
    shadow = _member(averages, "shadow")
    candidates = averages if shadow is None else shadow
    if not isinstance(candidates, Mapping):
        return {}
    return {name: value for name, value in candidates.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _tell_other_weights(
    loaded: Mapping[str, Any], taken: set[str | None], state_dict: Mapping[str, Tensor], where: str
) -> None:
    """Warns of copies of the weights, such as averages, that stand under keys which nobody reads."""
    shapes = {tensor.shape for tensor in state_dict.values()}
    for key, value in loaded.items():
        parts = [
            (key, value),
            *((f"{key}.{name}", _member(value, name)) for name in ("shadow", "module", "state_dict")),
        ]
        for name, part in parts:
            others = {} if key in taken else _shadow(part)
            matching = [n for n in others if plain_name(n) in state_dict and others[n].shape in shapes]
            if 2 * len(matching) > len(state_dict):
                warnings.warn(
                    f"{where}: {name!r} holds another copy of the weights (averages?), which is not used: averages are "
                    f"read from {' or '.join(map(repr, _AVERAGES))}. To take it, re-save it as {{'model': that copy, "
                    "'config': ...}",
                    stacklevel=4,
                )
                break


def _infer_config(state_dict: Mapping[str, Tensor], loaded: Mapping[str, Any], where: str) -> EqRConfig:
    """The config of an official file: its `arch` section, with what that lacks read off the tensors.

    Raises:
        MissingConfigError: the file does not say.
        ValueError: it has a field that does not exist.
    """
    section = loaded.get("config")
    arch = section.get("arch", section) if isinstance(section, Mapping) else None
    if not isinstance(arch, Mapping):
        raise MissingConfigError(
            f"{where}: no readable 'config' with an 'arch' section in it; pass config=EqRConfig(...)"
        )
    tensors = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    fields: dict[str, Any] = {}
    # TRM keeps its start in the file and knows neither damping nor noise.
    if str(arch.get("name", "")).startswith("trm@") or ("lambda_" not in arch and set(START_BUFFERS) <= set(tensors)):
        fields = dict(TRM_FIELDS)
    embedding = tensors.get("embed_tokens.embedding_weight", ())
    if len(embedding) == 2:
        fields["vocab_size"], fields["hidden_size"] = embedding
    layers = [int(match[1]) for match in (re.match(r"L_level\.layers\.(\d+)\.", name) for name in tensors) if match]
    fields["L_layers"] = max(layers, default=-1) + 1
    mixer = tensors.get("L_level.layers.0.mlp_t.gate_up_proj.weight", ())
    fields["mlp_t"] = len(mixer) == 2
    carried = _member(_member(loaded.get("carry"), "inner_carry"), "z_H")  # [batch, S, d]
    if fields["mlp_t"]:
        fields["seq_len"] = mixer[1]
    elif isinstance(carried, Tensor) and carried.ndim == 3:
        fields["seq_len"] = carried.shape[1]
    needed = ["seq_len", "H_cycles", "L_cycles", "expansion"]
    if not fields["mlp_t"]:
        needed += ["num_heads", "pos_encodings"]
    fields |= arch
    lacking = [name for name in needed if name not in fields]
    if lacking:
        raise MissingConfigError(
            f"{where}: neither its config nor its tensors tell {some(lacking)}; pass config=EqRConfig(...)"
        )
    try:
        return EqRConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: in its config: {error}; or pass config=EqRConfig(...)") from error
