"""Triton kernels without a GPU: under Triton's interpreter, and compiled for GPUs not there.

The interpreter is chosen when a kernel is defined, by the environment, so each file runs in a
process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run_file(file: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/engine/{file}"],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("file", ["interpreted_decode.py"])
def test_kernels_pass_their_tests_under_the_interpreter(file: str) -> None:
    run_file(file, {**os.environ, "TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("file", ["compiled_decode.py"])
def test_kernels_compile_for_every_gpu_within_their_limits(file: str) -> None:
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run_file(file, plain)
