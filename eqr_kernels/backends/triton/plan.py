"""What is fixed when the kernel is compiled: the model's sizes and how the work is cut into tiles.

Imports neither Triton nor a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from eqr_kernels.config import EqRConfig

# Up to this many tokens, one tile holds a feature's whole token axis.
_ONE_TILE = 128


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles, powers of two, and how many warps and pipeline stages work on them.

    Attributes:
        tokens, columns, inner: of the products over features: rows, columns of the result, and the summed axis.
        hidden: columns of the gate, and as many of the up product.
        pairs: pairs of queries' and keys' columns that are rotated together.
        mix_features, mix_units: of the token mixer that holds whole token axes: features, and hidden units at a time.
        queries, keys: of the attention.
        row_tokens, row_features: of the passes that treat each element on its own.
        warps, stages: `num_warps` and `num_stages`.
    """

    tokens: int
    columns: int
    hidden: int
    pairs: int
    inner: int
    mix_features: int
    mix_units: int
    queries: int
    keys: int
    row_tokens: int
    row_features: int
    warps: int
    stages: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tiles:
        """From what `dataclasses.asdict` gave.

        Raises:
            TypeError, ValueError: a field is missing, unknown or no positive int.
        """
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        return cls(**values)

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


@dataclass(frozen=True)
class Plan:
    """The constants of one compiled kernel. Its attributes are read inside the kernels.

    S tokens, d features, V vocabulary, k(m) hidden units of the SwiGLU on an axis of m; rows of features are padded
    with zeros to `width`, rows of tokens (of the token mixer's weights) to `span`.
    """

    S: int
    d: int
    V: int
    width: int
    span: int
    hidden: int  # k(d)
    token_hidden: int  # k(S); 0 with attention
    heads: int  # 0 with the token mixer
    head_dim: int
    rope_parts: int  # 0: no rotation; 1: of whole heads; 2: of their halves
    layers: int
    H_cycles: int
    L_cycles: int
    fixed_start: bool
    calls: bool  # the products are called, not inlined; see outer_step.py
    one_pass: bool  # the token mixer holds whole token axes
    inner: int  # the tile of a summed axis: over features
    inner_tokens: int  # over tokens; `tile.inner` over hidden units
    tile_S: int  # S up to a power of two
    tile_head: int  # head_dim up to a power of two
    tile_V: int
    tile: Tiles

    @classmethod
    def of(cls, config: EqRConfig, tiles: Tiles, *, calls: bool = False, one_pass: bool | None = None) -> Plan:
        """The plan of a model's kernel with these tiles, shrunk to the model where they are larger.

        Args:
            calls: whether the products are called, not inlined.
            one_pass: whether the token mixer holds whole token axes; None: where they fit.
        """
        c = config
        if one_pass is None:
            one_pass = c.mlp_t and c.seq_len <= _ONE_TILE
        tile_S, tile_d = power_of_two(c.seq_len), power_of_two(c.hidden_size)
        inner = min(tiles.inner, tile_d)
        inner_tokens = min(tiles.inner, tile_S)
        tile = Tiles(
            tokens=min(tiles.tokens, tile_S),
            columns=min(tiles.columns, tile_d),
            hidden=tiles.hidden,
            pairs=min(tiles.pairs, tile_d),
            inner=tiles.inner,
            mix_features=min(tiles.mix_features, tile_d),
            mix_units=tiles.mix_units,
            queries=min(tiles.queries, tile_S),
            keys=min(tiles.keys, tile_S),
            row_tokens=min(tiles.row_tokens, tile_S),
            row_features=min(tiles.row_features, tile_d),
            warps=tiles.warps,
            stages=tiles.stages,
        )
        width = round_up(c.hidden_size, max(tile.columns, inner, tile.mix_features, tile.row_features))
        return cls(
            S=c.seq_len,
            d=c.hidden_size,
            V=c.vocab_size,
            width=width,
            span=round_up(c.seq_len, 16 if one_pass else inner_tokens),
            hidden=c.swiglu_size(c.hidden_size),
            token_hidden=c.swiglu_size(c.seq_len) if c.mlp_t else 0,
            heads=0 if c.mlp_t else c.num_heads,
            head_dim=c.head_dim if not c.mlp_t else 0,
            rope_parts=0 if c.mlp_t else {"none": 0, "rope": 1, "rope2d": 2}[c.pos_encodings],
            layers=c.L_layers,
            H_cycles=c.H_cycles,
            L_cycles=c.L_cycles,
            fixed_start=c.fixed_init,
            calls=calls,
            one_pass=one_pass,
            inner=inner,
            inner_tokens=inner_tokens,
            tile_S=tile_S,
            tile_head=power_of_two(c.head_dim) if not c.mlp_t else 16,
            tile_V=min(64, power_of_two(c.vocab_size)),
            tile=tile,
        )

    @property
    def updates(self) -> int:
        """Applications of the module in one outer step."""
        return self.H_cycles * (self.L_cycles + 1)

    @property
    def qkv(self) -> int:
        """Length of a row of queries, keys and values."""
        return round_up(3 * self.d, 16)

    @property
    def rotated(self) -> int:
        """Of those, how many are rotated: all queries and keys, or none."""
        return 2 * self.d if self.rope_parts else 0

    @property
    def rope_half(self) -> int:
        """Distance of the two features that are rotated together."""
        return self.head_dim // (2 * self.rope_parts) if self.rope_parts else 0

    @property
    def softmax_scale(self) -> float:
        return float(self.head_dim**-0.5) if self.heads else 0.0

    @property
    def embedding_scale(self) -> float:
        return float(self.d**0.5)

    @property
    def squares_size(self) -> int:
        return round_up(max(self.S, self.width), 16)

    @property
    def mixer_in_size(self) -> int:
        """Elements of one layer's weights `mixer_in`, and below of `mixer_out`."""
        return 3 * self.d * self.width if self.heads else 2 * self.token_hidden * self.span

    @property
    def mixer_out_size(self) -> int:
        return self.width * self.width if self.heads else self.S * self.token_hidden

    @property
    def work(self) -> int:
        """Elements of `h`, the scratch space that a block's hidden values share."""
        channel = self.S * self.hidden
        if self.heads:
            return round_up(max(channel, self.S * (self.qkv + self.width)), 16)
        return round_up(max(channel, 0 if self.one_pass else self.token_hidden * self.width), 16)


def power_of_two(size: int) -> int:
    """`size` up to a power of two that a product's tile may have, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def round_up(size: int, multiple: int) -> int:
    return -(size // -multiple) * multiple


# In the order in which they are tried; the first that fits is the choice where nothing is timed.
_BF16 = (
    Tiles(128, 64, 64, 32, 32, 64, 32, 64, 64, 16, 128, warps=8, stages=3),
    Tiles(128, 64, 64, 32, 64, 64, 32, 64, 64, 16, 128, warps=8, stages=3),
    Tiles(128, 128, 64, 32, 64, 64, 64, 128, 64, 16, 128, warps=8, stages=3),
    Tiles(128, 64, 128, 32, 32, 64, 32, 128, 128, 16, 128, warps=8, stages=4),
    Tiles(64, 64, 64, 32, 64, 64, 32, 64, 64, 16, 128, warps=4, stages=3),
)
_BF16_ATTENTION = (Tiles(64, 64, 64, 32, 64, 64, 32, 64, 64, 16, 128, warps=8, stages=3), *_BF16)
_FP32 = (
    Tiles(64, 64, 32, 16, 16, 32, 32, 32, 32, 16, 128, warps=8, stages=2),
    Tiles(32, 64, 32, 16, 16, 32, 32, 32, 32, 16, 128, warps=8, stages=2),
)
# As few tiles as can be: the interpreter's time goes by operations, whatever their size.
INTERPRETED = Tiles(128, 256, 256, 256, 256, 256, 256, 256, 256, 256, 256, warps=4, stages=1)


def candidates(config: EqRConfig, dtype: torch.dtype, *, calls: bool = False) -> tuple[Plan, ...]:
    """The plans worth trying for a model in `dtype`, float32 or bfloat16; no two are the same."""
    tiles = _FP32 if dtype == torch.float32 else _BF16 if config.mlp_t else _BF16_ATTENTION
    return tuple(dict.fromkeys(Plan.of(config, tile, calls=calls) for tile in tiles))


def prefers_calls(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether products should be called on NVIDIA devices of this compute capability: where they use mma.sync."""
    return dtype == torch.bfloat16 and capability[0] in (8, 12)
