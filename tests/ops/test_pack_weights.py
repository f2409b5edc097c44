"""`ops.pack_weights`: what it takes, and what it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eqr_kernels import ops
from eqr_kernels.precision import NAMED, Precision
from eqr_kernels.reference import BlockWeights, OperatorWeights
from tests.support.environment import BUILT, WHY_NOT_BUILT
from tests.support.fixed_point_op import (
    D,
    K,
    S,
    V,
    operator,
    pack,
    run,
    same,
    weights,
    with_size,
)

pytestmark = pytest.mark.skipif(not BUILT, reason=WHY_NOT_BUILT)

ISAS = ops.cpu_isas() if BUILT else []
PRECISIONS = tuple(precision.name for precision in NAMED)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mixer, fixed_start", [("mlp_t", False), ("attention", True)])
def test_opcheck_of_pack_weights(mixer: str, fixed_start: bool, precision: str) -> None:
    arguments = weights(mixer, fixed_start, precision)
    torch.library.opcheck(torch.ops.eqr_kernels.pack_weights.default, tuple(arguments.values()))


BAD_WEIGHTS = [
    (dict(embedding=torch.zeros(V, D).double()), TypeError, r"embedding must be a torch.float32 tensor \[7, 16\], got"),
    (dict(lm_head=torch.zeros(V, D + 1)), ValueError, r"lm_head must have shape \[7, 16\], got \[7, 17\]"),
    (dict(lm_head=torch.zeros(D, V).T), ValueError, r"lm_head must be contiguous.*use lm_head.contiguous\(\)"),
    (dict(q_bias=torch.zeros(2, device="meta")), ValueError, r"q_bias is on meta.*move it with .cpu\(\)"),
    (dict(blocks=[torch.zeros(1)]), ValueError, "blocks must be 4 tensors .* for each of the 1 layers, got 1"),
    (dict(blocks=[torch.zeros(2 * K, S)] * 4), ValueError, r"blocks\[1\] must have shape \[6, 256\], got \[512, 6\]"),
    (dict(rope_cos=torch.zeros(S, 8)), ValueError, "rope_cos and rope_sin must both be given or both be None"),
    (dict(rope_cos=torch.zeros(S, 8), rope_sin=torch.zeros(S, 8)), ValueError, "where rope_parts is not 0 and only"),
    (dict(H_start=torch.zeros(D)), ValueError, "H_start and L_start must both be given or both be None"),
    (dict(H_start=torch.zeros(2), L_start=torch.zeros(D)), ValueError, r"H_start must have shape \[16\], got \[2\]"),
    (dict(sizes=(1, 2)), ValueError, "sizes must be 10 integers .*rope_parts.*, got 2"),
    (dict(constants=(1.0,)), ValueError, "constants must be 4 numbers .*lambda_.*, got 1"),
    (dict(constants=(0.0, 1e-5, 1.0, 1.0)), ValueError, r"constants\[0\] \(lambda_\) must be in \(0, 1\], got 0"),
    (dict(constants=(1.0, float("nan"), 1.0, 1.0)), ValueError, r"\(rms_norm_eps\) must be finite in float32 and"),
    (dict(constants=(1.0, 1e-5, 1.0, -1.0)), ValueError, r"\(L_init_std\) must be finite in float32 and .*, got -1"),
    (with_size(7, 0), ValueError, r"sizes\[7\] \(H_cycles\) must be in 1..2\*\*28, got 0"),
    (with_size(8, 127), ValueError, r"H_cycles \* \(L_cycles \+ 1\) must be at most 254 .*, got 256"),
    (with_size(9, 3), ValueError, "rope_cos and rope_sin must be given where rope_parts is not 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_WEIGHTS)
def test_bad_weights_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {**weights(), **change}
    with pytest.raises(error, match=message):
        pack(**arguments)
    # The op itself is safe to call without the wrapper. (No kernel of it runs on another device.)
    if not any(isinstance(value, Tensor) and value.device.type != "cpu" for value in change.values()):
        with pytest.raises(ValueError):
            torch.ops.eqr_kernels.pack_weights(*arguments.values())


def test_a_precision_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, int8, got 'fp8'"):
        torch.ops.eqr_kernels.pack_weights(*weights(precision="fp8").values())


def test_a_start_state_goes_with_an_operator_that_has_one() -> None:
    w = weights()
    heads = (w["embedding"], w["lm_head"], w["q_weight"], w["q_bias"])
    given = OperatorWeights(*heads, (BlockWeights(*w["blocks"]),))
    with pytest.raises(ValueError, match="start must be given where fixed_start, and only there, got True"):
        ops.pack_weights(given, ops.Operator(**operator(fixed_start=True)), Precision.fp32)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((S, D, V, 0, K, 0, 1, 2, 2, 0), "0 and the other not, got 0 and 0"),
        ((S, D, V, K, K, 2, 1, 2, 2, 0), "0 and the other not, got 256 and 2"),
        ((S, D, V, 0, K, 3, 1, 2, 2, 0), "features must be a multiple of heads, got 16 and 3"),
        ((S, D, V, 0, K, 8, 1, 2, 2, 2), r"features / heads must be a multiple of 2 \* rope_parts, got 16 and 8"),
        ((S, D, V, K + 1, K, 0, 1, 2, 2, 0), r"\(mixer_hidden\) must be a multiple of 256, got 257"),
        ((S, D, V, K, 1, 0, 1, 2, 2, 0), r"\(hidden\) must be a multiple of 256, got 1"),
        ((2**31, D, V, K, K, 0, 1, 2, 2, 0), r"\(tokens\) must be in 1..2\*\*28, got 2147483648"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(sizes: tuple[int, ...], message: str) -> None:
    arguments = {**weights(), "sizes": sizes}
    with pytest.raises(ValueError, match=message):
        torch.ops.eqr_kernels.pack_weights(*arguments.values())
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, pytest.raises(ValueError):
        fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        fake["blocks"] = [mode.from_tensor(b) for b in arguments["blocks"]]
        pack(**fake)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights_are_plain_data_of_their_instruction_set(isa: str, precision: str, restore: None) -> None:
    ops.set_cpu_isa(isa)
    packed = pack(**weights(precision=precision))
    again = pack(**weights(precision=precision))
    assert torch.equal(packed.data, again.data) and packed.data.data_ptr() % 64 == 0
    expected = run(packed)
    assert expected.residuals.isfinite().all() and (expected.steps == 6).all()
    ops.set_cpu_isa(ISAS[-1])  # the packed weights know theirs
    assert same(run(packed._replace(data=packed.data.clone())), expected)
