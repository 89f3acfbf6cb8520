"""Pages that travel between slots and frames, on several models: nothing of it shows in a text.

The device's side is driven by random schedules here, and whatever is free is poisoned with NaN;
then the whole engine is, behind its own scheduler.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import config
import engine.engine
from config import load_model as load_model_config
from config.schema import ModelConfig
from engine.engine import Engine, build
from engine.executor import Read
from engine.model.rwkv7 import RWKV7
from engine.model.weights import load_model
from engine.plan import PageMove, SeatStart, StepPlan, StepResult
from engine.runner import ModelRunner
from engine.state.pool import SlotPool
from engine.types import SamplingParams
from tests.conftest import SHARED_DIR
from tests.engine.device import (
    CPU,
    Device,
    alone,
    decode,
    load,
    make_device,
    prefill,
    random_model,
    raw_logits,
    start,
    store,
)
from tests.engine.test_engine import plain, random_request, table, vocab

__all__ = ["vocab"]  # a fixture

CONFIG_DIR = Path(config.__file__).parent
CHAT_DEMO = SHARED_DIR / "assets/models/rwkv7-chat-demo-D128-L4-V2048.pth"
SAMPLED = SamplingParams(
    seed=11, top_p=0.9, presence_penalty=0.4, repetition_penalty=0.1, penalty_decay=0.98,
    has_logprobs=True,
)  # fmt: skip


@cache
def embedded(dtype: torch.dtype) -> RWKV7:
    cfg = load_model_config(CONFIG_DIR, "rwkv-lm-tiny")
    return load_model(CONFIG_DIR / "assets/rwkv-lm-tiny.safetensors", cfg, CPU, dtype)


@cache
def chat_demo(dtype: torch.dtype) -> RWKV7:
    if not CHAT_DEMO.is_file():
        pytest.skip(f"needs {CHAT_DEMO.name} in shared/assets/models beside the checkout")
    cfg = ModelConfig(name="demo", num_cells=4, vocab_size=2048, embedded_dim=128, num_heads=2)
    return load_model(CHAT_DEMO, cfg, CPU, dtype)


MODELS: dict[str, Callable[[], RWKV7]] = {
    "random-float64": lambda: random_model(torch.float64),
    "random-bfloat16": lambda: random_model(torch.bfloat16),
    "embedded-float32": lambda: embedded(torch.float32),
    "embedded-float64": lambda: embedded(torch.float64),
    "chat-demo-float32": lambda: chat_demo(torch.float32),
}


def prompt_of(model: RWKV7, rng: random.Random, num_tokens: int) -> tuple[int, ...]:
    return (0, *(rng.randrange(1, model.dims.vocab_size) for _ in range(num_tokens - 1)))


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_a_page_that_was_away_continues_with_the_same_tokens_and_logprobs(
    name: str, temperature: float
) -> None:
    model, sampling = MODELS[name](), replace(SAMPLED, temperature=temperature)
    prompt, num_tokens = prompt_of(model, random.Random(3), 20), 16

    def run(*, leaves_after: int) -> tuple[list[int], list[float]]:
        device, slot = make_device(model, num_slots=3), 1
        draws = [device.run(prefill(0, prompt, 1), starts=(start(0, sampling),))]
        for step in range(num_tokens - 1):
            moves: tuple[PageMove, ...] = ()
            if step == leaves_after:
                device.run(moves=(store(slot, 2),))
                device.storage.poison(slot)
                moves, slot = (load(2, 3),), 3
            draws.append(device.run(decode(0, len(prompt) + step, slot, slot), moves=moves))
        return [d.tokens[0] for d in draws], [d.logprobs[0] for d in draws]

    stayed = run(leaves_after=-1)
    for leaves_after in (0, 7, num_tokens - 2):
        assert run(leaves_after=leaves_after) == stayed  # exactly, in any dtype
    tokens, logprobs = stayed
    assert tokens == alone(model, prompt, num_tokens, sampling)
    if name != "random-bfloat16":  # its logits depend on the chunking by more than the tolerance
        tolerance = 1e-5 if name.endswith("32") else 1e-12
        for i in range(num_tokens):
            whole = raw_logits(model, [*prompt, *tokens[:i]]).log_softmax(-1)
            assert logprobs[i] == pytest.approx(float(whole[tokens[i]]), abs=tolerance)


@pytest.mark.parametrize("name", ["random-float64", "embedded-float32"])
def test_any_slot_is_as_good_as_any_other(name: str) -> None:
    model = MODELS[name]()
    prompt = prompt_of(model, random.Random(4), 9)
    answers = set()
    for src in range(1, 5):
        for dst in range(1, 5):
            device = make_device(model)
            first = device.run(prefill(0, prompt, src), starts=(start(0, SAMPLED),))
            second = device.run(decode(0, len(prompt), src, dst))
            answers.add((first, second, device.run(decode(0, len(prompt) + 1, dst, dst))))
    assert len(answers) == 1


class Swapper:
    """Runs more sequences than slots: each step some rows, and random pages go and come back.

    Whatever is free after a step is poisoned.
    """

    def __init__(self, device: Device, prompts: list[tuple[int, ...]], seed: int) -> None:
        self.device, self.prompts = device, prompts
        self.rng = random.Random(seed)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.slots: dict[int, int] = {}  # by sequence
        self.frames: dict[int, int] = {}
        self.num_moves = 0

    def free(self, count: int, taken: dict[int, int]) -> list[int]:
        free = [place for place in range(1, count + 1) if place not in taken.values()]
        self.rng.shuffle(free)
        return free

    def step(self, num_tokens: int) -> None:
        storage, frames = self.device.storage, self.device.frames
        moves: list[PageMove] = []
        starts: list[SeatStart] = []
        for seq in [seq for seq in self.slots if self.rng.random() < 0.3]:
            if free := self.free(frames.num_frames, self.frames):
                self.frames[seq] = free[0]
                moves.append(store(self.slots.pop(seq), free[0]))
        for seq in self.rng.sample(list(self.frames), len(self.frames)):
            if (free := self.free(storage.num_slots, self.slots)) and self.rng.random() < 0.5:
                self.slots[seq] = free[0]
                moves.append(load(self.frames.pop(seq), free[0]))
                starts.append(start(seq, params_of(seq), output=self.tokens[seq]))
        rows = [
            decode(seq, len(self.prompts[seq]) + len(self.tokens[seq]) - 1, slot, slot)
            for seq, slot in self.slots.items()
            if len(self.tokens[seq]) < num_tokens and self.rng.random() < 0.8
        ]
        waiting = [seq for seq, tokens in enumerate(self.tokens) if not tokens]
        if waiting and (free := self.free(storage.num_slots, self.slots)):
            seq = waiting[0]
            self.slots[seq] = free[0]
            rows.append(prefill(seq, self.prompts[seq], free[0]))
            starts.append(start(seq, params_of(seq)))
        self.rng.shuffle(rows)
        draws = self.device.run(*rows, starts=tuple(starts), moves=tuple(moves))
        for row, token in zip(rows, draws.tokens, strict=True):
            self.tokens[row.seq_id].append(token)
        self.num_moves += len(moves)
        for slot in self.free(storage.num_slots, self.slots):
            storage.poison(slot)
        for frame in self.free(frames.num_frames, self.frames):
            frames.poison_frame(frame)


def params_of(seq: int) -> SamplingParams:
    return replace(SAMPLED, seed=seq, temperature=0.0 if seq % 3 == 0 else 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_sequences_that_take_turns_in_few_slots_equal_those_that_ran_alone(seed: int) -> None:
    model, rng, num_tokens = random_model(), random.Random(seed), 12
    prompts = [prompt_of(model, rng, rng.randint(1, 12)) for _ in range(7)]
    device = make_device(model, num_slots=3, num_frames=6, num_seats=7)
    swapper = Swapper(device, prompts, seed)
    while min(len(tokens) for tokens in swapper.tokens) < num_tokens:
        swapper.step(num_tokens)
    device.storage.check()
    assert swapper.num_moves > 30
    for seq, prompt in enumerate(prompts):
        assert swapper.tokens[seq] == alone(model, prompt, num_tokens, params_of(seq))


class PoisoningRunner(ModelRunner):
    """Fills every place that was free when a plan was submitted with NaN when it has run.

    Nobody can have it until a later plan, which writes it before anyone reads it. That holds for
    frames only as long as no disk's worker fills them too.
    """

    slots: SlotPool | None = None
    frames: SlotPool | None = None
    num_poisoned_slots = num_poisoned_frames = 0

    def start(self, on_result: Callable[[StepResult], None]) -> None:
        self.free: dict[int, tuple[list[int], list[int]]] = {}
        super().start(on_result)

    def submit(self, plan: StepPlan) -> None:
        assert self.slots is not None
        frames = [] if self.frames is None else [*self.frames._free]
        self.free[plan.step_id] = [*self.slots._free], frames
        super().submit(plan)

    def issue(self, plan: StepPlan) -> Read:
        read = super().issue(plan)
        if self.slots is not None:  # None while the engine warms up
            slots, frames = self.free.pop(plan.step_id)
            for slot in slots:
                self._executor._storage.poison(slot)
            for frame in frames:
                self._executor._storage._frames.poison_frame(frame)
            self.num_poisoned_slots += len(slots)
            self.num_poisoned_frames += len(frames)
        return read


@pytest.mark.parametrize("num_state_slots", [4, 7])
async def test_poison_in_whatever_is_free_changes_no_text(
    num_state_slots: int, vocab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.engine, "ModelRunner", PoisoningRunner)
    core = build(table(vocab, num_state_slots=num_state_slots, host_state_mib=1))
    runner = core._pipeline._runner
    assert isinstance(runner, PoisoningRunner)
    tiers = core._scheduler.cache.tiers
    runner.slots, runner.frames = tiers.slots, tiers.frames
    rng = random.Random(12)
    base = [0, *(rng.randint(1, 256) for _ in range(120))]
    requests = []
    for _ in range(20):
        prompt, params = random_request(rng)
        requests.append((base[: rng.choice([0, 40, 120])] + prompt, params))

    async def answer(prompt: list[int], params: SamplingParams) -> list[int]:
        await asyncio.sleep(rng.random() * 0.1)
        return [t async for d in opened.generate(prompt, params) for t in d.token_ids]

    async with Engine(core) as opened:
        answers = await asyncio.gather(*(answer(*request) for request in requests * 2))
    assert answers == [plain(*request) for request in requests] * 2
    assert runner.num_poisoned_slots > 20
    assert runner.num_poisoned_frames > 20
