"""The device's side alone: a model, poisoned slots and frames, a runner, and rows for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from config.schema import ModelConfig
from engine.model.rwkv7 import RWKV7, Batch
from engine.model.weights import dummy_model
from engine.plan import ZERO_SLOT, MoveKind, PageMove, Row, SeatStart, SlotRef, StepPlan
from engine.runner import ModelRunner
from engine.sampler import Draws, Sampler
from engine.state.frames import HostFrames
from engine.state.storage import StateStorage
from engine.types import SamplingParams

CFG = ModelConfig(name="test", num_cells=2, vocab_size=61, embedded_dim=32, num_heads=2)
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
ZERO = SlotRef(ZERO_SLOT, 0)

Page = dict[str, bytes]


class Device(NamedTuple):
    model: RWKV7
    storage: StateStorage
    frames: HostFrames
    runner: ModelRunner

    def run(
        self, *rows: Row, starts: tuple[SeatStart, ...] = (), moves: tuple[PageMove, ...] = ()
    ) -> Draws:
        return self.runner.execute(StepPlan(0, rows, starts, moves))


def random_model(dtype: torch.dtype = torch.float64) -> RWKV7:
    return dummy_model(CFG, CPU, dtype)


def make_device(
    model: RWKV7,
    *,
    num_slots: int = 4,
    num_frames: int = 3,
    num_seats: int = 4,
    is_poisoned: bool = True,
) -> Device:
    """Poisoned: what reads a slot, a frame or logits before they are written computes NaN."""
    frames = HostFrames(model.layout, num_frames, is_pinned=False)
    storage = StateStorage(model.layout, num_slots, CPU, frames)
    if is_poisoned:
        for slot in range(1, num_slots + 1):
            storage.poison(slot)
        for frame in range(1, num_frames + 1):
            frames.poison_frame(frame)
    runner = ModelRunner(model, storage, Sampler(num_seats, (), CPU), num_seats)
    return Device(model, storage, frames, runner)


def start(
    seat: int, sampling: SamplingParams = GREEDY, *, output: list[int] | None = None
) -> SeatStart:
    return SeatStart(seat, sampling, tuple(output or ()))


def prefill(
    seq: int,
    tokens: tuple[int, ...],
    slot: int,
    *,
    position: int = 0,
    sample: bool = True,
    keep_logits: bool = False,
) -> Row:
    """A sequence's seat is its number; at position 0 it begins from the zero page."""
    dst = SlotRef(slot, 0)
    src = dst if position else ZERO
    return Row(seq, seq, tokens, len(tokens), position, src, dst, sample, keep_logits)


def decode(seq: int, position: int, src: int, dst: int) -> Row:
    return Row(seq, seq, None, 1, position, SlotRef(src, 0), SlotRef(dst, 0), sample=True)


def draw_again(seq: int, position: int, slot: int) -> Row:
    """A row of no tokens."""
    return Row(seq, seq, (), 0, position, SlotRef(slot, 0), SlotRef(slot, 0), sample=True)


def store(slot: int, frame: int, *, has_logits: bool = False) -> PageMove:
    return PageMove(MoveKind.STORE, SlotRef(slot, 0), SlotRef(frame, 0), has_logits)


def load(frame: int, slot: int, *, has_logits: bool = False) -> PageMove:
    return PageMove(MoveKind.LOAD, SlotRef(slot, 0), SlotRef(frame, 0), has_logits)


def bytes_of(page: dict[str, Tensor]) -> Page:
    return {
        name: tensor.view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in page.items()
    }


def raw_logits(model: RWKV7, tokens: list[int]) -> Tensor:
    """Logits [V] after the tokens, by the model alone, in its one state."""
    state, slots = model.new_state(1, CPU), torch.tensor([0])
    with torch.inference_mode():
        hidden = model(torch.tensor(tokens), Batch((len(tokens),), slots, slots), state)
        logits: Tensor = model.head(hidden[-1])
    return logits


def alone(
    model: RWKV7, prompt: tuple[int, ...], num_tokens: int, sampling: SamplingParams = GREEDY
) -> list[int]:
    """A sequence by model and sampler alone, without runner, slots or batches."""
    state, slots, out = model.new_state(1, CPU), torch.tensor([0]), list[int]()
    sampler = Sampler(1, (), CPU)
    sampler.start(0, sampling)
    fed = list(prompt)
    for position in range(len(prompt), len(prompt) + num_tokens):
        with torch.inference_mode():
            hidden = model(torch.tensor(fed), Batch((len(fed),), slots, slots), state)
            logits = model.head(hidden[-1:]).to(state.wkv.dtype)
            fed = list(sampler.sample(logits, [0], [position]).tokens)
        out += fed
    return out
