"""Slots, frames and moves, byte for byte, against a dict of bytes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config.schema import ModelConfig
from engine.model.weights import dummy_model
from engine.plan import ZERO_SLOT, PageMove
from engine.state.frames import HostFrames
from engine.state.layout import PageLayout
from engine.state.storage import StateStorage
from tests.engine.device import (
    CPU,
    Page,
    alone,
    bytes_of,
    decode,
    draw_again,
    load,
    make_device,
    prefill,
    start,
    store,
)

NUM_SLOTS, NUM_FRAMES = 4, 3


def page_layout(dtype: str) -> PageLayout:
    return PageLayout(
        num_cells=2,
        num_heads=3,
        head_size=4,
        vocab_size=7,
        wkv_dtype="float64" if dtype == "float64" else "float32",
        shift_dtype=dtype,
    )


def filled(layout: PageLayout, seed: int = 0) -> tuple[StateStorage, HostFrames]:
    """Random bits in every slot and frame, those that are no number included."""
    frames = HostFrames(layout, NUM_FRAMES, is_pinned=False)
    storage = StateStorage(layout, NUM_SLOTS, CPU, frames)
    generator = torch.Generator().manual_seed(seed)
    pages = [storage.slot_tensors(slot) for slot in range(1, NUM_SLOTS + 1)]
    pages += [frames.frame_tensors(frame) for frame in range(1, NUM_FRAMES + 1)]
    for page in pages:
        for tensor in page.values():
            flat = tensor.view(-1).view(torch.uint8)
            flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=generator))
    return storage, frames


def memory(storage: StateStorage, frames: HostFrames) -> dict[tuple[str, int], Page]:
    """All there is, the zero page too."""
    slots = {("slot", i): bytes_of(storage.slot_tensors(i)) for i in range(NUM_SLOTS + 1)}
    held = {("frame", i): bytes_of(frames.frame_tensors(i)) for i in range(1, NUM_FRAMES + 1)}
    return slots | held


moves = st.builds(
    lambda make, slot, frame, has_logits: (
        store(slot, frame, has_logits=has_logits)
        if make == "store"
        else load(frame, slot, has_logits=has_logits)
    ),
    st.sampled_from(["store", "load"]),
    st.integers(1, NUM_SLOTS),
    st.integers(1, NUM_FRAMES),
    st.booleans(),
)


@given(plan=st.lists(moves, max_size=12), dtype=st.sampled_from(["float64", "float32", "bfloat16"]))
@settings(max_examples=60)
def test_moves_copy_one_page_to_the_bit_and_touch_nothing_else(
    plan: list[PageMove], dtype: str
) -> None:
    storage, frames = filled(page_layout(dtype))
    expected = memory(storage, frames)
    for move in plan:
        storage.move(move)
        source, target = ("slot", move.slot.slot), ("frame", move.frame.slot)
        if move.kind.value == "load":
            source, target = target, source
        names = ["wkv", "shift", "logits"] if move.has_logits else ["wkv", "shift"]
        expected[target] = expected[target] | {name: expected[source][name] for name in names}
        assert memory(storage, frames) == expected
    storage.check()


@pytest.mark.parametrize("has_logits", [True, False])
@pytest.mark.parametrize("slot", range(1, NUM_SLOTS + 1))
def test_every_slot_comes_back_from_a_frame_into_any_other(slot: int, has_logits: bool) -> None:
    storage, _ = filled(page_layout("bfloat16"), seed=slot)
    before = bytes_of(storage.slot_tensors(slot))
    frame, other = slot % NUM_FRAMES + 1, slot % NUM_SLOTS + 1
    storage.move(store(slot, frame, has_logits=has_logits))
    storage.poison(slot)
    storage.move(load(frame, other, has_logits=has_logits))
    after = bytes_of(storage.slot_tensors(other))
    assert (after["wkv"], after["shift"]) == (before["wkv"], before["shift"])
    assert (after["logits"] == before["logits"]) == has_logits


def test_a_page_may_be_stored_from_a_slot_and_another_loaded_there_in_one_plan() -> None:
    storage, frames = filled(page_layout("float32"))
    out, back = bytes_of(storage.slot_tensors(2)), bytes_of(frames.frame_tensors(3))
    for move in (store(2, 1, has_logits=True), load(3, 2, has_logits=True)):
        storage.move(move)
    assert bytes_of(frames.frame_tensors(1)) == out
    assert bytes_of(storage.slot_tensors(2)) == back


def test_what_is_written_into_a_frame_is_what_a_slot_gets() -> None:
    """The disk's side: frame tensors are the frame itself, not a copy of it."""
    storage, frames = filled(page_layout("float32"))
    page = frames.frame_tensors(2)
    for name, tensor in page.items():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + len(name))
    storage.move(load(2, 3, has_logits=True))
    for name, tensor in storage.slot_tensors(3).items():
        assert tensor.flatten().tolist() == [i + len(name) for i in range(tensor.numel())]


def test_poison_fills_one_place_and_leaves_the_others() -> None:
    storage, frames = filled(page_layout("float32"))
    before = memory(storage, frames)
    storage.poison(2)
    frames.poison_frame(1)
    for page in (storage.slot_tensors(2), frames.frame_tensors(1)):
        assert all(tensor.isnan().all() for tensor in page.values())
    after = memory(storage, frames)
    changed = {place for place in before if before[place] != after[place]}
    assert changed == {("slot", 2), ("frame", 1)}


OUTSIDE: dict[str, Callable[[StateStorage, HostFrames], None]] = {
    "load into the zero page": lambda s, _: s.move(load(1, ZERO_SLOT)),
    "poison of the zero page": lambda s, _: s.poison(ZERO_SLOT),
    "store into frame 0": lambda s, _: s.move(store(1, 0)),
    "load from beyond the frames": lambda s, _: s.move(load(NUM_FRAMES + 1, 1)),
    "store from beyond the slots": lambda s, _: s.move(store(NUM_SLOTS + 1, 1)),
    "store from before the slots": lambda s, _: s.move(store(-1, 1)),
    "frame -1": lambda _, f: f.poison_frame(-1),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_place_that_is_none_is_a_broken_invariant_and_changes_nothing(case: str) -> None:
    storage, frames = filled(page_layout("float32"))
    before = memory(storage, frames)
    with pytest.raises(AssertionError):
        OUTSIDE[case](storage, frames)
    assert memory(storage, frames) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layout_storage_and_model_agree(dtype: torch.dtype) -> None:
    cfg = ModelConfig(name="test", num_cells=3, vocab_size=50, embedded_dim=32, num_heads=4)
    model = dummy_model(cfg, CPU, torch.float32).to(dtype)
    storage = StateStorage(model.layout, 2, CPU, HostFrames(model.layout, 1, is_pinned=False))
    state = model.new_state(3, CPU)
    for ours, theirs in ((storage.state.wkv, state.wkv), (storage.state.shift, state.shift)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert state.shift.dtype == dtype
    assert state.wkv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (storage.logits.shape, storage.logits.dtype) == ((3, 50), state.wkv.dtype)
    num_bytes = sum(tensor.nbytes for tensor in storage.slot_tensors(1).values())
    assert num_bytes == model.layout.page_bytes


def test_places_whose_offsets_need_more_than_31_bits_are_the_right_ones() -> None:
    """17 GB of addresses, of which only the few pages used take memory."""
    cfg = ModelConfig(name="test", num_cells=1, vocab_size=61, embedded_dim=64, num_heads=1)
    model = dummy_model(cfg, CPU, torch.float32)
    near, far = 5, 2**19 + 5
    assert far * prod(model.layout.wkv_shape) > 2**31
    try:
        device = make_device(model, num_slots=far, num_frames=far, is_poisoned=False)
    except RuntimeError as error:
        pytest.skip(f"this machine does not lend so many addresses: {error}")
    device.storage.poison(near)
    device.frames.poison_frame(near)
    tokens = device.run(prefill(0, (5, 6, 7), far, keep_logits=True), starts=(start(0),)).tokens
    tokens += device.run(decode(0, 3, far, far - 1)).tokens
    tokens += device.run(draw_again(1, 3, far), starts=(start(1),)).tokens
    device.run(moves=(store(far - 1, far),))
    device.storage.poison(far - 1)
    tokens += device.run(decode(0, 4, far, far), moves=(load(far, far),)).tokens
    first, second, third = alone(model, (5, 6, 7), 3)
    assert tokens == (first, second, first, third)
    for page in (device.storage.slot_tensors(near), device.frames.frame_tensors(near)):
        assert all(tensor.isnan().all() for tensor in page.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_frames_take_memory_when_they_are_used_and_not_before() -> None:
    layout = page_layout("float32")
    before = resident_bytes()
    frames = HostFrames(layout, 2**30 // layout.page_bytes, is_pinned=False)
    assert resident_bytes() - before < 2**24
    frames.poison_frame(frames.num_frames)
    assert resident_bytes() - before < 2**25


def resident_bytes() -> int:
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE")
