"""A unit: the rows that one call works on, and that one shard holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from eqr_kernels.distributed.optional import arrow
from eqr_kernels.tasks.common import KEPT_ERRORS, ParseError, PuzzleSet

DEFAULT_ROWS = 256
MOST_ROWS = KEPT_ERRORS
"""Of a unit: all of its rows may be ones that cannot be read, and each is kept."""


class Key(NamedTuple):
    """Which unit: the number of its file, and of the unit in the file."""

    file: int
    place: int


@dataclass(frozen=True, eq=False)
class Unit:
    """Rows that follow each other in a file.

    Attributes:
        key: which. file: name of the file.
        puzzles: those that could be read, with `line`; uint8 [n, S]. n may be 0.
        errors: the rows that could not.
        share: of the whole input, read so far.
    """

    key: Key
    file: str
    puzzles: PuzzleSet
    errors: tuple[ParseError, ...]
    share: float

    def __len__(self) -> int:
        return len(self.puzzles) + len(self.errors)

    def to_bytes(self) -> bytes:
        """As an Arrow stream, in which it travels between machines: no code is in it."""
        pa = arrow()
        p = self.puzzles
        columns = {
            "inputs": _rows(p.inputs),
            "labels": pa.nulls(len(p), pa.binary()) if p.labels is None else _rows(p.labels),
            "source": pa.array(p.source.tolist(), pa.string()),
            "rating": pa.array(p.rating, pa.float64()),
            "line": pa.array(p.line, pa.int64()),
            "id": pa.nulls(len(p), pa.string()) if p.id is None else pa.array(p.id.tolist(), pa.string()),
        }
        metadata = {
            "key": f"{self.key.file},{self.key.place}",
            "file": self.file,
            "share": repr(self.share),
            "seq_len": str(p.inputs.shape[1]),
        }
        errors = {name: [getattr(error, name) for error in self.errors] for name in ("line", "text", "message")}
        return stream_of(pa.table(columns).replace_schema_metadata(metadata), pa.table(errors, _errors_schema()))

    @classmethod
    def from_bytes(cls, data: Any) -> Unit:
        """What `to_bytes` gave."""
        table, errors = tables_of(data, 2)
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        seq_len = int(metadata["seq_len"])
        labels, ids = table["labels"], table["id"]
        file, place = map(int, metadata["key"].split(","))
        return cls(
            Key(file, place),
            metadata["file"],
            PuzzleSet(
                _tokens(table["inputs"], seq_len),
                None if not len(labels) or labels.null_count else _tokens(labels, seq_len),
                np.array(table["source"].to_pylist(), np.str_),
                table["rating"].to_numpy(),
                table["line"].to_numpy(),
                None if not len(ids) or ids.null_count else np.array(ids.to_pylist(), np.str_),
            ),
            tuple(ParseError(**row) for row in errors.to_pylist()),
            float(metadata["share"]),
        )


def _errors_schema() -> Any:
    pa = arrow()
    return pa.schema([("line", pa.int64()), ("text", pa.string()), ("message", pa.string())])


def _rows(tokens: Any) -> Any:
    return arrow().array([row.tobytes() for row in tokens], arrow().binary())


def _tokens(column: Any, seq_len: int) -> Any:
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, seq_len)


def stream_of(*tables: Any) -> bytes:
    """Tables as Arrow streams, one behind the other."""
    pa = arrow()
    sink = pa.BufferOutputStream()
    for table in tables:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return bytes(sink.getvalue())


def tables_of(data: Any, count: int) -> Sequence[Any]:
    """The tables of `stream_of`."""
    pa = arrow()
    source = pa.BufferReader(data)
    return [pa.ipc.open_stream(source).read_all() for _ in range(count)]
