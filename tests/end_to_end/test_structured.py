"""Structured output, tools and thoughts as users of the openai package see them.

The embedded model knows nothing of either: what is right here is what the grammar makes right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.end_to_end.process import ServerProcess

MESSAGES = [{"role": "user", "content": "Tell me of a dog."}]
ASK = {"model": "m", "messages": MESSAGES, "max_tokens": 600, "temperature": 1}


class Kind(Enum):
    CAT = "cat"
    DOG = "dog"


class Pet(BaseModel):
    kind: Kind
    name: str = Field(max_length=10)
    friends: list[Kind] = Field(max_length=2)


class GetWeather(BaseModel):
    """What the weather is like."""

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=9)


WEATHER = openai.pydantic_function_tool(GetWeather, name="get_weather")


@contextmanager
def client_of(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_parse_gives_objects_of_the_class(server: ServerProcess):
    with client_of(server) as client:
        for seed in range(5):
            answer = client.chat.completions.parse(**ASK, seed=seed, response_format=Pet)
            assert isinstance(answer.choices[0].message.parsed, Pet)
            assert answer.choices[0].finish_reason == "stop"


def test_streamed_json_is_the_whole_one_and_parses(server: ServerProcess):
    with client_of(server) as client:
        whole = client.chat.completions.parse(**ASK, seed=3, response_format=Pet)
        with client.chat.completions.stream(**ASK, seed=3, response_format=Pet) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed


def test_each_of_n_answers_has_the_form(server: ServerProcess):
    with client_of(server) as client:
        answer = client.chat.completions.parse(**ASK, seed=3, n=3, response_format=Pet)
    pets = [choice.message.parsed for choice in answer.choices]
    assert all(isinstance(pet, Pet) for pet in pets)
    assert len({choice.message.content for choice in answer.choices}) == 3


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_choice": ["yes", "no"]}, "^(yes|no)$"),
        ({"guided_regex": "[0-9]{3}-[a-z]+!"}, "^[0-9]{3}-[a-z]+!$"),
        ({"structured_outputs": {"grammar": 'start: "(" start ")" | "x"'}}, r"^\(*x\)*$"),
    ],
)
def test_fields_of_vllm_work_for_both_routes(
    server: ServerProcess, extra: dict[str, object], pattern: str
):
    ask = {"max_tokens": 300, "seed": 1, "model": "m", "extra_body": extra}
    with client_of(server) as client:
        chat = client.chat.completions.create(messages=MESSAGES, **ask)
        completion = client.completions.create(prompt="Once", **ask)
    for choice, text in (
        (chat.choices[0], chat.choices[0].message.content),
        (completion.choices[0], completion.choices[0].text),
    ):
        if choice.finish_reason == "stop":
            jsonschema.validate(text, {"type": "string", "pattern": pattern})
        else:
            assert choice.finish_reason == "length"


def test_required_call_has_the_arguments_of_its_class(server: ServerProcess):
    with client_of(server) as client:
        for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
            answer = client.chat.completions.parse(
                **ASK, seed=1, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False
            )
            (call,) = answer.choices[0].message.tool_calls or []
            assert answer.choices[0].finish_reason == "tool_calls"
            assert answer.choices[0].message.content is None
            assert isinstance(call.function.parsed_arguments, GetWeather)


def test_streamed_call_is_the_whole_one(server: ServerProcess):
    ask = ASK | {
        "seed": 2, "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False
    }  # fmt: skip
    with client_of(server) as client:
        whole = client.chat.completions.parse(**ask)
        with client.chat.completions.stream(**ask) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 1
    (call,), (other,) = (answer.choices[0].message.tool_calls or [] for answer in (whole, final))
    assert call.function.arguments == other.function.arguments
    assert other.function.parsed_arguments == call.function.parsed_arguments


def test_call_and_result_go_on_and_the_prompt_is_found_again(server: ServerProcess):
    with client_of(server) as client:
        ask = {"model": "m", "max_tokens": 200, "temperature": 0, "tools": [WEATHER]}
        first = client.chat.completions.create(
            **ask, messages=MESSAGES, tool_choice="required", parallel_tool_calls=False
        )
        said = first.choices[0].message
        (call,) = said.tool_calls or []
        json.loads(call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"celsius": 31}'}
        second = client.chat.completions.create(
            **ask, messages=[*MESSAGES, said.model_dump(), result], parallel_tool_calls=False
        )
    assert second.choices[0].finish_reason in ("stop", "length", "tool_calls")
    first_len = first.usage.prompt_tokens + first.usage.completion_tokens
    assert second.usage.prompt_tokens > first_len - 2
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens


def test_free_choice_is_text_or_calls(server: ServerProcess):
    with client_of(server) as client:
        answers = [
            client.chat.completions.create(**ASK | {"max_tokens": 40}, seed=seed, tools=[WEATHER])
            for seed in range(6)
        ]
    for answer in answers:
        message = answer.choices[0].message
        assert message.content or message.tool_calls
        for call in message.tool_calls or []:
            assert call.function.name == "get_weather"


def test_cut_call_ends_cleanly(server: ServerProcess):
    ask = ASK | {"tools": [WEATHER], "tool_choice": "required", "seed": 1}
    with client_of(server) as client:
        sizes = range(1, 100, 14)
        answers = [client.chat.completions.create(**ask | {"max_tokens": n}) for n in sizes]
    for answer in answers:
        choice = answer.choices[0]
        assert choice.finish_reason == "length"
        assert not choice.message.content
    assert any(answer.choices[0].message.tool_calls for answer in answers)


def test_bad_schema_is_a_400_that_says_why(server: ServerProcess):
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    with client_of(server) as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASK, response_format=asked)
    assert caught.value.param == "response_format"
    assert "not" in caught.value.message


def test_thought_then_json(server: ServerProcess):
    with client_of(server) as client:
        answer = client.chat.completions.create(
            **ASK | {"max_tokens": 60}, reasoning_effort="high", seed=1,
            extra_body={"guided_choice": ["yes", "no"]},
        )  # fmt: skip
    message, usage = answer.choices[0].message, answer.usage
    if message.content:
        assert message.content in ("yes", "no")
    else:  # it was still thinking
        assert answer.choices[0].finish_reason == "length"
        assert message.reasoning_content
        assert usage.completion_tokens_details.reasoning_tokens == usage.completion_tokens
