"""The less travelled ways of the openai package: parse, streams of events, raw answers, vectors.

The server falls silent after a millisecond, so every stream that the package reads has comments.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterator

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.end_to_end.site import MODEL, Server

TALK = [{"role": "user", "content": "Where is the cat?"}]
ASK = {"model": MODEL, "messages": TALK, "max_tokens": 200, "temperature": 1, "seed": 3}
TEXTS = ["Once upon a time", "there was a cat."]


class Place(BaseModel):
    """Where something is."""

    room: str = Field(max_length=12)
    is_inside: bool


LOOK = openai.pydantic_function_tool(Place, name="look")
CALL = {"tools": [LOOK], "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture
def client(quiet_server: Server) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{quiet_server.process.address}/v1", api_key="sk-one", max_retries=0
    ) as client:
        yield client


@pytest.fixture
async def async_client(quiet_server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{quiet_server.process.address}/v1", api_key="sk-one", max_retries=0
    ) as client:
        yield client


class TestAsync:
    async def test_parse_whole_and_streamed(self, async_client: AsyncOpenAI):
        whole = await async_client.chat.completions.parse(**ASK, response_format=Place)
        async with async_client.chat.completions.stream(**ASK, response_format=Place) as stream:
            snapshots = [event.snapshot async for event in stream if event.type == "content.delta"]
            final = await stream.get_final_completion()
        assert isinstance(whole.choices[0].message.parsed, Place)
        assert final.choices[0].message.parsed == whole.choices[0].message.parsed
        assert snapshots[-1] == final.choices[0].message.content

    async def test_tool_calls_whole_and_streamed(self, async_client: AsyncOpenAI):
        whole = await async_client.chat.completions.parse(**ASK, **CALL)
        (call,) = whole.choices[0].message.tool_calls or []
        async with async_client.chat.completions.stream(**ASK, **CALL) as stream:
            done = [
                event
                async for event in stream
                if event.type == "tool_calls.function.arguments.done"
            ]
            final = await stream.get_final_completion()
        (streamed,) = final.choices[0].message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Place)
        assert streamed.function.parsed_arguments == call.function.parsed_arguments
        assert [event.arguments for event in done] == [call.function.arguments]
        assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "tool_calls"


class TestRaw:
    def test_headers_and_body(self, client: OpenAI):
        headers = {"X-Request-Id": "mine-1"}
        raw = client.chat.completions.with_raw_response.create(**ASK, extra_headers=headers)
        assert raw.status_code == 200
        assert raw.request_id == raw.headers["x-request-id"] == "mine-1"
        assert raw.headers["content-type"] == "application/json"
        answer = raw.parse()
        assert answer._request_id == "mine-1"
        assert json.loads(raw.text)["id"] == answer.id

    def test_stream_of_a_raw_answer(self, client: OpenAI):
        raw = client.chat.completions.with_raw_response.create(**ASK, stream=True)
        assert raw.headers["content-type"] == "text/event-stream"
        chunks = list(raw.parse())
        assert chunks[-1].choices[0].finish_reason

    def test_lines_and_bytes(self, client: OpenAI):
        create = client.chat.completions.with_streaming_response.create
        with create(**ASK) as response:
            whole = response.parse().choices[0].message.content
        with create(**ASK, stream=True) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert lines.pop() == "data: [DONE]"
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines]
        assert "".join(delta.get("content") or "" for delta in deltas) == whole

    async def test_async_ones(self, async_client: AsyncOpenAI):
        raw = await async_client.models.with_raw_response.list()
        assert [model.id for model in raw.parse().data] == [MODEL]
        create = async_client.completions.with_streaming_response.create
        async with create(model=MODEL, prompt="Once", max_tokens=4) as response:
            assert (await response.parse()).object == "text_completion"


class TestFields:
    def test_extra_body_reaches_the_sampler(self, client: OpenAI):
        extra = {"top_k": 1, "return_token_ids": True, "min_tokens": 4}
        drawn, greedy = (
            client.completions.create(
                model=MODEL, prompt="Once", max_tokens=8, extra_body=extra, temperature=temperature
            )
            for temperature in (1, 0)
        )
        assert drawn.choices[0].text == greedy.choices[0].text
        assert len(drawn.choices[0].token_ids) == drawn.usage.completion_tokens >= 4

    def test_logprobs_of_a_chat(self, client: OpenAI):
        answer = client.chat.completions.create(
            **ASK | {"max_tokens": 6}, logprobs=True, top_logprobs=20
        )
        content = answer.choices[0].logprobs.content
        assert len(content) == answer.usage.completion_tokens
        for token in content:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 20
            assert bytes(token.bytes).decode("utf-8", "replace") == token.token

    def test_prompts_of_every_kind(self, client: OpenAI):
        ask = {"model": MODEL, "max_tokens": 0, "echo": True, "logprobs": 1}
        whole = client.completions.create(prompt=TEXTS, **ask)
        ids = [
            client.post("/tokenize", cast_to=object, body={"prompt": text})["tokens"]
            for text in TEXTS
        ]
        for prompt, expected in ((ids, TEXTS), (TEXTS[0], TEXTS[:1]), (ids[1], TEXTS[1:])):
            answer = client.completions.create(prompt=prompt, **ask)
            assert [choice.text for choice in answer.choices] == expected
        for choice, tokens in zip(whole.choices, ids, strict=True):
            assert len(choice.logprobs.token_logprobs) == len(tokens)
            assert choice.logprobs.token_logprobs[0] is None

    def test_models(self, client: OpenAI):
        (listed,) = client.models.list()
        assert client.models.retrieve(MODEL) == listed
        assert listed.id == MODEL


class TestEmbeddings:
    def test_base64_and_numbers_are_the_same(self, client: OpenAI):
        """The package asks for base64 unless it is told otherwise, and hides it."""
        plain = client.embeddings.create(model=MODEL, input=TEXTS)
        told = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
        packed = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="base64")
        raw = client.embeddings.with_raw_response.create(model=MODEL, input=TEXTS)
        assert isinstance(json.loads(raw.text)["data"][0]["embedding"], str), "base64 by default"
        for default, number, text in zip(plain.data, told.data, packed.data, strict=True):
            unpacked = np.frombuffer(base64.b64decode(text.embedding), "<f4")
            assert default.embedding == pytest.approx(number.embedding, abs=1e-6)
            assert default.embedding == unpacked.tolist()
        assert plain.usage.prompt_tokens == told.usage.prompt_tokens

    async def test_async(self, async_client: AsyncOpenAI):
        answer = await async_client.embeddings.create(model=MODEL, input=TEXTS[0])
        assert np.linalg.norm(answer.data[0].embedding) == pytest.approx(1, abs=1e-5)


class TestErrors:
    def test_wrong_key(self, client: OpenAI):
        with pytest.raises(openai.AuthenticationError) as caught:
            client.with_options(api_key="sk-two").models.list()
        assert caught.value.code == "invalid_api_key"
        assert "sk-two" not in str(caught.value)

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"temperature": -1}, "temperature"),
            ({"messages": []}, "messages"),
            ({"n": 1000}, "n"),
            ({"response_format": {"type": "xml"}}, "response_format.type"),
            ({"tools": [{"type": "function"}]}, "tools"),
        ],
    )
    def test_bad_fields_are_named(self, client: OpenAI, fields: dict, param: str):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**ASK | fields)
        assert caught.value.type == "invalid_request_error"
        assert (caught.value.param or "").startswith(param.split(".")[0])

    def test_unknown_models_and_paths(self, client: OpenAI):
        with pytest.raises(openai.NotFoundError) as model:
            client.embeddings.create(model="text-embedding-3-small", input="x")
        with pytest.raises(openai.NotFoundError) as path:
            client.images.generate(prompt="a cat")
        assert model.value.code == "model_not_found"
        assert path.value.code == "unknown_url"

    def test_deadline_of_the_server_and_of_the_client(self, client: OpenAI):
        ask = {"model": MODEL, "prompt": "Once", "max_tokens": 4000}
        ask["extra_body"] = {"ignore_eos": True, "timeout_ms": 50}
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(**ask)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        del ask["extra_body"]["timeout_ms"]
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(**ask, timeout=0.2)
