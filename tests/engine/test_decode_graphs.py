"""Replays of decode steps on a CPU: what each seat is given, whatever the size of the batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.decode_graphs import sizes_up_to
from engine.executor import StepExecutor
from engine.plan import StepPlan, StepResult
from engine.runner import ModelRunner
from engine.sampler import Sampler
from engine.types import SamplingParams
from tests.engine.device import (
    CPU,
    GREEDY,
    Device,
    alone,
    bytes_of,
    decode,
    make_device,
    prefill,
    random_model,
    raw_logits,
    start,
)
from tests.engine.replays import HostDraws, Replays

SAMPLED = SamplingParams(temperature=1.3, top_p=0.9, presence_penalty=0.4, has_logprobs=True)


def replaying(num_seats: int = 6, *, with_draws: bool = True) -> tuple[Device, Replays]:
    """A device whose decode steps are replayed; its slots are poisoned after the warm-up."""
    device, recorder = make_device(random_model(), num_slots=8, num_seats=num_seats), Replays()
    sampler = Sampler(
        num_seats, (), CPU, on_device=HostDraws(num_seats, ()) if with_draws else None
    )
    runner = ModelRunner(
        device.model, device.storage, sampler, num_seats, make_recorder=lambda: recorder
    )
    runner.prepare()
    device.storage.poison(1)
    return device._replace(runner=runner), recorder


def test_sizes_end_with_the_largest_batch() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(4) == [1, 2, 4]
    assert sizes_up_to(100)[-2:] == [96, 100]
    assert len(sizes_up_to(512)) == 20
    assert sizes_up_to(1000)[-4:] == [640, 768, 896, 1000]


@pytest.mark.parametrize("with_draws", [True, False])
def test_rows_of_every_number_draw_what_they_draw_alone(with_draws: bool) -> None:
    device, recorder = replaying(with_draws=with_draws)
    assert recorder.num_recorded == 4 * (2 if with_draws else 1)  # 1, 2, 4, 6
    params = [replace(SAMPLED, seed=seat) if seat % 2 else GREEDY for seat in range(6)]
    tokens: dict[int, list[int]] = {}
    for seat in range(6):
        prompt = (4, 5, seat)
        draws = device.run(prefill(seat, prompt, seat + 1), starts=(start(seat, params[seat]),))
        tokens[seat] = [*draws.tokens]
    free = bytes_of(device.storage.slot_tensors(8))
    for seats in ((0,), (5, 1, 3), (0, 1, 2, 3, 4), (2, 4), (5, 4, 3, 2, 1, 0)) * 2:
        rows = [decode(seat, 2 + len(tokens[seat]), seat + 1, seat + 1) for seat in seats]
        for seat, token in zip(seats, device.run(*rows).tokens, strict=True):
            tokens[seat].append(token)
    for seat, drawn in tokens.items():
        assert drawn == alone(device.model, (4, 5, seat), len(drawn), params[seat])
    assert recorder.num_replayed == 10
    assert bytes_of(device.storage.slot_tensors(8)) == free, "a padding row wrote a slot"
    device.storage.check()
    device.runner.close()


def test_rows_that_are_told_more_take_the_logits() -> None:
    device, _ = replaying()
    starts = (start(0), start(1), start(2, replace(GREEDY, num_top_logprobs=2)))
    rows = [prefill(seat, (4, 5), seat + 1) for seat in range(3)]
    first = device.run(*rows, starts=starts).tokens
    keeps = decode(0, 2, 1, 1)._replace(keep_logits=True)
    hidden = decode(1, 2, 2, 2)._replace(returns_hidden=True)
    silent = decode(2, 2, 3, 3)._replace(sample=False)
    draws = device.run(keeps, hidden, silent)
    expected = raw_logits(device.model, [4, 5, first[0]])
    assert torch.allclose(device.storage.logits[1], expected, rtol=0, atol=1e-12)
    assert len(draws.hidden[0]) == 4 * device.model.dims.embedded_dim
    assert draws.tokens == (int(expected.argmax()),) * 2
    assert draws.unsound == ()
    device.storage.poison(3)
    assert device.run(silent).unsound == (2,)
    device.runner.close()


def test_results_come_in_the_order_of_plans_while_the_next_one_is_asked_for() -> None:
    device, _ = replaying()
    results: list[StepResult] = []
    device.runner.start(results.append)
    device.runner.submit(StepPlan(0, (prefill(0, (4, 5), 1),), (start(0),)))
    for step in range(1, 8):
        device.runner.submit(StepPlan(step, (decode(0, 1 + step, 1, 1),)))
    device.runner.submit(StepPlan(8, (prefill(1, (1, 999), 2),), (start(1),)))  # no such token
    device.runner.submit(StepPlan(9, (decode(0, 9, 1, 1),)))
    device.runner.close()
    assert [result.step_id for result in results] == [*range(10)]
    assert "IndexError" in (results[8].error or "")
    tokens = [result.tokens[0] for result in results if result.error is None]
    assert tokens == alone(device.model, (4, 5), 9)


class Broken:
    """Records nothing."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_where_recording_fails_one_line_says_why_and_steps_run_as_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = make_device(random_model())
    executor = StepExecutor(device.model, device.storage, Sampler(4, (), CPU), 4)
    with caplog.at_level(logging.INFO):
        executor.record(Broken())
    assert caplog.messages == ["cuda graphs: off (RuntimeError: operation not permitted)"]
    draws = executor.issue(StepPlan(0, (prefill(0, (4, 5), 1),), (start(0),)))()
    draws = executor.issue(StepPlan(1, (decode(0, 2, 1, 1),)))()
    assert [*draws.tokens] == alone(device.model, (4, 5), 2)[1:]
