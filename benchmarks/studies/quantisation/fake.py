"""Weights as a low precision would hold them, kept in float32: what rounding does where no kernel has the precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eqr_kernels.reasoner import EquilibriumReasoner

SCALE_BYTES = 4
_E4M3_MOST = 448.0
_LEAST_GROUP = 8


@dataclass(frozen=True)
class Rounded:
    """A weight on the grid of a low precision.

    Attributes:
        values: float32 [out, in], the rounded weight.
        scale: float32 [out, groups], the grid's unit in each row and group of the input axis; None where there is none.
        group: inputs that share a scale; None as `scale`.
        bits: of an element, its scale left out.
    """

    values: Tensor
    scale: Tensor | None
    group: int | None
    bits: int

    @property
    def bytes(self) -> int:
        """Elements packed without gaps, and float32 scales."""
        scales = 0 if self.scale is None else SCALE_BYTES * self.scale.numel()
        return -(self.values.numel() * self.bits // -8) + scales


Rounding = Callable[[Tensor], Rounded]
"""weight [out, in] -> what stands for it."""


def group_within(axis: int, limit: int) -> int:
    """The greatest divisor of `axis` up to `limit`, so that all groups are equal: 27 of 81 inputs for 32 or 64.

    Raises:
        ValueError: it would be below 8 (or `limit`, if that is less): almost every weight would have its own scale.
    """
    if axis < 1 or limit < 1:
        raise ValueError(f"axis and limit must be at least 1, got {axis} and {limit}")
    group = next(size for size in range(min(axis, limit), 0, -1) if axis % size == 0)
    if group < min(axis, limit, _LEAST_GROUP):
        raise ValueError(
            f"an axis of {axis} inputs has no divisor from {min(limit, _LEAST_GROUP)} to {limit}, got {group} at best; "
            "use one scale for each output channel (group None)"
        )
    return group


def round_to_integers(weight: Tensor, bits: int, group: int | None = None) -> Rounded:
    """The weight on a symmetric integer grid: unit = greatest magnitude / (2**(bits - 1) - 1), ties to even.

    The code -2**(bits - 1) is left unused, as in the package's int8 kernel. Every element lies within half a unit of
    the weight, and rounding twice gives the same codes. Codes are found in float64, so that this holds exactly.

    Args:
        weight: [out, in], finite.
        bits: 2 to 8.
        group: inputs that share a scale, a divisor of `in`; None is one scale for each output channel.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check_matrix(weight)
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    limit = 2 ** (bits - 1) - 1
    grouped = _grouped(weight, group)
    scale = _unit(grouped, limit)
    codes = (grouped / scale.double()).round().clamp(-limit, limit)
    return _rounded(codes, scale, weight, bits)


def round_to_e4m3(weight: Tensor) -> Rounded:
    """The weight in float8 e4m3fn (4 bits of exponent, 3 of mantissa, at most 448) under a scale per output channel.

    Format: Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433.

    Args:
        weight: [out, in], finite.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check_matrix(weight)
    grouped = _grouped(weight, None)
    scale = _unit(grouped, _E4M3_MOST)
    codes = (grouped / scale.double()).clamp(-_E4M3_MOST, _E4M3_MOST).float().to(torch.float8_e4m3fn)
    return _rounded(codes.double(), scale, weight, 8)


def jitter(weight: Tensor, relative: float = 2.0**-20, seed: int = 0) -> Rounded:
    """The weight times 1 +- `relative`, signs at random: no quantisation, but other last bits in all that follows.

    Args:
        weight: [out, in], finite.
        relative: at least 2**-23, or float32 would not show it.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check_matrix(weight)
    if not 2.0**-23 <= relative < 1:
        raise ValueError(f"relative must be from 2**-23 to 1, got {relative:g}")
    signs = torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    values = weight.detach().double() * (1 + relative * signs.to(weight.device))
    return Rounded(values.float(), None, None, 32)


def block_linears(model: EquilibriumReasoner) -> Iterator[tuple[str, torch.nn.Linear]]:
    """What is quantised: the linear layers of the blocks, by name. Embedding, lm_head and q_head stay."""
    for name, module in model.L_level.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield f"L_level.{name}", module


@torch.no_grad()
def with_rounded_weights(
    model: EquilibriumReasoner, rounding: Rounding | None
) -> tuple[EquilibriumReasoner, dict[str, Rounded]]:
    """A float32 copy of the model whose block linears are rounded, and each as it was rounded; None rounds nothing."""
    changed = copy.deepcopy(model).float().eval()
    rounded: dict[str, Rounded] = {}
    for name, linear in block_linears(changed) if rounding else ():
        assert rounding is not None
        rounded[name] = rounding(linear.weight)
        linear.weight.copy_(rounded[name].values)
    return changed, rounded


def _check_matrix(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating-point tensor [out, in], got {kind}")
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"weight must be [out, in] and not empty, got shape {list(weight.shape)}")
    if not weight.isfinite().all():
        raise ValueError(f"weight must be finite, got {int((~weight.isfinite()).sum())} non-finite values")


def _grouped(weight: Tensor, group: int | None) -> Tensor:
    """float64 [out, groups, group]."""
    inputs = weight.shape[1]
    size = inputs if group is None else group
    if size < 1 or inputs % size:
        raise ValueError(f"group must divide the {inputs} inputs of the weight, got {group}; see group_within")
    return weight.detach().double().unflatten(1, (-1, size))


def _unit(grouped: Tensor, limit: float) -> Tensor:
    """The grid's unit, float32 [out, groups, 1]; 1 where all is zero (or too small for float32 to hold a unit)."""
    unit = (grouped.abs().amax(2, keepdim=True) / limit).float()
    return torch.where(unit > torch.finfo(torch.float32).tiny, unit, 1.0)


def _rounded(codes: Tensor, scale: Tensor, weight: Tensor, bits: int) -> Rounded:
    values = (codes * scale.double()).float().flatten(1)
    return Rounded(values, scale[..., 0], codes.shape[2], bits)
