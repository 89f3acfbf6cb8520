"""Results of calls, as input items and behind previous_response_id; tools that states know."""

from __future__ import annotations

from pathlib import Path

from openai.types.responses import Response

from api.tool_text import definitions
from tests.api.harness import running
from tests.api.scripted import spelled
from tests.api.test_response_tools import CALLS, NOW, THOUGHT, TOOLS, WEATHER, answered
from tests.api.test_responses import ITEM, PATH, ask, well


def results(*texts: str) -> list[dict]:
    return [
        {"type": "function_call_output", "call_id": f"call_{number}", "output": text}
        for number, text in enumerate(texts)
    ]


RESULTS = (
    '\n### Tool Output\n```json\n"31 C"\n```\n### Tool Output\n```json\n29\n```\n### Assistant'
)


class TestResults:
    async def test_output_can_be_sent_back_as_input(self, tmp_path: Path, monkeypatch):
        fields = {"tools": [WEATHER], "reasoning": {"effort": "low"}}
        async with running(tmp_path) as server:
            first = await answered(server, monkeypatch, THOUGHT + CALLS[1:], **fields)
            said = first.json()["output"]
            given = [{"role": "user", "content": "hi"}, *said, *results("31 C", "29")]
            response = well(await ask(server, input=given, tools=[WEATHER]))
            sent = spelled(server.engine.requests[-1].prompt_ids)
            items = (await server.get(f"{PATH}/{response.id}/input_items?order=asc")).json()
        assert sent.endswith(f"### User\nhi\n### Assistant{CALLS}{RESULTS}")
        for item in items["data"]:
            ITEM.validate_python(item, strict=True)
        assert [item["type"] for item in items["data"]] == [
            "message",
            "reasoning",
            "message",
            *["function_call"] * 2,
            *["function_call_output"] * 2,
        ]
        assert items["data"][3]["call_id"] == said[2]["call_id"]
        assert items["data"][5]["output"] == "31 C"

    async def test_results_may_be_parts(self, tmp_path: Path):
        parts = [{"type": "input_text", "text": text} for text in ("3", "4")]
        output = {"type": "function_call_output", "call_id": "1", "output": parts}
        async with running(tmp_path) as server:
            response = well(await ask(server, input=[output]))
            sent = spelled(server.engine.requests[-1].prompt_ids)
            (item,) = (await server.get(f"{PATH}/{response.id}/input_items")).json()["data"]
        assert sent == '### Tool Output\n```json\n"3\\n4"\n```\n### Assistant'
        ITEM.validate_python(item, strict=True)
        assert item["output"] == parts

    async def test_state_goes_on_with_the_results_alone(self, tmp_path: Path, monkeypatch):
        tools = {"tools": [WEATHER]}
        async with running(tmp_path) as server:
            first = well(await answered(server, monkeypatch, CALLS, **tools))
            given = {"input": results("31 C", "29"), "previous_response_id": first.id}
            second = well(await ask(server, **given, **tools))
            sent = server.engine.requests[-1]
            assert sent.state_id is not None
            assert spelled(sent.prompt_ids) == RESULTS
            base = server.states.find(sent.owner, sent.state_id).ids
            # The same conversation without its state.
            server.states.kept.clear()
            well(await ask(server, **given, **tools))
            from_text = server.engine.requests[-1]
            # The third turn goes on in the same form, whether there are tools or not.
            for fields in ({}, tools):
                well(await ask(server, input="Bye", previous_response_id=second.id, **fields))
                assert server.engine.requests[-1].state_id is None
                assert spelled(server.engine.requests[-1].prompt_ids).count("### `weather`") == 1
        assert from_text.state_id is None
        assert spelled(from_text.prompt_ids) == spelled((*base, *sent.prompt_ids))

    async def test_tools_are_told_once_and_others_anew(self, tmp_path: Path):
        async with running(tmp_path) as server:

            async def added(previous: Response, **fields: object) -> tuple[Response, str]:
                asked = {"input": "more", "previous_response_id": previous.id, **fields}
                response = well(await ask(server, **asked))
                sent = server.engine.requests[-1]
                assert sent.state_id is not None
                return response, spelled(sent.prompt_ids)

            first = well(await ask(server, tools=[WEATHER]))
            same, text = await added(first, tools=[WEATHER])
            assert text == "\n### User\nmore\n### Assistant"
            none, text = await added(same)
            assert text == "\n### User\nmore\n### Assistant"
            again, text = await added(none, tools=[WEATHER])
            assert text == "\n### User\nmore\n### Assistant"
            _, text = await added(again, tools=[NOW], instructions="Be kind.")
            told = definitions([TOOLS[1]])
            assert text == f"\n### System\nBe kind.\n{told}\n### User\nmore\n### Assistant"

    async def test_tools_that_come_later_are_told_then(self, tmp_path: Path):
        async with running(tmp_path) as server:
            first = well(await ask(server))
            fields = {"previous_response_id": first.id, "tools": [NOW]}
            well(await ask(server, **fields))
            assert "### `now`" in spelled(server.engine.requests[-1].prompt_ids)
            server.states.kept.clear()
            well(await ask(server, **fields))
            text = spelled(server.engine.requests[-1].prompt_ids)
        assert text.startswith("### User\nhi\n### Assistant\n")
        assert text.endswith(
            f"\n### System\n{definitions([TOOLS[1]])}\n### User\nhi\n### Assistant"
        )
