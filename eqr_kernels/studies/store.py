"""Parts of a recording on disk, so that a run which was interrupted goes on where it stopped."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eqr_kernels.atomic import atomic_write
from eqr_kernels.studies.recording import ARRAYS, Recording

_SETTINGS = "recording.json"


class OtherRecording(ValueError):
    """A folder holds the parts of another recording; the message names what differs."""


class Store:
    """A folder with finished parts, each written whole or not at all.

    Args:
        folder: made where it is missing; its parent must exist.
        settings: what a recording depends on (weights, puzzles, depths and the like), as JSON values.

    Raises:
        OtherRecording: the folder holds the parts of one.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        keep_settings(folder / _SETTINGS, settings, "parts of another recording")

    def load(self, start: int) -> Recording | None:
        """The part that begins with puzzle `start`, or None where it is not there or cannot be read."""
        try:
            with np.load(self._path(start), allow_pickle=False) as held:
                arrays: dict[str, Any] = {name: held[name] for name in ARRAYS}
                return Recording(tuple(held["depths"].tolist()), **arrays, **json.loads(str(held["metadata"])))
        except (
            OSError,
            KeyError,
            TypeError,
            ValueError,
            EOFError,
            NotImplementedError,
            zipfile.BadZipFile,
            zlib.error,
        ):
            return None

    def puzzles(self) -> int:
        """How many puzzles the finished parts hold."""
        known = (self.load(int(path.stem.removeprefix("part-"))) for path in self.folder.glob("part-*.npz"))
        return sum(len(part) for part in known if part is not None)

    def save(self, start: int, part: Recording) -> None:
        """Keeps the part that begins with puzzle `start`."""
        data = io.BytesIO()
        held: dict[str, Any] = {"depths": part.depths, "metadata": json.dumps(part.metadata()), **part.arrays()}
        np.savez_compressed(data, **held)
        atomic_write(self._path(start), data.getvalue())

    @staticmethod
    def discard(folder: Path) -> None:
        """Removes a recording, if there is one; a folder that holds anything else is left alone.

        Raises:
            ValueError: the folder is not one of ours.
        """
        if not folder.exists():
            return
        if not (folder / _SETTINGS).exists():
            raise ValueError(f"{folder} holds no recording, so it is not removed; name another folder")
        shutil.rmtree(folder)

    def _path(self, start: int) -> Path:
        return self.folder / f"part-{start:06d}.npz"


def keep_settings(path: Path, settings: Mapping[str, object], what: str) -> dict[str, Any]:
    """Writes what the files of a folder depend on, as JSON, or checks that it is what was written before.

    Args:
        what: the folder holds if it is not, for the message.

    Raises:
        OtherRecording: it is not; which settings differ.
    """
    now: dict[str, Any] = json.loads(json.dumps(settings))
    if not path.exists():
        atomic_write(path, json.dumps(now, indent=1).encode())
        return now
    before = json.loads(path.read_text())
    differs = sorted(key for key in {*now, *before} if now.get(key) != before.get(key))
    if differs:
        texts = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in differs)
        raise OtherRecording(f"{path.parent} holds {what}: {texts}")
    return now
