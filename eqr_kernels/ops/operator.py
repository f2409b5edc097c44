"""An operator as the ops take it: its sizes and constants, and its packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

SIZES = (
    "tokens",
    "features",
    "vocabulary",
    "mixer_hidden",
    "hidden",
    "heads",
    "layers",
    "H_cycles",
    "L_cycles",
    "rope_parts",
)
CONSTANTS = ("lambda_", "rms_norm_eps", "H_init_std", "L_init_std")


class Operator(NamedTuple):
    """All of an operator but its weights, in the order of the ops' schemas.

    Attributes:
        sizes: tokens S, features d, vocabulary V, mixer_hidden (k(S); 0 with attention), hidden (k(d)), heads (0
            without attention), layers, H_cycles, L_cycles, rope_parts (0: no rotation; 1: of whole heads; 2: of their
            halves).
        constants: lambda_, rms_norm_eps, H_init_std, L_init_std.
        fixed_start: the same start state for every token of every puzzle, in place of random ones.
    """

    sizes: Sequence[int]
    constants: Sequence[float]
    fixed_start: bool

    def check(self) -> None:
        """Raises ValueError where a size or a constant is missing; what each may be is checked in C++."""
        if len(self.sizes) != len(SIZES):
            raise ValueError(f"sizes must be {len(SIZES)} integers ({', '.join(SIZES)}), got {len(self.sizes)}")
        if len(self.constants) != len(CONSTANTS):
            raise ValueError(
                f"constants must be {len(CONSTANTS)} numbers ({', '.join(CONSTANTS)}), got {len(self.constants)}"
            )


class PackedWeights(NamedTuple):
    """What `pack_weights` gives: weights in the order in which the kernels read them, with the operator they are of."""

    data: Tensor  # uint8 [bytes]
    operator: Operator
