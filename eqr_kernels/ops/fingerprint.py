"""A hash of tensors by their bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.library import register_fake, require


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """A 64-bit hash of the bytes, shapes and dtypes of `tensors`, in order: other contents give another number.

    Args:
        tensors: at least one, of any shapes and dtypes, contiguous and on CPU.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is not as above.
    """
    require()
    _check(tensors)
    return int(torch.ops.eqr_kernels.fingerprint.default(tensors))


def _check(tensors: Sequence[Tensor]) -> None:
    if not len(tensors):
        raise ValueError("tensors must hold at least one tensor, got none")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{i}] must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            raise ValueError(
                f"tensors[{i}] must be contiguous, got shape {list(tensor.shape)}; use tensors[{i}].contiguous()"
            )
        check.on_cpu(f"tensors[{i}]", tensor)


@register_fake("fingerprint")
def _(tensors: Sequence[Tensor]) -> Tensor:
    _check(tensors)
    return tensors[0].new_empty((), dtype=torch.int64)
