"""The arithmetic of a run, by the name that users give it and by the dtype that stands for it."""

from __future__ import annotations

from enum import Enum

import torch


class Precision(Enum):
    """What a run computes in; csrc/common/precision.h has those that the compiled kernels take.

    `Precision["bf16"]` is the one of a name, `Precision(torch.bfloat16)` that of a dtype.
    """

    fp32 = torch.float32
    bf16 = torch.bfloat16
    """Operands of the products; their sums and the state are float32 in the kernels."""
    int8 = torch.int8
    """The channel GEMMs, with weights scaled per output channel and activations per row; the rest as in bf16."""
    fp16 = torch.float16
    fp64 = torch.float64

    @property
    def dtype(self) -> torch.dtype:
        return self.value

    @classmethod
    def of_weights(cls, dtype: torch.dtype) -> Precision:
        """The one that computes in the dtype of a model's weights.

        Raises:
            RuntimeError: no backend computes in that dtype.
        """
        if dtype not in {precision.dtype for precision in cls}:
            raise RuntimeError(f"the weights are {dtype}, in which no backend computes; use model.float()")
        return cls(dtype)


NAMED = (Precision.fp32, Precision.bf16, Precision.int8)
"""Those that `precision=` may name; the others come with weights of their dtype, on the reference backend."""


def names(precisions: tuple[Precision, ...]) -> str:
    """Their names as an error message lists them."""
    return ", ".join(precision.name for precision in precisions)
