"""Puzzles in the forms in which they circulate."""

from __future__ import annotations

import numpy as np

from eqr_kernels.tasks import sudoku

A = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
A_ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
B = "98.7..6..75.....8...6......4...3...2..89...7.....2.....1...4.....96...5.....91..3"
B_ANSWER = "982715634751463289346289517475138962128946375693527148217354896839672451564891723"
# Its fourth row is empty: of dashes, it looks like a rule.
C = A[:27] + "." * 9 + A[36:]


def rows_of(grid: str) -> list[str]:
    return [grid[i : i + 9] for i in range(0, 81, 9)]


def barred(row: str, bar: str = "|", edge: bool = False) -> str:
    middle = f" {bar} ".join(" ".join(row[i : i + 3]) for i in (0, 3, 6))
    return f"{bar} {middle} {bar}" if edge else middle


def banded(rows: list[str], rule: str, outer: bool = False) -> str:
    bands = [*rows[:3], rule, *rows[3:6], rule, *rows[6:]]
    return "\n".join([rule, *bands, rule] if outer else bands)


def spaced(grid: str, blank: str = ".") -> list[str]:
    return [" ".join(row.replace(".", blank)) for row in rows_of(grid)]


def plain(grid: str) -> str:
    return "\n".join(rows_of(grid))


FORMS = {
    "plain": plain(A),
    "zeros": plain(A).replace(".", "0"),
    "stars": plain(A).replace(".", "*"),
    "dashes": plain(A).replace(".", "-"),
    "crosses": plain(A).replace(".", "x"),
    "spaced": "\n".join(" " + row for row in spaced(A)),
    "spaced, trailing blanks": "\n".join(row + "   " for row in spaced(A)),
    "tabs": "\n".join("\t".join(row) for row in rows_of(A)),
    "tabs with empty cells": "\n".join("\t".join(row).replace(".", "") for row in rows_of(A)),
    "commas": "\n".join(",".join(row) for row in rows_of(A)),
    "commas with empty cells": "\n".join(",".join(row).replace(".", "") for row in rows_of(A)),
    "comma and space": "\n".join(", ".join(row).replace(".", "0") for row in rows_of(A)),
    "semicolons": "\n".join(";".join(row).replace(".", "") for row in rows_of(A)),
    "bars and dashes": banded([barred(row) for row in rows_of(A)], "-------+-------+------"),
    "outer bars": banded([barred(row, edge=True) for row in rows_of(A)], "+-------+-------+-------+", outer=True),
    "stars and rules of stars": banded([barred(row).replace(".", "*") for row in rows_of(A)], "*" * 21),
    "rules of equals signs": banded(spaced(A), "=================="),
    "nine dashes for a rule": banded(rows_of(A), "---------"),
    "nine dashes, spaced, for a rule": banded(spaced(A), "- - - - - - - - -", outer=True),
    "box drawing": banded([barred(row, "│", edge=True) for row in rows_of(A)], "├───────┼───────┼───────┤", outer=True),
    "heavy box drawing": banded([barred(row, "║") for row in rows_of(A)], "══════╬═══════╬══════"),
    "groups of three": "\n".join(" ".join(row[i : i + 3] for i in (0, 3, 6)) for row in rows_of(A)),
    "Simple Sudoku (.ss)": banded(
        ["|" + "|".join(row[i : i + 3] for i in (0, 3, 6)) + "|" for row in rows_of(A)], "|---+---+---|"
    ).join(("*-----------*\n", "\n*-----------*\n")),
    "bands apart": "\n\n".join("\n".join(rows_of(A)[i : i + 3]) for i in (0, 3, 6)),
    "lines apart": "\n\n".join(rows_of(A)),
    "spaces for blanks": "\n".join(row.replace(".", " ") for row in rows_of(A)),
    "spaces for blanks, none at the end": "\n".join(row.replace(".", " ").rstrip() for row in rows_of(A)),
    "spaces for blanks, spaced": "\n".join(" " + " ".join(row).replace(".", " ") for row in rows_of(A)),
    "spaces for blanks, bars": banded([barred(r.replace(".", " ")) for r in rows_of(A)], "------+-------+------"),
    "spaces for blanks, tight bars": "\n".join(
        "|".join(row[i : i + 3] for i in (0, 3, 6)).replace(".", " ") for row in rows_of(A)
    ),
    "rules with corners": banded([barred(row, edge=True) for row in rows_of(A)], ":-------+-------+-------:").join(
        (".-------.-------.-------.\n", "\n'-------'-------'-------'\n")
    ),
    "underscores": plain(A).replace(".", "_"),
    "lists of numbers": "[" + ",\n ".join(str([int(c) for c in row.replace(".", "0")]) for row in rows_of(A)) + "]",
    "rows in brackets": "\n".join(str([int(c) for c in row.replace(".", "0")]) for row in rows_of(A)),
    "braces": "{\n" + "\n".join("{" + ",".join(row.replace(".", "0")) + "}," for row in rows_of(A)) + "\n};\n",
    "an array as NumPy prints it": str(np.array([[int(c) for c in row.replace(".", "0")] for row in rows_of(A)])),
    "rows in quotes": "\n".join(f'"{row}",' for row in rows_of(A)),
    "bars between all cells": "\n".join("| " + " | ".join(row) + " |" for row in rows_of(A)),
    "bars between all cells, empty ones": "\n".join("|" + "|".join(row).replace(".", " ") + "|" for row in rows_of(A)),
    "bars between all cells, no outer ones, empty ones": "\n".join(
        "|".join(row).replace(".", " ") for row in rows_of(A)
    ),
    "rules between all rows, empty cells": "+---" * 9
    + "+\n"
    + "\n".join("| " + " | ".join(row).replace(".", " ") + " |\n" + "+---" * 9 + "+" for row in rows_of(A)),
    "spaces for blanks, indented": "\n".join("    " + row.replace(".", " ") for row in rows_of(A)),
    "a quotation": "\n".join("> " + row for row in rows_of(A)),
    "a program": 'grid = """\n' + plain(A) + '\n"""\n',
    "comments at the ends": "\n".join(f"{row}  # row {i}" for i, row in enumerate(rows_of(A))),
    "a title": "Easy, no. 12\n" + plain(A),
    "a title that is a column's name": "Puzzle\n\n" + plain(A),
    "a title of two column names": "Sudoku, puzzle\n" + plain(A),
    "a title and a word behind": "Sudoku Mk. 7\n\n" + plain(A) + "\n\nGood luck!\n",
    "SudoCue (.sdk)": "#ARuud\n#DA random puzzle\n#B03-08-2006\n#LEasy\n" + plain(A),
    "SadMan (.sdk)": f"[Puzzle]\n{plain(A)}\n[State]\n{plain(A_ANSWER)}\n",
    "SadMan, the state first": f"[State]\n{plain(A_ANSWER)}\n[PencilMarks]\n{'1,2,,,3,,,,'}\n[puzzle]\n{plain(A)}\n",
    "line ends of Windows": plain(A).replace("\n", "\r\n") + "\r\n",
    "Ctrl-Z at the end": plain(A) + "\r\n\x1a",
    "a grid that is drawn here": sudoku.format_grid(sudoku.encode(A)),
}
"""Grid A, each on its own."""
