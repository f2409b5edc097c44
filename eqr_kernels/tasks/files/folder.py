"""The HRM/EqR layout: a folder (or its train/ or test/) with dataset.json and pairs of .npy files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from eqr_kernels.tasks.common import ParseErrors, PuzzleSet
from eqr_kernels.tasks.files.arrays import IntArray, from_arrays, read_array
from eqr_kernels.tasks.files.codec import Codec


def load_folder(path: Path, codec: Codec, split: str | None) -> tuple[PuzzleSet, ParseErrors]:
    """The puzzles of all sets of a folder, one after the other.

    Raises:
        OSError, ValueError, TypeError: it has another layout.
    """
    folder = _split_folder(path, split)
    card = _read_card(folder)
    sets = card.get("sets") or sorted(f.name.removesuffix("__inputs.npy") for f in folder.glob("*__inputs.npy"))
    if not isinstance(sets, list):
        raise ValueError(f"{folder / 'dataset.json'} says sets {sets!r}; it must be a list of names")
    parts = [(str(name), _read_set(folder, str(name), card)) for name in sets]
    widths = {part[0].shape[1] for _, part in parts}
    if len(widths) != 1:
        raise ValueError(
            f"{folder} has {len(parts)} sets with rows of {sorted(widths)}; it needs at least one, of one length"
        )
    inputs, labels = (np.concatenate([part[k] for _, part in parts]) for k in (0, 1))
    return from_arrays(inputs, labels, [name for name, part in parts for _ in part[0]], codec)


def _split_folder(path: Path, split: str | None) -> Path:
    def holds_puzzles(folder: Path) -> bool:
        return folder.is_dir() and ((folder / "dataset.json").exists() or any(folder.glob("*__inputs.npy")))

    if split is None and holds_puzzles(path):
        return path
    splits = [name for name in ("train", "test") if holds_puzzles(path / name)]
    if split is not None and split not in splits:
        raise ValueError(f"split is {split!r}; {path} has {' and '.join(splits) or 'neither train nor test'}")
    if split is None and len(splits) > 1:
        raise ValueError(f"{path} has train and test: choose with split='train' or split='test', or give that folder")
    if not splits:
        raise ValueError(f"{path} has no dataset.json and no *__inputs.npy, nor has its train or test folder")
    return path / (split or splits[0])


def _read_card(folder: Path) -> dict[str, object]:
    file = folder / "dataset.json"
    if not file.exists():
        return {}
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{file} is not JSON ({problem}): fetch or build the data set again") from None
    if not isinstance(card, dict):
        raise ValueError(f"{file} holds a {type(card).__name__}; it must be a JSON object")
    return card


def _read_set(folder: Path, name: str, card: dict[str, object]) -> tuple[IntArray, IntArray]:
    """Tokens and labels [N, S] of one set of the folder; labels that are to be ignored become 0."""
    files = [folder / f"{name}__{part}.npy" for part in ("inputs", "labels")]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; dataset.json names the set {name!r}: fetch it again")
    inputs, labels = (_read_file(file) for file in files)
    if inputs.shape != labels.shape:
        raise ValueError(f"{files[0]} has shape {inputs.shape}, {files[1]} has {labels.shape}; they must be equal")
    if isinstance(card.get("seq_len"), int) and card["seq_len"] != inputs.shape[1]:
        raise ValueError(f"{files[0]} has rows of {inputs.shape[1]}, dataset.json says seq_len {card['seq_len']}")
    ignored = card.get("ignore_label_id")
    if isinstance(ignored, int) and ignored != 0:
        labels = np.where(labels == ignored, 0, labels)
    return inputs, labels


def _read_file(path: Path) -> IntArray:
    with open(path, "rb") as file:
        return read_array(file, str(path))
