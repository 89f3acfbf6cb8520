"""POST /v1/states: what a state is made of, and where it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.harness import model_table, running
from tests.api.scripted import recited, spelled, write_vocab
from tests.api.test_states import assert_error, create, text_of

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
WRONG: list[tuple[dict[str, object], str]] = [
    ({}, "prompt"),
    ({"state": "s"}, "prompt"),
    ({"prompt": "a", "messages": [USER]}, "messages"),
    ({"prompt": "a", "response": "r"}, "response"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot"}]}, "messages[0].role"),
    ({"prompt": "a", "state": "s", "initial_state": "t"}, "initial_state"),
    ({"response": "r", "state": "s"}, "state"),
    ({"response": "r", "cache_salt": "s"}, "cache_salt"),
    ({"prompt": "a", "choice": 1}, "choice"),
    ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
    ({"prompt": "a", "label": 3}, "label"),
    ({"prompt": "a", "label": "x" * 257}, "label"),
    ({"prompt": "a", "ttl_s": -1}, "ttl_s"),
    ({"prompt": "a", "ttl_s": 1e300}, "ttl_s"),
    ({"prompt": "a", "pinned": 1}, "pinned"),
    ({"prompt": "a", "model": 3}, "model"),
]


class TestCreate:
    async def test_from_a_text_or_token_ids(self, tmp_path: Path):
        async with running(tmp_path) as server:
            text = await create(server, prompt="once", label="tale", ttl_s=0, pinned=True)
            ids = await create(server, prompt=[5, 6])
            assert await text_of(server, text) == "once"
            assert server.states.find("", ids.json()["id"]).ids == (5, 6)
            assert [request.sampling.max_tokens for request in server.engine.requests] == [0, 0]
        state = text.json()
        assert (state["label"], state["pinned"], state["expires_at"]) == ("tale", True, None)
        assert (state["object"], state["model"], state["num_tokens"]) == ("state", "m", 5)

    @pytest.mark.parametrize(
        ("messages", "expected"),
        [
            ([SYSTEM], "System: Be brief."),
            ([SYSTEM, USER], "System: Be brief.\n\nUser: hi\n\nAssistant:"),
            ([USER, ASSISTANT], "User: hi\n\nAssistant: Hello"),
            (
                [{"role": "tool", "content": "42"}],
                "### Tool Output\n```json\n42\n```\n### Assistant",
            ),
        ],
    )
    async def test_from_messages_it_ends_where_the_next_one_speaks(
        self, tmp_path: Path, messages: list[dict[str, str]], expected: str
    ):
        async with running(tmp_path) as server:
            assert await text_of(server, await create(server, messages=messages)) == expected

    async def test_end_of_messages_may_be_chosen(self, tmp_path: Path):
        async with running(tmp_path) as server:
            without = await create(server, messages=[USER], add_generation_prompt=False)
            assert await text_of(server, without) == "User: hi"
            opened = await create(server, messages=[SYSTEM], add_generation_prompt=True)
            assert await text_of(server, opened) == "System: Be brief.\n\nAssistant:"

    async def test_messages_of_a_state_and_new_ones_are_one_conversation(self, tmp_path: Path):
        async with running(tmp_path) as server:
            persona = (await create(server, messages=[SYSTEM])).json()
            await server.chat(state=persona["id"])
            added = spelled(server.engine.requests[-1].prompt_ids)
        assert added == "\n\nUser: hi\n\nAssistant:"

    async def test_regenerating_is_a_chat_without_messages(self, tmp_path: Path):
        async with running(tmp_path) as server:
            asked = (await create(server, messages=[USER])).json()
            again = [await server.chat(messages=[], state=asked["id"], n=2) for _ in range(2)]
            whole = await server.chat()
        texts = {c["message"]["content"] for a in again for c in a.json()["choices"]}
        assert {text.lstrip() for text in texts} == {
            whole.json()["choices"][0]["message"]["content"]
        }

    async def test_from_a_state(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = (await create(server, prompt="ab")).json()
            second = await create(server, prompt="cd", state=first["id"])
            third = await create(server, messages=[USER], state=first["id"])
            assert await text_of(server, second) == "abcd"
            assert await text_of(server, third) == "ab\n\nUser: hi\n\nAssistant:"
        assert second.json()["parent"] == first["id"]

    async def test_from_a_tuned_state(self, tmp_path: Path):
        table = model_table(initial_states=["tom.pth"])
        async with running(tmp_path, table) as server:
            alone = await create(server, initial_state="tom")
            told = await create(server, prompt="a", initial_state="tom")
            requests = server.engine.requests
            unknown = await create(server, initial_state="tim")
        assert (alone.status, told.status) == (200, 200)
        assert [request.initial_state for request in requests] == ["tom", "tom"]
        assert [request.prompt_ids for request in requests] == [(0,), (0, 1 + ord("a"))]
        assert_error(unknown, 400, "invalid_value", "initial_state")

    async def test_wrong_ones_are_refused_by_name(self, tmp_path: Path):
        async with running(tmp_path) as server:
            for fields, param in WRONG:
                assert_error(await create(server, **fields), 400, "invalid_value", param)
            assert server.states.kept == {}

    async def test_unknown_fields_are_refused_with_the_closest(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = await create(server, prompt="a", lable="x")
            in_query = await server.post("/v1/states?modle=m", {"prompt": "a"})
        assert_error(reply, 400, "invalid_value", "lable")
        assert 'did you mean "label"?' in reply.error["message"]
        assert_error(in_query, 400, "invalid_value", "modle")

    async def test_nothing_added_to_a_state_is_a_fork(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = (await create(server, prompt="ab")).json()
            reply = await create(server, prompt="", state=first["id"])
        assert_error(reply, 400, "invalid_value", "state")
        assert "fork" in reply.error["message"]

    async def test_unknown_state_is_404(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = await create(server, prompt="a", state="nope")
        assert_error(reply, 404, "state_not_found", "state")

    async def test_draining_server_keeps_nothing_new(self, tmp_path: Path):
        async with running(tmp_path) as server:
            server.service.is_draining = True
            assert_error(await create(server, prompt="a"), 503, "draining")


class TestFromResponse:
    @pytest.mark.parametrize("is_stream", [False, True])
    async def test_it_stands_for_prompt_and_answer(self, tmp_path: Path, is_stream: bool):
        async with running(tmp_path) as server:
            reply = await server.chat(stream=is_stream)
            answer_id = (reply.events()[0] if is_stream else reply.json())["id"]
            state = await create(server, response=answer_id)
            text = await text_of(server, state)
        prompt = "User: hi\n\nAssistant:"
        assert text == prompt + recited(len(prompt) + 1, 5)

    async def test_what_ended_the_answer_is_left_out(self, tmp_path: Path):
        body = {"model": "m", "prompt": "", "max_tokens": 60, "stop": [" the"]}
        async with running(tmp_path) as server:
            answer = (await server.post("/v1/completions", body)).json()
            state = await create(server, response=answer["id"])
            assert await text_of(server, state) == answer["choices"][0]["text"]

    async def test_each_choice_has_its_own(self, tmp_path: Path):
        body = {"model": "m", "prompt": "ab", "max_tokens": 4, "n": 2, "best_of": 3, "seed": 4}
        async with running(tmp_path) as server:
            server.runner.reads_seed = True
            answer = (await server.post("/v1/completions", body)).json()
            for choice in answer["choices"]:
                state = await create(server, response=answer["id"], choice=choice["index"])
                assert await text_of(server, state) == "ab" + choice["text"]
            beyond = await create(server, response=answer["id"], choice=2)
        assert answer["choices"][0]["text"] != answer["choices"][1]["text"]
        assert_error(beyond, 400, "invalid_value", "choice")

    async def test_it_goes_on_from_what_the_response_did(self, tmp_path: Path):
        async with running(tmp_path) as server:
            base = (await create(server, prompt="once ")).json()
            answer = (await server.chat(state=base["id"], cache_salt="s")).json()
            state = await create(server, response=answer["id"])
            text = await text_of(server, state)
            asked = server.engine.requests[-1]
            await server.request("DELETE", f"/v1/states/{base['id']}")
            gone = await create(server, response=answer["id"])
        assert text.startswith("once \n\nUser: hi\n\nAssistant:")
        assert (asked.state_id, asked.cache_salt) == (base["id"], "s")
        assert_error(gone, 404, "state_not_found", "response")

    async def test_unknown_or_unfinished_ones_are_404(self, tmp_path: Path):
        async with running(tmp_path) as server:
            server.runner.fail_next = "numbers went wrong"
            failed = (await server.chat(stream=True)).events()[0]["id"]
            for answer_id in ("chatcmpl-nope", failed):
                reply = await create(server, response=answer_id)
                assert_error(reply, 404, "response_not_found", "response")

    async def test_another_vocabulary_makes_it_unknown(self, tmp_path: Path):
        async with running(tmp_path) as server:
            answer = (await server.chat()).json()
            vocab = server.source.config_dir / "vocab.txt"
            write_more(vocab)
            assert (await server.post("/admin/models/reload", {})).status == 200
            reply = await create(server, response=answer["id"])
        assert_error(reply, 404, "response_not_found", "response")

    async def test_model_is_the_response_s(self, tmp_path: Path):
        async with running(tmp_path, model_table("m"), model_table("other")) as server:
            answer = (await server.chat()).json()
            assert (await create(server, response=answer["id"])).json()["model"] == "m"
            wrong = await create(server, response=answer["id"], model="other")
        assert_error(wrong, 400, "invalid_value", "model")


def write_more(vocab: Path) -> None:
    write_vocab(vocab)
    with vocab.open("a") as file:
        file.write("257 'hello' 5\n")
