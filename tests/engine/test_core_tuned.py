"""EngineCore: initial states by name, and texts on different states that never mix."""

from __future__ import annotations

import pytest

from engine.errors import InvalidRequest
from engine.types import OutputDelta, StateInfo, StateOptions
from tests.engine.machine import Machine, assert_answers, text_state
from tests.engine.replica import ask, read_all

PROMPT = (5, 6, 7, 8, 9, 10, 11)
MORE = (300, 301, 302)
KEEP = StateOptions()


def kept(delta: OutputDelta) -> StateInfo:
    assert delta.state is not None, f"{delta.finish_reason}: {delta.error}"
    return delta.state


TUNED = {"poet": 12345, "clerk": 999}


async def test_a_tuned_state_stands_for_the_zero_state() -> None:
    async with Machine(tuned=TUNED, num_slots=9) as machine:
        for name, state in TUNED.items():
            request = ask(name, PROMPT, initial_state=name)
            delta = await machine.answer(request)
            assert_answers(delta, request, (state, 0))
            assert (delta.num_cached_tokens, delta.num_state_tokens) == (0, 0)
        again = ask("again", PROMPT, initial_state="clerk", seed=4)
        delta = await machine.answer(again)
        assert_answers(delta, again, (999, 0))
        assert delta.num_cached_tokens == len(PROMPT)
        await machine.check_is_sound()


async def test_texts_behind_other_states_or_salts_never_mix() -> None:
    """The same tokens, all at once and once more, on each beginning."""
    async with Machine(tuned=TUNED, num_frames=40) as machine:
        made = [ask(f"m{i}", (i, i), max_tokens=0, keep_state=KEEP) for i in range(2)]
        states = [kept(await machine.answer(request)) for request in made]
        bases: dict[str | None, tuple[int, int]] = {
            None: (0, 0),
            **{name: (state, 0) for name, state in TUNED.items()},
        }
        requests = []
        for salt in ("", "a", "b"):
            for name, base in bases.items():
                one = ask(f"{salt} {name}", PROMPT, initial_state=name, cache_salt=salt)
                requests.append((one, base))
            for i, state in enumerate(states):
                one = ask(f"{salt} {i}", PROMPT, state_id=state.state_id, cache_salt=salt)
                requests.append((one, text_state((i, i))))
        for _ in range(2):
            streams = [machine.core.submit(request) for request, _ in requests]
            await machine.settle()
            for (request, base), stream in zip(requests, streams, strict=True):
                assert_answers(await read_all(stream), request, base)
        await machine.check_is_sound()


async def test_an_unknown_initial_state_is_refused_with_the_names_there_are() -> None:
    async with Machine(tuned=TUNED) as machine:
        with pytest.raises(
            InvalidRequest, match=r"'sailor' is not served.* poet, clerk"
        ) as refused:
            machine.core.submit(ask(initial_state="sailor"))
        assert refused.value.field == "initial_state"


async def test_a_request_cannot_begin_from_two_states() -> None:
    async with Machine(tuned=TUNED) as machine:
        state = kept(await machine.answer(ask("r", PROMPT, max_tokens=0, keep_state=KEEP)))
        with pytest.raises(InvalidRequest, match="exclude each other"):
            machine.core.submit(ask(initial_state="poet", state_id=state.state_id))
