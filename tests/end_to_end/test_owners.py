"""What one key has made does not exist for another: word for word as an id that nobody has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.api.harness import Reply
from tests.end_to_end.site import ADMIN, BOB, MODEL, STORY, Server, eventually, well

PROMPT = {"model": MODEL, "prompt": "a", "max_tokens": 1}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
LONG = {"model": MODEL, "prompt": STORY, "max_tokens": 100_000, "ignore_eos": True, "stop": []}

Ask = tuple[str, str, object]

OF_STATES: list[Ask] = [
    ("GET", "/v1/states/ID", None),
    ("POST", "/v1/states/ID", {"label": "mine now"}),
    ("PATCH", "/v1/states/ID", {"pinned": True}),
    ("POST", "/v1/states/ID/fork", {}),
    ("GET", "/v1/states/ID/export", None),
    ("GET", "/v1/states?after=ID", None),
    ("POST", "/v1/states", {"state": "ID", "prompt": "a"}),
    ("POST", "/v1/completions", PROMPT | {"state": "ID"}),
    ("POST", "/v1/completions/render", PROMPT | {"state": "ID"}),
    ("POST", "/v1/completions/score", {"model": MODEL, "choices": ["a"], "state": "ID"}),
    ("POST", "/v1/chat/completions", CHAT | {"state": "ID"}),
    ("POST", "/v1/chat/completions", CHAT | {"state": "ID", "stream": True}),
    ("POST", "/v1/chat/completions/render", CHAT | {"state": "ID"}),
    ("POST", "/v1/chat/completions", {"model": MODEL, "resume": "ID"}),
    ("DELETE", "/v1/states/ID", None),
]
OF_ANSWERS: list[Ask] = [("POST", "/v1/states", {"response": "ID"})]
OF_RESPONSES: list[Ask] = [
    ("GET", "/v1/responses/ID", None),
    ("GET", "/v1/responses/ID/input_items", None),
    ("POST", "/v1/responses/ID/cancel", {}),
    ("POST", "/v1/responses", {"model": MODEL, "input": "a", "previous_response_id": "ID"}),
    ("DELETE", "/v1/responses/ID", None),
]
OF_RUNNING: list[Ask] = [
    ("POST", "/abort_requests", {"request_ids": ["ID"]}),
    ("POST", "/abort_request", {"rid": "ID"}),
    ("POST", "/abort_request", {"abort_all": True}),
]


@pytest.fixture
def alice(closed_server: Server) -> Server:
    return closed_server


@pytest.fixture(params=[BOB, ADMIN])
def other(request: pytest.FixtureRequest, closed_server: Server) -> Server:
    return closed_server.asking_as(request.param)


@pytest.fixture
def running_id(alice: Server) -> Iterator[str]:
    """Of an answer of Alice's that is being made."""
    request_id = "alices-own"
    with ThreadPoolExecutor(1) as pool:
        asked = LONG | {"request_id": request_id}
        answer = pool.submit(alice.ask, "POST", "/v1/completions", asked)
        eventually(lambda: alice.gauge("rwkv_requests_running") == 1)
        yield request_id
        assert not answer.done()
        alice.post("/abort_requests", {"request_ids": [request_id]})
        assert answer.result().json()["choices"][0]["finish_reason"] == "abort"


def told(server: Server, ask: Ask, asked_id: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of the answer, without what differs each time."""
    method, path, body = ask
    sent = None if body is None else json.loads(json.dumps(body).replace("ID", asked_id))
    reply: Reply = server.ask(method, path.replace("ID", asked_id), sent)
    own = ("x-request-id", "date", "content-length")
    headers = {name: value for name, value in reply.headers.items() if name not in own}
    return reply.status, headers, reply.body.decode().replace(asked_id, "ID")


def assert_unknown(server: Server, asks: list[Ask], real_id: str) -> None:
    unknown_id = real_id[:-5] + "other"
    for ask in asks:
        found = told(server, ask, real_id)
        assert found == told(server, ask, unknown_id), ask
        assert found[0] in (400, 404) or asks is OF_RUNNING, (ask, found)


def test_states(alice: Server, other: Server) -> None:
    state = alice.state(prompt=STORY, label="alice's own")
    assert_unknown(other, OF_STATES, state["id"])
    assert state["id"] not in [one["id"] for one in other.states()]
    assert well(alice.ask("GET", f"/v1/states/{state['id']}")) == state
    assert alice.complete(" One", state=state["id"])["choices"]
    assert well(alice.ask("DELETE", f"/v1/states/{state['id']}"))["deleted"]


def test_states_of_answers(alice: Server, other: Server) -> None:
    answer = alice.complete(STORY, max_tokens=3, return_state=True)
    assert_unknown(other, OF_ANSWERS, answer["id"])
    assert_unknown(other, OF_STATES, answer["state"]["id"])
    assert alice.state(response=answer["id"])["num_tokens"] > 3


def test_an_id_that_both_chose_names_the_own_answer(alice: Server, other: Server) -> None:
    ask = {"max_tokens": 2, "request_id": "both"}
    hers = alice.complete(STORY, **ask)
    theirs = other.complete("Hello", **ask)
    assert hers["id"] == theirs["id"]
    lengths = [one.state(response=hers["id"])["num_tokens"] for one in (alice, other)]
    assert lengths[0] > lengths[1]


def test_stored_responses(alice: Server, other: Server) -> None:
    made = {"model": MODEL, "input": STORY, "max_output_tokens": 3}
    response = alice.post("/v1/responses", made)
    eventually(lambda: alice.ask("GET", f"/v1/responses/{response['id']}").status == 200)
    assert_unknown(other, OF_RESPONSES, response["id"])
    follow = made | {"previous_response_id": response["id"], "input": "And then?"}
    assert alice.post("/v1/responses", follow)["status"] in ("completed", "incomplete")
    assert well(alice.ask("DELETE", f"/v1/responses/{response['id']}"))["deleted"]


def test_responses_that_run(alice: Server, other: Server) -> None:
    made: dict[str, Any] = LONG | {"input": STORY, "background": True, "max_output_tokens": 100_000}
    del made["prompt"], made["max_tokens"]
    response = alice.post("/v1/responses", made)
    assert response["status"] == "in_progress"
    assert_unknown(other, OF_RESPONSES, response["id"])
    assert alice.get(f"/v1/responses/{response['id']}")["status"] == "in_progress"
    ended = alice.post(f"/v1/responses/{response['id']}/cancel", {})
    assert ended["status"] == "cancelled"
    assert well(alice.ask("DELETE", f"/v1/responses/{response['id']}"))["deleted"]


def test_running_requests(alice: Server, other: Server, running_id: str) -> None:
    assert_unknown(other, OF_RUNNING, running_id)
    theirs = other.complete("Hello", max_tokens=1, request_id=running_id)
    assert theirs["id"] == f"cmpl-{running_id}"  # whether it runs elsewhere does not show
    again = alice.ask("POST", "/v1/completions", PROMPT | {"request_id": running_id})
    assert (again.status, again.error["param"]) == (400, "request_id")
