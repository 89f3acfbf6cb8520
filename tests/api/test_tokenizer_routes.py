"""/tokenize, /detokenize and /tokenizer_info, which clients use instead of a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.chat_jinja import JINJA
from api.routes.tokenizer import END_OF_TEXT
from tests.api.harness import Reply, chat_body, model_table, running
from tests.api.scripted import spelled


def assert_error(reply: Reply, status: int, code: str, param: str | None = None) -> None:
    assert (reply.status, reply.error["code"], reply.error["param"]) == (status, code, param)


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_a_text_there_and_back(tmp_path: Path, prefix: str):
    async with running(tmp_path, model_table(max_context_len=500)) as server:
        tokens = (await server.post(f"{prefix}/tokenize", {"prompt": "Hé"})).json()
        text = (await server.post(f"{prefix}/detokenize", {"tokens": tokens["tokens"]})).json()
        info = (await server.get(f"{prefix}/tokenizer_info")).json()
    assert tokens == {"count": 4, "max_model_len": 500, "tokens": [0, 73, 196, 170]}
    assert text == {"prompt": "Hé"}
    assert (info["model_max_length"], info["vocab_size"]) == (500, 257)


async def test_tokens_are_those_that_the_model_is_fed(tmp_path: Path):
    async with running(tmp_path) as server:
        messages = chat_body()["messages"]
        chat = (await server.post("/tokenize", {"messages": messages})).json()["tokens"]
        await server.chat()
        assert tuple(chat) == server.engine.requests[-1].prompt_ids
        text = (await server.post("/tokenize", {"model": "m", "prompt": "hi"})).json()["tokens"]
        await server.post("/v1/completions", {"model": "m", "prompt": "hi", "max_tokens": 1})
        assert tuple(text) == server.engine.requests[-1].prompt_ids


async def test_what_may_be_left_out(tmp_path: Path):
    async with running(tmp_path) as server:
        bare = {"prompt": "hi", "add_special_tokens": False, "return_token_strs": True}
        text = (await server.post("/tokenize", bare)).json()
        open_end = {**chat_body(), "add_generation_prompt": False}
        del open_end["max_tokens"]
        chat = (await server.post("/tokenize", open_end)).json()
        split = {"prompt": "é", "return_token_strs": True}
        parts = (await server.post("/tokenize", split)).json()
    assert (text["tokens"], text["token_strs"]) == ([105, 106], ["h", "i"])
    assert text["max_model_len"] is None
    assert spelled(chat["tokens"]) == "User: hi"
    assert parts["token_strs"] == ["", "\ufffd", "\ufffd"]


async def test_the_name_of_token_0_is_found_at_the_beginning_only(tmp_path: Path):
    """As lm-eval does: POST /tokenize with what /tokenizer_info calls eos_token."""
    async with running(tmp_path) as server:
        info = (await server.get("/tokenizer_info?model=m")).json()
        alone = {"prompt": info["eos_token"], "add_special_tokens": False}
        inside = {"prompt": f"a{END_OF_TEXT}", "add_special_tokens": False}
        assert (await server.post("/tokenize", alone)).json()["tokens"] == [0]
        tokens = (await server.post("/tokenize", inside)).json()["tokens"]
        first = {"prompt": f"{END_OF_TEXT}hi", "add_special_tokens": False}
        assert (await server.post("/tokenize", first)).json()["tokens"] == [0, 105, 106]
        assert (await server.post("/tokenize", {"prompt": END_OF_TEXT})).json()["count"] == 2
    assert info["eos_token"] == info["bos_token"] == info["pad_token"]
    assert info["chat_template"] == JINJA["g1"]
    assert spelled(tokens) == f"a{END_OF_TEXT}"
    assert 0 not in tokens


async def test_a_long_text_is_taken_in_slices(tmp_path: Path):
    """blockbuster does not see work; that nothing is lost between the slices, this does."""
    text = "Hello, wörld! " * 2000
    async with running(tmp_path) as server:
        tokens = (await server.post("/tokenize", {"prompt": text})).json()["tokens"]
        back = (await server.post("/detokenize", {"tokens": tokens})).json()["prompt"]
    assert len(tokens) == 1 + len(text.encode())
    assert back == text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "x", "content": ""}]}, "messages[0].role"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_token": False}, "add_special_token"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 300]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
async def test_errors_name_the_field(tmp_path: Path, path: str, body: dict, param: str):
    async with running(tmp_path) as server:
        assert_error(await server.post(path, body), 400, "invalid_value", param)


async def test_of_several_models_one_must_be_named(tmp_path: Path):
    async with running(tmp_path, model_table("a"), model_table("b")) as server:
        for path in ("/tokenize", "/detokenize"):
            reply = await server.post(
                path, {"prompt": "x"} if path == "/tokenize" else {"tokens": []}
            )
            assert_error(reply, 400, "invalid_value", "model")
        assert_error(await server.get("/tokenizer_info"), 400, "invalid_value", "model")
        found = await server.get("/tokenizer_info?model=b")
        unknown = await server.post("/tokenize", {"model": "c", "prompt": ""})
    assert found.json()["model"] == "b"
    assert_error(unknown, 404, "model_not_found", "model")


async def test_the_key_is_needed(tmp_path: Path):
    async with running(tmp_path, api_key="k") as server:
        assert (await server.post("/tokenize", {"prompt": ""})).status == 401
        assert (await server.get("/version")).status == 401
        well = await server.get("/version", authorization="Bearer k")
    assert well.json().keys() == {"version"}
