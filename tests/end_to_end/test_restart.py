"""What lies in `state_dir`: after a stop, a crash, a rebuild, and whatever befalls its files."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.process import PROJECT
from tests.end_to_end.site import (
    ADDED,
    MODEL,
    STORY,
    SYSTEM,
    Server,
    Site,
    cached_of,
    chat_body,
    eventually,
    refusal,
    text_of,
    user,
)

PAGE_BYTES = 210_944
MANY_WARNINGS = 40


def place(folder: Path, **model: object) -> Site:
    return Site(folder, model={"state_dir": str(folder / "states"), **model})


def numbered(number: int) -> str:
    return f"This is story number {number}. {STORY}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What the answers ought to be: nothing is reused here."""
    off = {"enable_prefix_cache": False, "host_state_mib": 0}
    with Site(tmp_path_factory.mktemp("plain"), model=off).serving() as server:
        yield server


def test_after_a_stop_nothing_is_computed_again(tmp_path: Path, plain: Server) -> None:
    site = place(tmp_path)
    messages = [SYSTEM, user("Hello! Who are you?")]
    with site.serving() as server:
        first = server.complete(STORY * 3)
        told = server.chat(*messages)
        kept = server.state(prompt=STORY, label="kept", ttl_s=0)
        fork = server.post(f"/v1/states/{kept['id']}/fork", {"label": "fork", "pinned": True})
        gone = server.state(prompt=ADDED)
        server.state(prompt=ADDED, ttl_s=1)
        server.ask("DELETE", f"/v1/states/{gone['id']}")
        assert server.process.stop(signal.SIGINT) == 0, server.log
    assert {path.stat().st_mode & 0o777 for path in site.files("pages")} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in site.files("records")} == {0o600}
    with site.serving() as server:
        eventually(lambda: len(server.states()) == 2)
        assert server.states() == [state | {"tier": "disk"} for state in (fork, kept)]
        again = server.complete(STORY * 3)
        messages += [told["choices"][0]["message"], user("What do you like?")]
        second_turn = server.chat(*messages)
        answers = [server.complete(ADDED, state=state["id"]) for state in (kept, fork)]
        assert "WARNING" not in server.log
    assert cached_of(again) == again["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]
    assert text_of(again) == text_of(first) == text_of(plain.complete(STORY * 3))
    assert cached_of(second_turn) >= told["usage"]["prompt_tokens"]
    assert text_of(second_turn) == text_of(plain.chat(*messages))
    assert {text_of(answer) for answer in answers} == {text_of(plain.complete(STORY + ADDED))}


def test_killed_at_any_moment_it_comes_back_and_is_right(tmp_path: Path, plain: Server) -> None:
    """While states are being made, filed and deleted."""
    site = place(tmp_path, disk_state_mib=2)
    expected = {number: text_of(plain.complete(numbered(number))) for number in range(6)}
    written: list[Any] = []
    for round_number in range(2):
        with site.serving() as server:
            found = {state["id"]: state for state in server.states()}
            assert {state["id"] for state in written} <= found.keys()
            for state in found.values():
                answer = server.complete(state=state["id"])
                assert text_of(answer) == expected[int(state["label"])]
            for number, text in expected.items():
                assert text_of(server.complete(numbered(number))) == text
            assert "Traceback" not in server.log
            written.append(server.state(prompt=numbered(round_number), label=str(round_number)))
            eventually(lambda: record_of(site, written[-1]).exists())
            busy = threading.Thread(target=keep_busy, args=(server,))
            busy.start()
            busy.join(0.3 + 0.2 * round_number)
            server.process.kill()
            busy.join()


def keep_busy(server: Server) -> None:
    """Until the server is killed."""
    for number in range(10_000):
        try:
            state = server.state(prompt=numbered(number % 6), label=str(number % 6))
            if number % 3:
                server.ask("DELETE", f"/v1/states/{state['id']}")
        except (OSError, AssertionError):  # of half an answer
            return


def record_of(site: Site, state: Any) -> Path:
    return site.state_dir / "records" / f"{state['id']}.json"


def page_of(site: Site, state: Any) -> Path:
    """The file of its tensors."""
    record = json.loads(record_of(site, state).read_bytes())
    return site.state_dir / "pages" / f"{b64decode(record['digest']).hex()}.safetensors"


def test_files_that_were_harmed_are_told_and_do_no_harm(tmp_path: Path, plain: Server) -> None:
    """Somebody has been in the folder while the server was down."""
    site = place(tmp_path)
    with site.serving() as server:
        states = [server.state(prompt=numbered(number)) for number in range(8)]
        server.process.stop()
    names = [*harm_pages(site, states), *add_strangers(site, states[0])]
    changed = page_of(site, states[7])
    with site.serving() as server:
        for name in names:
            assert num_lines(server.log, name) == 1, f"{name} in\n{server.log}"
        assert num_lines(server.log, changed.name) == 0  # contents are checked when they are read
        left = {state["id"] for state in server.states()}
        assert left == {state["id"] for state in (states[0], states[7])}
        reply = server.ask("POST", "/v1/completions", chat_body(state=states[7]["id"]))
        assert reply.status in (404, 500), reply
        for state in states[1:]:
            reply = server.ask("POST", "/v1/completions", chat_body(state=state["id"]))
            assert refusal(reply) == (404, "state_not_found", "state")
        assert num_lines(server.log, changed.name) == 1
        for number in range(8):
            answer = server.complete(numbered(number))
            assert text_of(answer) == text_of(plain.complete(numbered(number)))
        good = server.complete(ADDED, state=states[0]["id"])
        assert "Traceback" not in server.log
        assert server.process.stop() == 0
    assert text_of(good) == text_of(plain.complete(numbered(0) + ADDED))
    assert not (site.state_dir / "pages/.tmp-x").exists()


def harm_pages(site: Site, states: list[Any]) -> list[str]:
    """All but the first state's; the last one's in a way that shows only when it is read."""
    _, truncated, longer, overwritten, huge, removed, linked, changed = (
        page_of(site, state) for state in states
    )
    os.truncate(truncated, truncated.stat().st_size - 1)
    with longer.open("ab") as file:
        file.write(b"\0")
    overwritten.write_bytes(os.urandom(PAGE_BYTES))
    os.truncate(huge, 1 << 40)  # it is sparse
    removed.unlink()
    linked.unlink()
    linked.symlink_to(page_of(site, states[0]))
    with changed.open("r+b") as file:
        file.seek(PAGE_BYTES // 2)
        file.write(os.urandom(8))
    # What is told of a state without its page is the record's id.
    return [
        *(page.name for page in (truncated, longer, overwritten, huge, linked)),
        *(state["id"] for state in states[1:7]),
    ]


def add_strangers(site: Site, state: Any) -> list[str]:
    weights = PROJECT / "config/assets/rwkv-lm-tiny.safetensors"
    strangers = {
        "pages/" + "ab" * 16 + ".safetensors": weights.read_bytes(),
        "pages/" + "cd" * 16 + ".safetensors": page_of(site, state).read_bytes(),
        "pages/notes.txt": b"mine",
        "records/state-garbage.json": b"\x80\x04pickled",
        "records/gen-garbage.json": b"{}",
        "records/remarks.txt": b"mine too",
    }
    for name, data in strangers.items():
        (site.state_dir / name).write_bytes(data)
    (site.state_dir / "pages/.tmp-x").write_text("left over by a crash")
    return [Path(name.removesuffix(".json")).name for name in strangers]


def num_lines(log: str, name: str) -> int:
    return sum(name in line for line in log.splitlines())


def test_a_state_dir_that_is_none_is_told_at_the_start(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    Site(tmp_path, model={"state_dir": str(blocked)}).write()
    given = ["--config-dir", str(tmp_path / "config"), "--infer-cfg", "test"]
    done = subprocess.run(
        [sys.executable, "-m", "api", *given],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "state_dir" in done.stderr
    assert str(blocked) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_does_not_stop_the_server(tmp_path: Path, plain: Server) -> None:
    """The size of a file is limited from outside; the kernel refuses what is beyond."""
    site = place(tmp_path)
    with site.serving() as server:
        pid = server.process.process.pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        states = [server.state(prompt=numbered(number)) for number in range(4)]
        for number, state in enumerate(states):
            answer = server.complete(ADDED, state=state["id"])
            assert text_of(answer) == text_of(plain.complete(numbered(number) + ADDED))
        assert len(server.states()) == 4
        assert 0 < num_lines(server.log, "File too large") < MANY_WARNINGS
        assert site.files("pages") == site.files("records") == []
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        after = server.state(prompt=STORY)
        eventually(lambda: record_of(site, after).exists())
        assert server.process.stop() == 0
        assert "Traceback" not in server.log
    assert {path.stem for path in site.files("records")} == {
        state["id"] for state in (*states, after)
    }
    names = os.listdir(site.state_dir / "pages")
    assert not [name for name in names if name.startswith(".tmp-")]


class TestRebuild:
    """A key that needs a new replica is changed while the server runs."""

    def test_states_go_over_by_the_disk(self, tmp_path: Path, plain: Server) -> None:
        with place(tmp_path).serving() as server:
            first = server.complete(STORY * 3)
            states = [server.state(prompt=numbered(number)) for number in range(3)]
            ids = [state["id"] for state in reversed(states)]
            rebuild(server, max_batch_size=5)
            eventually(lambda: [state["id"] for state in server.states()] == ids)
            answers = [server.complete(ADDED, state=state["id"]) for state in states]
            again = server.complete(STORY * 3)
            # Other weights find nothing of these, but do not take it away.
            rebuild(server, load_format="dummy")
            assert server.states() == []
            assert cached_of(server.complete(STORY * 3)) == 0
            rebuild(server, load_format="auto")
            eventually(lambda: [state["id"] for state in server.states()] == ids)
            # Without a disk they are lost.
            rebuild(server, state_dir=None)
            assert server.states() == []
            refused = server.ask("POST", "/v1/completions", chat_body(state=ids[0]))
            assert refusal(refused) == (404, "state_not_found", "state")
            assert cached_of(server.complete(STORY * 3)) == 0
        for number, answer in enumerate(answers):
            assert text_of(answer) == text_of(plain.complete(numbered(number) + ADDED))
        assert cached_of(again) == first["usage"]["prompt_tokens"]

    def test_budget_of_the_disk_is_kept(self, tmp_path: Path) -> None:
        site = place(tmp_path, disk_state_mib=2)
        capacity = 2 * 2**20 // PAGE_BYTES
        with site.serving() as server:
            for number in range(2 * capacity):
                server.complete(numbered(number), max_tokens=1)
            rebuild(server, disk_state_mib=1)
            eventually(lambda: "the replaced replica" in server.log)  # it has saved what it had
            eventually(lambda: len(site.files("pages")) == capacity // 2)
            latest = server.complete(numbered(2 * capacity - 1), max_tokens=1)
        assert cached_of(latest) > 0


def rebuild(server: Server, **keys: object) -> None:
    upsert = {"upsert": [{"model_name": MODEL, **keys}], "remove_model_names": []}
    assert server.post("/admin/models/reload", upsert)["rebuilt_model_names"] == [MODEL]
