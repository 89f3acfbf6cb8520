"""The server as users of the openai package see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.end_to_end.process import ServerProcess

MESSAGES = [{"role": "user", "content": "Hello!"}]
ASK = {"model": "m", "messages": MESSAGES, "max_tokens": 16, "temperature": 0, "seed": 1}


@contextmanager
def client_of(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


@asynccontextmanager
async def async_client_of(server: ServerProcess) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{server.address}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


def test_chat_whole_and_streamed_say_the_same(server: ServerProcess):
    ask = ASK | {"messages": [{"role": "user", "content": "Whole or streamed?"}]}
    with client_of(server) as client:
        whole = client.chat.completions.create(**ask)
        options = {"include_usage": True}
        # Where other tests have filled all pages, a prompt is given one at its second sight only.
        client.chat.completions.create(**ask)
        chunks = list(client.chat.completions.create(**ask, stream=True, stream_options=options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.role == "assistant"
    assert text == whole.choices[0].message.content
    finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
    assert finish == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens
    assert whole.system_fingerprint


def test_greedy_answers_repeat_and_seeded_ones_too(server: ServerProcess):
    with client_of(server) as client:
        greedy = [client.chat.completions.create(**ASK) for _ in range(2)]
        drawn = [client.chat.completions.create(**ASK | {"temperature": 1}) for _ in range(2)]
        other = client.chat.completions.create(**ASK | {"temperature": 1, "seed": 2})
    texts = [answer.choices[0].message.content for answer in (*greedy, *drawn, other)]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert texts[2] != texts[4]


def test_completions_and_models(server: ServerProcess):
    with client_of(server) as client:
        answer = client.completions.create(model="m", prompt="Hi", max_tokens=4, temperature=0)
        stream = client.completions.create(
            model="m", prompt="Hi", max_tokens=4, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].text for chunk in stream)
        assert [model.id for model in client.models.list()] == ["m"]
        assert client.models.retrieve("m").object == "model"
    assert answer.choices[0].text == text
    assert answer.usage.completion_tokens <= 4


def test_errors_arrive_as_the_classes_of_the_client(server: ServerProcess):
    with client_of(server) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(**ASK | {"model": "gpt-4"})
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(**ASK | {"top_p": 3})
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
    assert unknown.value.code == "model_not_found"
    assert wrong.value.param == "top_p"
    assert wrong.value.request_id


async def test_32_async_streams_at_once(server: ServerProcess):
    """Each with a seed of its own, and each as when it is alone."""

    async def ask(client: AsyncOpenAI, seed: int) -> tuple[str, str | None]:
        stream = await client.chat.completions.create(
            **ASK | {"temperature": 1, "seed": seed, "max_tokens": 24}, stream=True
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return text, chunks[-1].choices[0].finish_reason

    async with async_client_of(server) as client:
        together = await asyncio.gather(*(ask(client, seed) for seed in range(32)))
        alone = [await ask(client, seed) for seed in (0, 13, 31)]
    assert alone == [together[0], together[13], together[31]]
    assert {reason for _, reason in together} <= {"stop", "length"}
    assert len({text for text, _ in together}) == 32


async def test_closing_an_async_stream_early_leaves_the_client_usable(server: ServerProcess):
    async with async_client_of(server) as client:
        for _ in range(3):
            stream = await client.chat.completions.create(**ASK, stream=True)
            async for _chunk in stream:
                break
            await stream.close()
        assert (await client.chat.completions.create(**ASK)).object == "chat.completion"
