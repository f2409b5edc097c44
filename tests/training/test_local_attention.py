"""The start of attention over a board at its neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eqr_kernels import EqRConfig, EquilibriumReasoner, reference
from eqr_kernels.training.local_attention import look_at_neighbours
from tests.support.commands import eqr


def drawn(**changes: object) -> EquilibriumReasoner:
    torch.manual_seed(0)
    return EquilibriumReasoner(EqRConfig.maze_small(**changes))


def first_look(model: EquilibriumReasoner) -> Tensor:
    """What each square's heads look at in a board of equal tokens, attention weights [heads, S, S]."""
    config, rope = model.config, model.rope()
    embedded = model.embed(torch.full((1, config.seq_len), 2))
    qkv = model.L_level.layers[0].self_attn.qkv_proj(embedded)
    q, k, _ = qkv.view(config.seq_len, 3, config.num_heads, config.head_dim).unbind(1)
    assert rope is not None
    q, k = (reference._rotate(x[None], rope, config)[0].transpose(0, 1) for x in (q, k))
    return torch.softmax(q @ k.transpose(1, 2) / math.sqrt(config.head_dim), -1)


@pytest.mark.parametrize(
    "changes", [{}, {"seq_len": 49}, {"num_heads": 8, "hidden_size": 128}, {"num_heads": 2, "L_layers": 2}], ids=str
)
@torch.no_grad()
def test_each_head_begins_at_a_neighbour(changes: dict[str, int]) -> None:
    model = drawn(**changes)
    look_at_neighbours(model)
    width = model.config.board[1]
    square = torch.arange(model.config.seq_len).reshape(-1, width)[1:-1, 1:-1].reshape(-1)  # with four neighbours
    looks = first_look(model)
    for head in range(model.config.num_heads):
        neighbour = (-width, width, -1, 1)[head % 4]
        best = looks[head, square].argmax(-1) - square
        assert (best == neighbour).all(), f"head {head}"


def test_only_attention_over_a_board_has_neighbours() -> None:
    for changes in ({"mlp_t": True}, {"pos_encodings": "rope"}, {"pos_encodings": "none"}):
        with pytest.raises(ValueError, match="attention_init 'local' is for attention over a board"):
            look_at_neighbours(drawn(**changes))


def test_a_run_of_the_maze_preset_begins_there(tmp_path) -> None:
    data, out = tmp_path / "mazes.csv", tmp_path / "run"
    eqr("generate", "maze", "-n", 4, "--size", 5, "--answers", "--format", "csv", "-o", data)
    train = ["train", "--preset", "maze-small", "--task", "maze", "--data", data, "--out", out, "--set", "seq_len=25"]
    eqr(*train, "--steps", 1, "--lr", 0, "--no-compile", "--no-calibrate")
    shared = EquilibriumReasoner.from_pretrained(out).embed_tokens.embedding_weight[:, 0]
    assert (shared == 3 / 8).all()  # the feature from which positions are read
    wrong = ["--out", tmp_path / "other", "--set", "pos_encodings=rope", "--steps", 1]
    refused = eqr(*train, *wrong, code=2).stderr
    assert "attention over a board" in refused and "attention_init" in refused and not (tmp_path / "other").exists()
