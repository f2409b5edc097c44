"""The files of examples/: each runs as it stands, and does what its text says."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.support.environment import REPOSITORY

EXAMPLES = REPOSITORY / "examples"

# What each prints at its end: right answers, of how many, and how many there must be.
PRINTED = {
    "quickstart.py": (r"(\d+) of 12 solved by ", 12),
    "official_checkpoint.py": (r"\(EMA\)\. Trained for 16500 steps\.\n(\d+) of 4 solved", 4),
    "own_training_loop.py": (r"depth 8: (\d+) of 200 fresh puzzles right", 160),
    "deq_classifier.py": (r"(\d+) of 360 held-out digits right; all converged: True", 330),
    "looped_transformer.py": (r"\b8 bits +[\d.]+ steps +(\d+)\.\d% right", 95),
    "looped_language_model.py": (r"(\d+) of 32 prompts have the logits of the model's own forward", 32),
    "latin_squares.py": (r"(\d+) of 200 fresh squares right", 190),
    "ray_serve.py": (r"(\d+) of 12 solved by 2 replicas", 12),
}

NEEDED = {
    "ray_serve.py": ("ray.serve",),
    "deq_classifier.py": ("sklearn",),
    "looped_language_model.py": ("transformers",),
}
SHORTER = {"looped_transformer.py": dict(updates=250, picture="")}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.ray] * (name == "ray_serve.py")) for name in PRINTED]
)
def test_example(name: str, capsys: pytest.CaptureFixture[str]):
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package)
    if name in SHORTER:
        runpy.run_path(str(EXAMPLES / name))["main"](**SHORTER[name])
    else:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    pattern, least = PRINTED[name]
    printed = capsys.readouterr().out
    right = re.search(pattern, printed)
    assert right, printed
    assert int(right[1]) >= least, printed
