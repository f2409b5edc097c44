"""The names of columns, and what they stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence

COLUMNS = {
    "question": (
        *("question", "puzzle", "quizzes", "initial_board", "questions", "puzzles", "quiz", "problem", "problems"),
        *("input", "inputs", "initial", "board", "sudoku", "unsolved", "puzzle_string", "givens"),
    ),
    "answer": (
        *("answer", "answers", "solution", "solutions", "label", "labels", "solved", "solved_board", "solution_board"),
        *("solution_string", "output", "target"),
    ),
    "source": ("source",),
    "rating": ("rating", "ratings", "difficulty", "difficulty_rating"),
    "id": ("id",),
}
"""Names of columns by role, the preferred first; capitals do not count, and blanks and hyphens are as underscores."""

QUESTION_NAMES = ", ".join(COLUMNS["question"][:4])
"""The commonest, for messages."""


def roles(names: Sequence[str]) -> dict[str, int]:
    """Column numbers by role, -1 where none."""
    plain = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in names]
    return {role: next((plain.index(n) for n in known if n in plain), -1) for role, known in COLUMNS.items()}
