"""Which noise `studies.choose_noise` takes, on recordings by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eqr_kernels.studies import NoiseRun, choose_noise
from eqr_kernels.studies.statistics import Paired
from tests.support.recordings import made


def run(*selected: int, first: Any = None, of: int = 20) -> NoiseRun:
    """Of `of` puzzles, two trajectories each, those that are right by the lower residual and by the first."""
    correct = np.zeros((of, 2, 1), bool)
    correct[list(selected), 1] = True
    correct[list(selected if first is None else first), 0] = True
    return NoiseRun.of(made(correct, np.broadcast_to(np.array([[0.2], [0.1]]), (of, 2, 1))), "residual")


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
        ({0.0: run(*range(15), first=range(4))}, 0.1),  # not where breadth 1 would answer fewer
        ({0.0: run(*range(15), first=range(1, 6))}, 0.0),
    ],
)
def test_another_noise_is_chosen_only_if_it_answers_more_than_chance(others, chosen):
    choice = choose_noise({0.1: run(*FIVE), **others}, trained=0.1)
    assert choice.chosen == chosen and [t.noise_scale for t in choice.trials] == sorted({0.1, *others})


def test_a_noise_that_answers_fewer_beyond_chance_is_not_chosen():
    choice = choose_noise({0.1: run(*range(9)), 0.0: run(), 0.2: run(*range(19))}, trained=0.1)
    assert choice.trials[0].by_selected.p < 0.005 and choice.chosen == 0.2
    assert choose_noise({0.1: run(*range(9)), 0.0: run()}, trained=0.1).chosen == 0.1


def test_a_trial_counts_what_the_rule_selects_the_first_and_any_trajectory():
    other = run(1, 2, 3, first=[0], of=4)
    trial = choose_noise({0.0: other, 0.1: run(0, 1, 2, of=4)}, trained=0.1).trials[0]
    assert (trial.selected, trial.any, trial.first, trial.single) == (3, 4, 1, 4 / 8)
    assert (trial.by_selected, trial.by_first) == (Paired(4, 1, 1), Paired(4, 0, 2))


def test_what_is_compared_must_fit():
    with pytest.raises(ValueError, match=r"runs must have the trained noise 0.1, got \[0.0\]; run that as well"):
        choose_noise({0.0: run()}, trained=0.1)
    with pytest.raises(ValueError, match=r"the same puzzles, got 4 with noise 0 and 20 with the trained 0.1"):
        choose_noise({0.0: run(of=4), 0.1: run()}, trained=0.1)
