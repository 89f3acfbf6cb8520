"""States carried elsewhere, refused, and left behind: files, full stores, clients that leave."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.api.harness import request_bytes
from tests.end_to_end.site import (
    ADDED,
    MODEL,
    STORY,
    Server,
    Site,
    chat_body,
    eventually,
    refusal,
    text_of,
)

LONG_PROMPT = "The cat saw a fish, and the fish saw the cat. " * 4000


@pytest.fixture
def server(state_server: Server) -> Server:
    """The shared one, and not the one of random weights."""
    return state_server


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A state of another model of the same shape."""
    model = {"load_format": "dummy"}
    with Site(tmp_path_factory.mktemp("other"), model=model).serving() as other:
        state = other.state(prompt=STORY)
        return other.ask("GET", f"/v1/states/{state['id']}/export").body


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Elsewhere nothing is configured alike but the model."""
    model = {"max_batch_size": 3, "paragraph_len": 32, "host_state_mib": 2}
    with Site(tmp_path_factory.mktemp("elsewhere"), model=model).serving() as server:
        yield server


class TestMoving:
    def test_an_exported_state_goes_on_elsewhere(self, server: Server, other: Server) -> None:
        state = server.state(prompt=STORY, label="to move")
        exported = server.ask("GET", f"/v1/states/{state['id']}/export")
        assert exported.headers["content-type"] == "application/octet-stream"
        assert f"{state['id']}.safetensors" in exported.headers["content-disposition"]
        unknown = other.ask("GET", f"/v1/states/{state['id']}")
        assert refusal(unknown) == (404, "state_not_found", "state")
        there = other.post("/v1/states/import?label=moved&pinned=true", exported.body)
        assert there["id"] != state["id"]
        assert (there["label"], there["pinned"]) == ("moved", True)
        assert there["num_tokens"] == state["num_tokens"]
        answer = other.complete(ADDED, state=there["id"])
        direct = other.complete(state=there["id"])
        again = other.ask("GET", f"/v1/states/{there['id']}/export")
        assert text_of(answer) == text_of(server.complete(STORY + ADDED))
        assert text_of(direct) == text_of(server.complete(STORY))
        imported = server.post("/v1/states/import", again.body)
        assert text_of(server.complete(ADDED, state=imported["id"])) == text_of(answer)

    def test_what_is_no_state_of_this_model_is_refused(
        self, server: Server, other: Server, random_weights: bytes
    ) -> None:
        """More often than there are frames, so that none may get lost on the way."""
        state = server.state(prompt=STORY)
        good = server.ask("GET", f"/v1/states/{state['id']}/export").body
        damaged = bytearray(good)
        damaged[-1000] ^= 1
        refused = [
            b"garbage",
            os.urandom(4096),
            good[:-1],
            good + b"\0",
            bytes(damaged),
            random_weights,
            (1 << 62).to_bytes(8, "little") + b"{}",
        ]
        for data in 2 * refused:
            reply = other.ask("POST", "/v1/states/import", data)
            assert refusal(reply) == (400, "state_mismatch", None), data[:40]
            assert reply.error["message"].startswith("the file is refused: ")
        reply = other.ask("POST", "/v1/states/import", random_weights)
        assert "a state of another model (model_fingerprint" in reply.error["message"]
        assert refusal(other.ask("POST", "/v1/states/import", b""))[:2] == (400, "invalid_value")
        too_large = server.ask("POST", "/v1/states/import", good * 3)
        assert refusal(too_large)[:2] == (413, "request_too_large")
        assert other.post("/v1/states/import", good)["num_tokens"] == state["num_tokens"]


def forget_all(server: Server) -> None:
    for state in server.states():
        assert server.ask("DELETE", f"/v1/states/{state['id']}").status == 200


def test_a_full_store_refuses_and_keeps_what_it_has(other: Server) -> None:
    """It has 9 frames, and half of them are for states."""
    forget_all(other)
    kept = [other.state(prompt=f"{STORY} Number {number}.") for number in range(4)]
    data = other.ask("GET", f"/v1/states/{kept[0]['id']}/export").body
    for path, body in (
        ("/v1/states", {"prompt": ADDED}),
        ("/v1/completions", chat_body(prompt=ADDED, return_state=True)),
        ("/v1/states/import", data),
    ):
        assert refusal(other.ask("POST", path, body)) == (507, "states_full", None)
    fork = other.post(f"/v1/states/{kept[0]['id']}/fork")  # that needs no room
    assert {state["id"] for state in other.states()} == {state["id"] for state in (*kept, fork)}
    assert text_of(other.complete(STORY))
    other.ask("DELETE", f"/v1/states/{kept[1]['id']}")
    assert other.state(prompt=ADDED)["num_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/states", {"prompt": LONG_PROMPT}),
        ("/v1/completions", {"prompt": LONG_PROMPT, "return_state": True}),
        ("/v1/completions", {"prompt": STORY, "return_state": True, "max_tokens": 100_000}),
    ],
    ids=["state", "prompt", "answer"],
)
def test_who_leaves_before_the_state_is_there_leaves_nothing(
    other: Server, path: str, body: dict[str, object]
) -> None:
    """More often than there are slots or frames, so that none may get lost on the way."""
    forget_all(other)
    is_made = path == "/v1/states"
    asked = {"model": MODEL, **body} if is_made else chat_body(**body, stop=[])
    for _ in range(10):
        with other.process.connect() as sock:
            sock.sendall(request_bytes("POST", path, asked, other.headers))
            eventually(lambda: other.gauge("rwkv_requests_running") == 1)
        eventually(lambda: other.gauge("rwkv_requests_running") == 0)
    assert other.gauge("rwkv_state_slots", use="used") == 0
    assert other.states() == []
    kept = [other.state(prompt=f"{STORY} Number {number}.") for number in range(4)]
    for state in kept:
        assert other.ask("GET", f"/v1/states/{state['id']}/export").status == 200
