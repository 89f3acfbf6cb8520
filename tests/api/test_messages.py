"""/v1/messages, judged by the types of Anthropic's own client."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import TypeAdapter

from api.chat import FORMS
from api.errors import ApiError
from api.message_body import parse_messages
from tests.api.harness import Reply, Running, model_table, running
from tests.api.scripted import recited, spelled

EVENT = TypeAdapter(RawMessageStreamEvent)
FIRST = "User: hi\n\nAssistant:"
NUM_HI_TOKENS = len(FIRST) + 1
PATH = "/v1/messages"
USER = {"role": "user", "content": "hi"}


def body_of(**fields: object) -> dict[str, object]:
    return {"model": "m", "max_tokens": 6, "messages": [USER], **fields}


async def ask(server: Running, **fields: object) -> Reply:
    return await server.post(PATH, body_of(**fields))


def well(reply: Reply) -> Message:
    assert reply.status == 200, reply
    return Message.model_validate_json(reply.body, strict=True)


def text_of(message: Message) -> str:
    (block,) = message.content
    assert block.type == "text"
    return block.text


def error_of(reply: Reply) -> tuple[int, str, str]:
    """Status, type and message of an error in Anthropic's shape."""
    response = ErrorResponse.model_validate_json(reply.body)
    assert response.request_id == reply.headers["request-id"]
    return reply.status, reply.json()["error"]["type"], response.error.message


def events_of(reply: Reply) -> list[dict]:
    assert reply.headers["content-type"] == "text/event-stream"
    *pieces, rest = reply.body.decode().split("\n\n")
    assert rest == ""
    found = []
    for piece in pieces:
        name, data = piece.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] not in ("ping", "error"):
            EVENT.validate_python(event, strict=True)
        found.append(event)
    return found


async def prompt_of(server: Running, **fields: object) -> str:
    well(await ask(server, **fields))
    return spelled(server.engine.requests[-1].prompt_ids)


class TestWhole:
    async def test_has_the_answer_and_its_usage(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = await ask(server)
            again = well(await ask(server))
        message = well(reply)
        assert text_of(message) == recited(NUM_HI_TOKENS, 6).lstrip() == text_of(again)
        assert (message.model, message.role, message.type) == ("m", "assistant", "message")
        assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
        assert (message.usage.input_tokens, message.usage.output_tokens) == (NUM_HI_TOKENS, 6)
        assert reply.headers["request-id"] == reply.headers["x-request-id"]

    async def test_system_and_blocks_become_the_prompt(self, tmp_path: Path):
        blocks = [{"type": "text", "text": t, "cache_control": {"type": "ephemeral"}} for t in "ab"]
        async with running(tmp_path) as server:
            text = await prompt_of(server, system="Be kind.")
            assert text == f"System: Be kind.\n\n{FIRST}"
            text = await prompt_of(server, system=blocks, messages=[USER | {"content": blocks}])
            assert text == "System: a\nb\n\nUser: a\nb\n\nAssistant:"

    async def test_turns_of_one_role_are_one(self, tmp_path: Path):
        said = {"role": "assistant", "content": "Hello."}
        async with running(tmp_path) as server:
            text = await prompt_of(server, messages=[USER, USER, said, USER])
        assert text == "User: hi\nhi\n\nAssistant: Hello.\n\nUser: hi\n\nAssistant:"

    async def test_a_last_message_of_the_assistant_is_gone_on_with(self, tmp_path: Path):
        begun = {"role": "assistant", "content": "The answer is ("}
        async with running(tmp_path) as server:
            answer = text_of(well(await ask(server, messages=[USER, begun], max_tokens=30)))
            text = spelled(server.engine.requests[0].prompt_ids)
        assert text == f"{FIRST} The answer is ("
        assert answer == recited(len(text) + 1, 30)  # white space at its beginning counts

    async def test_sampling_arrives(self, tmp_path: Path):
        async with running(tmp_path) as server:
            well(await ask(server, temperature=0.25, top_p=0.5, top_k=7, seed=3))
            sampling = server.engine.requests[0].sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.25, 0.5, 7)
        assert (sampling.seed, sampling.max_tokens) == (3, 6)

    async def test_stop_sequences_end_it_besides_the_next_turn(self, tmp_path: Path):
        stop = recited(NUM_HI_TOKENS, 9)[-3:]
        async with running(tmp_path) as server:
            stopped = well(await ask(server, stop_sequences=["no such", stop], max_tokens=50))
            sampling = server.engine.requests[0].sampling
        assert sampling.stop == ("no such", stop, "\n\nUser:", "\nUser:")
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
        assert text_of(stopped) == recited(NUM_HI_TOKENS, 6).lstrip()

    async def test_end_of_the_turn_is_told_from_a_stop_sequence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        end = recited(NUM_HI_TOKENS, 9)[-3:]
        monkeypatch.setitem(FORMS, "g1", replace(FORMS["g1"], stops=(end,)))
        async with running(tmp_path) as server:
            message = well(await ask(server, max_tokens=50))
        assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)


class TestStream:
    async def test_events_come_in_order_and_make_the_whole(self, tmp_path: Path):
        async with running(tmp_path) as server:
            events = events_of(await ask(server, stream=True, max_tokens=30))
            whole = well(await ask(server, max_tokens=30))
        deltas = [
            event["delta"]["text"] for event in events if event["type"] == "content_block_delta"
        ]
        assert [event["type"] for event in events] == [
            "message_start",
            "ping",
            "content_block_start",
            *("content_block_delta" for _ in deltas),
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert "".join(deltas) == text_of(whole)
        start = events[0]["message"]
        assert (start["content"], start["stop_reason"]) == ([], None)
        assert start["usage"]["input_tokens"] == NUM_HI_TOKENS
        assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
        assert events[-2]["usage"] == whole.usage.model_dump(exclude_unset=True)

    async def test_silence_is_filled_with_pings(self, tmp_path: Path):
        async with running(tmp_path, sse_keep_alive_ms=20, delay_s=0.05) as server:
            events = events_of(await ask(server, stream=True, max_tokens=3))
        assert sum(event["type"] == "ping" for event in events) > 2

    async def test_failure_is_told_by_an_event(self, tmp_path: Path):
        async with running(tmp_path) as server:
            server.runner.fail_next = "out of luck"
            last = events_of(await ask(server, stream=True))[-1]
        assert last["type"] == "error"
        assert last["error"] == {"type": "api_error", "message": "out of luck"}


class TestCount:
    async def test_counts_what_the_prompt_would_have(self, tmp_path: Path):
        body = {"model": "m", "messages": [USER], "system": "Be kind."}
        async with running(tmp_path) as server:
            reply = await server.post(f"{PATH}/count_tokens", body)
            message = well(await ask(server, system="Be kind."))
            assert len(server.engine.requests) == 1
        count = MessageTokensCount.model_validate_json(reply.body, strict=True)
        assert count.input_tokens == message.usage.input_tokens

    async def test_refuses_as_the_other_does(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = await server.post(f"{PATH}/count_tokens", {"model": "m", "messages": []})
            unknown = await server.post(f"{PATH}/count_tokens", {"model": "x", "messages": [USER]})
        assert error_of(reply)[:2] == (400, "invalid_request_error")
        assert error_of(unknown)[:2] == (404, "not_found_error")


class TestKey:
    @pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
    async def test_x_api_key_is_the_key_everywhere(self, tmp_path: Path, path: str):
        async with running(tmp_path, api_key="sk-1") as server:
            right = await server.post(path, body_of(), x_api_key="sk-1")
            wrong = await server.post(path, body_of(), x_api_key="sk-2")
            none = await server.post(path, body_of())
        assert [reply.status for reply in (right, wrong, none)] == [200, 401, 401]

    async def test_both_headers_are_the_same_owner(self, tmp_path: Path):
        async with running(tmp_path, api_key="sk-1") as server:
            await server.post("/v1/states", {"prompt": "a"}, x_api_key="sk-1")
            listed = await server.get("/v1/states", authorization="Bearer sk-1")
        assert len(listed.json()["data"]) == 1

    async def test_authorization_goes_before_it(self, tmp_path: Path):
        async with running(tmp_path, api_key="sk-1") as server:
            headers = {"authorization": "Bearer wrong", "x_api_key": "sk-1"}
            reply = await server.post(PATH, body_of(), **headers)
        assert error_of(reply)[:2] == (401, "authentication_error")


class TestErrors:
    async def test_are_in_the_words_of_the_protocol_whatever_went_wrong(self, tmp_path: Path):
        async with running(tmp_path, model_table(max_waiting=1), request_body_limit_bytes=500) as s:
            found = [
                error_of(await ask(s, model="gpt")),
                error_of(await ask(s, max_tokens=None)),
                error_of(await s.post(PATH, b"{")),
                error_of(await ask(s, system="x" * 1000)),
                error_of(await s.post(PATH, body_of(), content_type="text/plain")),
                error_of(await s.get(PATH)),
                error_of(await s.post(f"{PATH}/batches", {})),
            ]
            s.runner.fail_next = "out of luck"
            found.append(error_of(await ask(s)))
            s.service.is_draining = True
            found.append(error_of(await ask(s)))
        assert [(status, kind) for status, kind, _ in found] == [
            (404, "not_found_error"),
            (400, "invalid_request_error"),
            (400, "invalid_request_error"),
            (413, "invalid_request_error"),
            (415, "invalid_request_error"),
            (405, "invalid_request_error"),
            (404, "not_found_error"),
            (500, "api_error"),
            (503, "overloaded_error"),
        ]
        assert "'max_tokens'" in found[1][2]

    async def test_clients_are_told_to_do_without_a_thread(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = await ask(server, thread={"type": "create"})
        assert error_of(reply)[:2] == (400, "invalid_request_error")
        assert reply.error["details"]["error_code"] == "thread_unsupported_request"

    async def test_other_routes_keep_theirs(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = await server.post("/v1/messagesx", {})
        assert reply.error["code"] == "unknown_url"
        assert "request-id" not in reply.headers

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": None}, "messages"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
            ({"messages": [{"role": "user"}]}, "messages[0]"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
                "messages[0].content[0]",
            ),
            ({"system": [{"type": "image"}]}, "system[0]"),
            ({"max_tokens": None}, "max_tokens"),
            ({"output_config": {"task_budget": {"total": 9}}}, "output_config.task_budget"),
            ({"thread": {"type": "create"}}, "thread"),
            ({"compaction": {"type": "summarize"}}, "compaction"),
            ({"reasoning_effort": "high"}, "reasoning_effort"),
            ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
            ({"parallel_tool_calls": False}, "parallel_tool_calls"),
            ({"stop_sequences": [""]}, "stop_sequences"),
            ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
            ({"stop": "x"}, "stop"),
            ({"n": 2}, "n"),
            ({"state": "s"}, "state"),
        ],
    )
    def test_refused_by_name(self, fields: dict[str, object], param: str):
        with pytest.raises(ApiError) as caught:
            parse_messages(json.dumps(body_of(**fields)).encode()).chat_messages()
        assert (caught.value.status, caught.value.param) == (400, param)

    @pytest.mark.parametrize(
        "fields",
        [
            {"metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": None},
            {"tools": [], "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}},
        ],
    )
    def test_what_asks_for_nothing_passes(self, fields: dict[str, object]):
        assert parse_messages(json.dumps(body_of(**fields)).encode()).max_tokens == 6
