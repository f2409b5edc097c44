"""What a file is, by its first bytes and not by its name: text to be decoded, arrays, a table, or unreadable."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError)
"""What reading on in a cut or damaged file raises."""

_HEAD = 4096
_GZIP = b"\x1f\x8b"
_READ = {b"\x93NUMPY": "npy", b"PAR1": "parquet"}
_SUFFIXES = {".npy": "npy", ".npz": "npz", ".parquet": "parquet"}
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
_UNPACK = "unpack it and give the puzzle file in it"
_TEXT = "export the puzzles as text, a puzzle a line, or as CSV"
_REFUSED = [
    (4, b"1AY&SY", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x89PNG", "a PNG image", _TEXT),
    (0, b"\xff\xd8\xff", "a JPEG image", _TEXT),
    (0, b"GIF8", "a GIF image", _TEXT),
    (0, b"II*\x00", "a TIFF image", _TEXT),
    (0, b"MM\x00*", "a TIFF image", _TEXT),
    (8, b"WEBP", "a WebP image", _TEXT),
    (0, b"%PDF", "a PDF document", _TEXT),
    (0, b"{\\rtf", "an RTF document", "save it as plain text"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office document (such as .xls)", "save the sheet as CSV"),
    (0, b"SQLite format 3\x00", "an SQLite database", _TEXT),
    (0, b"\x89HDF", "an HDF5 file", "save the arrays with numpy.save"),
    (0, b"ARROW1\x00\x00", "an Arrow (Feather) file", "save the table as Parquet or CSV"),
    (0, b"Obj\x01", "an Avro file", "save the table as Parquet or CSV"),
    (0, b"\x7fELF", "a program", "name a file of puzzles"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch it with `git lfs pull`"),
    (0, b"<?xml", "an XML document", _TEXT),
]


class Container(NamedTuple):
    """An open file: kind "text" (decode it with `encoding`), "npy", "npz" or "parquet", and its unpacked bytes."""

    kind: str
    stream: BinaryIO
    encoding: str = "utf-8"


def open_container(file: BinaryIO, name: str, format: str) -> Container:
    """Gunzips an open file where its bytes say so, and tells what it is; `format` other than "auto" decides.

    Args:
        name: for messages; its suffix counts only where the bytes say nothing.

    Raises:
        ValueError: it is something that cannot be read; the message says what, and the way out.
    """
    stream, head = _gunzip(file)
    kind = _kind(head, stream, name)
    if format in ("npy", "npz", "parquet"):
        kind = format if kind == "text" else kind  # whose reader refuses it
    expected = {"auto": kind, "npy": "npy", "npz": "npz", "parquet": "parquet"}.get(format, "text")
    if kind != expected:
        raise ValueError(f"{name} is a .{kind} file, and format is {format!r}: leave format at 'auto'")
    return Container(kind, stream, _encoding(head))


def lines_of(container: Container) -> io.TextIOWrapper:
    """The text of a container, whatever its line ends; bytes that are no text become U+FFFD."""
    return io.TextIOWrapper(container.stream, encoding=container.encoding, errors="replace", newline=None)


def printable(value: object) -> str:
    """What can be shown and kept of a name or a message out of a file: its first 200 characters, none a control."""
    text = str(value)[:200]
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


def _gunzip(stream: BinaryIO) -> tuple[BinaryIO, bytes]:
    """The bytes behind any number of gzip layers, and the first of them (b"" where they are damaged)."""
    for _ in range(4):
        # GzipFile and BytesIO have no dependable peek of their own
        buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, stream))
        stream = cast(BinaryIO, buffered)
        try:
            head = buffered.peek(_HEAD)[:_HEAD]
        except DAMAGED:
            return stream, b""
        if not head.startswith(_GZIP):
            return stream, head
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))
    raise ValueError("the file is gzip within gzip, five times or more: unpack it")


def _kind(head: bytes, stream: BinaryIO, name: str) -> str:
    for magic, kind in _READ.items():
        if head.startswith(magic):
            return kind
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return _zip_kind(stream, name)
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{name} is a web page: download the file itself (the raw link)")
    for start, magic, what, remedy in _REFUSED:
        if head[start : start + len(magic)] == magic:
            raise ValueError(f"{name} is {what}: {remedy}")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1:
        raise ValueError(f"{name} is a Python pickle, which could run code: save the puzzles as text, CSV or .npy")
    if Path(name).suffix.lower() in _SUFFIXES:
        return _SUFFIXES[Path(name).suffix.lower()]  # whose reader says what is wrong
    if _is_binary(head):
        raise ValueError(f"{name} is no text, nor of a format that is known here (binary data): {_TEXT}")
    return "text"


def _zip_kind(stream: BinaryIO, name: str) -> str:
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, *DAMAGED):
        raise ValueError(f"{name} is a zip archive that is cut or cannot be listed: unzip it") from None
    if members and all(member.endswith(".npy") for member in members):
        stream.seek(0)
        return "npz"
    if "[Content_Types].xml" in members:
        raise ValueError(f"{name} is an Office document (such as .xlsx): save the sheet as CSV, its columns as text")
    if any(member.endswith("data.pkl") for member in members):
        raise ValueError(f"{name} is a torch file: save the puzzles as text, CSV or .npy")
    shown = ", ".join(repr(member) for member in members[:3]) + (", ..." if len(members) > 3 else "")
    raise ValueError(f"{name} is a zip archive ({shown or 'empty'}): unzip it and give the puzzle file in it")


def _encoding(head: bytes) -> str:
    for mark, encoding in _ENCODINGS.items():
        if head.startswith(mark):
            return encoding
    # ASCII in UTF-16 without a mark: every other byte is zero
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros = head[first::2]
        if len(zeros) >= 8 and zeros.count(0) > 0.9 * len(zeros) and head[1 - first :: 2].count(0) == 0:
            return encoding
    return "utf-8"


def _is_binary(head: bytes) -> bool:
    text = head.decode(_encoding(head), "replace")
    if "\x00" in text:
        return True
    strange = sum(c == "\ufffd" or (c < " " and c not in "\t\n\r\f\x1a\x1b") for c in text)
    return strange > 0.3 * len(text)
