"""Bugs of rwkv-rs (github.com/rwkv-rs/rwkv-rs) that must not be here, a test or two for each.

Each goes through HTTP or through the engine, whichever shows it.
"""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import api.generation
from api.server import drain
from api.tool_text import ToolCall, call_text
from engine.grammar_text import choice, regex
from engine.types import FinishReason
from tests.api.harness import (
    Reply,
    chat_body,
    eventually,
    model_table,
    request_bytes,
    running,
)
from tests.api.reloading import RELOAD
from tests.api.scripted import recited, spelled
from tests.engine import real_engines
from tests.engine.real_engines import Oracle, ask, real_table, request, text_ids
from tests.engine.simulation import Simulation
from tests.engine.test_scheduler import ask as asked
from tests.engine.test_scheduler import rows_of
from tests.engine.tracked import Setup
from tests.rwkv_rs import (
    AB,
    FREE,
    MODEL,
    PROMPT,
    assert_same,
    finish_reason,
    finishes,
    guests,
    ids_of,
    is_aborted,
    is_held_up,
    never_answers,
    num_inside,
    only_seat,
    read_slowly,
    started_again,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}

CALL = call_text(ToolCall("weather", '{"a": 1}'))


async def test_bug_01_temperature_zero_is_greedy(tmp_path: Path):
    """rwkv-rs refuses `temperature: 0` with 400, which clients and harnesses send all the time."""
    async with running(tmp_path) as server:
        for body in (chat_body(temperature=0), chat_body(temperature=0.0, seed=1)):
            assert (await server.post("/v1/chat/completions", body)).status == 200
        completion = {"model": "m", "prompt": "a", "temperature": 0, "max_tokens": 3}
        assert (await server.post("/v1/completions", completion)).status == 200
        sampling = [one.sampling for one in server.engine.requests]
    table = real_table(MODEL, tmp_path)
    async with real_engines.opened(table) as core:
        for one in sampling:
            greedy = replace(one, max_tokens=12, stop=(), stop_token_ids=())
            answer = await ask(core, PROMPT, greedy)
            text = [*PROMPT, *answer.token_ids]
            best = Oracle(table).logits(text).argmax(-1)[len(PROMPT) - 1 : -1].tolist()
            assert list(answer.token_ids) == best


async def test_bug_02_slow_reader_loses_nothing_and_stops_nobody(tmp_path: Path):
    """rwkv-rs drops the request, and panics the task, when a reader is 64 events behind."""
    num_tokens = 3000
    body = chat_body(max_tokens=num_tokens, stream=True, logprobs=True, top_logprobs=20)
    async with running(tmp_path) as server:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(request_bytes("POST", "/v1/chat/completions", body))
            await eventually(lambda: server.snapshot().num_running == 1)
            await eventually(lambda: server.snapshot().num_running == 0, 60)  # it is all drawn
            assert is_held_up(server)  # and nobody has read it
            assert (await server.chat()).status == 200
            data = await asyncio.to_thread(read_slowly, sock)
    events = [line[6:] for line in data.decode().split("\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event)["choices"][0] for event in events[:-1]]
    text = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
    num_prompt = len(server.engine.requests[0].prompt_ids)
    assert text == recited(num_prompt, num_tokens).lstrip()
    assert chunks[-1]["finish_reason"] == "length"
    num_logprobs = sum(len((chunk["logprobs"] or {}).get("content") or ()) for chunk in chunks)
    assert num_logprobs == num_tokens


async def test_bug_03_reload_keeps_api_key_and_comments_in_the_file(tmp_path: Path):
    """rwkv-rs writes the TOML back without api_key: after a restart everybody may come in."""
    key = {"authorization": "Bearer sk-one"}
    keys: dict[str, Any] = {"api_key": "sk-one", "api_keys": ["sk-two"], "admin_api_key": "sk-adm"}
    async with running(tmp_path, **keys) as server:
        before = server.config_file.read_text()
        body = {"upsert": [{"model_name": "m", "max_waiting": 99}]}
        assert (await server.post(RELOAD, body, authorization="Bearer sk-adm")).status == 200
        added = {"upsert": [{"model_name": "m", "max_batch_size": 4}]}
        assert (await server.post(RELOAD, added, authorization="Bearer sk-adm")).status == 200
        after = server.config_file.read_text()
        source = server.source
    changed = before.replace("max_batch_size = 8", "max_batch_size = 4")
    assert after == changed + "max_waiting = 99\n"
    assert after.startswith("# a comment to keep\n")
    async with started_again(source, server.builder) as again:
        assert (await again.get("/v1/models")).status == 401
        assert (await again.get("/v1/models", **key)).status == 200
        assert (await again.post(RELOAD, added, **key)).status == 403


async def test_bug_04_submit_racing_with_drain_is_refused_in_words(tmp_path: Path, monkeypatch):
    """rwkv-rs asserts, and so panics, where a request is submitted to a queue that drains."""
    begun, arrived, place = asyncio.Event(), asyncio.Semaphore(0), api.generation.place

    async def place_late(*arguments: Any) -> Any:
        """A drain begins after the route has asked whether there is one, before it submits."""
        placed = await place(*arguments)
        arrived.release()
        await begun.wait()
        return placed

    async with running(tmp_path) as server:
        server.runner.gate.clear()
        early = [asyncio.create_task(server.chat(seed=number)) for number in range(4)]
        await eventually(lambda: num_inside(server) == 4)
        monkeypatch.setattr("api.generation.place", place_late)
        racing = [asyncio.create_task(server.chat(stream=bool(n % 2))) for n in range(6)]
        for _ in racing:
            await arrived.acquire()
        draining = asyncio.create_task(server.service.registry.drain(10))
        await eventually(lambda: not server.snapshot().is_accepting)
        begun.set()
        refused = [await task for task in racing]
        server.runner.gate.set()
        finished = [await task for task in early]
        assert await draining
    for reply in refused:
        assert (reply.status, reply.error["code"]) == (503, "draining")
        assert int(reply.headers["retry-after"]) > 0
    assert [finish_reason(reply) for reply in finished] == ["length"] * 4


async def test_bug_04_drain_under_requests_fails_none_that_was_accepted(tmp_path: Path):
    """The same, with nothing held up: requests come in all the while a server goes down."""
    async with running(tmp_path, delay_s=0.001) as server:
        replies: list[Reply] = []

        async def ask_on() -> None:
            while not replies or replies[-1].status == 200:
                replies.append(await server.chat(max_tokens=3))

        clients = [asyncio.create_task(ask_on()) for _ in range(8)]
        await eventually(lambda: len(replies) > 20)
        server.service.is_draining = True
        await asyncio.wait_for(drain(server.service, server.server), 20)
        await asyncio.wait(clients)
        done = [client.exception() for client in clients]
        num_accepted = len(server.engine.requests)
    answered = [reply for reply in replies if reply.status == 200]
    assert len(answered) == num_accepted
    assert {finish_reason(reply) for reply in answered} == {"length"}
    assert {reply.status for reply in replies} <= {200, 503}, replies
    assert all(error is None or isinstance(error, OSError) for error in done), done


@pytest.mark.parametrize(
    "script",
    [
        "Hm.\n" + call_text(ToolCall("weather", '{"city": "Paris", "when": [1, {"a": "b"}]}')),
        CALL.replace("1}", "}}}", 1),
        CALL.replace('"weather"', "7"),
        CALL.replace('{"a"', "\\u12 \x01 [[[["),
        CALL.replace("weather", "nobody"),
        CALL.replace("{", "[", 1),
    ],
)
async def test_bug_05_cut_or_broken_tool_call_ends_cleanly(
    tmp_path: Path, monkeypatch, caplog, script: str
):
    """rwkv-rs panics on tool JSON that max_tokens cut off, or that is no JSON."""
    async with running(tmp_path) as server:
        first = await server.chat(max_tokens=1, tools=[WEATHER])
        start = "." * first.json()["usage"]["prompt_tokens"]
        monkeypatch.setattr("tests.api.scripted.SCRIPT", f"{start}{script}\0")
        for size in range(1, len(script) + 2, 3):
            whole = await server.chat(max_tokens=size, tools=[WEATHER])
            streamed = await server.chat(max_tokens=size, tools=[WEATHER], stream=True)
            assert whole.status == streamed.status == 200
            end = streamed.events()[-1]["choices"][0]["finish_reason"]
            assert end == finish_reason(whole)
            assert end == "length" or size > len(script)
            for call in whole.json()["choices"][0]["message"].get("tool_calls") or []:
                assert call["function"]["name"] in ("weather", "nobody")
        assert server.snapshot().num_running == 0
        assert (await server.chat()).status == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_bug_06_grammar_leaves_with_the_request_that_a_stop_string_ended(tmp_path: Path):
    """rwkv-rs clears the row of the grammar mask when the grammar ends, not on a stop string."""
    async with only_seat(tmp_path) as core:
        expected = await ask(core, PROMPT, FREE)
    for stopped in (
        replace(AB, stop=("ab", "ba", "aa", "bb")),
        replace(AB, stop_token_ids=(0, *ids_of(core, b"a", b"b", b"ab"))),
        replace(AB, max_tokens=2),
    ):
        async with only_seat(tmp_path) as core:
            bound = await ask(core, PROMPT, stopped)
            assert bound.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            assert set(bound.text) <= {"a", "b"}
            assert_same(await ask(core, PROMPT, FREE), expected)
            other = await ask(
                core, PROMPT, replace(FREE, grammar=choice(["xyz"]), stop_token_ids=(0,))
            )
            assert other.text.startswith("xyz")


async def test_bug_07_decode_first_and_max_context_len_have_an_effect(tmp_path: Path):
    """rwkv-rs reads and checks both keys and then uses neither."""
    schedules = []
    for decode_first in (True, False):
        setup = Setup(paragraph_len=3, max_batch_size=3, depth=1, decode_first=decode_first)
        simulation = Simulation(setup)
        simulation.add(asked(2, max_tokens=50))
        rows_of(simulation)
        simulation.add(asked(60))
        steps = [rows_of(simulation) for _ in range(8)]
        schedules.append([any(decodes for _, _, decodes in rows) for rows in steps])
        assert all(any(not decodes for _, _, decodes in rows) for rows in steps)
    assert schedules[0] == [True] * 8
    assert 0 < sum(schedules[1]) < 4

    body = {"model": "m", "prompt": "x" * 20, "max_tokens": 5}  # and one token in front
    for max_context_len, status, reason in ((26, 200, "length"), (20, 400, None), (0, 200, None)):
        table = model_table(max_context_len=max_context_len)
        async with running(tmp_path / str(max_context_len), table) as server:
            reply = await server.post("/v1/completions", body)
            long = await server.post("/v1/completions", body | {"max_tokens": 100})
        assert reply.status == status, reply
        if reason:
            assert reply.json()["usage"]["total_tokens"] == 26
            assert long.status == 200
            assert long.json()["usage"]["total_tokens"] == 26  # cut, and says so
            assert finish_reason(long) == "length"
        elif status == 400:
            assert reply.error["code"] == "context_length_exceeded"
        else:
            assert long.json()["usage"]["total_tokens"] == 121


async def test_bug_08_thinking_can_be_off_and_is_never_left_in_the_content(
    tmp_path: Path, monkeypatch
):
    """rwkv-rs opens a thought in every chat, and leaves `<think>` text in the content."""
    off: list[dict[str, object]] = [
        {},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ]
    thinking = {"reasoning_effort": "medium"}
    async with running(tmp_path) as server:
        for fields in off:
            assert (await server.chat(**fields)).status == 200
            assert spelled(server.engine.requests[-1].prompt_ids).endswith("\n\nAssistant:")
        first = await server.chat(max_tokens=1, **thinking)
        assert spelled(server.engine.requests[-1].prompt_ids).endswith("Assistant: <think")
        start, answer = "." * first.json()["usage"]["prompt_tokens"], ">\nHm.\n</think>\nYes."
        monkeypatch.setattr("tests.api.scripted.SCRIPT", start + answer)
        whole = await server.chat(max_tokens=len(answer), **thinking)
        streamed = await server.chat(max_tokens=len(answer), stream=True, **thinking)
        cut = await server.chat(max_tokens=5, **thinking)
    message = whole.json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes.", "Hm.")
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed.events()]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Hm."
    assert not cut.json()["choices"][0]["message"]["content"]


async def test_bug_09_prompts_do_not_starve_answers(tmp_path: Path):
    """rwkv-rs computes prompts or answers in a step, prompts first: while new ones come, none
    of the answers that run gets a token."""
    for decode_first in (True, False):
        setup = Setup(paragraph_len=4, max_batch_size=4, num_slots=8, decode_first=decode_first)
        simulation = Simulation(setup)
        answer = simulation.add(asked(2, max_tokens=40)).seq
        rows_of(simulation)
        num_silent, num_mixed = 0, 0
        while not answer.is_finished:
            while simulation.scheduler.num_waiting < 2:
                simulation.add(asked(12, max_tokens=1))  # there is always another prompt
            rows = rows_of(simulation)
            has_decoded = (0, 1, True) in rows
            if answer.is_finished:
                break
            num_silent = 0 if has_decoded else num_silent + 1
            num_mixed += has_decoded and any(not decodes for _, _, decodes in rows)
            assert num_silent <= 3, "an answer gets every fourth step at least"
        assert num_mixed >= 8


async def test_bug_10_random_numbers_do_not_repeat_per_slot(tmp_path: Path):
    """rwkv-rs seeds its generator with the number of the slot, anew for each request: whoever gets
    the slot gets the same numbers, and nobody else can have them again."""
    async with running(tmp_path) as server:
        for _ in range(12):
            assert (await server.chat()).status == 200
        assert (await server.chat(seed=7, n=3)).status == 200
        seeds = [one.sampling.seed for one in server.engine.requests]
    assert len(set(seeds[:12])) == 12
    assert seeds[12:] == [7, 8, 9]

    params = [replace(FREE, seed=seed) for seed in range(8)]
    async with only_seat(tmp_path) as core:
        alone = [await ask(core, PROMPT, one) for one in params]
    assert len({answer.token_ids for answer in alone}) == len(params)
    async with real_engines.opened(real_table(MODEL, tmp_path, max_batch_size=8)) as core:
        # Each in another seat and slot than before, and in company.
        answers = await asyncio.gather(*(ask(core, PROMPT, one) for one in reversed(params)))
    assert [one.token_ids for one in reversed(answers)] == [one.token_ids for one in alone]


async def test_bug_11_nothing_is_left_in_a_slot_or_seat(tmp_path: Path):
    """rwkv-rs has to reset a slot by hand, state, shifts, elapsed_t, penalties, mask and RNG, and
    what is forgotten shows in the next user's text."""
    wanted = [
        FREE,
        replace(FREE, temperature=0.0),
        replace(FREE, presence_penalty=0.7, repetition_penalty=0.2, penalty_decay=0.98),
        replace(FREE, grammar=regex("[a-z ]{20}"), stop_token_ids=(0,)),
    ]
    expected = []
    for params in wanted:
        async with only_seat(tmp_path) as core:
            expected.append(await ask(core, PROMPT, params))
    async with only_seat(tmp_path) as core:
        for number, guest in enumerate(guests(core).values()):
            for which, leave in enumerate((finishes, is_aborted, never_answers), number):
                prompt = text_ids(MODEL, 50 + 9 * number, start=7 * which)
                await leave(core, request(prompt, guest))
                place = which % len(wanted)
                assert_same(await ask(core, PROMPT, wanted[place]), expected[place])
        assert core.snapshot().num_free_slots == 1
