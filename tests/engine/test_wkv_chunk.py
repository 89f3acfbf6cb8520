"""The Triton kernels in chunks compute the recurrence: under the interpreter, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
)
def test_kernels_are_right_under_the_interpreter() -> None:
    """In a process of its own: triton asks for TRITON_INTERPRET when a kernel is defined."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/engine/interpreted_wkv_chunk.py"],
        cwd=PROJECT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
