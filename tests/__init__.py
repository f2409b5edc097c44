"""Tests, in folders by subject; what they share is in support/."""

import os

# Tensors here are tiny: threads cost more than they give, and spin when the machine is busy. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
