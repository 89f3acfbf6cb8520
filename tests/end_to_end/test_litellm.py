"""The server as users of litellm see it, by three of its roads."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import numpy as np
import pytest

from tests.end_to_end.site import MODEL, Server, chat_body, text_of, user

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch it when imported
litellm = pytest.importorskip(
    "litellm", reason="litellm is not installed: it has an environment of its own, `make clients`"
)

# Its own: it reads fields of pydantic that will go.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

HELLO = [{"role": "user", "content": "Hello! Who are you?"}]
ASK = {"messages": HELLO, "max_tokens": 24, "temperature": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"at": {"enum": ["here", "there"]}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def road(quiet_server: Server) -> dict[str, Any]:
    url = f"{quiet_server.process.address}/v1"
    return {"api_base": url, "api_key": "sk-one", "num_retries": 0}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_chats_whole_and_streamed(road: dict[str, Any], quiet_server: Server, provider: str):
    expected = quiet_server.chat(user("Hello! Who are you?"))
    ask = ASK | road | {"model": f"{provider}/{MODEL}"}
    whole = litellm.completion(**ask)
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO)
    for answer in (whole, rebuilt):
        assert answer.choices[0].message.content == text_of(expected)
        assert answer.choices[0].finish_reason == expected["choices"][0]["finish_reason"]
        assert answer.usage.completion_tokens == expected["usage"]["completion_tokens"]


async def test_async_ones_at_once(road: dict[str, Any]):
    ask = ASK | road | {"model": f"openai/{MODEL}"}
    whole, stream = await asyncio.gather(
        litellm.acompletion(**ask), litellm.acompletion(**ask, stream=True)
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole.choices[0].message.content


def test_tools_whole_and_streamed(road: dict[str, Any]):
    ask = ASK | road | {"model": f"openai/{MODEL}", "tools": [TOOL], "tool_choice": "required"}
    ask |= {"max_tokens": 200, "temperature": 1, "seed": 2, "parallel_tool_calls": False}
    whole = litellm.completion(**ask)
    rebuilt = litellm.stream_chunk_builder(list(litellm.completion(**ask, stream=True)))
    for answer in (whole, rebuilt):
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "look"
        assert call.function.arguments == whole.choices[0].message.tool_calls[0].function.arguments
        assert answer.choices[0].finish_reason == "tool_calls"


def test_texts(road: dict[str, Any], quiet_server: Server):
    expected = quiet_server.post("/v1/completions", chat_body(prompt=["Once", "Max"], logprobs=1))
    ask = {"prompt": ["Once", "Max"], "max_tokens": 24, "temperature": 0, "logprobs": 1}
    answer = litellm.text_completion(model=f"text-completion-openai/{MODEL}", **ask, **road)
    assert answer.choices[0].text == text_of(expected)
    told = expected["choices"][0]["logprobs"]
    assert answer.choices[0].logprobs.tokens == told["tokens"]


def test_vectors(road: dict[str, Any], quiet_server: Server):
    texts = ["Once", "Max"]
    expected = quiet_server.post("/v1/embeddings", {"model": MODEL, "input": texts})["data"]
    for extra in ({}, {"encoding_format": "float"}):
        answer = litellm.embedding(model=f"openai/{MODEL}", input=texts, **extra, **road)
        for item, other in zip(answer.data, expected, strict=True):
            np.testing.assert_allclose(item["embedding"], other["embedding"], atol=1e-5)


def test_messages_of_anthropic(quiet_server: Server):
    road = {"api_base": quiet_server.process.address, "api_key": "sk-one"}
    answer = litellm.completion(model=f"anthropic/{MODEL}", **ASK, **road)
    assert answer.choices[0].message.content == text_of(
        quiet_server.chat(user("Hello! Who are you?"))
    )


def test_errors_have_their_classes(road: dict[str, Any]):
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/gpt-4", **ASK, **road)
    with pytest.raises(litellm.BadRequestError, match="top_p"):
        litellm.completion(model=f"openai/{MODEL}", **ASK, top_p=3, **road)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(model=f"openai/{MODEL}", **ASK, **road | {"api_key": "sk-two"})
