"""Weights as safetensors, with the config in their header and the card beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from eqr_kernels.atomic import atomic_write
from eqr_kernels.checkpoint.card import ModelCard
from eqr_kernels.checkpoint.errors import MissingConfigError
from eqr_kernels.checkpoint.state_dict import check, clean, some
from eqr_kernels.config import EqRConfig

MODEL_FILE = "model.safetensors"
_HEADER_CONFIG = "eqr_config"


def read_safetensors(path: Path, config: EqRConfig | None) -> tuple[dict[str, Tensor], ModelCard]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            raw = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise RuntimeError(f"{path}: not a whole safetensors file ({error}); copy or save it again") from error
    state_dict = clean(raw, str(path))
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
        raise ValueError(f"card.config differs from config in {some(pairs)}; use dataclasses.replace(card, config=...)")
    tensors = clean(state_dict, str(target))
    check(tensors, config, str(target))
    path = target if target.suffix == ".safetensors" else target / MODEL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # One key only: safetensors writes several in random order, and the same weights should give the same bytes.
    weights = safetensors_bytes(tensors, {_HEADER_CONFIG: json.dumps(config.to_dict())})
    card = dataclasses.replace(card, sha256=hashlib.sha256(weights).hexdigest())
    atomic_write(path, weights)
    atomic_write(path.with_suffix(".json"), card.to_json().encode())
    return path
