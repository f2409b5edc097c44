"""The ops pack_weights and fixed_point on the arguments of their schemas, for a model that is not a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqr_kernels import ops
from eqr_kernels.precision import Precision
from eqr_kernels.reference import OperatorWeights, Rope
from eqr_kernels.run_rules import RunRules

FOREVER = 2**24 - 1
S, D, V, K = 6, 16, 7, 256  # tokens, features, vocabulary, hidden units


def weights(mixer: str = "mlp_t", fixed_start: bool = False, precision: str = "fp32") -> dict[str, Any]:
    """Arguments of the op pack_weights, in its order: weak blocks, so that the iteration contracts."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) / shape[-1] ** 0.5

    attention = mixer == "attention"
    mixers = [(3 * D, D), (D, D)] if attention else [(2 * K, S), (S, K)]
    blocks = [0.1 * draw(*shape) for shape in (*mixers, (2 * K, D), (D, K))]
    angles = torch.arange(S)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)  # two heads of eight features
    return dict(
        embedding=draw(V, D),
        lm_head=draw(V, D),
        q_weight=draw(2, D),
        q_bias=torch.zeros(2),
        blocks=blocks,
        rope_cos=angles.cos() if attention else None,
        rope_sin=angles.sin() if attention else None,
        H_start=draw(D) if fixed_start else None,
        L_start=draw(D) if fixed_start else None,
        **{name: value for name, value in operator(mixer).items() if name != "fixed_start"},
        precision=precision,
    )


def pack(blocks: list[Tensor], sizes: Any, constants: Any, precision: str, layout: str = "", **w: Any) -> Any:
    """`ops.pack_weights` of the op's own arguments, which may be wrong."""
    tables = [(w.pop(a), w.pop(b)) for a, b in (("rope_cos", "rope_sin"), ("H_start", "L_start"))]
    rope, start = (None if pair == (None, None) else pair for pair in tables)
    layers: Any = [blocks]
    described = ops.Operator(sizes, constants, start is not None)
    given: Any = dict(rope=rope and Rope(*rope), start=start, layout=layout)
    return ops.pack_weights(OperatorWeights(**w, blocks=layers), described, Precision[precision], **given)


def operator(mixer: str = "mlp_t", fixed_start: bool = False) -> dict[str, Any]:
    """The fields of `ops.Operator`."""
    attention = mixer == "attention"
    sizes = (S, D, V, 0 if attention else K, K, 2 if attention else 0, 1, 2, 2, int(attention))
    return dict(sizes=sizes, constants=(0.95, 1e-5, 1.0, 1.0), fixed_start=fixed_start)


def problem(n: int = 4, **changes: Any) -> dict[str, Any]:
    """Arguments of the op fixed_point after `packed`, in the op's order; no trajectory of it settles."""
    g = torch.Generator().manual_seed(1)
    arguments: dict[str, Any] = dict(
        tokens=torch.randint(0, V, (n, S), generator=g),
        ids=torch.arange(n) - 2**62,
        control=torch.zeros(3, dtype=torch.int64),
        **operator(),
        seed=2**32 - 1,
        breadth=3,
        depth=6,
        halt="none",
        tol=0.01,
        patience=1,
        select="residual",
        window=3,
        noise_scale=0.01,
        checkpoints=(2, 5),
        slots=64,
        trace=True,
    )
    return {**arguments, **changes}


def call(packed: Tensor, arguments: dict[str, Any], ask: Any = None) -> ops.FixedPointOutput:
    """`ops.fixed_point` of the op's own arguments, which may be wrong."""
    values = list(arguments.values())
    tensors, described, rules = values[:3], ops.Operator(*values[3:6]), RunRules(*values[6:])
    return ops.fixed_point(ops.PackedWeights(packed, described), *tensors, rules, ask=ask)


def run(packed: ops.PackedWeights, *, ask: Any = None, **changes: Any) -> ops.FixedPointOutput:
    return call(packed.data, problem(**changes), ask)


def same(a: ops.FixedPointOutput, b: ops.FixedPointOutput) -> bool:
    """Equal bit for bit, NaN included."""
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) for x, y in pairs)


def grids(out: ops.FixedPointOutput, breadth: int) -> list[Tensor]:
    """preds, status, score, q_halt, steps as `selection.select` takes them: [N, B, ...]."""
    fields = (out.preds, out.status, out.score, out.q_halt, out.steps)
    return [field.unflatten(0, (-1, breadth)) for field in fields]


def endless(control: Tensor, **changes: Any) -> dict[str, Any]:
    return dict(depth=FOREVER, checkpoints=(), trace=False, control=control, **changes)


def with_size(index: int, value: int) -> dict[str, Any]:
    """Arguments with one of the operator's sizes changed."""
    sizes = list(weights()["sizes"])
    sizes[index] = value
    return dict(sizes=sizes)
