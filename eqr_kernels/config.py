"""The sizes and constants of an Equilibrium Reasoner."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

PosEncodings = Literal["rope", "rope2d", "none"]

# Fields of the official `arch` section that do not change the operator, so that its configs load unchanged.
_OFFICIAL_FIELDS_WITHOUT_EFFECT = frozenset(
    {
        "name",
        "short_name",
        "loss",
        "batch_size",
        "H_layers",
        "forward_dtype",
        "puzzle_emb_ndim",
        "puzzle_emb_len",
        "num_puzzle_identifiers",
        "no_ACT_continue",
        "disable_act_halt",
        "act_inference",
        "halt_threshold",
        "halt_confirm_steps",
        "halt_confirm_mode",
    }
)
# A noise stream is 8 bits of the Philox counter, and streams 0 and 1 are the two start states.
_MAX_UPDATES_PER_STEP = 254

TRM_FIELDS = {"fixed_init": True, "lambda_": 1.0, "noise_scale": 0.0}
"""What makes a TRM of the operator: a fixed start, neither damping nor noise."""

_COUNTS = (
    "seq_len",
    "vocab_size",
    "hidden_size",
    "num_heads",
    "multiple_of",
    "H_cycles",
    "L_cycles",
    "L_layers",
    "halt_max_steps",
)
_NUMBERS = (
    "expansion",
    "rms_norm_eps",
    "rope_theta",
    "lambda_",
    "noise_scale",
    "H_init_std",
    "L_init_std",
    "halt_exploration_prob",
)


PUBLISHED_MULTIPLE = 256


def next_multiple(value: int, divisor: int) -> int:
    """The least multiple of `divisor` that is at least `value`."""
    return -(value // -divisor) * divisor


@dataclass(frozen=True)
class EqRConfig:
    """Everything that fixes the operator of an Equilibrium Reasoner (EqR, arXiv 2605.21488).

    The names are those of the official configuration. Defaults are the `sudoku-paper` preset's.

    Attributes:
        seq_len: tokens S of a row.
        vocab_size: size V of the vocabulary, with 0 the padding token.
        hidden_size: features d of a token.
        num_heads: attention heads (used when `mlp_t` is False).
        expansion, multiple_of: of the hidden units of a SwiGLU, see `swiglu_size`.
        H_cycles: latent recursions of an outer step.
        L_cycles: updates of z_L before each update of z_H.
        L_layers: blocks of the weight-tied module.
        mlp_t: True mixes tokens by a SwiGLU over the token axis, False by self-attention.
        pos_encodings: "rope", "rope2d" or "none"; used by attention only.
        rms_norm_eps: added to the mean square in every RMS-norm.
        rope_theta: base of the rotary frequencies.
        board_height, board_width: the grid of "rope2d"; the square root of `seq_len` when None.
        lambda_: weight of the update; damping is 1 - lambda_.
        noise_scale: standard deviation of the noise added at every update (noise injection, NI).
        H_init_std, L_init_std: standard deviation of the random start states (random initialisation, RI).
        fixed_init: True starts from the persistent buffers `H_init` and `L_init` [d], as TRM does, not at random.
        halt_max_steps: outer steps after which training replaces a row.
        halt_exploration_prob: probability, per row and training step, of drawing a minimum number of steps.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or fields contradict each other.
    """

    seq_len: int = 81
    vocab_size: int = 11
    hidden_size: int = 512
    num_heads: int = 8
    expansion: float = 4.0
    multiple_of: int = PUBLISHED_MULTIPLE
    H_cycles: int = 3
    L_cycles: int = 6
    L_layers: int = 2
    mlp_t: bool = True
    pos_encodings: PosEncodings = "none"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    board_height: int | None = None
    board_width: int | None = None
    lambda_: float = 0.95
    noise_scale: float = 0.01
    H_init_std: float = 1.0
    L_init_std: float = 1.0
    fixed_init: bool = False
    halt_max_steps: int = 16
    halt_exploration_prob: float = 0.1

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("board_height", "board_width"):
            side = getattr(self, name)
            if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
                raise TypeError(f"{name} must be an int or None, got {side!r} ({type(side).__name__})")
            if side is not None and side < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {side}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
            object.__setattr__(self, name, float(value))
        for name in ("mlp_t", "fixed_init"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if not 0 < self.lambda_ <= 1:
            raise ValueError(f"lambda_ must be in (0, 1], got {self.lambda_}; 1 means no damping")
        if self.expansion == 0:
            raise ValueError("expansion must be positive, got 0")
        if self.halt_exploration_prob > 1:
            raise ValueError(f"halt_exploration_prob must be in [0, 1], got {self.halt_exploration_prob}")
        if self.updates_per_step > _MAX_UPDATES_PER_STEP:
            raise ValueError(
                f"H_cycles * (L_cycles + 1) must be at most {_MAX_UPDATES_PER_STEP} (one noise stream each), "
                f"got {self.H_cycles} * {self.L_cycles + 1}; use fewer cycles and a greater depth"
            )
        if self.pos_encodings not in ("rope", "rope2d", "none"):
            raise ValueError(f'pos_encodings must be "rope", "rope2d" or "none", got {self.pos_encodings!r}')
        if not self.mlp_t:
            self._check_attention()

    def _check_attention(self) -> None:
        if self.hidden_size % self.num_heads:
            sizes = f"{self.hidden_size} and {self.num_heads}"
            raise ValueError(f"hidden_size must be a multiple of num_heads, got {sizes}")
        multiple = {"rope": 2, "rope2d": 4, "none": 1}[self.pos_encodings]
        if self.head_dim % multiple:
            raise ValueError(
                f"hidden_size / num_heads must be a multiple of {multiple} for pos_encodings={self.pos_encodings!r}, "
                f"got {self.head_dim}"
            )
        if self.pos_encodings == "rope2d":
            height, width = self.board
            if height * width != self.seq_len:
                raise ValueError(
                    f"board_height * board_width must be seq_len={self.seq_len} for pos_encodings='rope2d', "
                    f"got {height} * {width}; set both"
                )

    def swiglu_size(self, size: int) -> int:
        """Hidden units k of a SwiGLU on an axis of `size`: `expansion * size * 2/3`, rounded up to `multiple_of`."""
        return next_multiple(max(1, round(self.expansion * size * 2 / 3)), self.multiple_of)

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def board(self) -> tuple[int, int]:
        """Height and width of the grid that the tokens lie on, for "rope2d"."""
        side = math.isqrt(self.seq_len)
        return self.board_height or side, self.board_width or side

    @property
    def updates_per_step(self) -> int:
        """Applications of the module F in one outer step."""
        return self.H_cycles * (self.L_cycles + 1)

    @property
    def layers_per_step(self) -> int:
        """Layer equivalents of one outer step: block applications."""
        return self.updates_per_step * self.L_layers

    @classmethod
    def sudoku_paper(cls, **changes: Any) -> EqRConfig:
        """The published Sudoku-Extreme model: 81 tokens, d 512, token mixing by SwiGLU, 42 layers a step."""
        return cls.from_dict({**changes})

    @classmethod
    def maze(cls, **changes: Any) -> EqRConfig:
        """The published 30x30 maze model: 900 tokens, d 128, attention with RoPE."""
        maze = dict(
            seq_len=900,
            vocab_size=6,
            hidden_size=128,
            num_heads=8,
            H_cycles=3,
            L_cycles=4,
            L_layers=1,
            mlp_t=False,
            pos_encodings="rope",
        )
        return cls.from_dict({**maze, **changes})

    @classmethod
    def maze_small(cls, **changes: Any) -> EqRConfig:
        """54 thousand parameters for 11x11 mazes: one block of d 64, attention with RoPE over rows and columns.

        The weights fit mazes of any size. Rotary frequencies of 1 radian a square and more tell a square from its
        neighbour, which attention on a board needs more than long distances.
        """
        small = dict(
            seq_len=121,
            hidden_size=64,
            num_heads=4,
            multiple_of=64,
            H_cycles=1,
            L_cycles=3,
            pos_encodings="rope2d",
            rope_theta=0.1,
        )
        return cls.maze(**{**small, **changes})

    @classmethod
    def sudoku(cls, **changes: Any) -> EqRConfig:
        """The size of the shipped model `sudoku`: half a million parameters, two blocks of d 128, 16 layers a step."""
        return cls.from_dict({**dict(hidden_size=128, H_cycles=2, L_cycles=3, L_layers=2), **changes})

    @classmethod
    def sudoku_small(cls, **changes: Any) -> EqRConfig:
        """A quarter of a million parameters for 9x9 Sudoku; trains on a laptop's CPU in hours."""
        return cls.from_dict({**dict(hidden_size=128, H_cycles=2, L_cycles=3, L_layers=1), **changes})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EqRConfig:
        """A config from a mapping, such as the official `arch` section.

        Official fields that do not change the operator are passed over.

        Raises:
            ValueError: a field does not exist; the message names the nearest one.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in fields.items():
            if name in known:
                values[name] = "none" if name == "pos_encodings" and value is None else value
            elif name not in _OFFICIAL_FIELDS_WITHOUT_EFFECT:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {nearest[0]!r}? " if nearest else ""
                raise ValueError(f"EqRConfig has no field {name!r}; {hint}Known fields: {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return dataclasses.asdict(self)
