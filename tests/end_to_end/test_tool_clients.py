"""Tools, forms and thoughts of responses and messages, through the official clients.

The model has random weights: what it calls is what the grammar makes it call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from anthropic import Anthropic, AsyncAnthropic, beta_tool
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import ParsedResponseFunctionToolCall, Response
from pydantic import BaseModel, Field

from tests.end_to_end.process import ServerProcess

SEEDED = {"extra_body": {"seed": 1}}
ASK = {"model": "m", "max_output_tokens": 600, "temperature": 1, **SEEDED}
INPUT = "Hot in Paris?"
MESSAGES = [{"role": "user", "content": INPUT}]
TELL = {"model": "m", "max_tokens": 600, "messages": MESSAGES, **SEEDED}


class GetWeather(BaseModel):
    """What the weather is like."""

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=9)


class Pet(BaseModel):
    kind: Literal["cat", "dog"]  # Anthropic's client takes limits of numbers and texts away
    is_tame: bool


OF_CLASS = openai.pydantic_function_tool(GetWeather, name="get_weather")
FLAT = {"type": "function", **OF_CLASS["function"]}
TOOL = {
    "name": "get_weather",
    "description": "The weather.",
    "input_schema": GetWeather.model_json_schema(),
}
CALL_ONE = {"tools": [FLAT], "tool_choice": "required", "parallel_tool_calls": False}
CALL_CLASS = CALL_ONE | {"tools": [OF_CLASS]}
USE_ONE = {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.address, api_key="none", max_retries=0) as claude:
        yield claude


def called(response: Response) -> ParsedResponseFunctionToolCall:
    (item,) = response.output
    assert item.type == "function_call"
    return item  # type: ignore[return-value]


class TestResponses:
    def test_parse_gives_calls_and_objects_of_the_class(self, client: OpenAI):
        response = client.responses.parse(input=INPUT, **ASK | CALL_CLASS)
        assert response.status == "completed"
        call = called(response)
        assert isinstance(call.parsed_arguments, GetWeather)
        stored = called(client.responses.retrieve(response.id))
        assert (stored.id, stored.call_id) == (call.id, call.call_id)
        assert (stored.name, stored.arguments) == (call.name, call.arguments)
        pet = client.responses.parse(input=INPUT, text_format=Pet, **ASK)
        assert isinstance(pet.output_parsed, Pet)

    def test_stream_accumulates_to_the_whole(self, client: OpenAI):
        whole = called(client.responses.parse(input=INPUT, **ASK | CALL_CLASS))
        with client.responses.stream(input=INPUT, **ASK | CALL_CLASS) as stream:
            kinds = [event.type for event in stream]
            final = called(stream.get_final_response())
        assert kinds.count("response.function_call_arguments.delta") > 1
        assert final.arguments == whole.arguments
        assert final.parsed_arguments == whole.parsed_arguments
        with client.responses.stream(input=INPUT, text_format=Pet, **ASK) as stream:
            assert isinstance(stream.get_final_response().output_parsed, Pet)

    def test_result_goes_on_from_the_state_or_from_the_text(self, client: OpenAI):
        first = client.responses.create(input=INPUT, **ASK | CALL_ONE)
        call = called(first)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "31 C"}
        ask = ASK | {"tools": [FLAT], "temperature": 0, "max_output_tokens": 30}
        short = client.responses.create(input=[result], previous_response_id=first.id, **ask)
        given = [{"role": "user", "content": INPUT}, call.to_dict(), result]
        long = client.responses.create(input=given, **ask)
        assert [item.type for item in short.output] == [item.type for item in long.output]
        assert short.output_text == long.output_text
        assert short.usage is not None
        assert long.usage is not None
        assert short.usage.input_tokens == long.usage.input_tokens
        cached = short.usage.input_tokens_details.cached_tokens
        assert short.usage.input_tokens - cached < 60
        listed = client.responses.input_items.list(long.id, order="asc")
        assert [item.type for item in listed] == [
            "message",
            "function_call",
            "function_call_output",
        ]

    def test_thought_is_an_item(self, client: OpenAI):
        ask = ASK | {"reasoning": {"effort": "low"}, "max_output_tokens": 20}
        response = client.responses.create(input=INPUT, **ask)
        assert response.output[0].type == "reasoning"
        with client.responses.stream(input=INPUT, **ask) as stream:
            events = list(stream)
        deltas = [event for event in events if event.type == "response.reasoning_text.delta"]
        (part,) = response.output[0].content or []
        assert "".join(event.delta for event in deltas) == part.text
        assert response.usage is not None
        assert response.usage.output_tokens_details.reasoning_tokens > 0

    @pytest.mark.parametrize("length", [3, 25, 40])
    def test_cut_call_ends_cleanly(self, client: OpenAI, length: int):
        response = client.responses.create(
            input=INPUT, **ASK | CALL_ONE | {"max_output_tokens": length}
        )
        assert response.status == "incomplete"
        assert [item.status for item in response.output] == ["incomplete"]
        with client.responses.stream(
            input=INPUT, **ASK | CALL_ONE | {"max_output_tokens": length}
        ) as stream:
            assert [event.type for event in stream][-1] == "response.incomplete"


class TestMessages:
    def test_calls_are_blocks_that_follow_the_schema(self, claude: Anthropic):
        for choice in (USE_ONE["tool_choice"], {"type": "tool", "name": "get_weather"}):
            message = claude.messages.create(**TELL, tools=[TOOL], tool_choice=choice)
            (block,) = message.content
            assert block.type == "tool_use"
            assert GetWeather.model_validate(block.input)
            assert message.stop_reason == "tool_use"

    def test_stream_accumulates_to_the_whole(self, claude: Anthropic):
        whole = claude.messages.create(**TELL, **USE_ONE)
        with claude.messages.stream(**TELL, **USE_ONE) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_message()
        assert kinds.count("input_json") > 1
        assert [block.input for block in final.content] == [block.input for block in whole.content]
        assert (final.stop_reason, final.usage) == (whole.stop_reason, final.usage)
        assert final.usage.output_tokens == whole.usage.output_tokens

    def test_parse_gives_objects_of_the_class(self, claude: Anthropic):
        message = claude.messages.parse(**TELL, output_format=Pet)
        assert isinstance(message.parsed_output, Pet)
        with claude.messages.stream(**TELL, output_format=Pet) as stream:
            assert isinstance(stream.get_final_message().parsed_output, Pet)

    def test_result_goes_on(self, claude: Anthropic):
        first = claude.messages.create(**TELL, **USE_ONE)
        (block,) = first.content
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "31 C"}
        turns = [*MESSAGES, first.to_param(), {"role": "user", "content": [result]}]
        tell = TELL | {"messages": turns, "max_tokens": 20, "tools": [TOOL]}
        second = claude.messages.create(**tell)
        count = claude.messages.count_tokens(model="m", messages=turns, tools=[TOOL])
        usage = second.usage
        assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
        assert usage.cache_read_input_tokens
        assert second.content

    def test_thought_is_a_block(self, claude: Anthropic):
        tell = TELL | {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 20}
        whole = claude.messages.create(**tell)
        with claude.messages.stream(**tell) as stream:
            thoughts = [event.thinking for event in stream if event.type == "thinking"]
            final = stream.get_final_message()
        assert whole.content == final.content
        assert whole.content[0].type == "thinking"
        assert "".join(thoughts) == whole.content[0].thinking
        details = whole.usage.output_tokens_details
        assert details is not None
        assert details.thinking_tokens > 0

    @pytest.mark.parametrize("length", [3, 25, 40])
    def test_cut_call_ends_cleanly(self, claude: Anthropic, length: int):
        tell = TELL | USE_ONE | {"max_tokens": length}
        assert claude.messages.create(**tell).stop_reason == "max_tokens"
        with claude.messages.stream(**tell) as stream:
            assert stream.get_final_message().stop_reason == "max_tokens"

    def test_tool_runner_calls_the_function_and_sends_back_what_it_gives(self, claude: Anthropic):
        asked: list[dict[str, object]] = []

        @beta_tool
        def get_weather(city: Literal["Paris", "Rome"], is_today: bool) -> str:
            """The weather.

            Args:
                city: where
                is_today: when
            """
            asked.append({"city": city, "is_today": is_today})
            return f"rain in {city}"

        choice = {"type": "any", "disable_parallel_tool_use": True}
        runner = claude.beta.messages.tool_runner(
            **TELL, tools=[get_weather], tool_choice=choice, max_iterations=2
        )
        messages = list(runner)
        assert [message.stop_reason for message in messages] == ["tool_use"] * 2
        given = [block.input for message in messages for block in message.content]
        assert asked
        assert given[: len(asked)] == asked


async def test_async_clients_beside_each_other(server: ServerProcess):
    async with (
        AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client,
        AsyncAnthropic(base_url=server.address, api_key="none", max_retries=0) as claude,
    ):

        async def respond() -> str:
            async with client.responses.stream(input=INPUT, **ASK | CALL_ONE) as stream:
                return called(await stream.get_final_response()).arguments

        async def tell() -> object:
            async with claude.messages.stream(**TELL, **USE_ONE) as stream:
                return (await stream.get_final_message()).content[0].input

        found = await asyncio.gather(respond(), tell(), respond(), tell())
        assert found == [await respond(), await tell()] * 2
