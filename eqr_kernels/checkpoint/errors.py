"""Errors of reading a checkpoint."""

from __future__ import annotations


class MissingConfigError(ValueError):
    """A file whose weights could be read, but that does not say which config they were trained with."""
