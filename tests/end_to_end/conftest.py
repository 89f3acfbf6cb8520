"""One server process for all tests that leave it as they find it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.process import ServerProcess, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("server"), request_body_limit_bytes=100_000) as running:
        yield running
