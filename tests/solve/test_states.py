"""States in and out of solve, trajectories told as they end, and batches of no puzzles."""

from __future__ import annotations

import inspect

import pytest
import torch

from eqr_kernels import EquilibriumReasoner, LatentState, Status, solve
from eqr_kernels.run_rules import SELECTION_RULES
from tests.support.models import assert_same, make_contractive, tiny_config
from tests.support.results import FIELDS

TOKENS = torch.randint(1, 7, (5, 6), generator=torch.Generator().manual_seed(0))
NOISY = dict(noise_scale=0.01, halt="none")


def rows_of(model, tokens, breadth, seed=0):
    """The start states of all trajectories, those of a puzzle together."""
    repeated = tokens.repeat_interleave(breadth, 0)
    return model.initial_state(repeated, seed=seed, restart=torch.arange(breadth).repeat(len(tokens)))


def after(model, result, depth, breadth=1):
    """The state that `result`, a solve of that depth with return_state, has come to."""
    start = rows_of(model, TOKENS, breadth)
    return LatentState(result.z_H, result.z_L, start.seed, start.ids, start.restart, start.step + depth)


@pytest.mark.parametrize("fixed_init", [False, True])
def test_from_its_own_start_a_solve_is_the_same(backend, fixed_init):
    model = make_contractive(tiny_config(fixed_init=fixed_init))
    options = dict(depth=30, breadth=3, tol=0.01, noise_scale=0.001, backend=backend)
    want = model.solve(TOKENS, **options, seed=5)
    got = model.solve(TOKENS, **options, initial_state=rows_of(model, TOKENS, 3, seed=5))
    assert torch.equal(got.preds, want.preds) and torch.equal(got.all_steps, want.all_steps)
    # The kernels draw the start by approximations of their own.
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)


def test_a_start_in_float64_is_not_rounded(contractive):
    model = contractive.double()
    want = model.solve(TOKENS, depth=4, **NOISY)
    got = model.solve(TOKENS, depth=4, **NOISY, initial_state=rows_of(model, TOKENS, 1))
    assert torch.equal(got.logits, want.logits) and torch.equal(got.residual, want.residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_solve_goes_on_where_another_ended(contractive, backend, dtype):
    model = contractive.to(dtype)
    whole = model.solve(TOKENS, depth=12, **NOISY, backend=backend, return_state=True)
    part = model.solve(TOKENS, depth=5, **NOISY, backend=backend, return_state=True)
    assert part.z_H.dtype == torch.float32 and part.z_H.shape == (5, 6, 16)
    rest = model.solve(
        TOKENS, depth=7, **NOISY, backend=backend, return_state=True, initial_state=after(model, part, 5)
    )
    for name in ("preds", "logits", "q_halt", "residual", "z_H", "z_L"):
        assert_same(getattr(rest, name), getattr(whole, name), backend, msg=name)
    assert rest.steps.tolist() == [7] * 5


def test_a_state_of_the_model_itself_goes_on_too(contractive, backend):
    state = contractive.initial_state(TOKENS)
    with torch.no_grad():
        for _ in range(3):
            state, logits, _ = contractive(TOKENS, state)
    whole = contractive.solve(TOKENS, depth=8, halt="none", backend=backend)
    rest = contractive.solve(TOKENS, depth=5, halt="none", backend=backend, initial_state=state)
    torch.testing.assert_close(rest.logits, whole.logits, rtol=1e-4, atol=1e-4)
    warm = contractive.solve(TOKENS, depth=40, tol=1e-3, backend=backend, initial_state=state)
    cold = contractive.solve(TOKENS, depth=40, tol=1e-3, backend=backend)
    assert torch.equal(warm.steps, cold.steps - 3) and warm.converged.all()


@pytest.mark.parametrize("select", SELECTION_RULES)
def test_the_state_is_that_of_the_selected_trajectory(contractive, backend, select):
    options = dict(depth=30, tol=0.01, noise_scale=0.001, backend=backend, return_state=True)
    broad = contractive.solve(TOKENS, breadth=4, select=select, **options)
    starts = rows_of(contractive, TOKENS, 4)
    assert len(set(broad.restart.tolist())) > 1
    for puzzle, restart in enumerate(broad.restart.tolist()):
        row = slice(4 * puzzle + restart, 4 * puzzle + restart + 1)
        start = LatentState(*(field[row] for field in starts))
        alone = contractive.solve(TOKENS[puzzle : puzzle + 1], **options, initial_state=start)
        for name in ("z_H", "z_L"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(broad, name)[puzzle], rtol=1e-4, atol=1e-4)
    # The logits are what the head makes of the state.
    torch.testing.assert_close(contractive.lm_head(broad.z_H), broad.logits, rtol=1e-4, atol=1e-4)


def state_with(**fields):
    return lambda model: model.initial_state(TOKENS)._replace(**fields)


@pytest.mark.parametrize(
    ("state", "options", "error", "message"),
    [
        (lambda model: "zeros", {}, TypeError, "initial_state must be a LatentState, got str; see model.initial_state"),
        (state_with(z_L=None), {}, TypeError, "initial_state.z_L must be a tensor, got NoneType"),
        (state_with(ids=[1, 2, 3, 4, 5]), {}, TypeError, "initial_state.ids must be a tensor, got list"),
        (
            state_with(),
            dict(breadth=2),
            ValueError,
            r"z_H must be .* \[10, 6, 16\], a row for each of the 5 puzzles' 2",
        ),
        (state_with(z_L=torch.zeros(5, 6, 8)), {}, ValueError, r"z_L must be .*got torch.float32 \[5, 6, 8\]"),
        (state_with(z_H=torch.zeros(5, 6, 16).long()), {}, ValueError, "z_H must be of floats"),
        (state_with(step=torch.full((5,), 2**24 - 3)), {}, ValueError, r"stay below 2\*\*24 together, got 16777213"),
        (state_with(restart=torch.full((5,), -1)), {}, ValueError, "initial_state.restart must be in 0"),
        (
            state_with(seed=torch.zeros(1).long()),
            {},
            ValueError,
            r"initial_state.seed must have shape \[5\], got \[1\]",
        ),
        (state_with(z_H=torch.zeros(5, 6, 16, device="meta")), {}, RuntimeError, "of the meta device have no values"),
        (state_with(ids=torch.zeros(4).long()), {}, ValueError, r"ids must have shape \[5\]"),
        (state_with(), dict(seed=3), ValueError, "seed and ids of its own, and seed was given too"),
        (state_with(), dict(ids=torch.arange(5)), ValueError, "seed and ids of its own, and ids was given too"),
    ],
)
def test_a_state_that_does_not_fit_is_named(contractive, state, options, error, message):
    with pytest.raises(error, match=message):
        contractive.solve(TOKENS, tol=0.1, initial_state=state(contractive), **options)


@pytest.mark.parametrize("options", [dict(tol=0.01), dict(halt="q", select="q"), dict(tol=0.01, select="first")])
def test_each_trajectory_is_told_as_it_ends(contractive, backend, options):
    calls = []
    result = contractive.solve(
        TOKENS, depth=20, breadth=3, **options, return_all=True, backend=backend, on_finished=calls.append
    )
    assert sorted((t.puzzle, t.restart) for t in calls) == [(p, r) for p in range(5) for r in range(3)]
    for t in calls:
        at = t.puzzle, t.restart
        assert isinstance(t.status, Status) and t.status == result.all_status[at] and t.steps == result.all_steps[at]
        assert t.preds.tolist() == result.all_preds[at].tolist()
        for name in ("residual", "score", "q_halt"):
            value, recorded = getattr(t, name), float(getattr(result, f"all_{name}")[at])
            assert value == recorded or (value != value and recorded != recorded), name


def test_it_is_told_while_others_run_and_what_the_callback_raises_stops_them(contractive, backend):
    calls = []

    def finished(trajectory):
        calls.append(trajectory)
        raise KeyboardInterrupt

    start = contractive.initial_state(TOKENS[:2])
    start.z_H[0] = torch.nan  # diverges at its first step; the other would take minutes
    options = dict(depth=1 << 23, halt="none", backend=backend, initial_state=start)
    with pytest.raises(KeyboardInterrupt):
        contractive.solve(TOKENS[:2], **options, on_finished=finished)
    assert [(t.puzzle, t.status) for t in calls] == [(0, Status.DIVERGED)]


@pytest.mark.parametrize("select", SELECTION_RULES)
def test_no_puzzles_give_an_empty_result(contractive, backend, select):
    calls = []
    options = dict(depth=4, breadth=2, tol=0.1, select=select, checkpoints=(1, 3), trace=True, backend=backend)
    options |= dict(return_all=True, return_state=True, progress=lambda *a: calls.append(a), on_finished=calls.append)
    empty, some = (contractive.solve(tokens, **options) for tokens in (TOKENS[:0], TOKENS[:1]))
    called = len(calls)
    for name in (*FIELDS, "converged", "all_preds", "residuals", "z_H", "z_L"):
        a, b = getattr(empty, name), getattr(some, name)
        assert a.shape == (0, *b.shape[1:]) and a.dtype == b.dtype, name
    assert {d: at.all_preds.shape for d, at in empty.at.items()} == {1: (0, 2, 6), 3: (0, 2, 6)}
    assert empty.backend == backend
    contractive.solve(TOKENS[:0], **options)
    assert len(calls) == called
    state, logits, q_halt = contractive(TOKENS[:0], contractive.initial_state(TOKENS[:0]))
    assert logits.shape == (0, 6, 7) and q_halt.shape == (0,) and state.z_H.shape == (0, 6, 16)
    assert contractive.initial_state(0).ids.shape == (0,)


def test_the_method_shows_the_signature_of_solve():
    method, function = inspect.signature(EquilibriumReasoner.solve), inspect.signature(solve)
    assert list(method.parameters.items())[1:] == list(function.parameters.items())[1:]
    assert {"depth", "breadth", "tol", "return_state", "on_finished"} <= set(method.parameters)
    assert "Iterates" in EquilibriumReasoner.solve.__doc__
