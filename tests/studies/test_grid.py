"""The grid of depths and breadths that one run gives, against a run for each of its cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eqr_kernels import EquilibriumReasoner
from eqr_kernels.studies.attractors import modes
from eqr_kernels.studies.coupling import couple
from eqr_kernels.studies.recording import record
from eqr_kernels.studies.replay import RULES as ALL_RULES
from eqr_kernels.studies.replay import correct_grid, ends_at, settled
from eqr_kernels.studies.scoring import exact_match
from tests.support.environment import needs_extension
from tests.support.models import make_contractive, tiny_config

DEPTHS, BREADTHS = (1, 2, 5, 9), (1, 2, 5)
RULES = ("residual", "vote", "q")


def random_model(seed: int) -> EquilibriumReasoner:
    """Random weights do not contract, so that a puzzle's trajectories answer differently."""
    torch.manual_seed(seed)
    model = EquilibriumReasoner(tiny_config(noise_scale=0.01)).eval()
    with torch.no_grad():
        model.q_head.weight.normal_()
    return model


def labels_for(model: EquilibriumReasoner, tokens: torch.Tensor, **options: object) -> np.ndarray:
    """Labels [N, S] that are neither all right nor all wrong: the answers of restart 3 of five, two rows spoilt."""
    every = model.solve(tokens, depth=DEPTHS[-1], breadth=5, halt="none", return_all=True, **options).all_preds
    labels = every[:, 3].numpy().copy()
    labels[4, 0] = labels[4, 0] % 6 + 1
    labels[5, 2:] = 0
    return labels


@needs_extension
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_cell_is_a_run_of_its_own_bit_for_bit(puzzles, seed):
    model = random_model(seed)
    labels = labels_for(model, puzzles, seed=seed, backend="cpu")
    options = dict(seed=seed, backend="cpu")
    recording = record(model, puzzles.numpy(), labels, depths=DEPTHS, breadth=BREADTHS[-1], **options)
    grid = correct_grid(recording, DEPTHS, BREADTHS, RULES)
    assert grid.shape == (12, 4, 3, 3)
    for k, depth in enumerate(DEPTHS):
        for j, breadth in enumerate(BREADTHS):
            for r, rule in enumerate(RULES):
                alone = model.solve(
                    puzzles, depth=depth, breadth=breadth, select=rule, halt="none", return_all=True, **options
                )
                right = exact_match(alone.preds.numpy(), labels)
                assert grid[:, k, j, r].tolist() == right.tolist(), (depth, breadth, rule)
            for name in ("residual", "score", "q_halt", "steps", "status"):
                mine, other = getattr(recording, name)[:, :breadth, k], getattr(alone, f"all_{name}").numpy()
                assert mine.astype(other.dtype).tobytes() == other.tobytes(), (depth, breadth, name)
            right = exact_match(alone.all_preds.numpy(), labels)
            assert recording.correct[:, :breadth, k].tolist() == right.tolist()
    # Not by chance: the trajectories do disagree.
    assert 0 < recording.correct[..., -1].mean() < 1 and len(np.unique(recording.score[0, :, -1])) == 5


@needs_extension
@pytest.mark.parametrize("seed", [0, 3])
def test_each_cell_under_halting_is_a_run_of_its_own(puzzles, seed):
    model = make_contractive(tiny_config(noise_scale=0.02), seed=seed)
    tol = float(model.solve(puzzles, depth=9, breadth=5, halt="none", trace=True).residuals[..., 3:6].median())
    labels = labels_for(model, puzzles, backend="cpu")
    options = dict(halt="residual", tol=tol, backend="cpu")
    rules = (*RULES, "first")
    recording = record(model, puzzles.numpy(), labels, depths=DEPTHS, breadth=BREADTHS[-1], **options)
    grid, still = correct_grid(recording, DEPTHS, BREADTHS, rules), settled(recording, tol)
    for k, depth in enumerate(DEPTHS):
        for j, breadth in enumerate(BREADTHS):
            for r, rule in enumerate(rules):
                alone = model.solve(puzzles, depth=depth, breadth=breadth, select=rule, **options)
                right = exact_match(alone.preds.numpy(), labels)
                assert grid[:, k, j, r].tolist() == right.tolist(), (depth, breadth, rule)
                if rule != "first":  # whose losers are cancelled
                    assert recording.steps[:, :breadth, k].tolist() == alone.all_steps.tolist()
                    assert recording.residual[:, :breadth, k].tolist() == alone.all_residual.tolist()
                    assert still[:, :breadth, k].tolist() == (alone.all_status == 0).tolist()
    assert 0 < still[..., -1].mean() <= 1 and 1 < recording.steps[..., -1].min() < recording.steps.max()
    assert (ends_at(recording, 9).settled == still[..., -1]).all()


@pytest.mark.parametrize("halt", ["none", "residual"])
def test_chunks_change_nothing_and_any_is_the_union(contractive, puzzles, backend, halt):
    labels = labels_for(contractive, puzzles)
    arguments = dict(depths=(2, 6), breadth=3, halt=halt, backend=backend)
    if halt == "residual":
        arguments["tol"] = 0.05
    whole = record(contractive, puzzles.numpy(), labels, **arguments)
    parts = record(contractive, puzzles.numpy(), labels, chunk=5, **arguments)
    exactly = backend == "cpu"
    for name in ("correct", "answer", "steps", "status", *(("residuals", "score", "accuracy") if exactly else ())):
        assert np.array_equal(getattr(whole, name), getattr(parts, name), equal_nan=name == "residuals"), name
    grid = correct_grid(whole, (2, 6), (1, 3), ("any", "residual"))
    for j, b in enumerate((1, 3)):
        assert (grid[:, :, j, 0] == whole.correct[:, :b].any(1)).all()


def test_settled_without_halting_is_the_residual_at_that_depth(contractive, puzzles):
    recording = record(contractive, puzzles.numpy(), puzzles.numpy(), depths=(1, 3, 6), breadth=2)
    tol = float(np.float32(np.median(recording.residuals)))
    still = np.stack([recording.residuals[..., d - 1] <= np.float32(tol) for d in (1, 3, 6)], 2)
    assert 0 < still.mean() < 1 and (settled(recording, tol) == still).all()


def test_rows_without_labels_never_count(contractive, puzzles):
    """Neither as right, nor among the trajectories that are compared, nor as a puzzle with a mode."""
    labels = labels_for(contractive, puzzles)
    padded = labels.copy()
    padded[[0, 7]] = 0
    rest = [i for i in range(12) if i not in (0, 7)]
    recording = record(contractive, puzzles.numpy(), padded, depths=(6,), breadth=3)
    part = record(contractive, puzzles[rest].numpy(), labels[rest], depths=(6,), breadth=3)
    assert not correct_grid(recording, (6,), (3,), ALL_RULES[:3])[[0, 7]].any() and not recording.correct[[0, 7]].any()
    assert recording.labelled.tolist() == [i in rest for i in range(12)]
    assert np.isnan(recording.accuracy[[0, 7]]).all()
    assert couple(recording, 6).trajectories == couple(part, 6).trajectories == 30
    assert couple(recording, 6).right == couple(part, 6).right > 0
    judged = modes(recording.correct[..., 0], settled(recording, 0.05)[..., 0], labelled=recording.labelled)
    assert judged.puzzle.tolist() == rest
    assert judged.mode == modes(part.correct[..., 0], settled(part, 0.05)[..., 0]).mode


def test_memory_bounds_the_chunk(contractive, puzzles, monkeypatch):
    """Wide and deep runs go in smaller parts, the answers stay."""
    arguments = dict(depths=(1, 4), breadth=3)
    sizes = []
    solve = EquilibriumReasoner.solve

    def watched(self, tokens, **options):
        sizes.append(len(tokens))
        return solve(self, tokens, **options)

    monkeypatch.setattr(EquilibriumReasoner, "solve", watched)
    whole = record(contractive, puzzles.numpy(), puzzles.numpy(), **arguments)
    # 2 x (2 depths x 84 bytes + 4 residuals) = 368 bytes a trajectory, 3 of them a puzzle.
    monkeypatch.setattr("eqr_kernels.studies.recording._CHUNK_BYTES", 5000)
    parts = record(contractive, puzzles.numpy(), puzzles.numpy(), **arguments)
    assert sizes == [12, 4, 4, 4] and (whole.correct == parts.correct).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(breadths=[]), "breadths must name at least one breadth"),
        (dict(breadths=[0]), "breadths must be at least 1, got 0"),
        (dict(breadths=[3]), "breadths must be at most that of the recording, 2, got 3"),
        (dict(depths=[2]), "depth 2 was not recorded; those recorded are 1, 4"),
        (dict(rules=["best"]), "select must be of residual, vote, q, first, any, got 'best'"),
        (dict(rules=[]), "select must be of .*, got none"),
        (dict(rules=["first"]), 'select="first" needs a halting rule'),
    ],
)
def test_a_grid_refuses(contractive, puzzles, change, message):
    recording = record(contractive, puzzles[:2].numpy(), puzzles[:2].numpy(), depths=(1, 4), breadth=2)
    with pytest.raises(ValueError, match=message):
        correct_grid(recording, **(dict(depths=[1], breadths=[1]) | change))
