"""Disks that are full, read-only or damaged under a running server. See also test_restart.py."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.protocols import QUESTION, ask
from tests.end_to_end.site import MODEL, STORY, Server, Site, eventually, refusal, text_of

FAULTY = "tests.end_to_end.faulty"
DATABASE = "responses.sqlite3"
ADDED = " One day"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, model={"state_dir": str(tmp_path / "states")})


@contextmanager
def full(server: Server, num_bytes: int) -> Iterator[None]:
    """No file may be larger; the kernel refuses what is beyond."""
    pid = server.process.process.pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    for folder in folders:
        folder.chmod(0o500)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o700)


def test_configuration_that_cannot_be_written_is_not_used_either(site: Site) -> None:
    with site.serving(FAULTY) as server:
        folder = site.config_file.parent
        before, names = site.config_file.read_bytes(), os.listdir(folder)
        for harm, reason in (
            (full(server, 100), "File too large"),
            (read_only(folder), "Permission denied"),
        ):
            with harm:
                refused = change(server, max_batch_size=5)
                assert refusal(refused)[:2] == (500, "reload_failed")
                assert reason in refused.error["message"]
                report = server.get("/health")["last_reload"]
                assert (report["result"], report["source"]) == ("rejected", "admin")
                assert ask(server, "/v1/chat/completions").is_good
            assert site.config_file.read_bytes() == before
            assert os.listdir(folder) == names
            assert server.get("/health")["models"][0]["max_batch_size"] == 8
        assert change(server, max_batch_size=5).status == 200
        assert b"max_batch_size = 5" in site.config_file.read_bytes()
        assert server.process.stop() == 0


def change(server: Server, **keys: object) -> Any:
    upsert = {"upsert": [{"model_name": MODEL, **keys}]}
    return server.ask("POST", "/admin/models/reload", upsert)


def test_states_stay_in_memory_while_their_folder_is_read_only(site: Site) -> None:
    with site.serving(FAULTY) as server:
        with read_only(site.state_dir / "pages", site.state_dir / "records"):
            state = server.state(prompt=STORY)
            answer = text_of(server.complete(ADDED, state=state["id"]))
            eventually(lambda: "Permission denied" in server.log)
            assert site.files("pages") == site.files("records") == []
            assert [one["id"] for one in server.states()] == [state["id"]]
        server.state(prompt=ADDED)  # whose file shows that there is a disk again
        eventually(lambda: len(site.files("records")) == 2)
        assert text_of(server.complete(ADDED, state=state["id"])) == answer
        assert server.process.stop() == 0
        assert "Traceback" not in server.log


class TestResponses:
    """The database of stored responses."""

    def test_what_cannot_be_written_is_found_and_written_later(self, site: Site) -> None:
        with site.serving(FAULTY) as server:
            first = create(server)
            with full(server, 20_000):  # bytes; the log cannot grow beyond them either
                second = create(server, previous_response_id=first["id"])
                for response in (first, second):
                    assert server.get(f"/v1/responses/{response['id']}") == response
                eventually(lambda: "cannot be stored" in server.log)
            third = create(server, previous_response_id=second["id"])
            assert server.process.stop() == 0
            assert "Traceback" not in server.log
        with site.serving(FAULTY) as server:
            for response in (first, second, third):
                assert server.get(f"/v1/responses/{response['id']}") == response

    def test_a_damaged_database_is_told_and_does_no_more_harm(self, site: Site) -> None:
        """While the server runs, and when it starts."""
        with site.serving(FAULTY) as server:
            lost = create(server)
            path = Path(str(site.model["state_dir"])) / DATABASE
            eventually(lambda: path.exists() and lost["id"].encode() in path.read_bytes())
            path.write_bytes(b"garbage" * 10_000)
            check_damaged(server, lost["id"])
            assert server.process.stop() == 0
            assert "Traceback" not in server.log
        with site.serving(FAULTY) as server:
            check_damaged(server, lost["id"])
            assert server.process.stop() == 0
            assert "Traceback" not in server.log
        assert path.read_bytes().startswith(b"garbage"), "somebody may want to look at it"


def check_damaged(server: Server, lost_id: str) -> None:
    assert server.ask("GET", f"/v1/responses/{lost_id}").status == 404
    kept = create(server)
    further = create(server, previous_response_id=kept["id"])
    assert server.get(f"/v1/responses/{further['id']}") == further
    assert "stored" in server.log
    assert ask(server, "/v1/completions").is_good


def create(server: Server, **fields: object) -> Any:
    body = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 8}
    return server.post("/v1/responses", body | fields)
