"""Tiles for Triton's interpreter."""

from __future__ import annotations

import dataclasses

from eqr_kernels.backends.triton import adapter


def with_tiles(monkeypatch, **changes):
    """Cuts the work into other tiles than the interpreter's usual, large ones."""
    from eqr_kernels.backends.triton import plan

    calls, one_pass = changes.pop("calls", False), changes.pop("one_pass", None)
    tiles = dataclasses.replace(plan.INTERPRETED, **changes)
    chosen = lambda model, *_: plan.Plan.of(model.config, tiles, calls=calls, one_pass=one_pass)  # noqa: E731
    monkeypatch.setattr(adapter, "_plan", chosen)
