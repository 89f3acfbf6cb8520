"""Small copies between host and device that nobody waits for. Knows tensors, not their meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Integers as int64 on the device. What is asked of the device next finds them there."""
    if device.type != "cuda":
        # From a list, numpy makes it in half the time of torch.
        return torch.from_numpy(np.array(values, np.int64)).to(device)
    # A copy from other memory than pinned one would wait until the device has nothing to do.
    pinned = torch.tensor(values, dtype=torch.int64, pin_memory=True)
    return pinned.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; on a GPU it is garbage until what `mark` returns has been called."""
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def mark(device: torch.device) -> Callable[[], None]:
    """What waits, on any thread, until the device has done all that this one has asked so far."""
    if device.type != "cuda":
        return _has_happened
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    wait: Callable[[], None] = event.synchronize
    return wait


def _has_happened() -> None:
    """A CPU is done on return."""
