"""Keys stay where they are written: a real process, every route, broken files, then a search."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.openapi.operations import OPERATIONS
from tests.api.harness import Reply
from tests.config.secret_mistakes import MISTAKES, SECRET
from tests.end_to_end.process import PROJECT, ServerProcess
from tests.end_to_end.site import MODEL, STORY, TABLE, Server, chat_body, eventually, user

ONE, TWO, THREE, ADMIN = (f"{SECRET}-{name}" for name in ("one", "two", "three", "admin"))
WRONG = "sk-wr0ng-guess"
BROKEN = [mistake for number, mistake in enumerate(MISTAKES) if number % 4 == 0]  # each 0.3 s

# The first line has no spaces: as a line of a vocabulary it is one word.
SERVER_KEYS = f"""\
api_key="{ONE}"#{SECRET}-in-a-comment
# who may call
api_keys = ["{TWO}"]  # the second one
admin_api_key = '{ADMIN}'
http_bind_addr = "127.0.0.1:0"
"""


class Witness:
    """A server's folder and process, and everything that it has told anybody."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.toml = folder / "config/infer/test.toml"
        self.heard: list[bytes] = []
        for name in ("infer", "model"):
            (folder / "config" / name).mkdir(parents=True)
        model = dict(TABLE) | {"state_dir": str(folder / "states")}
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in model.items())
        self.text = f"{SERVER_KEYS}\n[[models]] # one\n{lines}"
        self.write(self.text)
        given = ["--config-dir", folder / "config", "--infer-cfg", "test", "--log-level", "debug"]
        self.process = ServerProcess(given, folder / "server.log", PROJECT)

    def write(self, text: str) -> None:
        temporary = self.toml.with_suffix(".new")
        temporary.write_text(text)
        os.replace(temporary, self.toml)

    def ask(self, key: str | None, method: str, path: str, body: object = None) -> Reply:
        """`body` as JSON, or as it is; what comes back is remembered, headers included."""
        client = Server(self.process, key)
        reply = client.ask(method, path, body)
        self.heard.append(repr(reply.headers).encode() + reply.body)
        return reply

    def last_reload(self) -> str:
        return repr(self.ask(None, "GET", "/health").json()["last_reload"])

    def search(self) -> list[str]:
        """Where the secret is found; the TOML alone may have it. After the end of the process."""
        places = [f"an answer: {heard!r}" for heard in self.heard if SECRET.encode() in heard]
        if SECRET in self.process.summary:
            places.append("the summary")
        files = [path for path in self.folder.rglob("*") if path.is_file() and path != self.toml]
        return [*places, *(str(path) for path in files if SECRET.encode() in path.read_bytes())]


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Witness]:
    made = Witness(tmp_path)
    yield made
    made.process.kill()


GOOD: dict[str, object] = {
    "/v1/chat/completions": chat_body(messages=[user("Hi")], return_state=True, max_tokens=2),
    "/v1/completions": chat_body(prompt=STORY, stream=True, max_tokens=2),
    "/v1/responses": {"model": MODEL, "input": "Hi", "max_output_tokens": 2},
    "/v1/messages": {"model": MODEL, "max_tokens": 2, "messages": [user("Hi")]},
    "/v1/states": {"prompt": STORY, "label": "mine"},
    "/v1/embeddings": {"model": MODEL, "input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
}


def drive_every_route(witness: Witness) -> set[int]:
    """With each key, a wrong one and none; with good bodies, wrong ones, and none at all."""
    statuses = set()
    for method, pattern in OPERATIONS:
        path = re.sub(r"\{[^}]*\}", MODEL, pattern)
        bodies: list[object] = [None]
        if method in ("POST", "PATCH") and pattern != "/admin/models/reload":
            bodies += [b"{", {"model": 3, "prompt": {}}, GOOD.get(pattern, {})]
        for key in (ONE, TWO, ADMIN, WRONG, None):
            for body in bodies:
                statuses.add(witness.ask(key, method, path, body).status)
        statuses.add(witness.ask(ONE, "PUT", path).status)
    return statuses


def reload_by_post(witness: Witness) -> None:
    """What works, what does not, and what names the file with the keys as a file to load."""
    path, own = "/admin/models/reload", str(witness.toml)
    for key in ("tokenizer_vocab_path", "weights_path", "model_cfg"):
        for is_dry in (False, True):
            upsert = {"model_name": MODEL, key: own}
            witness.ask(ADMIN, "POST", path, {"upsert": [upsert], "dry_run": is_dry})
    tuned = {"model_name": MODEL, "initial_states": [own]}
    assert witness.ask(ADMIN, "POST", path, {"upsert": [tuned]}).status == 400
    for body in ({"upsert": [{"model_name": MODEL, "api_key": 1}]}, {"upsert": 3}, b"{"):
        assert witness.ask(ADMIN, "POST", path, body).status == 400
    assert witness.toml.read_text() == witness.text
    change = {"upsert": [{"model_name": MODEL, "max_waiting": 99}]}
    assert witness.ask(TWO, "POST", path, change).status == 403
    assert witness.ask(ADMIN, "POST", path, change).status == 200
    written = witness.toml.read_text()
    assert written == witness.text + "max_waiting = 99\n"  # keys and comments are as they were
    witness.text = written


def reload_by_file(witness: Witness) -> None:
    """Mistakes around the keys, each noticed and refused; then other keys, which hold."""
    tables = witness.text[witness.text.index("[[models]]") :]
    for mistake in BROKEN:
        before = witness.last_reload()
        witness.write(f"{mistake}\n\n{tables}")
        eventually(lambda before=before: witness.last_reload() != before)
        assert "rejected" in witness.last_reload()
        assert witness.ask(ONE, "GET", "/v1/models").status == 200
    witness.write(witness.text.replace(ONE, THREE))
    eventually(lambda: witness.ask(THREE, "GET", "/v1/models").status == 200)
    assert witness.ask(ONE, "GET", "/v1/models").status == 401


def test_no_key_is_found_anywhere_but_in_the_file(witness: Witness) -> None:
    statuses = drive_every_route(witness)
    assert statuses >= {200, 400, 401, 403, 404, 405, 415}
    assert max(statuses) < 500
    reload_by_post(witness)
    reload_by_file(witness)
    drive_every_route(witness)
    process = witness.process.process
    process.terminate()
    assert process.stdout is not None
    witness.heard.append(process.stdout.read().encode())
    assert witness.process.wait() == 0
    assert witness.search() == []
    log = witness.process.log.read_text()
    assert "rejected" in log
    assert "Traceback" not in log
    assert WRONG not in log
