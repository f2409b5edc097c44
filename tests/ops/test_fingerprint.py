"""`ops.fingerprint`: other contents, shapes or dtypes give another number."""

from __future__ import annotations

import pytest
import torch

from eqr_kernels import ops
from eqr_kernels.precision import NAMED
from tests.support.environment import BUILT, WHY_NOT_BUILT

pytestmark = pytest.mark.skipif(not BUILT, reason=WHY_NOT_BUILT)

ISAS = ops.cpu_isas() if BUILT else []
PRECISIONS = tuple(precision.name for precision in NAMED)


# ---- torch's own checks --------------------------------------------------------------------------------------------


def test_fingerprint_tells_contents_shapes_and_dtypes_apart() -> None:
    x = torch.arange(101, dtype=torch.int16)
    seen = {ops.fingerprint([x])}
    assert ops.fingerprint([x.clone()]) in seen
    others = [[x.view(101, 1)], [x.bfloat16()], [x.view(torch.float16)], [x, x], [x, x[:0]], [x[:100]], [x[:0]]]
    others += [[x[:50], x[50:]], [x[:51], x[51:]], [x[51:], x[:51]], [x[0]], [x[:1]]]
    for i in range(101):
        flipped = x.clone()
        flipped[i] ^= 1 << i % 15
        others.append([flipped])
    for tensors in others:
        result = ops.fingerprint(tensors)
        assert result not in seen, tensors
        seen.add(result)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.uint16,
    ],
)
def test_fingerprint_takes_any_dtype(dtype: torch.dtype) -> None:
    x = torch.ones(3, 2).to(dtype)
    y = x.clone()
    y[2, 1] = 0
    assert ops.fingerprint([x]) == ops.fingerprint([x.clone()]) != ops.fingerprint([y])


def test_fingerprint_names_what_it_cannot_take() -> None:
    for tensors, error, message in (
        ([], ValueError, "tensors must hold at least one tensor"),
        ([1], TypeError, r"tensors\[0\] must be a torch.Tensor, got int"),
        ([torch.ones(1), torch.ones(2, 3).T], ValueError, r"tensors\[1\] must be contiguous.*\[3, 2\]"),
        ([torch.ones(2, 3).to_sparse()], ValueError, r"tensors\[0\] must be contiguous"),
        ([torch.ones(1, device="meta")], ValueError, r"tensors\[0\] is on meta"),
    ):
        with pytest.raises(error, match=message):
            ops.fingerprint(tensors)  # type: ignore[arg-type]
