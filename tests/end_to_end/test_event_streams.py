"""Streams of all four protocols, read byte by byte by the rules of the standard.

The server falls silent after a millisecond, so keep-alives come between all events.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from tests.api.harness import Reply
from tests.end_to_end.site import MODEL, Server
from tests.event_stream import Event, EventStream, events_of, read_all

TALK = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], "seed": 5}
TOOL = {
    "name": "look",
    "parameters": {"type": "object", "properties": {"at": {"enum": ["here", "there"]}}},
}
OPENAI: Mapping[str, tuple[str, dict[str, object]]] = {
    "completion": ("/v1/completions", {"prompt": "Once", "max_tokens": 40, "temperature": 0}),
    "completions": (
        "/v1/completions",
        {"prompt": ["One", "Two"], "n": 2, "max_tokens": 8, "logprobs": 2, "echo": True},
    ),
    "nothing": ("/v1/completions", {"prompt": "Once", "max_tokens": 0}),
    "any bytes": ("/v1/completions", {"prompt": "x", "max_tokens": 200, "temperature": 100}),
    "chat": ("/v1/chat/completions", TALK | {"stream_options": {"include_usage": True}}),
    "thought": ("/v1/chat/completions", TALK | {"reasoning_effort": "high", "max_tokens": 30}),
    "call": (
        "/v1/chat/completions",
        TALK | {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"},
    ),
    "json": (
        "/v1/chat/completions",
        TALK | {"response_format": {"type": "json_object"}, "max_tokens": 60},
    ),
}


def streamed(server: Server, path: str, fields: Mapping[str, object]) -> Reply:
    reply = server.ask("POST", path, {"model": MODEL, "seed": 1, **fields, "stream": True})
    assert reply.status == 200, reply
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-cache"
    assert "content-length" not in reply.headers
    return reply


def objects(events: list[Event]) -> list[dict]:
    found = [json.loads(event.data) for event in events]
    assert all(isinstance(item, dict) for item in found)
    return found


def named(events: list[Event]) -> list[dict]:
    """Each has the name that its object has."""
    found = objects(events)
    assert [event.name for event in events] == [item["type"] for item in found]
    return found


@pytest.mark.parametrize("kind", OPENAI)
def test_events_without_names_end_in_done(quiet_server: Server, kind: str) -> None:
    reply = streamed(quiet_server, *OPENAI[kind])
    *events, last = events_of(reply.body)
    assert last == Event("message", "[DONE]")
    assert {event.name for event in events} == {"message"}
    chunks = objects(events)
    assert len({chunk["id"] for chunk in chunks}) == 1
    kinds = {"text_completion", "chat.completion.chunk"}
    assert {chunk["object"] for chunk in chunks} < kinds
    ended = [
        choice["index"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"] is not None
    ]
    seen = {choice["index"] for chunk in chunks for choice in chunk["choices"]}
    assert sorted(ended) == sorted(seen), "each answer ends once"


def test_silence_is_filled_with_comments_that_disturb_nothing(quiet_server: Server) -> None:
    path, fields = OPENAI["completion"]
    events, comments = read_all([streamed(quiet_server, path, fields).body])
    assert set(comments) == {"keep-alive"}
    whole = quiet_server.post(path, {"model": MODEL, "seed": 1, **fields})
    text = "".join(chunk["choices"][0]["text"] for chunk in objects(events[:-1]))
    assert text == whole["choices"][0]["text"]


def test_responses_have_names_and_numbers(quiet_server: Server) -> None:
    ask = {"input": "Tell me a story.", "max_output_tokens": 30, "store": False}
    found = named(events_of(streamed(quiet_server, "/v1/responses", ask).body))
    assert [item["sequence_number"] for item in found] == list(range(len(found)))
    assert found[0]["type"] == "response.created"
    assert found[-1]["type"] in ("response.completed", "response.incomplete")


def test_messages_have_names_and_pings(quiet_server: Server) -> None:
    ask = {"messages": TALK["messages"], "max_tokens": 30}
    found = named(events_of(streamed(quiet_server, "/v1/messages", ask).body))
    kinds = [item["type"] for item in found]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("ping") > 1
    assert kinds.count("message_stop") == 1


def test_nothing_is_held_back_that_completes_an_event(quiet_server: Server) -> None:
    """Each event is whole when its last byte has come, not when the next one begins."""
    stream = EventStream()
    events = []
    with quiet_server.process.connect() as sock:
        body = json.dumps({"model": MODEL, "prompt": "Once", "max_tokens": 20, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\nConnection: close\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in quiet_server.headers.items())
        sock.sendall(f"{head}\r\n{body}".encode())
        reader = sock.makefile("rb")
        while reader.readline().strip():
            pass
        while size := int(reader.readline(), 16):
            found = stream.feed(reader.read(size))
            stream.close()  # a chunk holds whole events only
            events += found
            assert reader.readline() == b"\r\n"
    assert events[-1].data == "[DONE]"


TEXT_PARTS = [{"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]}]
COUNTED = {"stream_options": {"include_usage": True}, "ignore_eos": True}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("completions", {"prompt": "Once", "max_tokens": 20, "repetition_penalty": 1.0, **COUNTED,
                         "temperature": 0.0, "logprobs": None}),
        ("completions", {"prompt": [35, 7, 9], "max_tokens": 20, "best_of": 1, **COUNTED}),
        ("chat/completions", {"messages": TEXT_PARTS, "max_completion_tokens": 60, **COUNTED,
                              "temperature": 0.0}),
    ],
)  # fmt: skip
def test_load_tools_get_as_many_tokens_as_they_ask_for(
    quiet_server: Server, path: str, fields: dict[str, object]
) -> None:
    """The fields of `vllm bench serve` and of SGLang's bench_serving."""
    *_, last, done = events_of(streamed(quiet_server, f"/v1/{path}", fields).body)
    assert done.data == "[DONE]"
    (told,) = objects([last])
    assert told["choices"] == []
    asked = fields.get("max_tokens", fields.get("max_completion_tokens"))
    assert told["usage"]["completion_tokens"] == asked
