"""The clock on the wall jumps while the server runs: only what is dated by it may notice."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.end_to_end.faulty import Fault, seed_of
from tests.end_to_end.process import Poller
from tests.end_to_end.protocols import BODIES, KINDS, ask
from tests.end_to_end.site import STORY, Server, Site, text_of

YEAR_S = 365 * 86_400
HOUR_S = 3600
TOLERANCE_S = 60
NUM_TOKENS = 20


class Clock:
    """That of a server on the wall."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def be_off_by(self, seconds: float) -> None:
        self.path.write_text(str(seconds))

    def is_now(self, unix_s: float, offset_s: float) -> bool:
        return abs(unix_s - time.time() - offset_s) < TOLERANCE_S


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path / "clock")


def test_a_jump_of_the_clock_ends_nothing_before_its_time(tmp_path: Path, clock: Clock) -> None:
    site = Site(tmp_path, model={"state_dir": str(tmp_path / "states")})
    env = {"FAULTY_CLOCK": str(clock.path)}
    with site.serving("tests.end_to_end.faulty", env) as server, ExitStack() as stack:
        expected = {path: ask(server, path, num_tokens=NUM_TOKENS).text for path in BODIES}
        short, long, endless = (
            server.state(prompt=STORY, ttl_s=ttl_s) for ttl_s in (HOUR_S, 2 * YEAR_S, 0)
        )
        idle = http.client.HTTPConnection("127.0.0.1", server.process.port, timeout=30)
        stack.callback(idle.close)
        for offset_s, left in (
            (HOUR_S - TOLERANCE_S, [endless, long, short]),
            (-10 * YEAR_S, [endless, long, short]),
            (YEAR_S, [endless, long]),  # as if the time had passed
        ):
            check_running_ones(server, clock, offset_s, expected)
            check_timeout(server)
            idle.request("GET", "/health")
            health = json.loads(idle.getresponse().read())
            assert clock.is_now(health["server_time_unix_ms"] / 1000, offset_s)
            assert health["models"][0]["running"] == 0
            assert mine(server) == {one["id"] for one in left}
        answer = server.complete(" One day", state=long["id"])
        assert text_of(answer) == text_of(server.complete(STORY + " One day"))
        assert server.process.stop() == 0
        assert "Traceback" not in server.log


def mine(server: Server) -> set[str]:
    """Ids of the states that no response has left."""
    return {one["id"] for one in server.states() if not one["label"].startswith("response ")}


def check_running_ones(
    server: Server, clock: Clock, offset_s: float, expected: dict[str, str]
) -> None:
    """The jump comes in the middle of them. They have a deadline, which is far."""
    fields = {"num_tokens": NUM_TOKENS, "seed": seed_of(Fault.SLOW), "timeout_ms": 60_000}
    with ThreadPoolExecutor(8) as pool, Poller(server.process) as poller:
        futures = [pool.submit(ask, server, path, stream=st, **fields) for path, st in KINDS[::3]]
        poller.seconds_until(running=len(futures))
        clock.be_off_by(offset_s)
        for future in futures:
            outcome = future.result()
            assert outcome.is_good, outcome
            assert outcome.text == expected[outcome.path]
    created = server.complete(STORY, max_tokens=1)["created"]
    assert clock.is_now(created, offset_s)


def check_timeout(server: Server) -> None:
    """It is as long as ever."""
    fields = {"num_tokens": NUM_TOKENS, "seed": seed_of(Fault.SLOW), "timeout_ms": 100}
    assert ask(server, "/v1/chat/completions", **fields).status == 504
