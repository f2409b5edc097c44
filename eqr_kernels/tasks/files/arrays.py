"""Arrays of whole numbers: .npy, and .npz with the puzzles and perhaps their answers."""

from __future__ import annotations

import io
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from eqr_kernels.tasks.common import UNKNOWN_RATING, ParseErrors, PuzzleSet
from eqr_kernels.tasks.files.assemble import checked
from eqr_kernels.tasks.files.codec import Codec
from eqr_kernels.tasks.files.columns import roles
from eqr_kernels.tasks.files.container import printable

IntArray = npt.NDArray[np.integer]
# integers as found and their answers' -> tokens of both, and what was allowed
ArrayReader = Callable[[IntArray, IntArray | None], tuple[IntArray, IntArray | None, str]]

_BROKEN: tuple[type[Exception], ...] = (
    *(ValueError, EOFError, OSError, KeyError, TypeError, MemoryError, OverflowError, SyntaxError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, NotImplementedError),
)
"""What numpy.load raises for files that are cut or changed."""


def load_arrays(
    stream: BinaryIO, name: str, codec: Codec, from_array: ArrayReader | None
) -> tuple[PuzzleSet, ParseErrors]:
    """The puzzles of an open .npy or .npz.

    Raises:
        ValueError, TypeError: it is none, or holds other than puzzles.
    """
    inputs, labels = _questions_and_answers(_load(stream, name), name)
    tokens, answers, allowed = (inputs, labels, "") if from_array is None else from_array(inputs, labels)
    return from_arrays(tokens, answers, [name] * len(inputs), codec, inputs, allowed)


def read_array(stream: BinaryIO, name: str) -> IntArray:
    """Whole numbers [N, S] of one .npy.

    Raises:
        ValueError, TypeError: it is none, or of another type or shape.
    """
    array = _load(stream, name)
    if isinstance(array, dict):
        raise ValueError(f"{name} holds several arrays (.npz); save the puzzles alone with numpy.save")
    return _rows_of(array, name)


def _load(stream: BinaryIO, name: str) -> Any:
    """An array, or arrays by name."""
    try:
        loaded = np.load(io.BytesIO(stream.read()), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {key: loaded[key] for key in loaded.files}
    except _BROKEN as problem:
        reason = printable(problem) or type(problem).__name__
        raise ValueError(f"{name} is not a .npy array of plain numbers ({reason}): save it with numpy.save") from None


def _questions_and_answers(loaded: Any, name: str) -> tuple[IntArray, IntArray | None]:
    if not isinstance(loaded, dict):
        return _rows_of(loaded, name), None
    names = list(loaded)
    columns = roles(names)
    if len(names) == 1:
        return _rows_of(loaded[names[0]], f"{name}, array {names[0]!r}"), None
    if columns["question"] < 0:
        raise ValueError(
            f"{name} holds the arrays {', '.join(map(repr, names)) or '(none)'}; name that of the puzzles 'puzzles' "
            "and that of their answers 'solutions', or save the puzzles alone"
        )
    inputs = _rows_of(loaded[names[columns["question"]]], f"{name}, array {names[columns['question']]!r}")
    if columns["answer"] < 0:
        return inputs, None
    labels = _rows_of(loaded[names[columns["answer"]]], f"{name}, array {names[columns['answer']]!r}")
    if labels.shape != inputs.shape:
        raise ValueError(
            f"{name} has puzzles of shape {inputs.shape} and answers of {labels.shape}; they must be equal"
        )
    return inputs, labels


def _rows_of(array: npt.NDArray[Any], name: str) -> IntArray:
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} has dtype {array.dtype}; puzzles must be integers: convert it, e.g. .astype('uint8')")
    if array.ndim == 1:
        array = array[None]
    if array.ndim == 3:
        array = array.reshape(len(array), array.shape[1] * array.shape[2])
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}; it must be [N, S], [N, side, side] or [S]")
    return array


def from_arrays(
    inputs: IntArray,
    labels: IntArray | None,
    source: list[str],
    codec: Codec,
    values: IntArray | None = None,
    allowed: str = "",
) -> tuple[PuzzleSet, ParseErrors]:
    """Puzzles of tokens [N, S], and the rows that are none; `values` are the numbers as they were found."""
    seq_len = inputs.shape[1]
    if codec.seq_len is not None and seq_len != codec.seq_len:
        raise ValueError(f"the arrays hold rows of {seq_len} cells; this task needs {codec.seq_len}")
    wrong = [""] * len(inputs)
    values = inputs if values is None else values
    least = 1 if codec.encode is None else 0
    allowed = allowed or f"tokens {least} .. {codec.vocab_size - 1}"
    parts = [inputs] if labels is None else [inputs, labels]
    for i in np.flatnonzero(((inputs < least) | (inputs >= codec.vocab_size)).any(1)):
        wrong[i] = f"holds {values[i].min()} .. {values[i].max()}; allowed are {allowed}"
    for i in np.flatnonzero(((parts[-1] < 0) | (parts[-1] >= codec.vocab_size)).any(1)):
        wrong[i] = wrong[i] or (
            f"its labels hold {parts[-1][i].min()} .. {parts[-1][i].max()}; allowed are 0 .. {codec.vocab_size - 1}"
        )
    valid = np.array([not message for message in wrong], bool)[:, None]
    tokens = [np.where(valid, part, 0).astype(np.uint8) for part in parts]
    puzzles = PuzzleSet(
        tokens[0],
        np.zeros_like(tokens[0]) if labels is None else tokens[1],
        np.array(source, np.str_),
        np.full(len(inputs), UNKNOWN_RATING, np.float64),
        np.arange(1, len(inputs) + 1),
    )
    return checked(puzzles, wrong, _LazyRows(values), ParseErrors(), codec)


class _LazyRows(Sequence[str]):
    """The rows of an array as text, made only for the rows that are reported."""

    def __init__(self, array: IntArray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return " ".join(map(str, self.array[index]))
