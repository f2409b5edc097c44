"""The grid of depths and breadths that one run gives, against a run for each of its cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eqr_kernels import EquilibriumReasoner
from eqr_kernels import studies as ev
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
    found = ev.evaluate(model, puzzles.numpy(), labels, depths=DEPTHS, breadth=BREADTHS, select=RULES, **options)
    assert found.grid.shape == (12, 4, 3, 3)
    for k, depth in enumerate(DEPTHS):
        for j, breadth in enumerate(BREADTHS):
            for r, rule in enumerate(RULES):
                alone = model.solve(
                    puzzles, depth=depth, breadth=breadth, select=rule, halt="none", return_all=True, **options
                )
                right = ev.exact_match(alone.preds.numpy(), labels)
                assert found.grid[:, k, j, r].tolist() == right.tolist(), (depth, breadth, rule)
            for name in ("residual", "score", "steps"):
                mine, other = getattr(found, f"all_{name}")[:, k, :breadth], getattr(alone, f"all_{name}").numpy()
                assert mine.tobytes() == other.tobytes(), (depth, breadth, name)
            for b in range(breadth):
                right = ev.exact_match(alone.all_preds[:, b].numpy(), labels)
                assert found.all_exact[:, k, b].tolist() == right.tolist()
    # Not by chance: the trajectories do disagree.
    assert 0 < found.all_exact[:, -1].mean() < 1 and len(np.unique(found.all_score[0, -1])) == 5


@needs_extension
@pytest.mark.parametrize("seed", [0, 3])
def test_each_cell_under_halting_is_a_run_of_its_own(puzzles, seed):
    model = make_contractive(tiny_config(noise_scale=0.02), seed=seed)
    tol = float(model.solve(puzzles, depth=9, breadth=5, halt="none", trace=True).residuals[..., 3:6].median())
    labels = labels_for(model, puzzles, backend="cpu")
    options = dict(halt="residual", tol=tol, backend="cpu")
    rules = (*RULES, "first")
    found = ev.evaluate(model, puzzles.numpy(), labels, depths=DEPTHS, breadth=BREADTHS, select=rules, **options)
    for k, depth in enumerate(DEPTHS):
        for j, breadth in enumerate(BREADTHS):
            for r, rule in enumerate(rules):
                alone = model.solve(puzzles, depth=depth, breadth=breadth, select=rule, **options)
                right = ev.exact_match(alone.preds.numpy(), labels)
                assert found.grid[:, k, j, r].tolist() == right.tolist(), (depth, breadth, rule)
                if rule != "first":  # whose losers are cancelled
                    assert found.all_steps[:, k, :breadth].tolist() == alone.all_steps.tolist()
                    assert found.all_settled[:, k, :breadth].tolist() == (alone.all_status == 0).tolist()
    assert 0 < found.all_settled[:, -1].mean() <= 1 and 1 < found.all_steps[:, -1].min() < found.all_steps.max()
    assert found.steps.tolist() == found.all_steps[:, -1].tolist()
    assert found.converged.tolist() == found.all_settled[:, -1].tolist()


def test_chunks_change_nothing_and_any_is_the_union(contractive, puzzles, backend):
    labels = labels_for(contractive, puzzles)
    arguments = dict(depths=(2, 6), breadth=(1, 3), select=("any", "residual"), tol=0.05, backend=backend)
    whole = ev.evaluate(contractive, puzzles.numpy(), labels, **arguments)
    parts = ev.evaluate(contractive, puzzles.numpy(), labels, chunk=5, **arguments)
    names = ["grid", "all_exact", "all_steps", "all_settled", "steps", "converged", "labelled"]
    if backend == "cpu":
        names += ["all_residual", "all_score", "all_accuracy"]
    for name in names:
        assert (getattr(whole, name) == getattr(parts, name)).all(), name
    for j, b in enumerate((1, 3)):
        assert (whole.grid[:, :, j, 0] == whole.all_exact[:, :, :b].any(2)).all()
    assert (whole.exact == whole.grid[:, :, 1, 0]).all()


def test_settled_without_halting_is_the_residual_at_that_depth(contractive, puzzles):
    traced = contractive.solve(puzzles, depth=6, breadth=2, halt="none", trace=True).residuals.numpy()
    tol = float(np.float32(np.median(traced)))
    found = ev.evaluate(contractive, puzzles.numpy(), puzzles.numpy(), depths=(1, 3, 6), breadth=2, tol=tol)
    settled = np.stack([traced[..., d - 1] <= np.float32(tol) for d in (1, 3, 6)], 1)
    assert 0 < settled.mean() < 1 and (found.all_settled == settled).all()
    without = ev.evaluate(contractive, puzzles.numpy(), puzzles.numpy(), depths=(1, 3), breadth=2)
    assert without.all_settled is None and without.steps is None and without.converged is None


def test_rows_without_labels_never_count(contractive, puzzles):
    """Neither as right, nor among the trajectories that are compared, nor as a puzzle with a mode."""
    labels = labels_for(contractive, puzzles)
    padded = labels.copy()
    padded[[0, 7]] = 0
    rest = [i for i in range(12) if i not in (0, 7)]
    arguments = dict(depths=(6,), breadth=3, select=ev.RULES[:3], tol=0.05)
    found = ev.evaluate(contractive, puzzles.numpy(), padded, **arguments)
    part = ev.evaluate(contractive, puzzles[rest].numpy(), labels[rest], **arguments)
    assert not found.grid[[0, 7]].any() and not found.all_exact[[0, 7]].any()
    assert found.labelled.tolist() == [i in rest for i in range(12)]
    assert np.isnan(found.all_accuracy[[0, 7]]).all()

    def coupling(e: ev.Evaluation) -> ev.Coupling:
        fields = (e.all_exact, e.all_accuracy, e.all_residual, e.all_score, e.all_diverged)
        return ev.couple(6, *(field[:, 0] for field in fields))

    assert coupling(found).trajectories == coupling(part).trajectories == 30
    assert coupling(found).right == coupling(part).right > 0
    modes = ev.diagnose(found.all_exact[:, 0], found.all_settled[:, 0], labelled=found.labelled)
    assert modes.puzzle.tolist() == rest
    assert modes.mode == ev.diagnose(part.all_exact[:, 0], part.all_settled[:, 0]).mode


def test_memory_bounds_the_chunk(contractive, puzzles, monkeypatch):
    """Wide and deep runs go in smaller parts, the answers stay."""
    from eqr_kernels.studies import accuracy as running

    arguments = dict(depths=(1, 4), breadth=3, tol=0.05)
    sizes = []
    solve = EquilibriumReasoner.solve

    def watched(self, tokens, **options):
        sizes.append(len(tokens))
        return solve(self, tokens, **options)

    monkeypatch.setattr(EquilibriumReasoner, "solve", watched)
    whole = ev.evaluate(contractive, puzzles.numpy(), puzzles.numpy(), **arguments)
    monkeypatch.setattr(running, "_CHUNK_BYTES", 8000)  # 536 bytes a trajectory, 3 of them a puzzle
    parts = ev.evaluate(contractive, puzzles.numpy(), puzzles.numpy(), **arguments)
    assert sizes == [12, 4, 4, 4] and (whole.grid == parts.grid).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(breadth=[]), "breadth must name at least one breadth"),
        (dict(select="best"), "select must be of residual, vote, q, first, any, got 'best'"),
        (dict(select=[]), "select must be of .*, got none"),
        (dict(select="first"), 'select="first" needs a halting rule'),
        (dict(breadth=0), "breadth must be at least 1, got 0"),
        (dict(depths=[0, 2]), "depths must be at least 1, got 0"),
    ],
)
def test_a_grid_refuses(contractive, puzzles, change, message):
    with pytest.raises(ValueError, match=message):
        ev.evaluate(contractive, puzzles.numpy(), puzzles.numpy(), **(dict(depths=[1]) | change))
