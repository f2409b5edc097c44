"""Training: a model is trained by `trainer`, and a run of it planned, kept on disk and resumed by `plan` and `run`.

`settings` and `recipes` say how; `trainer` takes the steps with `objective`, `optim`, `fused` and `cycles`; `state`,
`slices`, `record` and `resume` make a run that may be stopped and continued to the same bits; `evaluation`, `logs` and
`throughput` measure it as it goes.
"""
