"""The libraries that this room needs and the rest of the package does not, with what to do where one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

_REMEDY = "pip install 'eqr_kernels[distributed]'"


def arrow() -> Any:
    """The module `pyarrow`, with `pyarrow.parquet`.

    Raises:
        ImportError: it is not there.
    """
    return _modules("--out and --engine ray write Parquet, which needs pyarrow", "pyarrow.parquet", "pyarrow")


def ray() -> Any:
    """The module `ray`, with `ray.data`.

    Raises:
        ImportError: it is not there.
    """
    return _modules("--engine ray needs Ray", "ray.data", "ray")


def ray_core() -> Any:
    """The module `ray` alone, which is imported quicker.

    Raises:
        ImportError: it is not there.
    """
    return _modules("--engine ray needs Ray", "ray")


def ray_serve() -> Any:
    """The module `ray.serve`.

    Raises:
        ImportError: it is not there.
    """
    return _modules("--engine ray needs Ray Serve to serve", "ray.serve")


def _modules(what: str, *names: str) -> ModuleType:
    """The last of the modules."""
    try:
        return [importlib.import_module(name) for name in names][-1]
    except ImportError as error:
        raise ImportError(f"{what}, which cannot be imported ({error}): {_REMEDY}") from None
