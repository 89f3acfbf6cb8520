"""Kernels compiled for GPUs that are not there, and what the machine code needs.

Uses the assembler's own tools, which Triton's wheel brings. Not under the interpreter.
`python -m tests.engine.kernels.machine_code` prints the needs of all kernels as a table, and fails
if one exceeds its limits. Each file `compiled_*.py` here lists the launches of a kernel as `CASES`.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUDA = (80, 89, 90, 100, 120)  # A100, 4090, H100, B200, 5090
AMD = (GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx1100", 32))  # MI300, 7900

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_ALIGNED = [["tt.divisibility", 16]]  # as a launch finds pointers and strides to be


class Needs(NamedTuple):
    registers: int  # per thread; 255 at most
    stack_bytes: int  # per thread: what did not fit into registers
    shared_bytes: int  # per program
    wide_loads: int = 0  # of 16 bytes per thread
    wide_stores: int = 0
    matrix_products: int = 0  # instructions of the tensor cores


class Limits(NamedTuple):
    """At most so many registers and bytes; at least so many of the others."""

    registers: int = 255
    stack_bytes: int = 0
    shared_bytes: int = 48 * 1024
    wide_loads: int = 0
    wide_stores: int = 0
    matrix_products: int = 0


class Case(NamedTuple):
    """One way in which a kernel is launched, and what it may need then.

    `types` names the arguments as Triton spells them ("*fp32", "i64"), but for the constants;
    pointers are aligned, and so are the integers in `aligned`. `archs` are the GPUs on which it
    is launched so; AMD's compile whatever sm_90 does.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, object]
    limits: Limits
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 1
    archs: tuple[int, ...] = CUDA

    def is_for(self, target: GPUTarget) -> bool:
        return (90 if target.backend == "hip" else target.arch) in self.archs

    def __str__(self) -> str:
        return self.name


def excess(needs: Needs, limits: Limits) -> list[str]:
    """What is more, or less, than the limits allow, in words."""
    pairs = zip(Needs._fields, needs, limits, strict=True)
    return [
        f"{name.replace('_', ' ')} {value}, {'at most' if i < 3 else 'at least'} {limit}"
        for i, (name, value, limit) in enumerate(pairs)
        if (value > limit if i < 3 else value < limit)
    ]


def needs_of(case: Case, arch: int) -> Needs:
    built = _compiled(case, GPUTarget("cuda", arch, 32))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        usage = _output("cuobjdump", "-res-usage", path)
        code = _output("nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return Needs(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=built.metadata.shared,
        wide_loads=count(r"\bLDG\.E\.(?:\w+\.)*128") + count(r"\bLDGSTS\.E\.(?:\w+\.)*128"),
        wide_stores=count(r"\bSTG\.E\.(?:\w+\.)*128"),
        matrix_products=count(r"\b(?:[HIQ]MMA|[HIQ]GMMA|UTC[HIQ]MMA)\b"),
    )


def _compiled(case: Case, target: GPUTarget) -> Any:
    names = case.kernel.arg_names
    types = {name: case.types[name] for name in names if name not in case.constants}
    is_amd = target.backend == "hip"  # there, kernels are launched with products of float32
    constants = {
        name: "ieee" if is_amd and name.endswith("PRECISION") else value
        for name, value in case.constants.items()
    }
    source = ASTSource(
        fn=case.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): _ALIGNED
            for name, kind in types.items()
            if kind.startswith("*") or name in case.aligned
        },
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=target, options=options)


def _output(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [_TOOLS / tool, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout + done.stderr


def all_cases(only: str) -> list[Case]:
    paths = sorted(Path(__file__).parent.glob("compiled_*.py"))
    modules = [importlib.import_module(f"tests.engine.kernels.{path.stem}") for path in paths]
    return [case for module in modules for case in module.CASES if only in case.name]


def row(place: tuple[str, int, GPUTarget]) -> tuple[str, list[str]]:
    """A line of the table, and what is wrong with it; cases cannot be sent to processes."""
    only, number, target = place
    case = all_cases(only)[number]
    if target.backend == "hip":
        assert _compiled(case, target).asm["hsaco"]
        return f"| {case} | {target.arch} |" + " compiled |" + " |" * (len(Needs._fields) - 1), []
    needs = needs_of(case, target.arch)
    cells = " | ".join(map(str, needs))
    wrong = [f"{case} on sm_{target.arch}: {text}" for text in excess(needs, case.limits)]
    return f"| {case} | sm_{target.arch} | {cells} |", wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile all kernels for GPUs, and judge them.")
    parser.add_argument("--archs", type=int, nargs="*", default=CUDA, help="80 for sm_80, ...")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--amd", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--jobs", type=int, default=2, help="compiled at once")
    args = parser.parse_args()
    targets = [GPUTarget("cuda", arch, 32) for arch in args.archs] + list(AMD if args.amd else ())
    places = [
        (args.only, number, target)
        for number, case in enumerate(all_cases(args.only))
        for target in targets
        if case.is_for(target)
    ]
    print("| kernel | GPU | " + " | ".join(name.replace("_", " ") for name in Needs._fields) + " |")
    print("|---" * (2 + len(Needs._fields)) + "|")
    wrong: list[str] = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for line, reasons in pool.map(row, places):
            print(line, flush=True)
            wrong += reasons
    print(f"\n{len(places)} compiled", *wrong, sep="\n")
    return 1 if wrong or not places else 0


if __name__ == "__main__":
    sys.exit(main())
