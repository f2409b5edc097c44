"""A model from anywhere: shipped names, files, folders and hub repositories."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import warnings
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from eqr_kernels.checkpoint.card import UNCALIBRATED, ModelCard
from eqr_kernels.checkpoint.official import read_torch
from eqr_kernels.checkpoint.safetensors import MODEL_FILE, read_safetensors
from eqr_kernels.checkpoint.state_dict import START_BUFFERS, check
from eqr_kernels.config import EqRConfig

PRETRAINED = Path(__file__).parents[1] / "pretrained"


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
            It wins over both; where it differs, the card's tolerances, noise_scale and accuracies no longer hold and
            are dropped.
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
    read = read_safetensors if path.suffix == ".safetensors" else read_torch
    state_dict, card = read(path, config)
    if config is not None and config != card.config:
        card = dataclasses.replace(
            card, config=config, **UNCALIBRATED, tol_by_precision={}, noise_scale=None, accuracies={}
        )
    if not card.config.fixed_init:
        dropped = [name for name in START_BUFFERS if state_dict.pop(name, None) is not None]
        if dropped:
            warnings.warn(f"{path}: {' and '.join(dropped)} not used, since the config starts at random", stacklevel=2)
    check(state_dict, card.config, str(path))
    return Checkpoint(state_dict, card.config, card, str(path))


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
