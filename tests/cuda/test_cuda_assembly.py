"""The machine code of the CUDA kernels: registers, spills, and the instructions that must be there.

nvcc assembles csrc/cuda/*.cu for sm_80 and sm_90a; the code is read, not run, so no GPU is needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.environment import REPOSITORY

CSRC = REPOSITORY / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a")
JOBS = 2  # a compiler takes about a gigabyte

pytestmark = pytest.mark.slow

# Of each kernel, by what its name must hold: the architecture and the instructions that it must have there.
BY_WARPS = ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128")
REQUIRED = {
    (r"\bthroughput_mma<", "sm_80"): BY_WARPS,
    (r"\bthroughput_mma<", "sm_90a"): BY_WARPS,
    (r"\bthroughput_wgmma<", "sm_90a"): (
        r"HGMMA.64x\d+x16.F32.BF16",  # wgmma
        "UBLKCP",  # bulk copies
        "MULTICAST",  # to all of a cluster
        "SYNCS.PHASECHK",  # waits for an mbarrier
        "SYNCS.ARRIVE",
        "USETMAXREG",
        "UCGABAR_WAIT",  # waits for the cluster
    ),
    (r"\blatency\b", "sm_80"): ("HMMA.16816.F32.BF16",),
    (r"\blatency\b", "sm_90a"): ("HMMA.16816.F32.BF16",),
    (r"\bselect_winners_kernel\b", "sm_80"): (),
    (r"\bselect_winners_kernel\b", "sm_90a"): (),
    (r"\bpack_layer_kernel\b", "sm_80"): (),
    (r"\bpack_layer_kernel\b", "sm_90a"): (),
    (r"\bpack_rest_kernel\b", "sm_80"): (),
    (r"\bpack_rest_kernel\b", "sm_90a"): (),
    (r"\bcheck_tokens_kernel\b", "sm_80"): (),
    (r"\bcheck_tokens_kernel\b", "sm_90a"): (),
}


@dataclass
class Kernel:
    name: str
    architecture: str
    registers: int = -1
    stack: int = -1
    spilled: int = -1
    shared: int = 0
    instructions: Counter[str] = field(default_factory=Counter)


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: beside nvcc, on PATH, or of the Triton package."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if name == "nvcc":
        return shutil.which(nvcc)
    places = [str(Path(nvcc).resolve().parent), "/usr/local/cuda/bin", os.environ.get("PATH", os.defpath)]
    if spec := importlib.util.find_spec("triton"):
        places += [str(Path(folder, "backends", "nvidia", "bin")) for folder in spec.submodule_search_locations or []]
    return shutil.which(name, path=os.pathsep.join(places))


def run(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)
    assert done.returncode == 0, f"{' '.join(map(str, command))} gave {done.returncode}:\n{done.stdout[-8000:]}"
    return done.stdout


def demangled(names: list[str]) -> dict[str, str]:
    tool = find_tool("cu++filt") or shutil.which("c++filt")
    if tool is None:
        pytest.skip("needs cu++filt or c++filt, of the package binutils")
    return dict(zip(names, run(tool, *names).splitlines(), strict=True)) if names else {}


def parse_assembler(text: str, architecture: str) -> dict[str, Kernel]:
    """What `ptxas -v` says of every kernel, by mangled name."""
    kernels: dict[str, Kernel] = {}
    kernel = None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            assert match[2] == architecture, line
            kernel = kernels[match[1]] = Kernel(match[1], architecture)
        elif match := re.search(r"Function properties for (\w+)", line):
            kernel = kernels.get(match[1])  # none for a function that is not inlined
        elif kernel is None:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel.stack, kernel.spilled = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(shared[1]) if shared else 0
    return kernels


def parse_disassembly(text: str) -> dict[str, Counter[str]]:
    """How often each instruction stands in each function, by mangled name."""
    functions: dict[str, Counter[str]] = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        name = part.split(maxsplit=1)[0]
        matches = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]+)", part, re.MULTILINE)
        functions[name] = Counter(matches)
    return functions


@dataclass
class Assembled:
    messages: dict[tuple[str, str], str]  # of the compiler, by source and architecture
    kernels: list[Kernel]

    def matching(self, pattern: str, architecture: str) -> list[Kernel]:
        return [k for k in self.kernels if k.architecture == architecture and re.search(pattern, k.name)]


def assemble(sources: list[Path]) -> Assembled:
    """Assembles the sources, or takes what an earlier run made of the same ones."""
    nvcc, cuobjdump = find_tool("nvcc"), find_tool("cuobjdump")
    if nvcc is None:
        pytest.skip("needs nvcc: install the CUDA toolkit, or set CUDACXX")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of the package triton")

    parts = [run(nvcc, "--version").encode(), Path(__file__).read_bytes()]
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
        parts += [str(path.relative_to(CSRC)).encode(), path.read_bytes()]
    folder = REPOSITORY / "build" / "cubins" / hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)

    def one(job: tuple[Path, str]) -> tuple[str, list[Kernel]]:
        source, architecture = job
        cubin = folder / f"{source.stem}.{architecture}.cubin"
        messages = cubin.with_suffix(".txt")
        if not messages.exists():  # written when the assembler is done
            virtual = architecture.replace("sm_", "compute_")
            options = ("-std=c++17", "-O3", "-DNDEBUG", "-I", CSRC, f"-gencode=arch={virtual},code={architecture}")
            messages.write_text(run(nvcc, *options, "-Xptxas", "-v", "-cubin", "-o", cubin, source))
        text = messages.read_text()
        kernels = parse_assembler(text, architecture)
        disassembly = parse_disassembly(run(cuobjdump, "-sass", cubin))
        names = demangled(list(kernels))
        for mangled, kernel in kernels.items():
            kernel.name = names[mangled]
            kernel.instructions = disassembly[mangled]
        return text, list(kernels.values())

    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(JOBS) as pool:
        results = list(pool.map(one, jobs))
    messages = {
        (source.name, architecture): text for (source, architecture), (text, _) in zip(jobs, results, strict=True)
    }
    return Assembled(messages, [kernel for _, kernels in results for kernel in kernels])


@pytest.fixture(scope="session")
def assembled() -> Assembled:
    """All kernels of csrc/cuda."""
    if not SOURCES:
        pytest.skip("there are no CUDA sources in csrc/cuda")
    result = assemble(SOURCES)
    for k in result.kernels:
        print(f"{k.architecture}: {k.registers} registers, {k.shared} bytes of static shared memory: {k.name}")
    return result


def test_kernels_are_found_on_both_architectures(assembled: Assembled) -> None:
    names = {a: sorted(k.name for k in assembled.kernels if k.architecture == a) for a in ARCHITECTURES}
    assert names["sm_80"] and names["sm_80"] == names["sm_90a"]


def test_every_kernel_is_in_the_table(assembled: Assembled) -> None:
    patterns = [pattern for pattern, _ in REQUIRED]
    assert not {k.name for k in assembled.kernels if not any(re.search(pattern, k.name) for pattern in patterns)}


def test_nothing_spills(assembled: Assembled) -> None:
    assert all(k.registers > 0 and k.stack >= 0 and k.spilled >= 0 and k.instructions for k in assembled.kernels)
    assert not [(k.name, k.architecture, k.stack) for k in assembled.kernels if k.stack]
    assert not [(k.name, k.architecture, k.spilled) for k in assembled.kernels if k.spilled]
    local = {(k.name, k.architecture, i) for k in assembled.kernels for i in k.instructions if i[:3] in ("LDL", "STL")}
    assert not local
    assert not [(k.name, k.architecture, k.registers) for k in assembled.kernels if k.registers > 255]


def test_the_assembler_promises_full_speed(assembled: Assembled) -> None:
    """It says so where it serialises wgmma or ignores setmaxnreg."""
    lost = [
        (job, line) for job, text in assembled.messages.items() for line in text.splitlines() if "Potential" in line
    ]
    assert not lost


@pytest.mark.parametrize(("pattern", "architecture"), REQUIRED)
def test_required_instructions(assembled: Assembled, pattern: str, architecture: str) -> None:
    kernels = assembled.matching(pattern, architecture)
    assert kernels, f"no kernel of {architecture} matches {pattern}: {sorted({k.name for k in assembled.kernels})}"
    for kernel in kernels:
        for wanted in REQUIRED[pattern, architecture]:
            assert any(re.search(wanted, i) for i in kernel.instructions), (kernel.name, wanted, kernel.instructions)


def test_the_parsers_read_what_the_tools_write() -> None:
    text = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3oneILi8EEvPf' for 'sm_80'
ptxas info    : Function properties for _Z3oneILi8EEvPf
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem, 368 bytes cmem[0]
ptxas info    : Function properties for _Z6helperv
    96 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z3twov' for 'sm_80'
ptxas info    : Function properties for _Z3twov
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers"""
    one, two = parse_assembler(text, "sm_80").values()
    assert (one.registers, one.stack, one.spilled, one.shared) == (255, 16, 12, 512)
    assert (two.registers, two.stack, two.spilled, two.shared) == (10, 0, 0, 0)
    text = """\tcode for sm_90a
\t\tFunction : _Z3oneILi8EEvPf
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
                                                                      /* 0x000fe20000000800 */
        /*0010*/              @!P0 STL [R1], R2 ;                     /* 0x0000000000027919 */
        /*0020*/                   HGMMA.64x88x16.F32.BF16 R4, gdesc[UR4], R4, !UPT ;
        /*0030*/             @!UPT UIADD3 URZ, URZ, URZ, URZ ;
        /*12340*/                  EXIT ;
\t\t..........
\t\tFunction : _Z3twov
        /*0000*/                   EXIT ;"""
    functions = parse_disassembly(text)
    wanted = {"LDC": 1, "STL": 1, "HGMMA.64x88x16.F32.BF16": 1, "UIADD3": 1, "EXIT": 1}
    assert functions == {"_Z3oneILi8EEvPf": wanted, "_Z3twov": {"EXIT": 1}}
