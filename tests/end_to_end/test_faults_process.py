"""A server that is told to stop while all protocols are being answered."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.end_to_end.faulty import Fault, seed_of
from tests.end_to_end.process import Poller
from tests.end_to_end.protocols import KINDS, ask
from tests.end_to_end.site import Server, Site, eventually

NUM_TOKENS = 20


def test_a_stop_under_load_fails_no_accepted_request(tmp_path: Path) -> None:
    """Neither of those that run nor of those that wait; and who comes later is told to go."""
    site = Site(tmp_path, model={"max_batch_size": 4, "state_dir": str(tmp_path / "states")})
    with site.serving("tests.end_to_end.faulty") as server, ThreadPoolExecutor(16) as pool:
        expected = {path: ask(server, path, num_tokens=NUM_TOKENS).text for path, _ in KINDS}
        slowly = {"num_tokens": NUM_TOKENS, "seed": seed_of(Fault.SLOW)}
        kinds = [*KINDS, *KINDS[:4]]
        futures = [pool.submit(ask, server, path, stream=st, **slowly) for path, st in kinds]
        eventually(lambda: num_accepted(server) == len(kinds))
        with Poller(server.process) as poller:
            server.process.process.send_signal(signal.SIGTERM)
            poller.seconds_until(accepting=False)
            assert server.ask("GET", "/health/ready").status == 503
            assert server.ask("GET", "/health/live").status == 200
            late = [ask(server, path, stream=is_stream) for path, is_stream in KINDS]
            assert poller.model()["running"] > 0, "they came too late to mean anything"
        outcomes = [future.result() for future in futures]
        assert server.process.wait() == 0, server.log
        assert "Traceback" not in server.log
    for refused in late:
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"
    for outcome in outcomes:
        assert outcome.is_good, outcome
        assert outcome.text == expected[outcome.path]


def num_accepted(server: Server) -> int:
    (model,) = server.get("/health")["models"]
    number: int = model["running"] + model["waiting"]
    return number
