"""Configuration and weights that change, break and vanish under a server that is busy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.process import PROJECT
from tests.end_to_end.protocols import KINDS, Outcome, ask
from tests.end_to_end.site import MODEL, STORY, TABLE, Server, Site, eventually, refusal, text_of

NUM_TOKENS = 20
NUM_RELOADS = 20
NUM_CLIENTS = 4


def report(server: Server) -> dict[str, Any]:
    return server.get("/health")["last_reload"] or {}


def num_reloads(server: Server, result: str) -> float:
    for line in server.ask("GET", "/metrics").body.decode().splitlines():
        if line.startswith(f'rwkv_reloads_total{{result="{result}"}}'):
            return float(line.split()[-1])
    return 0


def size_of(server: Server) -> int:
    size: int = server.get("/health")["models"][0]["max_batch_size"]
    return size


@contextmanager
def load(server: Server) -> Iterator[list[Outcome]]:
    """Clients that ask in all protocols until the end."""
    outcomes: list[Outcome] = []
    is_over = threading.Event()

    def keep_asking(first: int) -> None:
        for path, is_stream in cycle(KINDS[first:] + KINDS[:first]):
            if is_over.is_set():
                return
            outcomes.append(ask(server, path, stream=is_stream, num_tokens=NUM_TOKENS))

    clients = [threading.Thread(target=keep_asking, args=(2 * i,)) for i in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield outcomes
    finally:
        is_over.set()
        for client in clients:
            client.join()


def test_a_storm_of_reloads_fails_no_request_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """By file, by half a file first, and by POST; each builds a new replica."""
    site = Site(tmp_path, model={"state_dir": str(tmp_path / "states")})
    with site.serving() as server:
        expected = {path: ask(server, path, num_tokens=NUM_TOKENS).text for path, _ in KINDS}
        before = num_descriptors(server)
        with load(server) as outcomes:
            for number in range(NUM_RELOADS):
                size = 4 + number % 5
                (post, write, write_in_two_parts)[number % 3](site, server, size)
                eventually(lambda size=size: size_of(server) == size, timeout_s=60)
        assert num_reloads(server, "applied") >= NUM_RELOADS
        assert report(server)["result"] == "applied"
        eventually(lambda: num_descriptors(server) <= before, timeout_s=60)
        assert server.process.stop() == 0
        assert "Traceback" not in server.log
    assert {outcome.path for outcome in outcomes} == expected.keys()
    for outcome in outcomes:
        assert outcome.is_good, outcome
        assert outcome.text == expected[outcome.path]


def num_descriptors(server: Server) -> int:
    """Of connections, pages, databases, weights."""
    return len(os.listdir(f"/proc/{server.process.process.pid}/fd"))


def post(site: Site, server: Server, size: int) -> None:
    upsert = {"upsert": [{"model_name": MODEL, "max_batch_size": size}]}
    assert server.post("/admin/models/reload", upsert)["rebuilt_model_names"] == [MODEL]


def write(site: Site, server: Server, size: int) -> None:
    site.model["max_batch_size"] = size
    site.write()


def write_in_two_parts(site: Site, server: Server, size: int) -> None:
    """The first half stands there for a while."""
    path, num_rejected = site.config_file, num_reloads(server, "rejected")
    key = "max_batch_size ="
    begin, _, rest = path.read_text().partition(key)
    rest = re.sub(r"\d+", str(size), rest, count=1)
    with path.open("w") as file:
        file.write(begin + key)
        file.flush()
        eventually(lambda: num_reloads(server, "rejected") > num_rejected)
        told = report(server)
        assert (told["result"], told["source"]) == ("rejected", "file")
        assert str(path) in told["file"]
        assert told["message"] in server.log
        file.write(rest)


class TestWeights:
    """The file of a model that is being served."""

    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        target = tmp_path / "weights.safetensors"
        shutil.copy(str(TABLE["weights_path"]), target)
        return target

    def test_harm_is_done_to_no_request_and_told_to_who_reloads(
        self, tmp_path: Path, weights: Path
    ) -> None:
        site = Site(tmp_path, model={"weights_path": str(weights)})
        whole = weights.read_bytes()
        with site.serving() as server:
            expected = text_of(server.complete(STORY))
            weights.unlink()
            refused = rebuild(server)
            assert refusal(refused)[:2] == (400, "model_not_loaded")
            assert str(weights) in refused.error["message"]
            assert report(server)["result"] == "rejected"
            assert text_of(server.complete(STORY)) == expected
            # Half a copy, in place, then something else, by renaming.
            for harmed in (whole[: len(whole) // 2], b"\x80\x04no weights" * 1000):
                weights.with_suffix(".new").write_bytes(harmed)
                os.replace(weights.with_suffix(".new"), weights)
                refused = rebuild(server)
                assert refusal(refused)[:2] == (400, "model_not_loaded")
                assert str(weights) in refused.error["message"]
                assert report(server)["message"] in server.log
                assert text_of(server.complete(STORY)) == expected
            assert size_of(server) == TABLE["max_batch_size"]
            assert site.config_file.read_text().count("max_batch_size = 8") == 1
            weights.write_bytes(whole)
            assert rebuild(server).status == 200
            os.truncate(weights, 1000)  # what is served does not depend on the file
            assert text_of(server.complete(STORY)) == expected
            assert "Traceback" not in server.log
            assert server.process.stop() == 0

    def test_a_cut_file_keeps_the_server_from_starting_with_one_message(
        self, tmp_path: Path, weights: Path
    ) -> None:
        os.truncate(weights, 1_000_000)
        Site(tmp_path, model={"weights_path": str(weights)}).write()
        given = ["--config-dir", str(tmp_path / "config"), "--infer-cfg", "test"]
        done = subprocess.run(
            [sys.executable, "-m", "api", *given],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert str(weights) in done.stderr
        assert "Traceback" not in done.stderr


def rebuild(server: Server) -> Any:
    upsert = {"upsert": [{"model_name": MODEL, "max_batch_size": 7}]}
    return server.ask("POST", "/admin/models/reload", upsert)
