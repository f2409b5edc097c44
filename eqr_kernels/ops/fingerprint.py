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
    check.fingerprint(tensors)
    return int(torch.ops.eqr_kernels.fingerprint.default(tensors))


@register_fake("fingerprint")
def _(tensors: Sequence[Tensor]) -> Tensor:
    check.fingerprint(tensors)
    return tensors[0].new_empty((), dtype=torch.int64)
