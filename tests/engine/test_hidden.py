"""The row of a prompt's last token: the model's own, whatever batch, chunk or snapshot gave it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import InvalidRequest
from engine.loading import load
from engine.model.rwkv7 import RWKV7, Batch
from engine.types import EngineRequest, FinishReason, OutputDelta, SamplingParams, StateOptions
from tests.engine.device import GREEDY, decode, make_device, prefill, random_model, start
from tests.engine.real_engines import opened, real_table, request, text_ids
from tests.engine.replica import ask, deliver_all, make_core, read_all, running
from tests.hash_model import HashRunner, feed, hidden_of

NOTHING = SamplingParams(temperature=0.0, max_tokens=0)


def embed(request_id: str, *prompt_ids: int, priority: int = 0) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_ids=prompt_ids,
        sampling=NOTHING,
        returns_hidden=True,
        priority=priority,
    )


def test_rows_that_return_it_get_their_own_in_plan_order() -> None:
    device = make_device(random_model(torch.float32))
    device.run(prefill(0, (1, 2, 3), 1), starts=(start(0),))
    asked = [
        prefill(seq, ids, seq + 1)._replace(returns_hidden=True)
        for seq, ids in ((1, (4, 5)), (2, (6,)), (3, (7, 8, 9)))
    ]
    starts = tuple(start(seq) for seq in (1, 2, 3))
    rows = (asked[0], decode(0, 3, 1, 1), asked[1], asked[2])
    hidden = device.run(*rows, starts=starts).hidden
    assert len(hidden) == 3
    for ids, row in zip(((4, 5), (6,), (7, 8, 9)), hidden, strict=True):
        alone = model_row(device.model, list(ids))
        np.testing.assert_allclose(np.frombuffer(row, np.float32), alone, rtol=1e-5, atol=1e-6)
    assert device.run(decode(0, 4, 1, 1)).hidden == ()


def one(prompt_ids: tuple[int, ...], sampling: SamplingParams, **keys: object) -> EngineRequest:
    return EngineRequest(request_id="r", prompt_ids=prompt_ids, sampling=sampling, **keys)  # type: ignore[arg-type]


class TestCore:
    async def test_it_is_that_of_the_state_after_the_last_prompt_token(self) -> None:
        runner = HashRunner()
        async with running(make_core(runner)) as core:
            streams = [core.submit(embed(str(i), *range(i, i + 9))) for i in range(6)]
            await deliver_all(runner)
            answers = [await read_all(stream) for stream in streams]
        for i, answer in enumerate(answers):
            state = 0
            for token in range(i, i + 9):
                state = feed(state, token)
            assert answer.hidden == hidden_of(state)
            assert answer.finish_reason is FinishReason.LENGTH
            assert (answer.num_prompt_tokens, answer.num_output_tokens) == (9, 0)
            assert (answer.text, answer.token_ids) == ("", ())

    async def test_other_answers_have_none(self) -> None:
        runner = HashRunner()
        async with running(make_core(runner)) as core:
            stream, other = core.submit(ask()), core.submit(embed("e", 1, 2))
            await deliver_all(runner)
            assert (await read_all(stream)).hidden == b""
            assert (await read_all(other)).hidden != b""

    async def test_a_failed_step_and_bad_logits_fail_the_request(self) -> None:
        runner = HashRunner(bad_every=1)
        async with running(make_core(runner)) as core:
            stream = core.submit(embed("e", 1, 2))
            await deliver_all(runner)
            answer = await read_all(stream)
        assert answer.finish_reason is FinishReason.ERROR
        assert "not finite" in (answer.error or "")

    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (one((1,), GREEDY, returns_hidden=True), "returns_hidden"),
            (
                one((1,), NOTHING, returns_hidden=True, keep_state=StateOptions()),
                "returns_hidden",
            ),
            (one((), NOTHING, returns_hidden=True), "prompt_ids"),
            (one((1,), NOTHING, returns_hidden=True, scores_from=0), "returns_hidden"),
        ],
    )
    async def test_what_does_not_go_together(self, request_: EngineRequest, field: str) -> None:
        async with running(make_core(HashRunner())) as core:
            with pytest.raises(InvalidRequest) as refusal:
                core.submit(request_)
        assert refusal.value.field == field


def row_of(answer: OutputDelta) -> np.ndarray:
    assert answer.error is None, answer.error
    return np.frombuffer(answer.hidden, dtype=np.float32)


def model_row(model: RWKV7, ids: list[int]) -> np.ndarray:
    """The last row [C] after ln_out, by the model alone, the whole text at once."""
    state, slots = model.new_state(1, "cpu"), torch.tensor([0])
    with torch.inference_mode():
        rows_TC = model(torch.tensor(ids), Batch((len(ids),), slots, slots), state)
    return rows_TC[-1].float().numpy()


async def test_it_equals_the_models_own_row_with_and_without_snapshots(tmp_path: Path) -> None:
    """Texts that begin alike, in one batch and again one by one, beside an answer."""
    table = real_table("embedded-float64", tmp_path)
    model = load(table, torch.device("cpu"), torch.float64)
    texts = [text_ids("embedded-float64", length) for length in (2, 17, 60, 61, 90, 90)]
    async with opened(table) as core:

        async def embed_all() -> list[OutputDelta]:
            asked = [request(ids, NOTHING, returns_hidden=True) for ids in texts]
            return await asyncio.gather(*(core.submit(one).collect() for one in asked))

        answer = core.submit(request(texts[2], SamplingParams(temperature=0.0, max_tokens=8)))
        together = await embed_all()
        again = [
            await core.submit(request(ids, NOTHING, returns_hidden=True)).collect() for ids in texts
        ]
        await answer.collect()
    for ids, first, second in zip(texts, together, again, strict=True):
        for found in (first, second):
            np.testing.assert_allclose(row_of(found), model_row(model, ids), rtol=1e-6, atol=1e-6)
    assert all(
        0 < delta.num_cached_tokens < len(ids)
        for delta, ids in zip(again[2:], texts[2:], strict=True)
    )
