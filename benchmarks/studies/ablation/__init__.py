"""The way from a feed-forward network to an Equilibrium Reasoner, each row trained with the same compute.

`python -m benchmarks.studies.ablation --help`. The rows follow the construction path of EqR (arXiv 2605.21488, tables 2
and 3); `rows.ROWS` says what each one is, and where it differs from the paper.
"""
