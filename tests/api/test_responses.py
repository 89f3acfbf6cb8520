"""/v1/responses: one response, from its fields to its last event, judged by OpenAI's own types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter

from api.errors import ApiError
from api.response_body import parse_response
from api.response_encode import ResponseEncoder
from tests.api.harness import Reply, Running, eventually, model_table, running
from tests.api.scripted import recited, spelled

EVENT = TypeAdapter(ResponseStreamEvent)
ITEM = TypeAdapter(ResponseItem)
NUM_HI_TOKENS = len("User: hi\n\nAssistant:") + 1
PATH = "/v1/responses"


def body_of(**fields: object) -> dict[str, object]:
    return {"model": "m", "input": "hi", "max_output_tokens": 6, **fields}


async def ask(server: Running, **fields: object) -> Reply:
    return await server.post(PATH, body_of(**fields))


def well(reply: Reply) -> Response:
    """The response in an answer, which must be just as OpenAI's client knows it."""
    assert reply.status == 200, reply
    return Response.model_validate_json(reply.body, strict=True)


def events_of(reply: Reply) -> list[dict]:
    """Named events, each of a type that OpenAI's client knows, numbered from 0."""
    assert reply.headers["content-type"] == "text/event-stream"
    *pieces, rest = reply.body.decode().split("\n\n")
    assert rest == ""
    found = []
    for number, piece in enumerate(pieces):
        name, data = piece.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENT.validate_python(event, strict=True)
        found.append(event)
    return found


def refusal(**fields: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_response(json.dumps(body_of(**fields)).encode()).items()
    assert caught.value.status == 400
    return caught.value


class TestWhole:
    async def test_has_the_answer_and_echoes_what_was_asked(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = await ask(
                server,
                instructions="Be brief.",
                temperature=0.5,
                top_p=0.9,
                metadata={"order": "1"},
            )
            asked = server.engine.requests[0]
        response = well(reply)
        text = "System: Be brief.\n\nUser: hi\n\nAssistant:"
        assert spelled(asked.prompt_ids) == text
        assert asked.sampling.max_tokens == 6
        assert (asked.sampling.temperature, asked.sampling.top_p) == (0.5, 0.9)
        assert response.output_text == recited(len(text) + 1, 6).lstrip()
        assert response.id.startswith("resp_")
        assert response.metadata == {"order": "1"}
        assert response.instructions == "Be brief."
        assert (response.temperature, response.top_p, response.max_output_tokens) == (0.5, 0.9, 6)
        assert response.previous_response_id is None

    async def test_usage_counts_input_and_output(self, tmp_path: Path):
        async with running(tmp_path) as server:
            usage = well(await ask(server)).usage
        assert usage is not None
        assert (usage.input_tokens, usage.output_tokens) == (NUM_HI_TOKENS, 6)
        assert usage.total_tokens == NUM_HI_TOKENS + 6
        assert usage.input_tokens_details.cached_tokens == 0

    async def test_is_incomplete_where_the_length_ended_it(self, tmp_path: Path):
        async with running(tmp_path) as server:
            cut = well(await ask(server))
            # The seventh and eighth character of what is recited.
            stop = recited(NUM_HI_TOKENS, 8)[-2:]
            complete = well(await ask(server, max_output_tokens=30, stop=stop))
        assert cut.status == "incomplete"
        assert cut.incomplete_details is not None
        assert cut.incomplete_details.reason == "max_output_tokens"
        assert cut.output[0].status == "incomplete"
        assert complete.status == "completed"
        assert complete.incomplete_details is None
        assert complete.completed_at is not None

    @pytest.mark.parametrize(
        "given",
        [
            [{"role": "user", "content": "hi"}],
            [{"type": "message", "role": "USER", "content": "hi"}],
            [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        ],
    )
    async def test_input_may_be_items(self, tmp_path: Path, given: list[dict]):
        async with running(tmp_path) as server:
            well(await ask(server, input=given))
            assert spelled(server.engine.requests[0].prompt_ids) == "User: hi\n\nAssistant:"

    async def test_input_may_be_a_whole_conversation(self, tmp_path: Path):
        said = [{"type": "output_text", "text": "Hello.", "annotations": []}]
        given = [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": t} for t in ("hi", "you")]},
            {"type": "message", "id": "msg_1", "role": "assistant", "content": said},
            {"role": "user", "content": "and?"},
        ]
        async with running(tmp_path) as server:
            well(await ask(server, input=given))
            text = spelled(server.engine.requests[0].prompt_ids)
        assert text == (
            "System: Be kind.\n\nUser: hi\nyou\n\nAssistant: Hello.\n\nUser: and?\n\nAssistant:"
        )

    async def test_failure_of_the_engine_is_an_error_and_not_stored(self, tmp_path: Path):
        async with running(tmp_path) as server:
            server.runner.fail_next = "out of luck"
            reply = await ask(server)
        assert (reply.status, reply.error["code"]) == (500, "engine_error")

    async def test_fields_of_the_chat_route_work_too(self, tmp_path: Path):
        async with running(tmp_path) as server:
            well(await ask(server, seed=7, top_k=3, presence_penalty=0.5, priority=2))
            asked = server.engine.requests[0]
        assert (asked.sampling.seed, asked.sampling.top_k) == (7, 3)
        assert (asked.sampling.presence_penalty, asked.priority) == (0.5, 2)


class TestStream:
    async def test_events_come_in_order_and_make_the_whole(self, tmp_path: Path):
        async with running(tmp_path) as server:
            events = events_of(await ask(server, stream=True, max_output_tokens=30))
            stored = await server.get(f"{PATH}/{events[0]['response']['id']}")
            whole = well(await ask(server, max_output_tokens=30))
        names = [event["type"].removeprefix("response.") for event in events]
        deltas = [event["delta"] for event in events if "delta" in event]
        assert names == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            *("output_text.delta" for _ in deltas),
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "incomplete",
        ]
        assert "".join(deltas) == whole.output_text
        assert events[-4]["text"] == events[-3]["part"]["text"] == whole.output_text
        item_ids = {event["item_id"] for event in events if "item_id" in event}
        assert item_ids == {events[2]["item"]["id"], events[-2]["item"]["id"]}
        assert events[0]["response"]["status"] == "in_progress"
        assert stored.json() == events[-1]["response"]

    async def test_silence_is_filled_with_comments(self, tmp_path: Path):
        async with running(tmp_path, sse_keep_alive_ms=20, delay_s=0.05) as server:
            reply = await ask(server, stream=True, max_output_tokens=3)
        assert b": keep-alive\n\n" in reply.body

    async def test_failure_is_told_by_events_and_stored(self, tmp_path: Path):
        async with running(tmp_path) as server:
            server.runner.fail_next = "out of luck"
            *_, error, last = events_of(await ask(server, stream=True))
            stored = well(await server.get(f"{PATH}/{last['response']['id']}"))
        assert (error["type"], error["code"], error["message"]) == (
            "error",
            "engine_error",
            "out of luck",
        )
        assert last["type"] == "response.failed"
        assert stored.status == "failed"
        assert stored.error is not None
        assert (stored.error.code, stored.error.message) == ("server_error", "out of luck")

    async def test_client_that_leaves_ends_it_and_leaves_nothing(self, tmp_path: Path):
        async with running(tmp_path, delay_s=0.02) as server:
            _, writer = await server.open()
            data = json.dumps(body_of(stream=True, max_output_tokens=1000)).encode()
            head = f"POST {PATH} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            await eventually(lambda: server.snapshot().num_running == 1)
            writer.close()
            await eventually(lambda: server.snapshot().num_running == 0)
            assert server.states.kept == {}

    @pytest.mark.parametrize("is_stream", [False, True])
    async def test_answer_that_cannot_be_given_out_leaves_no_state(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stream: bool
    ):
        """The engine has ended it and kept its state by then."""
        name = "last" if is_stream else "whole"
        monkeypatch.setattr(ResponseEncoder, name, lambda *_: 1 // 0)
        async with running(tmp_path) as server:
            reply = await ask(server, stream=is_stream)
            assert server.engine.requests[0].keep_state is not None
            await eventually(lambda: server.states.kept == {})
        assert "internal error" in reply.body.decode()


class TestStored:
    async def test_retrieve_gives_the_same_object(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = await ask(server)
            again = await server.get(f"{PATH}/{well(reply).id}")
        assert again.body == reply.body

    async def test_store_false_keeps_neither_response_nor_state(self, tmp_path: Path):
        async with running(tmp_path) as server:
            response = well(await ask(server, store=False))
            missing = await server.get(f"{PATH}/{response.id}")
            assert server.states.kept == {}
            assert server.engine.requests[0].keep_state is None
        assert (missing.status, missing.error["code"]) == (404, "response_not_found")

    async def test_delete_takes_response_and_state(self, tmp_path: Path):
        async with running(tmp_path) as server:
            response = well(await ask(server))
            (kept,) = server.states.kept.values()
            assert kept.info.label == f"response {response.id}"
            reply = await server.request("DELETE", f"{PATH}/{response.id}")
            assert server.states.kept == {}
            again = await server.request("DELETE", f"{PATH}/{response.id}")
        assert reply.json() == {"id": response.id, "object": "response", "deleted": True}
        assert again.status == 404

    async def test_input_items_are_listed_newest_first_in_pages(self, tmp_path: Path):
        given = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
        async with running(tmp_path) as server:
            path = f"{PATH}/{well(await ask(server, input=given)).id}/input_items"
            newest = (await server.get(path)).json()
            oldest = (await server.get(f"{path}?order=asc&limit=2")).json()
            rest = (await server.get(f"{path}?order=asc&after={oldest['last_id']}")).json()
            wrong = [
                await server.get(f"{path}?{query}") for query in ("order=up", "after=x", "b=1")
            ]
        for item in newest["data"]:
            ITEM.validate_python(item, strict=True)
        assert newest["data"] == [*oldest["data"], *rest["data"]][::-1]
        assert [item["role"] for item in oldest["data"]] == ["user", "assistant"]
        assert (oldest["has_more"], rest["has_more"]) == (True, False)
        assert newest["first_id"] == newest["data"][0]["id"]
        assert [reply.error["param"] for reply in wrong] == ["order", "after", "b"]

    @pytest.mark.parametrize("path", ["", "/input_items"])
    async def test_of_another_owner_is_not_found(self, tmp_path: Path, path: str):
        async with running(tmp_path, api_key="one") as server:
            mine = {"authorization": "Bearer one"}
            response = well(await server.request("POST", PATH, body_of(), mine))
            target = f"{PATH}/{response.id}{path}"
            assert (await server.request("GET", target, headers=mine)).status == 200
            text = server.config_file.read_text().replace('"one"', '"two"')
            server.config_file.write_text(text)
            await eventually(lambda: server.service.config.api_key == "two")
            other = {"authorization": "Bearer two"}
            assert (await server.request("GET", target, headers=other)).status == 404
            follow = body_of(previous_response_id=response.id)
            refused = await server.request("POST", PATH, follow, other)
        assert (refused.status, refused.error["code"]) == (400, "previous_response_not_found")

    async def test_only_background_ones_can_be_cancelled(self, tmp_path: Path):
        async with running(tmp_path) as server:
            response = well(await ask(server))
            reply = await server.post(f"{PATH}/{response.id}/cancel", {})
        assert reply.status == 400
        assert "'background'" in reply.error["message"]

    async def test_streaming_a_stored_one_is_refused(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = await server.get(f"{PATH}/x?stream=true")
            known = await server.get(f"{PATH}/x?stream=false&include_obfuscation=false")
        assert (reply.status, reply.error["param"]) == (400, "stream")
        assert known.status == 404


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"input": None}, "input"),
            ({"input": []}, "input"),
            ({"input": 3}, "input"),
            ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
            ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
            ({"input": [{"role": "user"}]}, "input[0].content"),
            ({"input": [{"type": "item_reference", "id": "1"}]}, "input[0].type"),
            (
                {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
                "input[0].content[0]",
            ),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"max_output_tokens": 1.5}, "max_output_tokens"),
            ({"truncation": "auto"}, "truncation"),
            ({"text": {"verbosity": "low"}}, "text.verbosity"),
            ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
            ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
            ({"reasoning_effort": "high"}, "reasoning_effort"),
            ({"include": ["message.output_text.logprobs"]}, "include"),
            ({"conversation": "conv_1"}, "conversation"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"max_tokens": 5}, "max_tokens"),
            ({"n": 2}, "n"),
            ({"state": "s"}, "state"),
            ({"background": True, "store": False}, "background"),
            ({"background": True, "stream": True}, "stream"),
            ({"metadata": {"a": 1}}, "metadata[...]"),
            ({"metadata": {"k" * 65: "v"}}, "metadata"),
            ({"metadata": {"k": "v" * 513}}, "metadata"),
            ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
            ({"previous_response_id": "r", "initial_state": "t"}, "initial_state"),
            ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ],
    )
    def test_by_name(self, fields: dict[str, object], param: str):
        assert refusal(**fields).param == param

    @pytest.mark.parametrize(
        "fields",
        [
            {"truncation": "disabled", "tools": [], "tool_choice": "auto", "include": []},
            {"text": {"format": {"type": "text"}}, "reasoning": {"effort": None}},
            {
                "user": "u",
                "safety_identifier": "s",
                "prompt_cache_key": "k",
                "service_tier": "auto",
            },
            {"parallel_tool_calls": False, "max_tool_calls": 3, "something_new": 1},
            {"stream": True, "stream_options": {"include_obfuscation": False}},
        ],
    )
    def test_what_asks_for_nothing_passes(self, fields: dict[str, object]):
        assert parse_response(json.dumps(body_of(**fields)).encode()).max_tokens == 6

    async def test_too_long_input_is_named(self, tmp_path: Path):
        async with running(tmp_path, model_table(max_context_len=10)) as server:
            reply = await ask(server, input="a long question indeed")
        assert (reply.status, reply.error["code"], reply.error["param"]) == (
            400,
            "context_length_exceeded",
            "input",
        )

    async def test_sampling_is_judged_as_in_a_chat(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = await ask(server, temperature=-1)
        assert (reply.status, reply.error["param"]) == (400, "temperature")

    async def test_unknown_model_and_draining(self, tmp_path: Path):
        async with running(tmp_path) as server:
            unknown = await ask(server, model="gpt")
            server.service.is_draining = True
            draining = await ask(server)
        assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
        assert (draining.status, draining.error["code"]) == (503, "draining")
