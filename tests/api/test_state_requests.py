"""Requests that go on from states and leave states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api.access import owner_of
from api.errors import ApiError
from api.schemas import parse_chat, parse_completion
from engine.types import StateOptions
from tests.api.harness import Reply, Running, chat_body, model_table, running
from tests.api.scripted import recited, spelled

WEEK_S = 604_800
NUM_CHAT_TOKENS = len("User: hi\n\nAssistant:") + 1  # one byte is one token; one begins it
COMPLETION = {"model": "m", "prompt": "ab", "max_tokens": 6}


def refusal(body: dict[str, object]) -> ApiError:
    """Of a chat body, or of a completion body where it has no messages."""
    parse = parse_chat if "messages" in body else parse_completion
    with pytest.raises(ApiError) as caught:
        parse(json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value


async def complete(server: Running, **fields: object) -> Reply:
    return await server.post("/v1/completions", {"model": "m", "max_tokens": 6, **fields})


async def text_of_state(server: Running, state_id: str, owner: str = "") -> str:
    return spelled(server.states.find(owner, state_id).ids)


class TestReturnState:
    async def test_whole_answer_carries_the_state_of_its_end(self, tmp_path: Path):
        async with running(tmp_path) as server:
            answer = (await complete(server, prompt="ab", return_state=True)).json()
            state = answer["state"]
            text = await text_of_state(server, state["id"])
        assert text == "ab" + answer["choices"][0]["text"]
        assert state == state | {
            "object": "state",
            "model": "m",
            "num_tokens": 1 + 2 + 6,
            "bytes": 8,
            "label": "",
            "pinned": False,
            "has_logits": True,
            "parent": None,
            "tier": "device",
        }
        assert state["expires_at"] - state["created"] == WEEK_S
        assert len(state) == 12

    async def test_stream_carries_it_in_the_chunk_that_ends_the_answer(self, tmp_path: Path):
        body = chat_body(return_state=True, stream=True, stream_options={"include_usage": True})
        async with running(tmp_path) as server:
            events = (await server.post("/v1/chat/completions", body)).events()
        *_, last, usage = events
        assert last["choices"][0]["finish_reason"] == "length"
        assert last["state"]["object"] == "state"
        assert usage["choices"] == []
        assert [event for event in events if "state" in event] == [last]

    async def test_without_asking_there_is_none(self, tmp_path: Path):
        async with running(tmp_path) as server:
            assert "state" not in (await server.chat()).json()
            assert "state" not in (await server.chat(return_state=False)).json()
            assert server.states.kept == {}

    async def test_it_is_filed_as_asked(self, tmp_path: Path):
        async with running(tmp_path) as server:
            filing = {"label": "tom", "ttl_s": 60, "pinned": True}
            state = (await server.chat(return_state=filing)).json()["state"]
            for_ever = (await server.chat(return_state={"ttl_s": 0})).json()["state"]
        assert (state["label"], state["pinned"]) == ("tom", True)
        assert state["expires_at"] - state["created"] == 60
        assert for_ever["expires_at"] is None

    async def test_default_time_to_live_is_configured(self, tmp_path: Path):
        async with running(tmp_path, model_table(state_ttl_s=0)) as server:
            state = (await server.chat(return_state=True)).json()["state"]
        assert state["expires_at"] is None

    async def test_no_room_is_507(self, tmp_path: Path):
        async with running(tmp_path) as server:
            server.states.max_num_states = 0
            reply = await server.post("/v1/states", {"prompt": "a"})
        assert (reply.status, reply.error["code"]) == (507, "states_full")

    @pytest.mark.parametrize(
        ("value", "param"),
        [
            ({"label": "x" * 257}, "return_state.label"),
            ({"ttl_s": -1}, "return_state.ttl_s"),
            ({"lable": "x"}, "return_state"),
            ({"pinned": "yes"}, "return_state.pinned"),
            (3, "return_state"),
        ],
    )
    def test_wrong_ones_are_refused_by_name(self, value: object, param: str):
        assert refusal(chat_body(return_state=value)).param == param

    def test_it_is_for_one_answer(self):
        error = refusal(chat_body(return_state=True, n=2))
        assert error.param == "return_state"
        assert "'choice'" in error.message


class TestState:
    async def test_completion_goes_on_without_a_new_beginning(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = (await complete(server, prompt="ab", return_state=True)).json()
            second = (await complete(server, prompt="cd", state=first["state"]["id"])).json()
            asked = server.engine.requests[1]
        assert spelled(asked.prompt_ids) == "cd"
        assert 0 not in asked.prompt_ids
        assert second["choices"][0]["text"] == recited(9 + 2, 6)
        assert second["usage"]["prompt_tokens"] == 2
        assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "state_tokens": 9}

    @pytest.mark.parametrize("fields", [{}, {"prompt": ""}, {"prompt": None}])
    async def test_completion_may_go_on_without_a_prompt(self, tmp_path: Path, fields: dict):
        async with running(tmp_path) as server:
            first = (await complete(server, prompt="ab", return_state=True)).json()
            second = (await complete(server, state=first["state"]["id"], **fields)).json()
        assert second["choices"][0]["text"] == recited(9, 6)

    async def test_token_ids_go_on_as_they_are(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = (await complete(server, prompt="ab", return_state=True)).json()
            await complete(server, prompt=[7, 8], state=first["state"]["id"])
            assert server.engine.requests[1].prompt_ids == (7, 8)

    async def test_second_turn_of_a_chat_gives_the_text_of_the_whole(self, tmp_path: Path):
        question = {"role": "user", "content": "and then?"}
        async with running(tmp_path) as server:
            first = (await server.chat(return_state=True)).json()
            second = await server.chat(
                messages=[question], state=first["state"]["id"], return_state=True
            )
            text = await text_of_state(server, second.json()["state"]["id"])
        said = recited(NUM_CHAT_TOKENS, 5)
        assert text.startswith(f"User: hi\n\nAssistant:{said}\n\nUser: and then?\n\nAssistant:")
        assert second.json()["state"]["parent"] == first["state"]["id"]

    async def test_chat_without_messages_goes_on_with_the_answer(self, tmp_path: Path):
        """White space at the seam is part of the text then."""
        async with running(tmp_path) as server:
            num_whole, num_part = 40, 16
            assert recited(NUM_CHAT_TOKENS + num_part, 1) == " "
            whole = (await server.chat(max_tokens=num_whole)).json()
            part = (await server.chat(max_tokens=num_part, return_state=True)).json()
            fields = {"state": part["state"]["id"], "max_tokens": num_whole - num_part}
            by_list = (await server.chat(messages=[], **fields)).json()
            absent = (await server.chat(messages=None, **fields, stream=True)).events()
        texts = [answer["choices"][0]["message"]["content"] for answer in (whole, part, by_list)]
        assert texts[0] == texts[1] + texts[2]
        streamed = [event["choices"][0]["delta"].get("content", "") for event in absent]
        assert "".join(streamed) == texts[2]

    async def test_chat_from_the_beginning_of_a_document_opens_no_blank_line(self, tmp_path: Path):
        async with running(tmp_path) as server:
            state = (await server.post("/v1/states", {"prompt": ""})).json()
            assert state["num_tokens"] == 1
            await server.chat(state=state["id"])
            assert spelled(server.engine.requests[-1].prompt_ids) == "User: hi\n\nAssistant:"

    async def test_several_answers_go_on_from_one_state(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = (await complete(server, prompt="ab", return_state=True)).json()
            answer = (await complete(server, state=first["state"]["id"], n=3)).json()
        assert [choice["text"] for choice in answer["choices"]] == [recited(9, 6)] * 3
        assert answer["usage"]["prompt_tokens_details"]["state_tokens"] == 9

    @pytest.mark.parametrize("is_stream", [False, True])
    async def test_unknown_one_is_404(self, tmp_path: Path, is_stream: bool):
        async with running(tmp_path) as server:
            reply = await server.chat(state="state-nope", stream=is_stream)
        assert (reply.status, reply.error["code"]) == (404, "state_not_found")
        assert reply.error["param"] == "state"

    async def test_states_belong_to_a_model(self, tmp_path: Path):
        async with running(tmp_path, model_table("m"), model_table("other")) as server:
            first = (await complete(server, prompt="ab", return_state=True)).json()
            reply = await complete(server, model="other", state=first["state"]["id"])
        assert (reply.status, reply.error["code"]) == (404, "state_not_found")

    async def test_too_long_message_is_still_named(self, tmp_path: Path):
        async with running(tmp_path, model_table(max_context_len=30)) as server:
            first = (await complete(server, prompt="ab", return_state=True)).json()
            long = [{"role": "user", "content": "x" * 50}]
            reply = await server.chat(messages=long, state=first["state"]["id"])
        assert (reply.status, reply.error["param"]) == (400, "messages")


TUNED = {"initial_states": ["tom.pth", "ann.pth"]}


class TestInitialState:
    async def run(self, folder: Path, table: dict[str, object], **fields: object) -> str | None:
        """The tuned state that a completion began from."""
        async with running(folder, model_table(**table)) as server:
            reply = await complete(server, prompt="a", **fields)
            assert reply.status == 200, reply.body
            (asked,) = server.engine.requests
        assert asked.prompt_ids[0] == 0, "a document begins as usual"
        return asked.initial_state

    async def test_named_one_is_begun_with(self, tmp_path: Path):
        assert await self.run(tmp_path, TUNED, initial_state="ann") == "ann"

    async def test_configured_one_is_the_default(self, tmp_path: Path):
        assert await self.run(tmp_path, TUNED | {"initial_state": "tom"}) == "tom"

    async def test_none_is_the_default_of_the_default(self, tmp_path: Path):
        assert await self.run(tmp_path, TUNED) is None

    async def test_state_does_not_begin_anew(self, tmp_path: Path):
        table = model_table(**TUNED, initial_state="tom")
        async with running(tmp_path, table) as server:
            first = (await complete(server, prompt="ab", return_state=True)).json()
            await complete(server, prompt="cd", state=first["state"]["id"])
            assert [request.initial_state for request in server.engine.requests] == ["tom", None]

    async def test_unknown_one_is_400_with_the_closest(self, tmp_path: Path):
        async with running(tmp_path, model_table(**TUNED)) as server:
            reply = await complete(server, prompt="a", initial_state="tim")
        assert (reply.status, reply.error["param"]) == (400, "initial_state")
        assert 'did you mean "tom"?' in reply.error["message"]

    def test_not_together_with_a_state(self):
        assert refusal(COMPLETION | {"state": "s", "initial_state": "t"}).param == "initial_state"


class TestOwner:
    async def test_state_of_another_key_is_not_there(self, tmp_path: Path):
        key = {"authorization": "Bearer sk-1"}
        async with running(tmp_path, api_key="sk-1") as server:
            foreign = server.states.add("somebody else", (1, 2), StateOptions())
            body = COMPLETION | {"return_state": True}
            own = (await server.post("/v1/completions", body, **key)).json()["state"]
            (asked,) = server.engine.requests
            reply = await server.post(
                "/v1/completions", COMPLETION | {"state": foreign.state_id}, **key
            )
            found = await server.get(f"/v1/states/{own['id']}", **key)
            listed = (await server.get("/v1/states", **key)).json()
        assert (reply.status, reply.error["code"]) == (404, "state_not_found")
        assert found.json() == own
        assert [state["id"] for state in listed["data"]] == [own["id"]]
        assert asked.owner == owner_of(b"sk-1")

    def test_owner_follows_from_the_key_and_does_not_show_it(self):
        owner = owner_of(b"sk-1")
        assert len(owner) == 32
        assert int(owner, 16)
        assert "sk-1" not in owner
        assert owner != owner_of(b"sk-2")


async def test_hints_are_where_messages_begin(tmp_path: Path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "héllo"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "why"},
    ]
    async with running(tmp_path) as server:
        await server.chat(messages=messages)
        (asked,) = server.engine.requests
    rests = [spelled(asked.prompt_ids[hint:]) for hint in asked.snapshot_hints]
    assert [rest.partition("\n\n")[0] for rest in rests] == [
        "User: héllo",
        "Assistant: yes?",
        "User: why",
    ]


@pytest.mark.parametrize(
    ("table", "exceeds"),
    [
        ({"max_context_len": 20, "context_policy": "report"}, True),
        ({"max_context_len": 21, "context_policy": "report"}, False),
        ({"max_context_len": 0, "context_policy": "report"}, False),
        ({"max_context_len": 21, "context_policy": "reject"}, False),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_usage_says_that_the_context_was_too_long(
    tmp_path: Path, table: dict[str, object], exceeds: bool, is_stream: bool
):
    """9 tokens of the state, 6 of the prompt, 6 of the answer."""
    async with running(tmp_path, model_table(**table)) as server:
        first = (await complete(server, prompt="ab", return_state=True)).json()
        body = COMPLETION | {"prompt": "cdefgh", "state": first["state"]["id"]}
        if is_stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        reply = await server.post("/v1/completions", body)
    usage = reply.events()[-1]["usage"] if is_stream else reply.json()["usage"]
    assert usage.get("context_exceeded") is (True if exceeds else None)
    assert usage["total_tokens"] == 12
