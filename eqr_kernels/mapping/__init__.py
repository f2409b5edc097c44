"""Maps of a model: what depth, breadth, seeds and precision do to where its trajectories end, and what they cost."""
