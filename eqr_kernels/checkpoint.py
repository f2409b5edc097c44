"""Weights and model cards: official `.pth` files, `.safetensors`, shipped models and hub repositories.

Nothing in a file is ever executed. Pickles go through `torch.load(weights_only=True)`; classes of the training code
that lie about in official files (the carry, NumPy's generator state, configuration objects) become `Inert` objects,
and a file that names anything else is refused before it is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import re
import secrets
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from eqr_kernels.config import TRM_FIELDS, EqRConfig, swiglu_size
from eqr_kernels.noise import RNG_LAYOUT
from eqr_kernels.other_models import refuse_other_models

SCHEMA_VERSION = 1
MODEL_FILE = "model.safetensors"
PRETRAINED = Path(__file__).parent / "pretrained"

_HEADER_CONFIG = "eqr_config"
_PREFIXES = ("module.", "model.", "inner.")
_START_BUFFERS = ("H_init", "L_init")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
# torch's allow-list is one for the whole process, so only one load at a time may replace it.
_ALLOW_LIST_LOCK = threading.Lock()


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model's weights; JSON beside the safetensors. A dataclass, like the `EqRConfig` inside it.

    Attributes:
        config: the operator that the weights belong to.
        schema_version: of the card itself.
        data: what it was trained on.
        steps: training steps.
        accuracies: measured accuracies, free-form JSON.
        tol: residual tolerance found by `eqr calibrate`, for `tol="auto"`; None when not calibrated.
        noise_scale: recommended for inference; None for the config's.
        window: differences of logits that a trajectory's score is the mean of.
        rng_layout: layout of the random numbers under which tol and accuracies were measured.
        licence, commit, notes: of the weights, of the code that trained them, anything else.
        sha256: of the safetensors file, so that weights and card can't be mixed up; `save_checkpoint` fills it in.
        extra: keys that this version does not know, kept as they came.

    Raises:
        TypeError, ValueError: a field has the wrong type, is out of range or belongs to another version.
    """

    config: EqRConfig
    schema_version: int = SCHEMA_VERSION
    data: str | dict[str, Any] = ""
    steps: int | None = None
    accuracies: dict[str, Any] = field(default_factory=dict)
    tol: float | None = None
    noise_scale: float | None = None
    window: int = 3
    rng_layout: int = RNG_LAYOUT
    licence: str = ""
    commit: str = ""
    notes: str = ""
    sha256: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds: dict[type | tuple[type, ...], tuple[str, ...]] = {
            EqRConfig: ("config",),
            (str, dict): ("data",),
            dict: ("accuracies", "extra"),
            int: ("schema_version", "window", "rng_layout"),
            (int, type(None)): ("steps",),
            (int, float, type(None)): ("tol", "noise_scale"),
            str: ("licence", "commit", "notes", "sha256"),
        }
        for kind, names in kinds.items():
            for name in names:
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, kind):
                    allowed = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                    raise TypeError(f"card field {name!r} must be {allowed}, got {value!r} ({type(value).__name__})")
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"card field 'schema_version' is {self.schema_version}, this version reads {SCHEMA_VERSION}; "
                "upgrade eqr_kernels"
            )
        if self.rng_layout != RNG_LAYOUT:
            raise ValueError(
                f"card field 'rng_layout' is {self.rng_layout}, this version draws its random numbers by layout "
                f"{RNG_LAYOUT}, so tol and accuracies do not hold for it; install an eqr_kernels with that layout, or "
                "load the weights without the card and run `eqr calibrate` again"
            )
        for name, low in (("window", 1), ("steps", 0), ("tol", 0), ("noise_scale", 0)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise ValueError(f"card field {name!r} must be finite and at least {low}, got {value}")
        clash = sorted(set(self.extra) & ({f.name for f in dataclasses.fields(self)} - {"extra"}))
        if clash:
            raise ValueError(f"card field 'extra' must not repeat the card's own fields, got {', '.join(clash)}")
        try:
            json.dumps([self.data, self.accuracies, self.extra], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"card fields 'data', 'accuracies', 'extra' must be finite JSON values: {error}"
            ) from error

    def to_json(self) -> str:
        """The card as JSON; `extra` keys stand beside the others."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return json.dumps({**fields, "config": self.config.to_dict(), **self.extra}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str | os.PathLike[str] = "card") -> ModelCard:
        """A card from JSON; `name` (the file) begins every message.

        Raises:
            TypeError, ValueError: not JSON, a field missing, of the wrong type, out of range or of another version.
        """
        remedy = "write it anew with save_pretrained, or delete it to load the weights with the config in their header"
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name}: not a JSON file ({error}); {remedy}") from error
        if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
            raise ValueError(f"{name}: not a model card, a JSON object with the EqRConfig fields in 'config'; {remedy}")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        try:
            fields: dict[str, Any] = {key: value for key, value in values.items() if key in known}
            fields["config"] = EqRConfig.from_dict(values["config"])
            return cls(**fields, extra={key: value for key, value in values.items() if key not in known})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded model.

    Attributes:
        state_dict: weights by the official keys, without prefixes; on the CPU, contiguous, in the file's dtypes.
        config: the operator that they fit.
        card: what else is known of them.
        origin: where they came from, for messages.
    """

    state_dict: dict[str, Tensor]
    config: EqRConfig
    card: ModelCard
    origin: str

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds all weights without rounding."""
        return reduce(torch.promote_types, {tensor.dtype for tensor in self.state_dict.values()})


class MissingConfigError(ValueError):
    """A file whose weights could be read, but that does not say which config they were trained with."""


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


def available_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def load_checkpoint(
    source: str | os.PathLike[str], config: EqRConfig | None = None, *, revision: str | None = None
) -> Checkpoint:
    """Weights, config and card from anywhere; nothing in a file is executed.

    Args:
        source: the name of a shipped model (see `available_models`), an official `.pth`, a bare state dict saved by
            torch, a `.safetensors`, a folder of `save_checkpoint`, or a hub id "org/name" when no such path exists.
        config: the operator; by default what the card or the file says, with the sizes of the tensors filled in.
            It wins over both; where it differs, the card's tol, noise_scale and accuracies no longer hold and are
            dropped.
        revision: branch, tag or commit of a hub repository.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a hub id without huggingface_hub.
        TypeError, ValueError: an argument, a config field or a card is wrong.
        MissingConfigError: a ValueError; the file does not say its config, and `config` was not given.
        RuntimeError: the file is damaged, names code, or its weights do not fit the config or are not finite.
    """
    if config is not None and not isinstance(config, EqRConfig):
        raise TypeError(f"config must be an EqRConfig or None, got {type(config).__name__}; use EqRConfig.from_dict")
    path = _locate(source, revision)
    if path.is_dir():
        if not (path / MODEL_FILE).is_file():
            raise FileNotFoundError(f"{path}: no {MODEL_FILE} in it; give a folder of save_pretrained, or a file")
        path = path / MODEL_FILE
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    state_dict, card = read(path, config)
    if config is not None and config != card.config:
        card = dataclasses.replace(card, config=config, tol=None, noise_scale=None, accuracies={})
    if not card.config.fixed_init:
        dropped = [name for name in _START_BUFFERS if state_dict.pop(name, None) is not None]
        if dropped:
            warnings.warn(f"{path}: {' and '.join(dropped)} not used, since the config starts at random", stacklevel=2)
    _check(state_dict, card.config, str(path))
    return Checkpoint(state_dict, card.config, card, str(path))


def save_checkpoint(
    target: str | os.PathLike[str], state_dict: Mapping[str, Tensor], config: EqRConfig, card: ModelCard | None = None
) -> Path:
    """Writes weights as safetensors and the card as JSON beside them; the bits of every weight are kept.

    Each file appears whole or not at all. A stop between the two is noticed at loading, by the card's `sha256`.

    Args:
        target: a folder, which gets `model.safetensors` and `model.json`, or a path that ends in `.safetensors`.
        state_dict: official keys, with or without prefixes.
        config: the operator that they fit.
        card: with the same config; None writes one with the config alone.

    Returns:
        The path of the safetensors file.

    Raises:
        TypeError, ValueError: target or card is wrong.
        RuntimeError: the weights do not fit the config or are not finite.
    """
    target = Path(target)
    if target.suffix in (".pth", ".pt", ".bin", ".json"):
        raise ValueError(f"target must be a folder or end in .safetensors, got {str(target)!r}")
    card = ModelCard(config) if card is None else card
    if card.config != config:
        theirs = card.config.to_dict()
        pairs = [
            f"{name} ({theirs[name]!r}, not {own!r})" for name, own in config.to_dict().items() if own != theirs[name]
        ]
        raise ValueError(
            f"card.config differs from config in {_some(pairs)}; use dataclasses.replace(card, config=...)"
        )
    tensors = _clean(state_dict, str(target))
    _check(tensors, config, str(target))
    path = target if target.suffix == ".safetensors" else target / MODEL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # One key only: safetensors writes several in random order, and the same weights should give the same bytes.
    weights = safetensors_bytes(tensors, {_HEADER_CONFIG: json.dumps(config.to_dict())})
    card = dataclasses.replace(card, sha256=hashlib.sha256(weights).hexdigest())
    atomic_write(path, weights)
    atomic_write(path.with_suffix(".json"), card.to_json().encode())
    return path


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` so that `path` holds either all of it or what it held before, whatever interrupts."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def expected_shapes(config: EqRConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the state dict of an `EquilibriumReasoner` with this config."""
    d, vocabulary = config.hidden_size, config.vocab_size

    def swiglu(name: str, size: int) -> dict[str, tuple[int, ...]]:
        hidden = swiglu_size(size, config.expansion)
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
    return shapes | dict.fromkeys(_START_BUFFERS if config.fixed_init else (), (d,))


def _locate(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The file or folder that `source` means; fetches a hub repository."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a name, a path or a hub id, got {type(source).__name__}")
    path = Path(source).expanduser()
    if isinstance(source, str) and source in available_models():
        if path.exists():
            warnings.warn(
                f"{source!r}: took the shipped model, not the path here; for that say './{source}'", stacklevel=3
            )
        path = PRETRAINED / f"{source}.safetensors"
    elif not path.exists():
        if path.suffix in (".pth", ".pt", ".safetensors"):
            raise FileNotFoundError(f"{path}: no such file")
        if isinstance(source, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
            return _fetch(source, revision)
        names = ", ".join(available_models()) or "none in this installation"
        raise ValueError(f"source {str(source)!r} is no path, no hub id (org/name) and no shipped model ({names})")
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for hub repositories only, {str(source)!r} is none; leave it out")
    return path


def _fetch(repository: str, revision: str | None) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            f"source {repository!r} is no path here, and fetching it from the hub needs huggingface_hub: "
            "pip install eqr_kernels[hub]"
        ) from error
    card = Path(MODEL_FILE).with_suffix(".json").name
    try:
        folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=[MODEL_FILE, card]))
    except Exception as error:
        raise RuntimeError(
            f"source {repository!r} is no path here, and fetching it from the hub failed: {error}; "
            "check the id and the network"
        ) from error
    if not (folder / MODEL_FILE).is_file():
        raise FileNotFoundError(
            f"hub repository {repository!r} holds no {MODEL_FILE}; download its checkpoint (such as a .pth) and "
            "give the path"
        )
    return folder


def _read_safetensors(path: Path, config: EqRConfig | None) -> tuple[dict[str, Tensor], ModelCard]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            raw = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise RuntimeError(f"{path}: not a whole safetensors file ({error}); copy or save it again") from error
    state_dict = _clean(raw, str(path))
    in_header = _header_config(header, path) if config is None else None
    card_path = path.with_suffix(".json")
    if card_path.is_file():
        card = ModelCard.from_json(card_path.read_text(encoding="utf-8", errors="replace"), card_path)
        if card.sha256 and card.sha256 != hashlib.sha256(path.read_bytes()).hexdigest():
            raise RuntimeError(
                f"{card_path}: describes other weights than those in {path.name} (its sha256 differs: an interrupted "
                "save or a damaged copy); save or copy both again, or delete the card to load the weights without it"
            )
        if in_header is not None and in_header != card.config:
            raise RuntimeError(
                f"{card_path}: its config is not that in the header of {path.name}; pass the right one as config="
            )
        return state_dict, card
    chosen = config or in_header
    if chosen is None:
        raise MissingConfigError(
            f"{path}: no config in its header and no {card_path.name} beside it; pass config=EqRConfig(...)"
        )
    return state_dict, ModelCard(chosen)


def _header_config(header: Mapping[str, str], path: Path) -> EqRConfig | None:
    if _HEADER_CONFIG not in header:
        return None
    try:
        return EqRConfig.from_dict(json.loads(header[_HEADER_CONFIG]))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {_HEADER_CONFIG} in its header: {error}; pass config=EqRConfig(...)") from error


def _read_torch(path: Path, config: EqRConfig | None) -> tuple[dict[str, Tensor], ModelCard]:
    where, loaded = str(path), _unpickle(path)
    if not isinstance(loaded, Mapping):
        raise RuntimeError(f"{where}: holds a {type(loaded).__name__}, not a checkpoint dict or a state dict")
    model, ema = loaded.get("model"), _member(loaded, "ema")
    shadow = _member(ema, "shadow")
    if shadow is None and isinstance(ema, Mapping):
        shadow = {name: value for name, value in ema.items() if isinstance(value, Tensor)}
    if not isinstance(model, Mapping) and not shadow:
        state_dict, kind = _clean(loaded, where), "a bare state dict"
        loaded = {}
    else:
        state_dict, kind = (_clean(model, where) if isinstance(model, Mapping) else {}), "model"
        if shadow:
            averaged, kind = _clean(shadow, where), "EMA"
            lacking = sorted(set(state_dict) - set(averaged) - set(_START_BUFFERS))
            if lacking:
                warnings.warn(f"{where}: the EMA lacks {_some(lacking)}; took the last trained values", stacklevel=3)
            state_dict |= averaged
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
        f"{path}: refused, and nothing in it was run: it names {_some([repr(name) for name in refused])}, which no EqR "
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


def _clean(raw: Mapping[str, Any], where: str) -> dict[str, Tensor]:
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
        name = ".".join(part for part in key.split(".") if part != "_orig_mod")
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
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


def _check(state_dict: Mapping[str, Tensor], config: EqRConfig, where: str) -> None:
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
    found = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
    if found:
        raise RuntimeError(
            f"{where}: the weights do not fit the config. {found}. "
            "Pass the config that they were trained with as config="
        )
    for name, tensor in state_dict.items():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise RuntimeError(
                f"{where}: {name} has {bad} of {tensor.numel()} values that are not finite; use an earlier checkpoint"
            )


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
    if str(arch.get("name", "")).startswith("trm@") or ("lambda_" not in arch and set(_START_BUFFERS) <= set(tensors)):
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
            f"{where}: neither its config nor its tensors tell {_some(lacking)}; pass config=EqRConfig(...)"
        )
    try:
        return EqRConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: in its config: {error}; or pass config=EqRConfig(...)") from error


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
