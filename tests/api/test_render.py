"""The render routes say what the routes that compute would do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from tests.api.harness import chat_body, model_table, running

SAMPLING = {"temperature": 0.5, "top_p": 0.9, "stop": ["x", "y"], "seed": 3, "max_tokens": 4}


async def test_a_chat(tmp_path: Path):
    async with running(tmp_path) as server:
        shown = (await server.post("/v1/chat/completions/render", chat_body(seed=7))).json()
        assert not server.engine.requests, "nothing is computed"
        await server.chat(seed=7)
        (asked,) = server.engine.requests
    assert shown["prompt"] == "User: hi\n\nAssistant:"
    assert tuple(shown["token_ids"]) == asked.prompt_ids
    assert shown["sampling_params"] == _as_json(asdict(asked.sampling))
    assert shown["sampling_params"]["stop"] == ["\n\nUser:", "\nUser:"]
    assert (shown["object"], shown["model"]) == ("rendered_prompt", "m")


@pytest.mark.parametrize("prompt", ["hi", [0, 105, 106]])
async def test_a_completion(tmp_path: Path, prompt: object):
    body = {"model": "m", "prompt": prompt, **SAMPLING}
    async with running(tmp_path) as server:
        (shown,) = (await server.post("/v1/completions/render", body)).json()
        await server.post("/v1/completions", body)
        (asked,) = server.engine.requests
    assert shown["prompt"] == "hi"
    assert tuple(shown["token_ids"]) == asked.prompt_ids == (0, 105, 106)
    assert shown["sampling_params"] == _as_json(asdict(asked.sampling))


async def test_several_prompts_give_a_list(tmp_path: Path):
    body = {"model": "m", "prompt": ["a", [0, 105], "bc"], "n": 2, "logprobs": 3, "seed": 1}
    async with running(tmp_path) as server:
        shown = (await server.post("/v1/completions/render", body)).json()
        await server.post("/v1/completions", body)
        asked = server.engine.requests[::2]
    assert [one["prompt"] for one in shown] == ["a", "h", "bc"]
    assert [tuple(one["token_ids"]) for one in shown] == [one.prompt_ids for one in asked]
    for one, request in zip(shown, asked, strict=True):
        assert one["sampling_params"] == _as_json(asdict(request.sampling))


async def test_the_template_of_the_model_counts(tmp_path: Path):
    async with running(tmp_path, model_table(template="rwkv-rs")) as server:
        shown = (await server.post("/v1/chat/completions/render", chat_body())).json()
    assert shown["prompt"] == "User: hi\n\nAssistant: <think>\n"
    assert shown["sampling_params"]["stop"] == []
    assert shown["sampling_params"]["seed"] is None


async def test_what_is_added_to_a_state(tmp_path: Path):
    async with running(tmp_path) as server:
        state = (await server.post("/v1/states", {"prompt": "ab"})).json()["id"]
        body = chat_body(state=state)
        shown = (await server.post("/v1/chat/completions/render", body)).json()
        unknown = await server.post("/v1/chat/completions/render", chat_body(state="nope"))
    assert shown["prompt"] == "\n\nUser: hi\n\nAssistant:"
    assert shown["token_ids"][0] != 0
    assert shown["state"] == state
    assert (unknown.status, unknown.error["param"]) == (404, "state")


async def test_wrong_bodies_are_refused_as_they_would_be(tmp_path: Path):
    async with running(tmp_path) as server:
        for field, value in (("temperature", -1), ("resume", "x"), ("stop", [""])):
            fields = {field: value} if field != "resume" else {"resume": "x", "max_tokens": None}
            body = {**chat_body(), **fields}
            if field == "resume":
                body["messages"] = None
            reply = await server.post("/v1/chat/completions/render", body)
            assert (reply.status, reply.error["param"]) == (400, field)


def _as_json(value: object) -> object:
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, tuple) else value
