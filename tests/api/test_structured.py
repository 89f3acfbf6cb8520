"""Structured output over HTTP: what may be asked, what the engine is told, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.answer_reader import answer_lead
from api.chat import Ending
from engine.grammar_text import choice, json_schema, lark, regex
from tests.api.harness import model_table, running

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OBJECT = {"type": "object"}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
LARK = 'start: "a" | "b"'


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, lambda lead: json_schema(OBJECT, lead)),
        ({"response_format": FORMAT}, lambda lead: json_schema(SCHEMA, lead)),
        ({"structured_outputs": {"json": SCHEMA}}, lambda lead: json_schema(SCHEMA, lead)),
        ({"structured_outputs": {"json_object": True}}, lambda lead: json_schema(OBJECT, lead)),
        ({"structured_outputs": {"regex": "a+/"}}, lambda lead: regex("a+/", lead)),
        ({"structured_outputs": {"choice": ["a", "b"]}}, lambda lead: choice(["a", "b"], lead)),
        ({"structured_outputs": {"grammar": LARK}}, lambda lead: lark(LARK, lead)),
        ({"guided_json": SCHEMA}, lambda lead: json_schema(SCHEMA, lead)),
        ({"guided_json": '{"type": "object"}'}, lambda lead: json_schema(OBJECT, lead)),
        ({"guided_regex": "a+"}, lambda lead: regex("a+", lead)),
        ({"guided_choice": ["a"]}, lambda lead: choice(["a"], lead)),
        ({"guided_grammar": LARK}, lambda lead: lark(LARK, lead)),
        ({"response_format": {"type": "text"}}, lambda _: None),
        ({"response_format": None}, lambda _: None),
    ],
)
async def test_engine_is_given_the_grammar(tmp_path: Path, fields: dict, expected):
    async with running(tmp_path) as server:
        chat = await server.chat(**fields)
        completion = {"model": "m", "prompt": "x", "max_tokens": 2, **fields}
        plain = await server.post("/v1/completions", completion)
        sent = [request.sampling for request in server.engine.requests]
    assert (chat.status, plain.status) == (200, 200), (chat, plain)
    assert [sampling.grammar for sampling in sent] == [expected(" "), expected("")]
    assert sent[0].stop == (("\n\nUser:", "\nUser:") if expected("") is None else ())


@pytest.mark.parametrize(
    ("effort", "ending"),
    [
        ("none", Ending.LABEL),
        ("minimal", Ending.CLOSED_TAG),
        ("high", Ending.THOUGHT_TAG),
    ],
)
async def test_thought_comes_before_what_is_structured(tmp_path: Path, effort: str, ending: Ending):
    async with running(tmp_path) as server:
        await server.chat(guided_choice=["a"], reasoning_effort=effort)
        assert server.engine.requests[0].sampling.grammar == choice(["a"], answer_lead(ending, " "))


async def test_own_stop_strings_still_count(tmp_path: Path):
    async with running(tmp_path) as server:
        await server.chat(guided_regex=".*", stop=["x"])
        assert server.engine.requests[0].sampling.stop == ("x",)


async def test_every_copy_of_an_answer_has_the_grammar(tmp_path: Path):
    async with running(tmp_path) as server:
        await server.chat(guided_regex=".*", n=3)
        grammars = [request.sampling.grammar for request in server.engine.requests]
    assert grammars == [regex(".*", " ")] * 3


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "known are"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "missing"),
        ({"response_format": "json"}, "response_format", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            '["not"]',
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            "response_format",
            "",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "empty"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "empty"),
        (
            {"structured_outputs": {"choice": ["a"], "regex": "a"}},
            "structured_outputs.choice",
            "send one",
        ),
        ({"guided_regex": "a", "response_format": FORMAT}, "guided_regex", "send one"),
        ({"guided_json": "{"}, "guided_json", "no JSON schema"),
        ({"guided_json": "[1]"}, "guided_json", "no JSON schema"),
        ({"guided_grammar": 'root ::= "a"'}, "guided_grammar", "Lark"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar", "nowhere"),
        ({"guided_choice": ["x" * 300_000]}, "guided_choice", "262144"),
    ],
)
async def test_what_cannot_be_followed_is_400_with_field_and_reason(
    tmp_path: Path, fields: dict, param: str, reason: str
):
    async with running(tmp_path) as server:
        replies = [
            await server.chat(**fields),
            await server.post("/v1/completions", {"model": "m", "prompt": "x", **fields}),
        ]
        assert server.engine.requests == []
    for reply in replies:
        assert (reply.status, reply.error["code"]) == (400, "invalid_value"), reply
        assert reply.error["param"] == param
        assert reason in reply.error["message"]


async def test_schema_nested_beyond_reason_is_400(tmp_path: Path):
    schema: dict = {}
    for _ in range(190):
        schema = {"items": schema}
    async with running(tmp_path) as server:
        reply = await server.chat(guided_json=schema)
    assert (reply.status, reply.error["param"]) == (400, "guided_json")


async def test_always_thinking_template_has_the_thought_first(tmp_path: Path):
    async with running(tmp_path, model_table(template="rwkv-rs")) as server:
        await server.chat(guided_choice=["a"])
        sent = server.engine.requests[0].sampling.grammar
    assert sent == choice(["a"], answer_lead(Ending.THOUGHT, " "))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
        ("/v1/responses", {"input": "hi", "store": False}),
    ],
)
async def test_other_protocols_follow_grammars_too(tmp_path: Path, path: str, fields: dict):
    async with running(tmp_path) as server:
        reply = await server.post(path, {"model": "m", "guided_regex": "a+", **fields})
        (sent,) = server.engine.requests
        refused = await server.post(path, {"model": "m", "guided_regex": "(", **fields})
    assert reply.status == 200, reply
    assert sent.sampling.grammar == regex("a+", " ")
    assert sent.sampling.stop == ()
    assert refused.status == 400
    assert "unclosed" in refused.body.decode()
