"""What every test may use: the event loop, hypothesis profiles, a free port, shared assets.

Knows nothing of the packages under test.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The folder beside the checkout; a plain clone does not have it.
SHARED_DIR = Path(__file__).parents[1].parent / "shared"

# torch's threads wait for each other by spinning: on a busy machine two are many times slower
# than one. Set before anything imports torch, and inherited by the servers that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "ci", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", settings.get_profile("ci"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio; the engine's loop is written for it."""
    return "asyncio"


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function giving a TCP port of 127.0.0.1 that nobody listened on a moment ago."""
    return find_free_port


def find_free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def shared_dir() -> Path:
    """The folder of large test data beside the checkout; skips the test where it is absent."""
    if not SHARED_DIR.is_dir():
        pytest.skip(f"needs test data in {SHARED_DIR.name}/ beside the checkout, which is absent")
    return SHARED_DIR
