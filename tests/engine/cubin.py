"""Kernels compiled for GPUs that are not there, and what the machine code needs.

Uses the assembler's own tools, which Triton's wheel brings. Not under the interpreter.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_ALIGNED = [["tt.divisibility", 16]]  # as a launch finds pointers and strides to be


class Needs(NamedTuple):
    registers: int  # per thread; 255 at most
    stack_bytes: int  # per thread: what did not fit into registers
    shared_bytes: int  # per program
    wide_loads: int  # of 16 bytes per thread
    wide_stores: int


def compiled(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    aligned: tuple[str, ...],
    arch: int,
    num_warps: int,
    folder: Path,
) -> Needs:
    """`types` names the arguments as Triton spells them ("*fp32", "i64"); pointers are aligned,
    and so are the integers in `aligned`."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): _ALIGNED
            for i, name in enumerate(names)
            if signature[name].startswith("*") or name in aligned
        },
    )
    built = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps}
    )
    path = folder / "kernel.cubin"
    path.write_bytes(built.asm["cubin"])
    usage = _output("cuobjdump", "-res-usage", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    code = _output("nvdisasm", "-c", path)
    return Needs(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=built.metadata.shared,
        wide_loads=len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128", code)),
        wide_stores=len(re.findall(r"\bSTG\.E\.(?:\w+\.)*128", code)),
    )


def _output(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [_TOOLS / tool, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout + done.stderr
