"""Counter-based random numbers: one Philox4x32-10 layout for every backend (layout version 1).

Philox is the generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A number depends
only on who asks (seed, restart, id), when (step, stream) and where (element), so a trajectory draws the same noise
alone or in any company.

    key      (seed, restart)
    counter  (element // 4, step << 8 | stream, id low word, id high word)
    element  row-major index in the trajectory's own [S, d] tensor; word number element % 4 of its block
    stream   0 starts z_H, 1 starts z_L, 2 + m is the m-th update of an outer step

`rng` below is always an int64 tensor [n, 4] with the columns (seed, restart, id, step), a row for each trajectory.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

RNG_LAYOUT = 1
START_H, START_L, FIRST_UPDATE = 0, 1, 2

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10
# Standard deviation of a standard normal cut at +-2, by which the start states are divided.
TRUNCATED_STD = 0.8796256610342398


def make_rng(seed: Tensor | int, restart: Tensor | int, ids: Tensor, step: Tensor | int) -> Tensor:
    """The `rng` tensor [n, 4] of trajectories.

    Args:
        seed, restart: int or int64 [n], 0 to 2**32 - 1.
        ids: int64 [n], any 64 bits (two's complement).
        step: int or int64 [n], outer steps already done, 0 to 2**24 - 1.
    """
    columns = [torch.as_tensor(c, dtype=torch.int64, device=ids.device).expand(ids.shape) for c in (seed, restart)]
    return torch.stack(
        [*columns, ids, torch.as_tensor(step, dtype=torch.int64, device=ids.device).expand(ids.shape)], 1
    )


def check_word(name: str, value: object, bits: int) -> int:
    """`value` if it is an int that fits in `bits` unsigned bits.

    Raises:
        TypeError, ValueError: it does not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    number = int(value)
    if not 0 <= number < 1 << bits:
        raise ValueError(f"{name} must be in 0..2**{bits} - 1, got {number}")
    return number


def check_words(name: str, values: Tensor, bits: int) -> None:
    """Checks an int64 tensor of any shape whose entries must fit in `bits` unsigned bits; waits for the device.

    Raises:
        TypeError, ValueError: it is no int64 tensor, or an entry does not fit.
    """
    if values.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {values.dtype}; use {name}.long()")
    low, high = (int(v) for v in values.aminmax()) if values.numel() else (0, 0)
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"{name} must be in 0..2**{bits} - 1, got {low if low < 0 else high}")


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a * b, any shape."""
    # In halves that stay below 2**50: a product that wraps in int64 is undefined in the C++ that torch.compile writes.
    low, high = b * (a & 0xFFFF), b * (a >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _LOW


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words; all shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def philox_words(rng: Tensor, stream: int, numel: int) -> Tensor:
    """The first `numel` words of each trajectory's `stream`: int64 [n, numel] holding 32-bit words."""
    return _blocks(rng, stream, numel).flatten(1)[:, :numel]


def _blocks(rng: Tensor, stream: int, numel: int) -> Tensor:
    check_word("stream", stream, 8)
    seed, restart, ids, step = rng.unbind(1)  # [n] each
    block = torch.arange((numel + 3) // 4, dtype=torch.int64, device=rng.device)[None]  # [1, blocks]
    counter = (block, (step << 8 | stream)[:, None], (ids & _LOW)[:, None], ((ids >> 32) & _LOW)[:, None])
    words = philox(counter, (seed[:, None], restart[:, None]))
    return torch.stack(torch.broadcast_tensors(*words), 2)  # [n, blocks, 4]


def _uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    # 23 bits and a half: exact in float32 and never 0 or 1.
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def normal(rng: Tensor, stream: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normals of each trajectory's `stream`, by Box and Muller, [n, *shape].

    float64 is computed in float64; every other dtype in float32 and rounded once.
    """
    numel = math.prod(shape)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    u = _uniform(_blocks(rng, stream, numel), high)  # [n, blocks, 4]
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0::2]))
    angle = (2.0 * math.pi) * u[..., 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)  # [n, blocks, 2, 2]
    return pairs.flatten(1)[:, :numel].reshape(rng.shape[0], *shape).to(dtype)


def truncated_normal(uniform: Tensor) -> Tensor:
    """Maps uniforms in (0, 1), any shape, to the variance-compensated normal cut at +-2 (so at +-2.27)."""
    bound = math.erf(math.sqrt(2.0))
    x = torch.erfinv(bound * (2.0 * uniform - 1.0)) * (math.sqrt(2.0) / TRUNCATED_STD)
    return x.clamp(-2.0 / TRUNCATED_STD, 2.0 / TRUNCATED_STD)


def start(rng: Tensor, stream: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A random start state of standard deviation 1 (random initialisation), [n, *shape]; one word an element."""
    high = torch.float64 if dtype == torch.float64 else torch.float32
    u = _uniform(philox_words(rng, stream, math.prod(shape)), high)
    return truncated_normal(u).reshape(rng.shape[0], *shape).to(dtype)


def hash_tokens(tokens: Tensor) -> Tensor:
    """A stable 64-bit identifier for each row of `tokens` (integers [n, S]): int64 [n].

    The sum of a mixed word for each (position, token), mixed again (the finaliser of splitmix64), so that it does
    not depend on device, version or company.
    """
    x = tokens.to(torch.int64)
    position = torch.arange(1, x.shape[1] + 1, dtype=torch.int64, device=x.device)
    return _mix((_mix(position * -0x61C8864680B583EB + x)).sum(1))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def noise_floor(noise_scale: float) -> float:
    """The residual that the injected noise leaves, about: sqrt(2) noise_scale.

    Independent noise in the two states of a difference, relative to states whose components have a mean square of 1.
    """
    return math.sqrt(2) * noise_scale
