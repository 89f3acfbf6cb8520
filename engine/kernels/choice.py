"""Which backend computes a model. Loads Triton or numba only where it is wanted and there."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from engine.kernels import reference
from engine.kernels.backend import Backend

logger = logging.getLogger(__name__)


def choose_backend(device: torch.device, head_size: int) -> Backend:
    """Triton's on a GPU, numba's on a CPU, else the reference; one line of the log says which,
    and why. Numba's computes float32; what is of another type it leaves to the reference."""
    if device.type == "cpu":
        return _of_cpu()
    reason = _against_triton(device, head_size)
    if reason is not None:
        logger.info("kernels: reference (%s)", reason)
        return reference
    from engine.kernels.gpu import backend

    logger.info("kernels: triton")
    return backend


def _of_cpu() -> Backend:
    if find_spec("numba") is None:
        logger.info("kernels: reference (numba is not installed)")
        return reference
    from engine.kernels.cpu import backend

    logger.info("kernels: numba for the time mix in float32, else reference")
    return backend


def reason_against_triton(device: torch.device) -> str | None:
    """Why no kernel of Triton's can run there; None where they can."""
    if device.type != "cuda":
        return f"device {device.type}"
    return "triton is not installed" if find_spec("triton") is None else None


def _against_triton(device: torch.device, head_size: int) -> str | None:
    reason = reason_against_triton(device)
    if reason is not None:
        return reason
    if head_size & (head_size - 1):
        return f"head size {head_size} is not a power of two"
    return None
