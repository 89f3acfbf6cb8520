"""Processors that this one is not: what the kernels compute when numba compiles for them."""

from __future__ import annotations

import os
import subprocess
import sys

PATHS = {  # what `features.int8_dot` tells there; NUMBA_CPU_NAME and NUMBA_CPU_FEATURES
    "avx2": ("x86-64-v3", "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2,+ssse3"),
    "plain": ("generic", ""),
}


def digest_on(path: str, module: str) -> list[str]:
    """The lines of a test module's `digest()`, from a process that compiles for another one."""
    name, extra = PATHS[path]
    return subprocess.run(
        [sys.executable, "-c", f"from {module} import digest; print(digest())"],
        env={**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": extra},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
