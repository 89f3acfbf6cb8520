"""The less travelled ways of the anthropic package: raw answers, events, the async client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from tests.end_to_end.site import MODEL, Server

HELLO = [{"role": "user", "content": [{"type": "text", "text": "Hello! Who are you?"}]}]
ASK = {"model": MODEL, "max_tokens": 24, "messages": HELLO, "extra_body": {"temperature": 0}}


@pytest.fixture
def client(quiet_server: Server) -> Iterator[Anthropic]:
    url = quiet_server.process.address
    with Anthropic(base_url=url, api_key="sk-one", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(quiet_server: Server) -> AsyncIterator[AsyncAnthropic]:
    url = quiet_server.process.address
    async with AsyncAnthropic(base_url=url, api_key="sk-one", max_retries=0) as client:
        yield client


def said(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_raw_answer_has_headers_and_body(client: Anthropic):
    raw = client.messages.with_raw_response.create(**ASK)
    message = raw.parse()
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["request-id"] == raw.headers["x-request-id"] == message._request_id
    assert json.loads(raw.text())["id"] == message.id


def test_lines_of_a_raw_stream_are_the_whole(client: Anthropic):
    whole = said(client.messages.create(**ASK))
    with client.messages.with_streaming_response.create(stream=True, **ASK) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line[6:]) for line in lines]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == whole


def test_events_of_the_stream_helper_have_snapshots(client: Anthropic):
    with client.messages.stream(**ASK) as stream:
        events = list(stream)
        final = stream.get_final_message()
    texts = [event for event in events if event.type == "text"]
    assert "".join(event.text for event in texts) == texts[-1].snapshot == said(final)
    assert events[-1].type == "message_stop"
    assert {"content_block_stop", "message_delta"} < {event.type for event in events}


async def test_async_events_raw_and_count(async_client: AsyncAnthropic):
    raw = await async_client.messages.with_raw_response.create(**ASK)
    whole = await raw.parse()
    stream = await async_client.messages.create(stream=True, **ASK)
    text = "".join([
        event.delta.text async for event in stream if event.type == "content_block_delta"
    ])  # fmt: skip
    async with async_client.messages.stream(**ASK) as events:
        pieces = [piece async for piece in events.text_stream]
    count = await async_client.messages.count_tokens(model=MODEL, messages=HELLO)
    assert text == "".join(pieces) == said(whole)
    usage = whole.usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


async def test_leaving_a_stream_early_leaves_the_client_usable(async_client: AsyncAnthropic):
    for _ in range(3):
        async with async_client.messages.stream(**ASK) as stream:
            async for _event in stream:
                break
    assert said(await async_client.messages.create(**ASK))


def test_models_are_listed_and_found(client: Anthropic):
    """OpenAI's list is read by the package as its own, as far as the ids go."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


async def test_errors_of_the_async_client(async_client: AsyncAnthropic):
    with pytest.raises(anthropic.BadRequestError) as caught:
        await async_client.messages.create(**ASK | {"max_tokens": 0})
    with pytest.raises(anthropic.AuthenticationError):
        await async_client.with_options(api_key="sk-two").messages.create(**ASK)
    assert "max_tokens" in str(caught.value)
    assert caught.value.request_id
