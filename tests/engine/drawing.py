"""Runs a module's tests of the sampler twice: by the specification in torch, and by the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from engine.sampler import Sampler, choose_host_sampler

PATHS = ("specification", "kernel")


def draws_by(path: str, module: ModuleType) -> Iterator[None]:
    """What a fixture of the module yields from: its samplers draw on that path meanwhile."""
    if path == "specification":
        yield
        return
    pytest.importorskip("numba", reason="the kernel is numba's")

    def sampler(num_seats: int, banned_ids: Any, device: torch.device, *rest: Any) -> Sampler:
        on_host = choose_host_sampler(num_seats, device, banned_ids)
        return Sampler(num_seats, banned_ids, device, *rest, on_host=on_host)

    vars(module)["Sampler"] = sampler
    yield
    vars(module)["Sampler"] = Sampler
