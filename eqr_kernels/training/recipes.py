"""The recipes of `eqr train`: the schedule of each preset, where the command line does not say otherwise."""

from __future__ import annotations

from typing import Any

from eqr_kernels.config import TRM_FIELDS

_PUBLISHED: dict[str, Any] = dict(batch_size=768, lr=1e-4, lr_warmup_steps=2000, total_steps=50_000, curriculum="")
_SMALL: dict[str, Any] = dict(
    batch_size=96,
    lr=1e-3,
    lr_warmup_steps=200,
    total_steps=None,
    forward_dtype="bfloat16",
    curriculum="0:34-50,1200:30-46,4000:20-40,6500:17-38",
)
# Weights that were trained before need no long memory of the steps that follow.
FINE_TUNING: dict[str, Any] = dict(
    batch_size=96, lr=1e-4, lr_warmup_steps=100, total_steps=None, curriculum="", ema_rate=0.99
)
# On a CPU attention has no fused kernel in bfloat16, and PyTorch's is slow without instructions for it.
RECIPES = {
    "sudoku-paper": {**_PUBLISHED, "forward_dtype": "bfloat16"},
    "sudoku": _SMALL,
    "sudoku-small": _SMALL,
    "maze": _PUBLISHED,
    "maze-small": dict(
        attention_init="local",
        batch_size=64,
        lr=1e-3,
        lr_warmup_steps=200,
        total_steps=None,
        curriculum="",
        weight_decay=0.1,
    ),
}
"""The schedule of each preset, where the command line does not say otherwise."""

PRESETS = {name: name.replace("-", "_") for name in RECIPES}
"""The method of `EqRConfig` that makes each preset."""
RENAMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sudoku": (
        "sudoku",
        {},
        "is the size of the shipped model `sudoku`; the published size, which had this name, is sudoku-paper",
    ),
    "sudoku-medium": (
        "sudoku",
        {"H_cycles": 1, **TRM_FIELDS},
        "is now --preset sudoku with --set H_cycles=1 and the fields of a TRM",
    ),
}
"""Names that meant another size in version 0.1: the preset, the fields that differ, and what to say of it."""
DEFAULT_PRESET = "sudoku-small"
COMMON: dict[str, Any] = dict(
    attention_init="random",
    optimizer="adam_atan2",
    muon_lr=None,
    lr_min_ratio=1.0,
    decay_from=None,
    weight_decay=1.0,
    ema_rate=0.999,
    cycles="",
    mix="",
    forward_dtype="float32",
    seed=0,
    slice_steps=None,
)
"""What a recipe does not say."""
DECAY_END = 0.03
"""Share of the rate where a decay that --decay-from or --finish begins ends, where --lr-min-ratio does not say."""
