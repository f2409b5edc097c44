"""A training run on disk: split into small files, complete or not there at all, resumable to the same result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from eqr_kernels.training.trainer import Trainer

PART_BYTES = 15 * 2**20
FORMAT = 2
"""Of the state: 1 held rows in flight and float32 moments, 2 is what `Trainer.begin_slice` leaves."""

_PREFIX, _INCOMPLETE = "state-", "incomplete-"


def save_state(
    trainer: Trainer,
    folder: str | os.PathLike[str],
    settings: dict[str, Any],
    part_bytes: int = PART_BYTES,
    shared: bool = True,
) -> Path:
    """Begins a new slice and writes the run's state to `folder/state-STEP/`, in files of at most `part_bytes`.

    The folder is renamed into place when it is complete, so an interruption leaves the state before. Older states are
    removed; one of the same step gives way. Since saving begins a slice (`Trainer.begin_slice`), runs are the same bit
    for bit when they save at the same steps, whether they go on from there or are resumed.

    Args:
        trainer: between two steps.
        settings: JSON values that describe the run (configs, data); `read_manifest` gives them back to compare.
        shared: False leaves out what all processes have in common, and `load_state` then needs both folders.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_INCOMPLETE}*"):  # by a run that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    trainer.begin_slice()
    state = trainer.state_dict(shared)
    data = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in state.items()})
    parts = [data[i : i + part_bytes] for i in range(0, len(data), part_bytes)]
    temporary = Path(tempfile.mkdtemp(prefix=_INCOMPLETE, dir=folder))
    try:
        manifest = {
            "format": FORMAT,
            "step": trainer.step,
            "settings": settings,
            "stream": trainer.stream.state,
            "parts": [hashlib.sha256(part).hexdigest() for part in parts],
        }
        for i, part in enumerate(parts):
            (temporary / f"part-{i:03d}").write_bytes(part)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        target = folder / f"{_PREFIX}{trainer.step:09d}"
        replaced = folder / f"replaced-{target.name}"
        if target.exists():
            # Left by a run that was killed while it removed this.
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        try:
            temporary.rename(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)
    for old in folder.glob(f"{_PREFIX}*"):
        if old != target:
            shutil.rmtree(old)
    return target


def _states(folder: Path) -> list[Path]:
    def complete(prefix: str) -> list[Path]:
        return sorted(p for p in folder.glob(f"{prefix}{_PREFIX}*") if (p / "manifest.json").is_file())

    # A run that was killed while it put a state of the same step in another's place has left the other.
    return complete("") or complete("replaced-")


def has_state(folder: Path) -> bool:
    """Whether there is a state under `folder`."""
    return bool(_states(folder))


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest (step, settings, ...) of the newest state under `folder`.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: it is of another format.
    """
    states = _states(Path(folder))
    if not states:
        raise FileNotFoundError(
            f"no training state under {folder}: expected {_PREFIX}STEP/manifest.json; start a run with eqr train"
        )
    manifest: dict[str, Any] = json.loads((states[-1] / "manifest.json").read_text())
    number = manifest.get("format", 1)
    if number != FORMAT:
        raise RuntimeError(
            f"{states[-1]} is a training state of format {number}, and this version of eqr_kernels reads format "
            f"{FORMAT}; finish the run with the version that began it, or begin another in another folder"
        )
    return manifest


def load_state(trainer: Trainer, folder: str | os.PathLike[str], own: str | os.PathLike[str] | None = None) -> None:
    """Continues the newest run under `folder`: weights, averages, optimizer and random streams, with a new slice.

    Args:
        own: folder of this process's own state, saved with `shared=False`, of which the random streams are taken.

    Raises:
        FileNotFoundError: there is no state.
        RuntimeError: a part is missing or damaged, or the state is of another format, model or kind of device.
    """
    state, manifest = _read(Path(folder))
    if own is not None:
        streams, own_manifest = _read(Path(own))
        if own_manifest["step"] != manifest["step"]:
            raise RuntimeError(f"{own} is of step {own_manifest['step']}, but {folder} of step {manifest['step']}")
        state, manifest = state | streams, own_manifest
    trainer.load_state_dict(state, manifest["step"])
    trainer.stream.state = manifest["stream"]


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the manifest of the newest state under `folder`."""
    manifest = read_manifest(folder)
    path = _states(folder)[-1]
    data = bytearray()
    for i, digest in enumerate(manifest["parts"]):
        part = path / f"part-{i:03d}"
        if not part.is_file():
            raise RuntimeError(f"{part} is missing ({len(manifest['parts'])} parts belong to this state); copy it back")
        content = part.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise RuntimeError(f"{part} is damaged (its SHA-256 differs from the manifest's); copy it back")
        data += content
    return safetensors.torch.load(bytes(data)), manifest


def copy_state(folder: Path, target: Path) -> None:
    """Copies the newest state under `folder` to one under `target`, whole or not at all; its run may go on meanwhile.

    Raises:
        FileNotFoundError: there is none.
    """
    target.mkdir(parents=True, exist_ok=True)
    while True:
        states = _states(folder)
        if not states:
            raise FileNotFoundError(f"no training state under {folder}; start a run with eqr train")
        temporary = Path(tempfile.mkdtemp(prefix=_INCOMPLETE, dir=target))
        try:
            shutil.copytree(states[-1], temporary, dirs_exist_ok=True)
            temporary.rename(target / states[-1].name.removeprefix("replaced-"))
            return
        except (OSError, shutil.Error):
            shutil.rmtree(temporary, ignore_errors=True)
            # Its run has put a newer one in its place.
            if states[-1].is_dir():
                raise
