"""previous_response_id: from the state where there is one, else from the text, the same words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.api.harness import Running, eventually, model_table, running
from tests.api.scripted import recited, spelled
from tests.api.test_responses import PATH, ask, events_of, well

FIRST = "User: hi\n\nAssistant:"


async def whole_text(server: Running) -> str:
    """What the newest request stands for: the text of its state and its prompt."""
    asked = server.engine.requests[-1]
    base = () if asked.state_id is None else server.states.find(asked.owner, asked.state_id).ids
    return spelled((*base, *asked.prompt_ids))


def trimmed(text: str) -> str:
    """A message in a history has no space around it, an answer in a state what the model gave."""
    return re.sub(r" *(\n\n|Assistant:) *", r"\1", text)


async def follow(server: Running, previous: str, text: str = "more", **fields: object):
    return well(await ask(server, input=text, previous_response_id=previous, **fields))


class TestFromState:
    async def test_only_the_new_items_are_computed(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = well(await ask(server))
            second = await follow(server, first.id)
            asked = server.engine.requests[1]
            text = await whole_text(server)
        added = "\n\nUser: more\n\nAssistant:"
        num_before = len(FIRST) + 1 + 6
        assert spelled(asked.prompt_ids) == added
        assert text == f"{FIRST}{recited(len(FIRST) + 1, 6)}{added}"
        assert second.previous_response_id == first.id
        assert second.output_text == recited(num_before + len(added), 6).lstrip()
        assert second.usage is not None
        assert second.usage.input_tokens == num_before + len(added)
        assert second.usage.input_tokens_details.cached_tokens == num_before

    async def test_cost_of_a_turn_does_not_depend_on_its_history(self, tmp_path: Path):
        async with running(tmp_path) as server:
            response = well(await ask(server))
            for _ in range(10):
                response = await follow(server, response.id)
            lengths = {len(request.prompt_ids) for request in server.engine.requests[1:]}
        assert len(lengths) == 1

    async def test_two_branches_of_one_response(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = well(await ask(server))
            texts = []
            for text in ("left", "right"):
                await follow(server, first.id, text)
                texts.append(await whole_text(server))
        assert texts[0].replace("left", "right") == texts[1]

    async def test_a_streamed_response_can_be_followed(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = events_of(await ask(server, stream=True))[-1]["response"]
            await follow(server, first["id"], stream=False)
            assert server.engine.requests[1].state_id is not None

    async def test_store_false_goes_on_and_leaves_nothing(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = well(await ask(server))
            await follow(server, first.id, store=False)
            assert server.engine.requests[1].state_id is not None
            assert len(server.states.kept) == 1

    async def test_instructions_stay_in_effect_and_are_told_once(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = well(await ask(server, instructions="A"))
            same = await follow(server, first.id, instructions="A")
            assert spelled(server.engine.requests[-1].prompt_ids) == "\n\nUser: more\n\nAssistant:"
            none = await follow(server, same.id)
            await follow(server, none.id, instructions="A")
            assert "System" not in spelled(server.engine.requests[-1].prompt_ids)
            await follow(server, none.id, instructions="B")
            text = spelled(server.engine.requests[-1].prompt_ids)
        assert text == "\n\nSystem: B\n\nUser: more\n\nAssistant:"


class TestFromText:
    """The state is gone: the conversation is computed again from what is stored."""

    async def test_gives_the_words_that_the_state_stood_for(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = well(await ask(server, instructions="A"))
            second = await follow(server, first.id)
            await follow(server, second.id, "last")
            from_state = await whole_text(server)
            server.states.kept.clear()
            third = await follow(server, second.id, "last")
            from_text = await whole_text(server)
            assert server.engine.requests[-1].state_id is None
            assert server.engine.requests[-1].prompt_ids[0] == 0
            # It has left a state again.
            await follow(server, third.id, "more")
            assert server.engine.requests[-1].state_id is not None
        assert trimmed(from_text) == trimmed(from_state)

    async def test_begins_at_the_last_state_there_is(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = well(await ask(server))
            first_state = next(iter(server.states.kept))
            second = await follow(server, first.id)
            for state_id in [*server.states.kept]:
                if state_id != first_state:
                    server.states.delete("", state_id)
            await follow(server, second.id, "last")
            asked = server.engine.requests[-1]
        assert asked.state_id == first_state
        said = second.output_text.strip()
        assert spelled(asked.prompt_ids) == (
            f"\n\nUser: more\n\nAssistant: {said}\n\nUser: last\n\nAssistant:"
        )

    async def test_where_the_text_is_gone_too_it_says_so(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = well(await ask(server))
            second = await follow(server, first.id)
            await server.request("DELETE", f"{PATH}/{first.id}")
            await follow(server, second.id)  # its own state is enough
            server.states.kept.clear()
            reply = await ask(server, previous_response_id=second.id)
        assert (reply.status, reply.error["param"]) == (400, "previous_response_id")
        assert reply.error["code"] == "previous_response_not_found"
        assert first.id in reply.error["message"]

    async def test_another_model_goes_on_from_the_text(self, tmp_path: Path):
        async with running(tmp_path, model_table(), model_table("other")) as server:
            first = well(await ask(server))
            second = await follow(server, first.id, model="other")
            request = server.engine.requests[-1]
        assert second.model == "other"
        assert request.state_id is None
        assert spelled(request.prompt_ids).startswith(FIRST)

    async def test_it_begins_with_the_same_tuned_state(self, tmp_path: Path):
        tuned = tmp_path / "tuned.safetensors"
        tuned.write_bytes(b"")
        table = model_table(initial_states=[str(tuned)])
        async with running(tmp_path, table) as server:
            first = well(await ask(server, initial_state="tuned"))
            second = await follow(server, first.id)
            assert server.engine.requests[-1].initial_state is None
            server.states.kept.clear()
            await follow(server, second.id)
            assert server.engine.requests[-1].initial_state == "tuned"


class TestRoom:
    async def test_the_oldest_responses_give_up_their_states(self, tmp_path: Path):
        async with running(tmp_path) as server:
            limit = server.engine.info.num_frames // 4
            first = well(await ask(server))
            for _ in range(limit + 3):
                well(await ask(server))
            await eventually(lambda: len(server.states.kept) == limit)
            await follow(server, first.id)
            assert server.engine.requests[-1].state_id is None  # but its text is there

    async def test_without_room_for_a_state_the_response_is_stored_all_the_same(
        self, tmp_path: Path
    ):
        async with running(tmp_path) as server:
            server.engine.refuses_states = True
            first = well(await ask(server))
            assert server.engine.requests[-1].keep_state is None
            second = await follow(server, first.id)
        assert second.previous_response_id == first.id


@pytest.mark.parametrize("status", ["unknown", "failed"])
async def test_what_cannot_be_followed_is_refused(tmp_path: Path, status: str):
    async with running(tmp_path) as server:
        response_id = "resp_unknown"
        if status == "failed":
            server.runner.fail_next = "out of luck"
            events = events_of(await ask(server, stream=True))
            response_id = events[0]["response"]["id"]
        reply = await ask(server, previous_response_id=response_id)
    assert (reply.status, reply.error["param"]) == (400, "previous_response_id")
    assert response_id in reply.error["message"]
