"""/v1/responses as users of the openai package see it: a real process, the embedded model."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response

from tests.end_to_end.site import MODEL, Server, Site, eventually, text_of, user

ASK = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
HELLO = "Hello! Who are you?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    site = Site(tmp_path_factory.mktemp("responses"), model={}, api_key="sk-one")
    with site.serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with client_of(server) as client:
        yield client


def client_of(server: Server) -> OpenAI:
    base_url = f"{server.process.address}/v1"
    return OpenAI(base_url=base_url, api_key=server.key or "none", max_retries=0)


def wait(client: OpenAI, response_id: str) -> Response:
    deadline_s = time.monotonic() + 30
    while (response := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline_s, "it never ends"
        time.sleep(0.02)
    return response


def test_answers_as_a_chat_does(client: OpenAI, server: Server):
    response = client.responses.create(input=HELLO, **ASK)
    chat = server.chat(user(HELLO))
    assert response.output_text == text_of(chat)
    assert response.status in ("completed", "incomplete")
    assert response.usage is not None
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert response.usage.output_tokens == chat["usage"]["completion_tokens"]
    assert client.responses.retrieve(response.id) == response
    (item,) = client.responses.input_items.list(response.id)
    assert item.content[0].text == HELLO


def test_parse_gives_the_text(client: OpenAI):
    parsed = client.responses.parse(input=HELLO, **ASK)
    assert parsed.output_parsed is None
    assert parsed.output_text == client.responses.create(input=HELLO, **ASK).output_text


def test_turns_from_states_say_what_the_whole_history_gives(client: OpenAI, server: Server):
    history, previous_id, num_new = [], None, []
    for question in (HELLO, "What do you like?", "Tell me a story.", "Bye!"):
        history.append(user(question))
        response = client.responses.create(
            input=question, previous_response_id=previous_id, metadata={"turn": "x"}, **ASK
        )
        assert response.output_text == text_of(server.chat(*history))
        assert response.previous_response_id == previous_id
        assert response.usage is not None
        details = response.usage.input_tokens_details
        num_new.append(response.usage.input_tokens - details.cached_tokens)
        history.append({"role": "assistant", "content": response.output_text})
        previous_id = response.id
    assert max(num_new) < 20


def test_stream_accumulates_to_what_is_stored(client: OpenAI):
    with client.responses.stream(input=HELLO, **ASK) as stream:
        events = list(stream)
        texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert "".join(texts) == last.response.output_text
    stored = client.responses.retrieve(last.response.id)
    assert stored.output_text == last.response.output_text
    assert stored.output[0].id == last.response.output[0].id
    raw = list(client.responses.create(input=HELLO, stream=True, **ASK))
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    follow = client.responses.create(input="Why?", previous_response_id=last.response.id, **ASK)
    assert follow.usage is not None
    assert follow.usage.input_tokens_details.cached_tokens > 0


def test_completed_stream_gives_its_final_response(client: OpenAI):
    ask = ASK | {"max_output_tokens": 400}
    with client.responses.stream(input=HELLO, **ask) as stream:
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == client.responses.create(input=HELLO, **ask).output_text


def test_background_is_polled_and_cancelled(client: OpenAI):
    begun = client.responses.create(input=HELLO, background=True, **ASK)
    ended = wait(client, begun.id)
    assert ended.output_text == client.responses.create(input=HELLO, **ASK).output_text
    # Without a stop it writes on and on.
    long = {"max_output_tokens": 100_000, "background": True, "extra_body": {"stop": []}}
    running = client.responses.create(input=HELLO, **ASK | long)
    assert running.status == "in_progress"
    assert client.responses.cancel(running.id).status == "cancelled"
    assert client.responses.retrieve(running.id).status == "cancelled"


def test_delete_and_errors_arrive_as_the_classes_of_the_client(client: OpenAI):
    response = client.responses.create(input=HELLO, **ASK)
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError) as unknown:
        client.responses.create(input=HELLO, previous_response_id=response.id, **ASK)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.responses.create(input=HELLO, truncation="auto", **ASK)
    assert missing.value.code == "response_not_found"
    assert unknown.value.code == "previous_response_not_found"
    assert (wrong.value.code, wrong.value.param) == ("unsupported_parameter", "truncation")


async def test_async_client_in_parallel(server: Server):
    base_url = f"{server.process.address}/v1"
    async with AsyncOpenAI(base_url=base_url, api_key="sk-one", max_retries=0) as client:

        async def turn(question: str) -> str:
            first = await client.responses.create(input=question, **ASK)
            async with client.responses.stream(
                input="Why?", previous_response_id=first.id, **ASK
            ) as stream:
                events = [event async for event in stream]
            await client.responses.delete(first.id)
            return str(events[-1].response.output_text)

        questions = [HELLO, "Tell me a story.", "What is red?"]
        together = await asyncio.gather(*(turn(question) for question in questions))
        alone = [await turn(question) for question in questions]
    assert together == alone


def test_conversation_goes_on_from_its_state_after_a_stop_and_a_crash(tmp_path: Path):
    site = Site(tmp_path, model={"state_dir": str(tmp_path / "states")}, api_key="sk-one")
    ask = ASK | {"input": "Why?"}
    with site.serving() as first, client_of(first) as client:
        before = client.responses.create(input=HELLO, instructions="Be kind.", **ASK)
        expected = client.responses.create(previous_response_id=before.id, store=False, **ask)
        first.process.stop()
    with site.serving() as second, client_of(second) as client:
        assert client.responses.retrieve(before.id) == before
        after = client.responses.create(previous_response_id=before.id, **ask)
        assert after.output_text == expected.output_text
        assert num_computed(after) == num_computed(expected) < num_computed(before)
        client.responses.delete(before.id)
        expected = client.responses.create(previous_response_id=after.id, store=False, **ask)
        (state,) = second.states()
        assert state["label"] == f"response {after.id}"
        record = f"states/*/records/{state['id']}.json"
        eventually(lambda: any(tmp_path.glob(record)))
        second.process.stop(signal.SIGKILL)
    with site.serving() as third, client_of(third) as client:
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(before.id)
        assert client.responses.retrieve(after.id) == after
        again = client.responses.create(previous_response_id=after.id, **ask)
        assert again.output_text == expected.output_text
        assert num_computed(again) == num_computed(expected)


def num_computed(response: Response) -> int:
    """Tokens of the input that no state stood for."""
    assert response.usage is not None
    return response.usage.input_tokens - response.usage.input_tokens_details.cached_tokens
