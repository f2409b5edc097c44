"""Running setup.py, or another Python program, as from a shell of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.environment import REPOSITORY

# Of whoever runs the tests: a build would take them for its user's.
_HIDDEN = ("CXX", "CPPFLAGS", "LDFLAGS", "CUDA", "NVCC_", "CMAKE_", "GIT_")


def run_python(*command: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python *command`, with these variables of the environment and none of EQR_* or of a compiler besides."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("EQR_", *_HIDDEN))} | environment
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=settings, capture_output=True, text=True, timeout=300
    )
