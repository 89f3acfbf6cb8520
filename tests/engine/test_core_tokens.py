"""Which tokens a reader gets when: those of the text that is certain, and at the end the rest."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.plan import NO_TOKEN, Row
from engine.types import EngineRequest, FinishReason, OutputDelta, StateOptions
from tests.engine.replica import (
    ask,
    assert_is_free,
    deliver_all,
    hash_tokenizer,
    make_core,
    read_all,
    running,
    turn,
)
from tests.hash_model import VOCAB_SIZE, HashModel, HashRunner, oracle, scores_of


async def deltas_of(request: EngineRequest, **keys: int) -> list[OutputDelta]:
    """One for each step that had something to tell."""
    runner, deltas = HashRunner(), list[OutputDelta]()
    async with running(make_core(runner, **keys)) as core:
        stream = core.submit(request)
        await turn()
        while runner.plans:
            runner.deliver()
            await turn()
            if (delta := stream.poll()) is not None:
                deltas.append(delta)
        assert_is_free(core)
    return deltas


def some_stops(request: EngineRequest, rng: random.Random) -> tuple[str, ...]:
    """Pieces of what the request would say, so that some match and some only begin to."""
    text = hash_tokenizer().decode(oracle(request).token_ids)
    begins = [rng.randrange(len(text)) for _ in range(3)]
    pieces = [text[begin : begin + rng.randint(1, 6)] for begin in begins]
    return (*pieces, text[-3:] + "x")


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("includes_stop", [False, True])
async def test_tokens_come_when_their_text_is_certain(seed: int, includes_stop: bool) -> None:
    rng = random.Random(seed)
    request = ask(prompt_ids=(seed + 1,), max_tokens=14, seed=seed)
    sampling = replace(
        request.sampling,
        stop=some_stops(request, rng),
        min_tokens=rng.choice((0, 0, 4)),
        includes_stop=includes_stop,
    )
    *before, end = await deltas_of(replace(request, sampling=sampling))
    token_bytes = hash_tokenizer().token_bytes
    begin = num_text_bytes = 0
    for delta in before:
        for token in delta.token_ids:
            assert begin < delta.num_text_bytes, "a token of which nothing is certain"
            begin += len(token_bytes(token))
        assert begin >= delta.num_text_bytes, "text without its tokens"
        assert delta.num_text_bytes >= num_text_bytes
        num_text_bytes = delta.num_text_bytes
    tokens = [token for delta in (*before, end) for token in delta.token_ids]
    assert tuple(tokens) == oracle(request).token_ids[: end.num_output_tokens]
    whole = b"".join(map(token_bytes, tokens))
    text = "".join(delta.text for delta in (*before, end))
    assert whole[: end.num_text_bytes].decode("utf-8", "replace") == text
    if end.matched_stop is not None:
        data = end.matched_stop.encode()
        place = end.num_text_bytes - len(data) if includes_stop else end.num_text_bytes
        assert whole[place : place + len(data)] == data
        assert len(tokens) > sampling.min_tokens


async def test_a_stop_token_may_stay_in_the_text() -> None:
    tokens = oracle(ask(max_tokens=5)).token_ids
    request = ask(max_tokens=5, stop_token_ids=(tokens[3],))
    (*_, without) = await deltas_of(request)
    included = replace(request, sampling=replace(request.sampling, includes_stop=True))
    deltas = await deltas_of(included)
    text = "".join(delta.text for delta in deltas)
    assert text == hash_tokenizer().decode(tokens[:4])
    assert deltas[-1].finish_reason is without.finish_reason is FinishReason.STOP
    assert without.num_text_bytes < deltas[-1].num_text_bytes


class Refusing(HashModel):
    """Has nothing left to draw at the position `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _sample(self, row: Row, state: int) -> int:
        token = super()._sample(row, state)
        return NO_TOKEN if row.position + row.num_tokens >= self.at else token


@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_an_answer_ends_where_nothing_is_left_to_draw(num_tokens: int) -> None:
    request = ask(max_tokens=6)
    runner = HashRunner()
    runner.model = Refusing(len(request.prompt_ids) + num_tokens)
    async with running(make_core(runner)) as core:
        stream = core.submit(request)
        await deliver_all(runner)
        delta = await read_all(stream)
        assert_is_free(core)
        assert core._pipeline.is_empty
    assert delta.finish_reason is FinishReason.STOP
    assert delta.token_ids == oracle(request).token_ids[:num_tokens]
    assert delta.text == hash_tokenizer().decode(delta.token_ids)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 13])
@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_prompt_logprobs_come_at_once_and_first(length: int, max_tokens: int) -> None:
    prompt = tuple(range(7, 7 + length))
    request = replace(ask(prompt_ids=prompt, max_tokens=max_tokens), scores_from=1)
    deltas = await deltas_of(request)
    assert deltas[0].prompt_logprobs == tuple(scores_of(request))
    assert not any(delta.prompt_logprobs for delta in deltas[1:])
    assert deltas[-1].num_output_tokens == max_tokens


async def test_prompt_logprobs_do_not_wait_for_text() -> None:
    """The first tokens may be bytes of a character, or the beginning of a stop string."""
    asked = (
        replace(ask(prompt_ids=(5, 6, 7, 8, 9), max_tokens=6, seed=seed), scores_from=0)
        for seed in range(100)
    )
    texts = ((one, hash_tokenizer().decode(oracle(one).token_ids)) for one in asked)
    request, text = next((one, text) for one, text in texts if "\ufffd" not in text)
    sampling = replace(request.sampling, stop=(text + "and more",))
    first, last = await deltas_of(replace(request, sampling=sampling))
    assert (first.text, first.token_ids) == ("", ())
    assert len(first.prompt_logprobs) == 4
    assert last.text == text


async def test_a_prompt_alone_needs_no_host_memory_unless_it_is_to_be_kept() -> None:
    (only,) = await deltas_of(ask(max_tokens=0))
    assert (only.finish_reason, only.token_ids, only.state) == (FinishReason.LENGTH, (), None)
    (kept,) = await deltas_of(ask(max_tokens=0, keep_state=StateOptions()), num_frames=4)
    assert kept.state is not None


async def test_a_failed_prompt_has_no_logprobs() -> None:
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        stream = core.submit(replace(ask(prompt_ids=tuple(range(60))), scores_from=0))
        await turn()
        runner.deliver()
        await turn()
        runner.deliver_failure()
        await deliver_all(runner)
        delta = await read_all(stream)
    assert delta.finish_reason is FinishReason.ERROR
    assert delta.prompt_logprobs == ()


def test_vocabulary_has_texts_of_several_lengths() -> None:
    """Else the first test here would show little."""
    lengths = {len(hash_tokenizer().token_bytes(token)) for token in range(VOCAB_SIZE)}
    assert lengths > {0, 1, 4, 5}
