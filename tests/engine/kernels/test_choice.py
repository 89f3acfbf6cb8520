"""Which backend is chosen, and that the log says why."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from engine.kernels import choice, reference

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def chosen(
    device: torch.device, head_size: int, caplog: pytest.LogCaptureFixture
) -> tuple[object, list[str]]:
    with caplog.at_level(logging.INFO, logger=choice.logger.name):
        backend = choice.choose_backend(device, head_size)
    return backend, caplog.messages


def test_cpu_without_numba_takes_the_reference(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    expected = (reference, ["kernels: reference (numba is not installed)"])
    assert chosen(CPU, 64, caplog) == expected


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
def test_cpu_with_numba_takes_its_kernels(caplog: pytest.LogCaptureFixture) -> None:
    backend, messages = chosen(CPU, 64, caplog)
    assert getattr(backend, "__name__", None) == "engine.kernels.cpu.backend"
    assert messages == ["kernels: numba for the time mix in float32, else reference"]


def test_gpu_without_triton_takes_the_reference(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    expected = (reference, ["kernels: reference (triton is not installed)"])
    assert chosen(GPU, 64, caplog) == expected


def test_odd_head_size_takes_the_reference(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    expected = (reference, ["kernels: reference (head size 24 is not a power of two)"])
    assert chosen(GPU, 24, caplog) == expected


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_gpu_with_triton_takes_its_kernels(caplog: pytest.LogCaptureFixture) -> None:
    backend, messages = chosen(GPU, 64, caplog)
    assert getattr(backend, "__name__", None) == "engine.kernels.gpu.backend"
    assert messages == ["kernels: triton"]


def test_engine_on_a_cpu_does_not_load_triton() -> None:
    program = (
        "import sys, torch, engine.engine\n"
        "from engine.kernels.choice import choose_backend\n"
        "choose_backend(torch.device('cpu'), 64)\n"
        "assert 'engine.kernels.gpu.backend' not in sys.modules\n"
    )
    project = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program], cwd=project, timeout=60, check=True)
