"""POST /v1/embeddings over the scripted engine, whose rows say how many tokens they have seen."""

from __future__ import annotations

import asyncio
import math
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from openai import AsyncOpenAI

from api.errors import ApiError
from api.routes.embeddings import normalised
from tests.api.harness import Reply, Running, eventually, model_table, request_bytes, running
from tests.api.scripted import EMBEDDED_DIM


def embedding_of(num_tokens: int) -> np.ndarray:
    row = np.full(EMBEDDED_DIM, 3.0)
    row[0] = num_tokens
    return row / np.linalg.norm(row)


async def embed(server: Running, given: object, **fields: object) -> Reply:
    return await server.post("/v1/embeddings", {"model": "m", "input": given, **fields})


@pytest.mark.parametrize(
    ("given", "num_tokens"),
    [
        ("abc", [4]),
        (["abc", "", "é"], [4, 1, 3]),
        ([5, 6, 7], [3]),
        ([[5, 6, 7], [8]], [3, 1]),
        (["a", [5, 6]], [2, 2]),
    ],
)
async def test_every_form_of_input(tmp_path: Path, given: object, num_tokens: list[int]):
    async with running(tmp_path) as server:
        reply = await embed(server, given)
    answer = reply.json()
    assert (answer["object"], answer["model"]) == ("list", "m")
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == sum(num_tokens)
    assert [item["index"] for item in answer["data"]] == list(range(len(num_tokens)))
    for item, count in zip(answer["data"], num_tokens, strict=True):
        np.testing.assert_allclose(item["embedding"], embedding_of(count), rtol=1e-6)


async def test_base64_is_the_same_numbers(tmp_path: Path):
    async with running(tmp_path) as server:
        plain = (await embed(server, "abc", encoding_format="float")).json()["data"][0]
        packed = (await embed(server, "abc", encoding_format="base64")).json()["data"][0]
    unpacked = np.frombuffer(b64decode(packed["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(unpacked, np.array(plain["embedding"], dtype=np.float32))
    assert math.isclose(float(np.linalg.norm(unpacked)), 1.0, rel_tol=1e-6)


async def test_the_openai_client_reads_both(tmp_path: Path):
    async with (
        running(tmp_path) as server,
        AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="x") as client,
    ):
        packed = await client.embeddings.create(model="m", input=["ab", "abc"])
        plain = await client.embeddings.create(
            model="m", input=["ab", "abc"], encoding_format="float", dimensions=EMBEDDED_DIM
        )
    assert [item.index for item in packed.data] == [0, 1]
    for one, other in zip(packed.data, plain.data, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-6)
    assert packed.usage.prompt_tokens == 7


async def test_a_long_list_neither_fills_the_queue_nor_is_refused_by_it(tmp_path: Path):
    table = model_table(max_batch_size=2, max_waiting=1)
    async with running(tmp_path, table) as server:
        server.runner.gate.clear()
        asking = asyncio.create_task(embed(server, [f"{'a' * i}" for i in range(200)]))
        await eventually(lambda: len(server.service.running) == 1)
        await asyncio.sleep(0.05)
        snapshot = server.snapshot()
        assert snapshot.num_running + snapshot.num_waiting <= 2
        other = asyncio.create_task(server.chat(max_tokens=1))
        await asyncio.sleep(0.05)
        server.runner.gate.set()
        answer, chat = (await asking).json(), await other
    assert chat.status == 200
    for number, item in enumerate(answer["data"]):
        np.testing.assert_allclose(item["embedding"], embedding_of(number + 1), rtol=1e-6)


async def test_a_list_that_was_begun_is_finished_while_the_server_drains(tmp_path: Path):
    async with running(tmp_path, model_table(max_batch_size=2), delay_s=0.005) as server:
        asking = asyncio.create_task(embed(server, ["a"] * 40))
        await eventually(lambda: server.snapshot().num_running > 0)
        server.service.is_draining = True
        assert await server.engine.drain(20), "nothing had to be aborted"
        reply, late = await asking, await embed(server, "a")
    assert reply.status == 200
    assert len(reply.json()["data"]) == 40
    assert (late.status, late.error["code"]) == (503, "draining")


async def test_a_client_that_leaves_frees_everything(tmp_path: Path):
    async with running(tmp_path) as server:
        server.runner.gate.clear()
        _, writer = await server.open()
        body = {"model": "m", "input": ["a"] * 50}
        writer.write(request_bytes("POST", "/v1/embeddings", body))
        await eventually(lambda: server.snapshot().num_running > 0)
        writer.close()
        await eventually(lambda: server.snapshot().num_running == 0)
        await eventually(lambda: server.snapshot().num_free_slots == server.snapshot().num_slots)
        server.runner.gate.set()
        assert (await embed(server, "a")).status == 200


async def test_an_engine_that_fails_fails_the_list(tmp_path: Path):
    async with running(tmp_path) as server:
        server.runner.fail_next = "a broken step"
        failed = await embed(server, ["a"] * 20)
        await eventually(lambda: server.snapshot().num_running == 0)
        well = await embed(server, ["a"] * 20)
    assert (failed.status, failed.error["code"]) == (500, "engine_error")
    assert well.status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a", []]}, "input[1]"),
        ({"input": ["a", 5]}, "input[1]"),
        ({"input": [[1, -1]]}, "input[0]"),
        ({"input": [[1], [299, 300]]}, "input[1]"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 32}, "dimensions"),
        ({"input": "a", "initial_state": "nobody"}, "initial_state"),
        ({"input": "a", "priority": 10**6}, "priority"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"input": "a", "model": None}, "model"),
    ],
)
async def test_errors_name_the_field(tmp_path: Path, body: dict, param: str):
    async with running(tmp_path) as server:
        reply = await server.post("/v1/embeddings", {"model": "m", **body})
    assert (reply.status, reply.error["param"]) == (400, param)


async def test_too_long_a_text_names_its_place(tmp_path: Path):
    async with running(tmp_path, model_table(max_context_len=32)) as server:
        reply = await embed(server, ["a", "a" * 40])
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert reply.error["param"] == "input[1]"


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_row_without_length_is_no_embedding(value: float):
    with pytest.raises(ApiError) as failure:
        normalised(np.full(4, value, dtype=np.float32).tobytes())
    assert failure.value.status == 500
