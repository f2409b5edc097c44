"""Options that several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = "sudoku"

Model = Annotated[
    str, typer.Option(help="Name of a shipped model, a folder of save_pretrained, a .safetensors, a .pth or a hub id.")
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="The model's task: sudoku, maze, one that is installed, or of your own package.module:OBJECT or "
        "file.py:OBJECT.",
        show_default="what the model was trained on",
    ),
]
Depth = Annotated[int, typer.Option(help="Outer steps of a trajectory, at most.")]
Breadth = Annotated[
    int | None, typer.Option(help="Trajectories of each puzzle, from different random starts.", show_default="1")
]
Views = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="V",
        help="In place of --breadth: a trajectory for each of V views of a puzzle, which are itself and others by "
        "symmetries that its task knows.",
    ),
]
TurnEvery = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="STEPS",
        help="Every so many outer steps, move each puzzle's cells by another symmetry that its task knows, and its "
        "latent state with them.",
        show_default="never",
    ),
]
Halt = Annotated[
    str,
    typer.Option(
        help="When a trajectory stops: residual (at most --tol), q (the halting head is above 0), residual+q (both), "
        "'residual|q' (either; a shell needs the quotes) or none (the full depth)."
    ),
]
Select = Annotated[str, typer.Option(help="Rule that selects the trajectory that answers: residual, vote, q or first.")]
Window = Annotated[int | None, typer.Option(help="Changes of the logits that a score averages; default the card's.")]
Tol = Annotated[
    str,
    typer.Option(
        help="Residual that counts as settled: a number; auto, the card's, at which 99 % of what settled when it was "
        "calibrated was right; or fast, the card's loosest that cost no answer."
    ),
]
NoiseScale = Annotated[
    float | None, typer.Option(help="Noise injected at each update; default the card's, else the config's.")
]
Seed = Annotated[int, typer.Option(help="Seed of random starts and noise, and of the clues that --reveal picks.")]
Slots = Annotated[int | None, typer.Option(help="Trajectories in flight at a time.", show_default="64")]
BackendName = Annotated[
    str, typer.Option("--backend", help="auto, cpu, reference, ...; `eqr info` says which can run.")
]
AnsweredFile = Annotated[
    str | None, typer.Argument(metavar="FILE", help="Puzzles with answers: CSV, puzzle,answer lines, a folder, or -.")
]
Precision = Annotated[str, typer.Option(help="auto (of the weights), fp32, bf16 or int8.")]
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda, ...")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take the first puzzles only.")]
Subset = Annotated[
    int | None,
    typer.Option(min=1, help="Only so many puzzles, always the same, with the whole's mix of sources and ratings."),
]
Stratified = Annotated[
    int,
    typer.Option(
        "--subset",
        "--limit",
        min=1,
        help="At most so many puzzles, always the same, with the whole's mix of sources and ratings.",
    ),
]
Broad = Annotated[
    float | None,
    typer.Option(help="Share of restarts settled on the right answer that makes a broad basin.", show_default="0.95"),
]
Reveal = Annotated[
    int | None,
    typer.Option(min=0, metavar="CLUES", help="Sudoku: show random clues until there are so many."),
]
Format = Annotated[
    str,
    typer.Option("--format", help="Form of the puzzles: auto, lines, grids, csv, json, parquet, npy, npz or folder."),
]
Values = Annotated[str, typer.Option(help="What a Sudoku .npy holds: auto, digits (0 blank) or tokens (1 blank).")]
Split = Annotated[str | None, typer.Option(help="train or test, of a folder that has both.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="File for the JSON object, written whole or not at all.")
]
ShowProgress = Annotated[
    bool | None, typer.Option("--progress/--no-progress", help="Progress on stderr.", show_default="on a terminal")
]
Engine = Annotated[
    str, typer.Option("--engine", help="Where the work is done: local, or ray, on the machines of a Ray cluster.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Of the Ray cluster: auto or HOST:PORT.",
        show_default="RAY_ADDRESS, else a cluster of this machine for the time of the command",
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Workers of --engine ray at most.", show_default="as many as have room")
]
CpusPerWorker = Annotated[
    int | None, typer.Option(min=1, help="CPUs of each worker of --engine ray, and its threads.", show_default="1")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Write the results of all rows there, as Parquet shards as they finish; the same command goes on from "
        "them.",
    ),
]
ShardRows = Annotated[
    int | None,
    typer.Option(min=1, help="Rows of a shard of --out, which a worker solves together.", show_default="256"),
]
