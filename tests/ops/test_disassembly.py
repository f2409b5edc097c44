"""The machine code of the hot tiles: what the compiler must not do to them, and the instructions that must be there.

It is read, not run, so every instruction set that was built is checked on any machine.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from eqr_kernels import ops

pytestmark = [
    pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1]),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of the package binutils"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 code"),
]

TILE = re.compile(r"<void eqr::cpu::(\w+)::tile<eqr::cpu::\w+::(\w+), (\d), (\d), (true|false)>")
AMX_TILE = re.compile(r"<void eqr::cpu::amx::amx_tile<eqr::cpu::amx::(\w+)>")
# Of each level and operand type: what multiplies, and how many times a step for each row and vector.
MULTIPLIES = {
    ("avx2", "F32"): "vfmadd",
    ("avx2", "F32Bf16"): "vfmadd",
    ("avx2", "Bf16Dot"): "vfmadd",
    ("avx2", "Int8Pair"): "vpmaddwd",
    ("avx512", "F32"): "vfmadd",
    ("avx512", "F32Bf16"): "vfmadd",
    ("avx512", "Bf16Dot"): "vfmadd",
    ("avx512", "Int8Pair"): "vpmaddwd",
    ("avx512_bf16", "F32"): "vfmadd",
    ("avx512_bf16", "Bf16Dot"): "vdpbf16ps",
    ("avx512_bf16", "Int8Dot"): "vpdpbusd",
    ("amx", "F32"): "vfmadd",
    ("portable", "F32"): "mulps",
    ("portable", "F32Bf16"): "mulps",
    ("portable", "Bf16Dot"): "mulps",
    ("portable", "Int8Pair"): "pmaddwd",
}
WIDTH = {"portable": "xmm", "avx2": "ymm", "avx512": "zmm", "avx512_bf16": "zmm", "amx": "zmm"}


def loop_of(listing: list[str]) -> list[str]:
    """The innermost loop with a multiplication: from the target of a backward jump to the jump."""
    at = {int(line.split(":")[0], 16): i for i, line in enumerate(listing)}
    loops = []
    for i, line in enumerate(listing):
        jump = re.search(r"\tj\w+\s+([0-9a-f]+) <", line)
        if jump and (start := at.get(int(jump[1], 16))) is not None and start < i:
            loops.append(listing[start : i + 1])
    return min((loop for loop in loops if any("mul" in x or "madd" in x or "dp" in x for x in loop)), key=len)


@pytest.fixture(scope="module")
def functions() -> list[list[str]]:
    """The lines of every function of the extension, its name first."""
    library = __import__("eqr_kernels._C", fromlist=["_C"]).__file__
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", "-w", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [lines for function in text.split("\n\n") if (lines := function.splitlines())]


@pytest.fixture(scope="module")
def tiles(functions) -> dict[tuple[str, str, int, int, str], list[str]]:
    """Every tile's k loop, by level, operands, rows, vectors and whether its rows are packed."""
    loops = {}
    for lines in functions:
        if head := TILE.search(lines[0]):
            level, op, rows, columns, packed = head.groups()
            loops[level, op, int(rows), int(columns), packed] = loop_of([x for x in lines[1:] if ":\t" in x])
    assert loops, "no tile was found: was the library stripped?"
    return loops


def levels() -> set[str]:
    return set(WIDTH) if ops.build_info().get("avx512") == "native" else {"portable", "avx2"}


@pytest.mark.slow
def test_every_level_has_its_tiles(tiles):
    x86 = any(key[0] == "avx2" for key in tiles)
    expected = {key for key in MULTIPLIES if key[0] in levels() and (x86 or key[0] == "portable")}
    assert {key[:2] for key in tiles if key[0] in levels()} == expected


def test_no_tile_spills_inside_its_loop(tiles):
    spills = {
        key: [line for line in loop if re.search(r"%[re][sb]p\)", line)]
        for key, loop in tiles.items()
        # SSE2 has too few registers for the halves of bf16 pairs.
        if key[0] in levels() and key[:2] != ("portable", "Bf16Dot")
    }
    assert not {key: lines for key, lines in spills.items() if lines}


def test_loops_hold_the_multiplications_and_nothing_else_of_their_kind(tiles):
    for key, loop in tiles.items():
        level, op, rows, columns, _ = key
        if level not in levels():
            continue
        products = [line for line in loop if MULTIPLIES[level, op] in line]
        halves = 2 if op == "Bf16Dot" and MULTIPLIES[level, op] != "vdpbf16ps" else 1
        assert len(products) == rows * columns * halves, (key, products)
        assert all(WIDTH[level] in line for line in products), (key, products)
        # Beside them there are the operands' loads and a few of bookkeeping. (SSE2 copies and widens more.)
        others = len(loop) - len(products) * (2 if op == "Int8Pair" else 1)
        assert level == "portable" or others <= 2 * halves * rows + 4 * halves * columns + 12, (key, loop)


@pytest.mark.skipif(ops.build_info().get("avx512") != "native", reason="this build emulates the AVX-512 levels and AMX")
@pytest.mark.parametrize(("op", "multiply"), [("Bf16Amx", "tdpbf16ps"), ("Int8Amx", "tdpbusd")])
def test_amx_multiplies_every_operand_that_it_loads_twice(functions, op, multiply):
    copies = [lines for lines in functions if (head := AMX_TILE.search(lines[0])) and head[1] == op]
    assert copies
    for lines in copies:
        loop = loop_of([x for x in lines[1:] if ":\t" in x])
        kinds = {kind: sum(kind in line for line in loop) for kind in (multiply, "tileload", "tilestore", "prefetch")}
        assert (kinds[multiply], kinds["tileload"], kinds["tilestore"]) == (4, 4, 0), loop
        others = len(loop) - sum(kinds.values())
        assert others <= 12 and not [line for line in loop if re.search(r"%[re][sb]p\)", line)], loop
