"""What a request may end with besides an answer and its own error."""

from __future__ import annotations


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests, or ended before it could answer."""


class DeadlineExceeded(TimeoutError):
    """The deadline of a request passed before it was answered."""
