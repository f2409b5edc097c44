"""Which noise `studies.choose_noise` takes, on recordings by hand."""

from __future__ import annotations

import numpy as np
import pytest

from eqr_kernels.studies import choose_noise
from tests.support.recordings import made


def run(*right: int, of: int = 20):
    """A recording of `of` puzzles, two trajectories each, in which these puzzles end right, by the lower residual."""
    correct = np.zeros((of, 2, 1), bool)
    correct[list(right), 1] = True
    return made(correct, np.broadcast_to(np.array([[0.2], [0.1]]), (of, 2, 1)))


FIVE = range(5)


@pytest.mark.parametrize(
    "others, chosen",
    [
        ({0.0: run(*FIVE)}, 0.1),
        ({0.0: run(*range(9))}, 0.1),  # 4 gained of 4: by chance one time in eight
        ({0.0: run(*range(11))}, 0.0),  # 6 of 6: one in 32
        ({0.0: run(*range(11)), 0.2: run(*FIVE)}, 0.1),  # and not below a fortieth, as two are compared
        ({0.0: run(*range(15)), 0.2: run(*range(16))}, 0.2),  # the best
        ({0.0: run(*range(15)), 0.2: run(*range(15))}, 0.0),  # the smallest of two that are equally good
        ({0.0: run()}, 0.1),
    ],
)
def test_another_noise_is_taken_only_if_it_answers_more_than_chance(others, chosen):
    choice = choose_noise({0.1: run(*FIVE), **others}, trained=0.1)
    assert choice.chosen == chosen and [t.noise_scale for t in choice.trials] == sorted({0.1, *others})


def test_a_trial_counts_what_the_rule_selects_and_what_any_trajectory_has():
    trained, other = run(0, 1, 2, of=4), run(1, 2, 3, of=4)
    other.correct[0, 0] = True  # a trajectory that the residual does not select
    trial = choose_noise({0.0: other, 0.1: trained}, trained=0.1).trials[0]
    assert (trial.right, trial.any, trial.single) == (3, 4, 4 / 8)
    assert (trial.gained, trial.lost, trial.chance) == (1, 1, 1.0)


def test_the_trained_noise_must_be_among_them():
    with pytest.raises(ValueError, match=r"recordings must have the trained noise 0.1, got \[0.0\]"):
        choose_noise({0.0: run()}, trained=0.1)
