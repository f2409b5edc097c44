"""Attention that begins as a look at the neighbouring squares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eqr_kernels.modules import Attention, EqROperator

_NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Rows and columns from a square to what each head looks at, in turn."""
_CONSTANT = 3.0
"""Of the embedding's first feature, which every token has alike: what position alone is read from."""
_SHARPNESS = 3.0
"""What a head's logit of its neighbour has over an average square's, per axis."""
_CONTENT = 0.3
"""Share of their drawn size that queries and keys of the other features keep, or these would outweigh position."""


@torch.no_grad()
def look_at_neighbours(model: EqROperator) -> None:
    """Turns freshly drawn attention over a board so that each head looks at one of the four neighbours of a square.

    The positional initialisation of ConViT (arXiv 2103.10697, section 3.2), by rotary angles: queries and keys of a
    feature that all embedded tokens share differ in phase by one square's rotation, so their product is greatest there.
    It is the sharper the faster the angles turn. Random states, which are added to the embedding, blur it at the first
    outer step. Drawn at random, attention must first find out what a neighbour is: docs/training.md says what that
    costs on mazes.

    Raises:
        ValueError: tokens are mixed otherwise than by attention over a board ("rope2d"); or its heads are too few for
            the four directions, or too small or their angles too slow to tell a square from its neighbour.
    """
    config = model.config
    if config.mlp_t or config.pos_encodings != "rope2d":
        raise ValueError(
            "attention_init 'local' is for attention over a board (mlp_t=False and pos_encodings='rope2d'), got "
            f"mlp_t={config.mlp_t} and pos_encodings={config.pos_encodings!r}; take 'random'"
        )
    if config.num_heads < len(_NEIGHBOURS) or config.head_dim < 16 or config.rope_theta >= 1:
        raise ValueError(
            "attention_init 'local' needs num_heads of at least 4, heads of at least 16 features and a rope_theta "
            f"below 1 (0.1 is tried), got num_heads={config.num_heads}, {config.head_dim} features and "
            f"rope_theta={config.rope_theta:g}; set them so, or take 'random'"
        )
    half = config.head_dim // 2  # features of an axis: a cosine and a sine of each of its half // 2 frequencies
    frequency = config.rope_theta ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
    size = math.sqrt(_SHARPNESS * math.sqrt(config.head_dim) / len(frequency)) / _CONSTANT

    def turned(squares: int) -> Tensor:
        """A vector of `size` in each frequency, in the phase of so many squares: [half]."""
        return size * torch.cat([torch.cos(frequency * squares), torch.sin(frequency * squares)])

    model.embed_tokens.embedding_weight[:, 0] = _CONSTANT / math.sqrt(config.hidden_size)
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        weight = attention.qkv_proj.weight
        q, k, v = weight.view(3, config.num_heads, config.head_dim, -1)  # each [heads, head_dim, d]
        q.mul_(_CONTENT)
        k.mul_(_CONTENT)
        v[..., 0] = 0
        for head in range(config.num_heads):
            row, column = _NEIGHBOURS[head % len(_NEIGHBOURS)]
            q[head, :, 0] = torch.cat([turned(row), turned(column)])
            k[head, :, 0] = torch.cat([turned(0), turned(0)])
