"""Named ranges for Nsight: nothing at all where CUDA has not been initialised."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class _Range:
    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        torch.cuda.nvtx.range_push(self.name)

    def __exit__(self, *_: object) -> None:
        torch.cuda.nvtx.range_pop()


_NOTHING = _Nothing()


def nvtx_range(name: str) -> AbstractContextManager[None]:
    """A context whose duration a profiler shows under `name`; well under a microsecond where there is no CUDA.

    It never initialises CUDA, and closes its range when an exception passes.
    """
    return _Range(name) if torch.cuda.is_initialized() else _NOTHING
