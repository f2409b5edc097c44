"""What the tests of the CUDA kernels share, on the host and on a device."""

from __future__ import annotations

import torch

from eqr_kernels.results import SolveResult

# The contractive model's residuals lie around it after four outer steps, none as near as bf16 moves them.
TOL = 0.1104


SMALL = dict(seq_len=9, hidden_size=128, H_cycles=1, L_cycles=1, L_layers=1, expansion=1.0)


def same(a: SolveResult, b: SolveResult, rows: slice = slice(None)) -> bool:
    """Bit for bit, of all trajectories."""
    fields = ("logits", "q_halt", "residual", "score", "steps", "preds", "all_steps", "all_status", "all_score")
    return all(torch.equal(getattr(a, field)[rows], getattr(b, field)[rows]) for field in fields)
