"""The precisions that the study compares, what each weighs, and which cannot run here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.studies.quantisation.fake import (
    Rounded,
    Rounding,
    block_linears,
    group_within,
    jitter,
    round_to_e4m3,
    round_to_integers,
)
from eqr_kernels import backends
from eqr_kernels.precision import Precision
from eqr_kernels.reasoner import EquilibriumReasoner


@dataclass(frozen=True)
class Variant:
    """One way of holding and multiplying the weights.

    Attributes:
        name: unique in a study.
        what: it in words.
        precision: of the kernel that runs it, as `solve` takes it.
        rounding: of the block linears' weights before they are given to that kernel; None where it takes them as
            they are. With one, a variant is simulated: its effect is real, its speed unknown.
        control: no quantisation, but fp32 with something else changed, to compare with.
        reseeded: it runs from other starts with other noise.
    """

    name: str
    what: str
    precision: str
    rounding: Rounding | None = None
    control: bool = False
    reseeded: bool = False

    @property
    def simulated(self) -> bool:
        return self.rounding is not None


BASELINE = Variant("fp32", "fp32 throughout", "fp32")
JITTERED = Variant(
    "fp32 jittered", "block weights times 1 +- 2**-20: fp32 with other last bits", "fp32", jitter, control=True
)
RESEEDED = Variant("fp32 reseeded", "fp32 from other starts, with other noise", "fp32", control=True, reseeded=True)


def _grouped(weight: Tensor, bits: int, limit: int) -> Rounded:
    return round_to_integers(weight, bits, group_within(weight.shape[1], limit))


def default_variants(simulate_in: str = "fp32") -> tuple[Variant, ...]:
    """All that is compared with `BASELINE`, the controls first.

    Args:
        simulate_in: precision of the kernel that runs the simulated ones. "fp32" takes the rounded weights as they are,
            so that their rounding is all that differs from the baseline; "bf16" rounds them and the activations again.

    Raises:
        ValueError: it is neither.
    """
    if simulate_in not in ("fp32", "bf16"):
        raise ValueError(f"simulate_in must be fp32 or bf16, got {simulate_in!r}")

    def weights(name: str, what: str, rounding: Rounding) -> Variant:
        return Variant(f"{name} weights (simulated)", f"{what}, run in the {simulate_in} kernel", simulate_in, rounding)

    channel = "symmetric, a scale for each output channel"
    return (
        JITTERED,
        RESEEDED,
        Variant("bf16", "bf16 operands, fp32 sums and state", "bf16"),
        Variant("int8", "products over features in int8, activations scaled per row as they come; else bf16", "int8"),
        weights("int8", channel, partial(round_to_integers, bits=8)),
        weights("fp8 e4m3", "a scale for each output channel", round_to_e4m3),
        weights("int4", channel, partial(round_to_integers, bits=4)),
        weights("int4 g64", "symmetric, a scale for each 64 inputs", partial(_grouped, bits=4, limit=64)),
        weights("int4 g32", "symmetric, a scale for each 32 inputs", partial(_grouped, bits=4, limit=32)),
    )


def weight_bytes(model: EquilibriumReasoner, variant: Variant, rounded: Mapping[str, Rounded]) -> int:
    """Bytes of all weights as the variant holds them, without the padding and tables of any kernel.

    Embedding, heads and fixed starts count 4 bytes an element where the kernel's precision is fp32 and nothing is
    simulated, else 2 (also for a simulated variant that the fp32 kernel runs: it stands for one that is deployed).

    Args:
        rounded: by name, as `with_rounded_weights` tells.
    """
    plain = 4 if variant.control or (variant.precision == "fp32" and not variant.simulated) else 2
    linears = dict(block_linears(model))
    total = 0
    for name, linear in linears.items():
        weight = linear.weight
        if name in rounded:
            total += rounded[name].bytes
        elif variant.precision == "int8" and ".mlp." in name:
            total += weight.numel() + 4 * weight.shape[0]
        else:
            total += plain * weight.numel()
    in_blocks = {f"{name}.weight" for name in linears}
    others = sum(tensor.numel() for name, tensor in model.state_dict().items() if name not in in_blocks)
    return total + plain * others


def sort_out(
    model: EquilibriumReasoner, wanted: Sequence[Variant], backend: str
) -> tuple[list[Variant], list[dict[str, str]]]:
    """The variants that can run here, and name and reason of those that cannot; fp8 arithmetic is always among these.

    Raises:
        ValueError: two have one name, or there is no such backend.
    """
    names = [BASELINE.name, *(variant.name for variant in wanted)]
    if len(set(names)) < len(names):
        raise ValueError(f"variants must have different names, none of them {BASELINE.name!r}, got {names[1:]}")
    runnable, missing = [], []
    for variant in wanted:
        try:
            backends.choose(backend, model, Precision[variant.precision])
        except RuntimeError as why:
            missing.append({"name": variant.name, "why": str(why)})
        else:
            runnable.append(variant)
    return runnable, [*missing, {"name": "fp8", "why": _why_no_fp8(model.device)}]


def _why_no_fp8(device: torch.device) -> str:
    missing = "no backend of this package computes in fp8"
    if device.type == "cpu":
        return f"{missing}, and PyTorch has no fp8 products that a CPU is faster at"
    capability = torch.cuda.get_device_capability(device)
    has = "has" if capability >= (8, 9) else "has no"
    return f"{missing}; {torch.cuda.get_device_name(device)} {has} fp8 tensor cores"
