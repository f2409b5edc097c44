"""Results on disk: a folder of Parquet files, one for each unit, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from eqr_kernels.atomic import atomic_write
from eqr_kernels.distributed.optional import arrow
from eqr_kernels.distributed.units import Key
from eqr_kernels.studies.store import keep_settings

MANIFEST = "_manifest.json"
"""Readers of Parquet folders pass over names that begin with an underscore."""
_RUN, _WHICH = b"eqr_run", b"eqr_unit"


class Results(Protocol):
    """Where what came of units is kept."""

    finished: set[Key]

    def write(self, key: Key, table: Any) -> None: ...


class InMemory:
    """Results that are wanted in this process alone."""

    def __init__(self) -> None:
        self.finished: set[Key] = set()
        self._held: dict[Key, Any] = {}

    def write(self, key: Key, table: Any) -> None:
        self._held[key] = table
        self.finished.add(key)

    def tables(self) -> Iterator[Any]:
        """All that is there, in the order of the input."""
        for key in sorted(self.finished):
            yield self._held[key]


class Shards:
    """A folder of results, in which a run goes on where it stopped.

    Args:
        folder: made where it is missing; its parent must exist.
        settings: what the results depend on, as JSON values; kept in `MANIFEST`.

    Attributes:
        finished: the units that are there.

    Raises:
        OtherRecording: a ValueError; the folder holds results of other settings, and which those are.
        ValueError, FileNotFoundError: it is no folder that can be written to; it holds something else.
        ImportError: without pyarrow.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        arrow()
        check_folder(folder)
        folder.mkdir(exist_ok=True)
        if not (folder / MANIFEST).exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds something else than results of this command; name another --out")
        self.folder = folder
        kept = keep_settings(folder / MANIFEST, settings, "results of another run")
        self._run = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest().encode()
        self.finished = {key for path in folder.glob("part-*.parquet") if (key := self._key(path)) is not None}

    def _key(self, path: Path) -> Key | None:
        """Of a whole shard of this run; None of anything else, which is written anew."""
        pa = arrow()
        try:
            metadata = pa.parquet.read_schema(path).metadata or {}
            file, place = map(int, metadata[_WHICH].decode().split(","))
        except (OSError, KeyError, ValueError, pa.ArrowException):
            return None
        key = Key(file, place)
        return key if metadata.get(_RUN) == self._run and path == self.path(key) else None

    def path(self, key: Key) -> Path:
        """Of a unit's shard; their names have the order of the input."""
        return self.folder / f"part-{key.file:05d}-{key.place:08d}.parquet"

    def write(self, key: Key, table: Any) -> None:
        """Keeps what came of a unit."""
        pa = arrow()
        metadata = {**(table.schema.metadata or {}), _RUN: self._run, _WHICH: f"{key.file},{key.place}".encode()}
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
        atomic_write(self.path(key), bytes(sink.getvalue()))
        self.finished.add(key)

    def read(self, key: Key) -> Any:
        """What came of a unit that is finished."""
        return arrow().parquet.read_table(self.path(key), partitioning=None)

    def tables(self) -> Iterator[Any]:
        """All that is there, in the order of the input."""
        for key in sorted(self.finished):
            yield self.read(key)


def check_folder(folder: Path) -> None:
    """Raises where no results could be written there."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; results are a folder of Parquet files: name another")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {folder}: there is no folder {folder.absolute().parent}; make it first")
