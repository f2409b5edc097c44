"""Ops as Triton kernels, and what they share with the Triton backend. Importing a module of it imports Triton."""

from __future__ import annotations

import os


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
