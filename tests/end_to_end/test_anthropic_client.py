"""/v1/messages as users of the anthropic package see it: a real process, the embedded model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from tests.end_to_end.site import MODEL, Server, Site, text_of, user

HELLO = [{"role": "user", "content": "Hello! Who are you?"}]
GREEDY = {"extra_body": {"temperature": 0}}
ASK = {"model": MODEL, "max_tokens": 24, "messages": HELLO, **GREEDY}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    site = Site(tmp_path_factory.mktemp("messages"), model={}, api_key="sk-one")
    with site.serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.process.address, api_key="sk-one", max_retries=0) as client:
        yield client


def said(message: anthropic.types.Message) -> str:
    (block,) = message.content
    assert block.type == "text"
    return block.text


def test_answers_as_a_chat_does(client: Anthropic, server: Server):
    message = client.messages.create(system="Be kind.", **ASK)
    system = {"role": "system", "content": "Be kind."}
    chat = server.chat(system, user("Hello! Who are you?"))
    assert said(message) == text_of(chat)
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message._request_id
    usage = message.usage
    assert usage.output_tokens == chat["usage"]["completion_tokens"]
    num_cached = usage.cache_read_input_tokens
    assert num_cached is not None
    assert usage.input_tokens + num_cached == chat["usage"]["prompt_tokens"]


def test_the_same_prompt_again_is_read_from_the_cache(client: Anthropic):
    counts = []
    for _ in range(3):
        usage = client.messages.create(system="A long one. " * 20, **ASK).usage
        counts.append((usage.input_tokens, usage.cache_read_input_tokens))
    assert counts[0][1] == 0
    assert counts[-1][1] > 0
    assert len({sum(pair) for pair in counts}) == 1


def test_a_whole_conversation_with_what_the_client_gives_back(client: Anthropic):
    first = client.messages.create(**ASK)
    history = [*HELLO, first.to_param(), {"role": "user", "content": "Why?"}]
    second = client.messages.create(**ASK | {"messages": history})
    assert second.usage.output_tokens > 0


def test_stream_accumulates_to_the_whole(client: Anthropic):
    whole = client.messages.create(**ASK)
    with client.messages.stream(**ASK) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == said(final) == said(whole)
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens
    events = list(client.messages.create(stream=True, **ASK))
    assert [events[0].type, events[-1].type] == ["message_start", "message_stop"]


def test_stop_sequence_is_told(client: Anthropic):
    whole = said(client.messages.create(**ASK))
    stop = whole.split()[2]
    message = client.messages.create(stop_sequences=[stop], **ASK)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert said(message) == whole[: whole.index(stop)]


def test_count_tokens_is_what_the_answer_counts(client: Anthropic):
    count = client.messages.count_tokens(model=MODEL, messages=HELLO, system="Be kind.")
    usage = client.messages.create(system="Be kind.", **ASK).usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_arrive_as_the_classes_of_the_client(client: Anthropic, server: Server):
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(**ASK | {"model": "claude"})
    with pytest.raises(anthropic.BadRequestError) as wrong:
        client.messages.create(tools=[{"name": "bash", "type": "bash_20250124"}], **ASK)
    address = server.process.address
    with (
        Anthropic(base_url=address, api_key="sk-two", max_retries=0) as other,
        pytest.raises(anthropic.AuthenticationError) as refused,
    ):
        other.messages.create(**ASK)
    assert unknown.value.type == "not_found_error"
    assert unknown.value.request_id
    assert "'tools[0].type'" in (wrong.value.api_message or "")
    assert refused.value.type == "authentication_error"


def test_key_in_x_api_key(server: Server):
    """As older clients send it."""
    headers = {"X-Api-Key": "sk-one", "Authorization": anthropic.Omit()}
    address = server.process.address
    with Anthropic(base_url=address, api_key="x", default_headers=headers) as client:
        assert client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens > 0


async def test_async_client_in_parallel(server: Server):
    async with AsyncAnthropic(
        base_url=server.process.address, api_key="sk-one", max_retries=0
    ) as client:

        async def ask(text: str) -> str:
            messages = [{"role": "user", "content": text}]
            async with client.messages.stream(**ASK | {"messages": messages}) as stream:
                return said(await stream.get_final_message())

        texts = ["Hello!", "Tell me a story.", "What is red?"]
        together = await asyncio.gather(*(ask(text) for text in texts))
        alone = [await ask(text) for text in texts]
        whole = await client.messages.create(**ASK)
    assert together == alone
    assert said(whole)
