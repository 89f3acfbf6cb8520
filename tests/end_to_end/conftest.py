"""Server processes for all tests that leave them as they find them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.process import ServerProcess, serving
from tests.end_to_end.site import KEYS, Server, Site


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("server"), request_body_limit_bytes=100_000) as running:
        yield running


@pytest.fixture(scope="session")
def state_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The embedded model, with a key and no disk."""
    folder = tmp_path_factory.mktemp("states")
    return Site(folder, model={}, api_key="sk-one", request_body_limit_bytes=500_000)


@pytest.fixture(scope="session")
def state_server(state_site: Site) -> Iterator[Server]:
    with state_site.serving() as running:
        yield running


@pytest.fixture(scope="session")
def closed_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The embedded model with a disk, two clients and an administrator: `KEYS` of site.py."""
    folder = tmp_path_factory.mktemp("closed")
    return Site(folder, model={"state_dir": str(folder / "states")}, **KEYS)


@pytest.fixture(scope="session")
def closed_server(closed_site: Site) -> Iterator[Server]:
    """As the first of the clients."""
    with closed_site.serving() as running:
        yield running


@pytest.fixture(scope="session")
def quiet_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model, with a key, and a keep-alive after each millisecond of silence."""
    site = Site(tmp_path_factory.mktemp("quiet"), model={}, api_key="sk-one", sse_keep_alive_ms=1)
    with site.serving() as running:
        yield running
