"""The start of attention over a board at its neighbours."""

from __future__ import annotations

import json
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


def looks(model: EquilibriumReasoner) -> list[Tensor]:
    """What each layer's heads look at where a board is embedded, of equal tokens: attention weights [heads, S, S]."""
    config, rope = model.config, model.rope()
    embedded = model.embed(torch.full((1, config.seq_len), 2))
    assert rope is not None
    weights = []
    for layer in model.L_level.layers:
        qkv = layer.self_attn.qkv_proj(embedded)
        q, k, _ = qkv.view(config.seq_len, 3, config.num_heads, config.head_dim).unbind(1)
        q, k = (reference._rotate(x[None], rope, config)[0].transpose(0, 1) for x in (q, k))
        weights.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(config.head_dim), -1))
    return weights


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seq_len": 77, "board_height": 7, "board_width": 11},
        {"num_heads": 8, "hidden_size": 128},
        {"rope_theta": 0.5, "L_layers": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_each_head_begins_at_a_neighbour(changes: dict[str, float]) -> None:
    model = drawn(**changes)
    before = [layer.self_attn.qkv_proj.weight.clone() for layer in model.L_level.layers]
    look_at_neighbours(model)
    height, width = model.config.board
    square = torch.arange(height * width).reshape(height, width)[1:-1, 1:-1].reshape(-1)  # with four neighbours
    for layer, weights, old in zip(model.L_level.layers, looks(model), before, strict=True):
        for head, look in enumerate(weights):
            neighbour = square + (-width, width, -1, 1)[head % 4]
            assert (look[square].argmax(-1) == neighbour).all() and look[square, neighbour].mean() > 0.25, head
        now, was = (w.view(3, -1, model.config.hidden_size)[..., 1:] for w in (layer.self_attn.qkv_proj.weight, old))
        # What is not position is drawn as ever, queries and keys smaller, and no value tells of the shared feature.
        assert (
            torch.equal(now[2], was[2])
            and not layer.self_attn.qkv_proj.weight.view(3, -1, now.shape[2] + 1)[2, :, 0].any()
        )
        torch.testing.assert_close(now[:2], 0.3 * was[:2])


@pytest.mark.parametrize("changes", [{"num_heads": 2}, {"num_heads": 8}, {"rope_theta": 10000.0}], ids=str)
def test_heads_that_cannot_tell_the_neighbours_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(
        ValueError, match="needs num_heads of at least 4, heads of at least 16 features and a rope_theta"
    ):
        look_at_neighbours(drawn(**changes))


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
    path = next(out.glob("state-*/manifest.json"))
    manifest = json.loads(path.read_text())
    del manifest["settings"]["attention_init"]  # as in a manifest from before, when all were drawn at random
    path.write_text(json.dumps(manifest))
    goes_on = ["train", "--data", data, "--out", out, "--resume", "--steps", 2, "--lr", 0]
    refused = eqr(*goes_on, "--attention-init", "local", code=2).stderr
    assert "--attention-init (was 'random', now 'local')" in refused
    wrong = ["--out", tmp_path / "other", "--set", "pos_encodings=rope", "--steps", 1]
    refused = eqr(*train, *wrong, code=2).stderr
    assert "attention over a board" in refused and "attention_init" in refused and not (tmp_path / "other").exists()
