"""What this machine and this build can do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eqr_kernels import ops

REPOSITORY = Path(__file__).resolve().parents[2]


needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="needs a C++ compiler: none of c++, g++ and clang++ is there",
)


BUILT, WHY_NOT_BUILT = ops.extension_status()


needs_extension = pytest.mark.skipif(not BUILT, reason=WHY_NOT_BUILT)
