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

HERE = Path(__file__).parent
PROJECT = HERE.parents[2]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


INTERPRETED = sorted(path.name for path in HERE.glob("interpreted_*.py"))


def run(arguments: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# `make kernels` runs them all, beside what it compiles; the suite those of the whole model.
QUICK = {"interpreted_model.py"}


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.kernels]) for f in INTERPRETED],
)
def test_kernels_pass_their_tests_under_the_interpreter(file: str) -> None:
    command = ["pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    run([*command, str(HERE.relative_to(PROJECT) / file)], {**os.environ, "TRITON_INTERPRET": "1"})
