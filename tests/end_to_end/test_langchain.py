"""The server as users of langchain-openai see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from pydantic import BaseModel, Field

from tests.end_to_end.site import MODEL, Server, chat_body, text_of, user

WHY = "langchain-openai is not installed: pip install '.[dev]'"
langchain = pytest.importorskip("langchain_openai", reason=WHY)
tiktoken = pytest.importorskip("tiktoken", reason=WHY)

TEXT = "Once upon a time"


class Place(BaseModel):
    """Where something is."""

    room: str = Field(max_length=12)
    is_inside: bool


@pytest.fixture
def options(quiet_server: Server) -> Iterator[dict[str, Any]]:
    """Of every model; with connections that can be closed, since langchain leaves its own open."""
    with openai.DefaultHttpxClient() as client:
        yield {
            "base_url": f"{quiet_server.process.address}/v1",
            "api_key": "sk-one",
            "model": MODEL,
            "max_retries": 0,
            "http_client": client,
            "http_async_client": openai.DefaultAsyncHttpxClient(),
        }


@pytest.fixture
def chat(options: dict[str, Any]) -> Any:
    return langchain.ChatOpenAI(**options, temperature=0, max_tokens=24)


def total(chunks: list[Any]) -> Any:
    """Chunks know how to add themselves up."""
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def test_invoke_stream_and_batch_say_the_same(chat: Any, quiet_server: Server):
    whole = chat.invoke("Hello! Who are you?")
    streamed = total(list(chat.stream("Hello! Who are you?", stream_usage=True)))
    batch = chat.batch(["Hello! Who are you?", "Tell me a story.", "Why?"])
    expected = quiet_server.chat(user("Hello! Who are you?"))
    assert whole.content == streamed.content == batch[0].content == text_of(expected)
    assert len({answer.content for answer in batch}) == 3
    for answer in (whole, streamed):
        assert answer.usage_metadata["output_tokens"] == expected["usage"]["completion_tokens"]
        assert answer.usage_metadata["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert whole.response_metadata["finish_reason"] == expected["choices"][0]["finish_reason"]


async def test_async_ones_too(chat: Any):
    async with chat.http_async_client:
        whole = await chat.ainvoke([("system", "Be kind."), ("human", "Hello!")])
        stream = chat.astream([("system", "Be kind."), ("human", "Hello!")])
        chunks = [chunk async for chunk in stream]
        batch = await chat.abatch(["Hello!", "Why?"])
    assert total(chunks).content == whole.content
    assert all(answer.content for answer in batch)


def test_bound_tools_are_called(chat: Any):
    bound = chat.bind_tools([Place], tool_choice="Place", strict=True, parallel_tool_calls=False)
    bound = bound.bind(max_tokens=200, temperature=1, seed=3)
    whole = bound.invoke("Where is the cat?")
    streamed = total(list(bound.stream("Where is the cat?")))
    (call,), (other,) = whole.tool_calls, streamed.tool_calls
    assert call["name"] == "Place"
    Place.model_validate(call["args"])
    assert other["args"] == call["args"]
    history = [("human", "Where is the cat?"), whole]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "It is there."}
    assert chat.bind_tools([Place]).invoke([*history, result]).response_metadata["finish_reason"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object_of_the_class(options: dict[str, Any], method: str):
    asked = langchain.ChatOpenAI(**options, temperature=1, max_tokens=300, seed=1)
    answer = asked.with_structured_output(Place, method=method, strict=True).invoke("Where?")
    assert isinstance(answer, Place)


def test_json_mode_begins_an_object(chat: Any):
    """Which would be a long one: no schema says what is in it."""
    answer = chat.bind(response_format={"type": "json_object"}).invoke("Where?", stop=['"'])
    assert answer.content.strip() in ("{", "{}")


def test_responses_go_on_from_each_other(options: dict[str, Any], chat: Any):
    asked = langchain.ChatOpenAI(
        **options, temperature=0, max_tokens=24, use_previous_response_id=True
    )
    first = asked.invoke("Hello! Who are you?")
    second = asked.invoke([("human", "Hello! Who are you?"), first, ("human", "Why?")])
    assert first.text == chat.invoke("Hello! Who are you?").content
    assert second.response_metadata["id"] != first.response_metadata["id"]


def test_completions(options: dict[str, Any], quiet_server: Server):
    model = langchain.OpenAI(**options, temperature=0, max_tokens=24)
    expected = quiet_server.post("/v1/completions", chat_body(prompt=TEXT))
    assert model.invoke(TEXT) == "".join(model.stream(TEXT)) == text_of(expected)
    assert model.batch([TEXT, "Max"])[0] == text_of(expected)


class TestEmbeddings:
    def vectors(self, server: Server, texts: list[Any]) -> list[Any]:
        answer = server.post("/v1/embeddings", {"model": MODEL, "input": texts})
        return [item["embedding"] for item in answer["data"]]

    async def test_texts_are_sent_as_they_are(self, options: dict[str, Any], quiet_server: Server):
        model = langchain.OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
        found = model.embed_documents([TEXT, "Max"])
        np.testing.assert_allclose(found, self.vectors(quiet_server, [TEXT, "Max"]), atol=1e-5)
        np.testing.assert_allclose(model.embed_query(TEXT), found[0], atol=1e-5)
        async with model.http_async_client:
            found_later = await model.aembed_query(TEXT)
        np.testing.assert_allclose(found_later, found[0], atol=1e-5)

    def test_its_own_token_ids_are_taken_as_the_models(
        self, options: dict[str, Any], quiet_server: Server, monkeypatch: pytest.MonkeyPatch
    ):
        """Not what a user wants, see docs/api.md, but what was asked for. Here ids are bytes."""
        ranks = {bytes([i]): i for i in range(256)}
        encoding = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={})
        monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _: encoding)
        model = langchain.OpenAIEmbeddings(**options)
        (expected,) = self.vectors(quiet_server, [list(TEXT.encode())])
        np.testing.assert_allclose(model.embed_query(TEXT), expected, atol=1e-5)
