"""The app of `eqr serve` on a Ray cluster: an Engine in each of two replicas, behind one address.

    pip install 'eqr_kernels[serve,distributed]'
    python examples/ray_serve.py

The cluster is one of this machine, made for the time of the run; `connected("auto")` joins that which the machine is
in. `eqr serve --engine ray` does the same until Ctrl-C.
"""

import requests

import eqr_kernels as ek
from eqr_kernels.distributed.on_ray import connected
from eqr_kernels.distributed.online import application, running
from eqr_kernels.tasks.registry import SUDOKU
from eqr_kernels.tasks.sudoku_generator import generate

model = ek.EquilibriumReasoner.from_pretrained("sudoku")
puzzles = generate(12, "easy", seed=0).inputs

with connected("local"), running(application(model, name="sudoku", replicas=(2, 2)), "127.0.0.1", 8123):
    body = {"puzzles": [SUDOKU.decode(tokens) for tokens in puzzles]}
    answers = requests.post("http://127.0.0.1:8123/v1/solve", json=body, timeout=120).json()["results"]

print(f"{sum(answer['valid'] for answer in answers)} of {len(puzzles)} solved by 2 replicas")
