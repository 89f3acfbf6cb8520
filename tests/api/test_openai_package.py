"""Failures as the openai package tells its users, where the engine must fail to order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from tests.api.harness import Running, eventually, model_table, running

ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
FULL = model_table(max_batch_size=1, max_waiting=1)


@asynccontextmanager
async def client_of(server: Running, **options: Any) -> AsyncIterator[AsyncOpenAI]:
    asked = {"max_retries": 0, **options}
    url = f"{server.base_url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", **asked) as client:
        yield client


@asynccontextmanager
async def full(server: Running, client: AsyncOpenAI) -> AsyncIterator[None]:
    """One runs and one waits, until the end; then both are answered."""
    server.runner.gate.clear()
    accepted = [asyncio.create_task(client.chat.completions.create(**ASK)) for _ in range(2)]
    await eventually(lambda: server.snapshot().num_waiting == 1)
    yield
    server.runner.gate.set()
    for answer in await asyncio.gather(*accepted):
        assert answer.choices[0].finish_reason == "length"


async def test_full_queue_is_a_rate_limit(tmp_path: Path):
    async with (
        running(tmp_path, FULL) as server,
        client_of(server) as client,
        full(server, client),
    ):
        for is_stream in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(**ASK, stream=is_stream)
    assert caught.value.code == "queue_full"
    assert int(caught.value.response.headers["retry-after"]) >= 1


async def test_refused_request_is_tried_again_when_the_server_says(tmp_path: Path):
    statuses: list[int] = []

    async def note(response: Any) -> None:
        statuses.append(response.status_code)

    http = DefaultAsyncHttpxClient(event_hooks={"response": [note]})
    async with (
        running(tmp_path, FULL) as server,
        client_of(server, max_retries=1, http_client=http) as client,
    ):
        async with full(server, client):
            third = asyncio.create_task(client.chat.completions.with_raw_response.create(**ASK))
            await eventually(lambda: 429 in statuses)
        raw = await third
    assert raw.retries_taken == 1
    assert raw.parse().choices[0].finish_reason == "length"


async def test_failed_step_is_an_error_whole_and_streamed(tmp_path: Path):
    async with running(tmp_path) as server, client_of(server) as client:
        server.runner.fail_next = "numbers went wrong"
        with pytest.raises(openai.InternalServerError) as whole:
            await client.chat.completions.create(**ASK)
        server.runner.fail_next = "numbers went wrong"
        stream = await client.chat.completions.create(**ASK, stream=True)
        with pytest.raises(openai.APIError) as streamed:
            [chunk async for chunk in stream]
    assert whole.value.code == streamed.value.code == "engine_error"


async def test_client_that_waits_no_longer_frees_its_place(tmp_path: Path):
    async with running(tmp_path) as server, client_of(server) as client:
        server.runner.gate.clear()
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(**ASK, timeout=0.2)
        await eventually(lambda: server.snapshot().num_running == 0)
        server.runner.gate.set()


async def test_too_much_and_too_long_are_bad_requests(tmp_path: Path):
    table = model_table(max_context_len=20)
    async with (
        running(tmp_path, table, request_body_limit_bytes=2000) as server,
        client_of(server) as client,
    ):
        with pytest.raises(openai.BadRequestError) as long:
            await client.completions.create(model="m", prompt="x" * 50)
        with pytest.raises(openai.APIStatusError) as large:
            await client.completions.create(model="m", prompt="x" * 3000)
    assert long.value.code == "context_length_exceeded"
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")
