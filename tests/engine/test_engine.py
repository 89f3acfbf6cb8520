"""The whole engine on a real model in float64: what a request gets never depends on its company."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config.schema import ModelConfig, ModelTable
from engine.engine import Engine, build
from engine.errors import EngineError, InvalidRequest, WeightsError
from engine.loading import pick_device
from engine.model.rwkv7 import Batch
from engine.model.weights import dummy_model
from engine.runner import ModelRunner
from engine.sampler import Sampler
from engine.types import FinishReason, OutputDelta, SamplingParams

CFG = ModelConfig(name="test", num_cells=2, vocab_size=300, embedded_dim=32, num_heads=2)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 256 bytes, one token each."""
    path = tmp_path_factory.mktemp("vocab") / "bytes.txt"
    path.write_text("".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)))
    return path


def table(vocab: Path, **keys: object) -> ModelTable:
    defaults: dict[str, object] = dict(
        model=CFG, model_name="test", model_cfg="test", tokenizer_vocab_path=str(vocab),
        load_format="dummy", dtype="float64", device_type="cpu",
        max_batch_size=3, paragraph_len=8, max_context_len=0,
    )  # fmt: skip
    return ModelTable(**(defaults | keys))  # type: ignore[arg-type]


def plain(prompt: list[int], params: SamplingParams) -> list[int]:
    """The same request by the model alone, token by token, without engine, slots or batches."""
    model = dummy_model(CFG, "cpu", torch.float64)
    state, slot = model.new_state(1, "cpu"), torch.tensor([0])
    banned = list(range(257, 300))
    sampler = Sampler(1, banned, torch.device("cpu"))
    sampler.start(0, params)
    out: list[int] = []
    with torch.inference_mode():
        for token in prompt:
            hidden = model(torch.tensor([token]), Batch((1,), slot, slot), state)
        while len(out) < params.max_tokens:
            position = len(prompt) + len(out)
            out += sampler.sample(model.head(hidden), [0], [position]).tokens
            if out[-1] in params.stop_token_ids:
                break
            hidden = model(torch.tensor(out[-1:]), Batch((1,), slot, slot), state)
    return out


async def collect(engine: Engine, prompt: list[int], params: SamplingParams) -> list[OutputDelta]:
    return [delta async for delta in engine.generate(prompt, params)]


def random_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_p=rng.choice([1.0, 0.8]),
        top_k=rng.choice([0, 20]),
        presence_penalty=rng.choice([0.0, 0.5]),
        repetition_penalty=rng.choice([0.0, 0.2]),
        penalty_decay=0.99,
        seed=rng.getrandbits(64),
        max_tokens=rng.randint(1, 12),
        stop_token_ids=(0, rng.randint(1, 256)),
    )
    return [0, *(rng.randint(1, 256) for _ in range(rng.randint(0, 40)))], params


@pytest.mark.parametrize("decode_first", [True, False])
async def test_concurrent_requests_each_equal_their_lonely_run(
    vocab: Path, decode_first: bool
) -> None:
    rng = random.Random(7)
    requests = [random_request(rng) for _ in range(24)]
    async with Engine(build(table(vocab, decode_first=decode_first))) as engine:
        answers = await asyncio.gather(*(collect(engine, *request) for request in requests))
        assert engine.core.snapshot().num_free_slots == engine.core.info.num_slots
    for (prompt, params), deltas in zip(requests, answers, strict=True):
        tokens = [token for delta in deltas for token in delta.token_ids]
        assert tokens == plain(prompt, params)
        assert deltas[-1].num_output_tokens == len(tokens)
        stopped = tokens[-1] in params.stop_token_ids
        expected = FinishReason.STOP if stopped else FinishReason.LENGTH
        assert deltas[-1].finish_reason == expected


async def test_requests_that_leave_early_change_nobody_else(vocab: Path) -> None:
    rng = random.Random(8)
    requests = [random_request(rng) for _ in range(20)]
    async with Engine(build(table(vocab))) as engine:

        async def run(index: int) -> list[int] | None:
            prompt, params = requests[index]
            if index % 3 == 0:  # read one delta at most, then walk away
                endless = replace(params, max_tokens=10_000, stop_token_ids=())
                generator = engine.generate(prompt, endless)
                await anext(generator)
                await generator.aclose()  # type: ignore[attr-defined]
                return None
            return [t for delta in await collect(engine, prompt, params) for t in delta.token_ids]

        answers = await asyncio.gather(*(run(i) for i in range(len(requests))))
        assert engine.core.snapshot().num_free_slots == engine.core.info.num_slots
    for request, tokens in zip(requests, answers, strict=True):
        assert tokens is None or tokens == plain(*request)


async def test_text_stops_before_the_stop_string(vocab: Path) -> None:
    prompt = [0, 70, 71]
    params = SamplingParams(seed=3, max_tokens=40, stop_token_ids=())
    async with Engine(build(table(vocab))) as engine:
        whole = "".join(d.text for d in await collect(engine, prompt, params))
        position, stop = next(
            (i, whole[i : i + 2]) for i in range(5, 30) if "\ufffd" not in whole[i : i + 2]
        )
        deltas = await collect(engine, prompt, replace(params, stop=(stop,)))
    assert "".join(d.text for d in deltas) == whole[: whole.index(stop)]
    assert whole.index(stop) <= position
    assert deltas[-1].finish_reason == FinishReason.STOP
    assert deltas[-1].matched_stop == stop


async def test_ids_without_text_are_never_drawn(vocab: Path) -> None:
    params = SamplingParams(temperature=1000.0, max_tokens=400, stop_token_ids=(0,))
    async with Engine(build(table(vocab))) as engine:
        for seed in range(3):
            deltas = await collect(engine, [0], replace(params, seed=seed))
            assert max(t for d in deltas for t in d.token_ids) <= 256


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path: Path, vocab: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_text(vocab.read_text() + "300 'hello' 5\n")
    with pytest.raises(WeightsError, match="ids up to 300, the model only 300"):
        build(table(path))


def test_a_device_that_is_not_there_is_named(vocab: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(InvalidRequest, match="device_type = 'cuda'"):
        pick_device(table(vocab, device_type="cuda"))


async def test_a_closed_engine_is_freed_without_the_garbage_collector(
    tmp_path: Path, vocab: Path
) -> None:
    """It comes late, and to what was there when the server began to serve never; meanwhile the
    weights of every replaced replica would stay in the device's memory."""

    async def serve() -> list[weakref.ref[object]]:
        core = build(table(vocab, state_dir=tmp_path))
        runner = core._pipeline._runner
        assert isinstance(runner, ModelRunner)
        weight, storage = next(runner._executor._model.parameters()), runner._executor._storage
        async with Engine(core) as engine:
            assert await collect(engine, [0, 1, 2], SamplingParams(max_tokens=3))
        return [weakref.ref(one) for one in (core, weight, storage.state.wkv, storage._frames)]

    gc.collect()
    gc.disable()
    try:
        refs = await asyncio.create_task(serve())
        assert [ref() for ref in refs] == [None] * 4
    finally:
        gc.enable()


def test_every_error_of_the_engine_is_an_engine_error() -> None:
    assert issubclass(WeightsError, EngineError)
    assert issubclass(InvalidRequest, EngineError)


def test_int8_refuses_widths_that_are_no_multiple_of_64(vocab: Path) -> None:
    wanted = r"^models\.test: dtype = 'int8' needs widths that are multiples of 64, found 32"
    with pytest.raises(InvalidRequest, match=wanted):
        build(table(vocab, dtype="int8"))
