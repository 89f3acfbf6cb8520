"""A running engine for one model: wires weights, state, runner and core together.

`build` is for the server; `Engine` is for Python users.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from hashlib import blake2b
from itertools import count
from pathlib import Path
from types import TracebackType

import torch

from config import ModelTable, load_infer
from engine.core import EngineCore
from engine.errors import InvalidRequest, WeightsError
from engine.limits import limits_of
from engine.model.rwkv7 import RWKV7
from engine.model.weights import dummy_model, fingerprint, load_model
from engine.plan import ZERO_SLOT, Row, SeatStart, SlotRef, StepPlan
from engine.runner import ModelRunner
from engine.sampler import Sampler
from engine.state.layout import PageLayout
from engine.state.storage import StateStorage
from engine.tokenizer import Tokenizer
from engine.types import (
    EngineRequest,
    ModelInfo,
    OutputDelta,
    SamplingParams,
    StatsSink,
)


def build(table: ModelTable, stats: StatsSink | None = None) -> EngineCore:
    """Load, allocate and warm up one replica. Blocks for as long as the weights take to read.

    The caller starts it on its event loop with `core.start()`. Raises EngineError:
    a device, vocabulary or checkpoint that is not there or does not fit.
    """
    device = pick_device(table)
    dtype = pick_dtype(table, device)
    tokenizer = Tokenizer.load(table.tokenizer_vocab_path)
    model = load(table, device, dtype)
    if tokenizer.vocab_size > model.dims.vocab_size:
        raise WeightsError(
            f"tokenizer_vocab_path: {table.tokenizer_vocab_path} has ids up to "
            f"{tokenizer.vocab_size - 1}, the model only {model.dims.vocab_size} tokens"
        )
    layout = PageLayout(
        num_cells=model.dims.num_cells,
        num_heads=model.dims.num_heads,
        head_size=model.dims.head_size,
        wkv_dtype="float64" if dtype == torch.float64 else "float32",
        shift_dtype=str(dtype).removeprefix("torch."),
    )
    num_slots = table.resolved_num_state_slots
    storage = StateStorage(layout, num_slots, device)
    sampler = Sampler(
        num_seats=table.max_batch_size,
        banned_ids=tokenizer.ids_without_text(model.dims.vocab_size),
        device=device,
    )
    num_threads = table.num_threads or max(1, (os.cpu_count() or 1) - 1)
    runner = ModelRunner(model, storage, sampler, table.max_batch_size, num_threads)
    _warm_up(runner)
    model_fingerprint = fingerprint(model)
    cache_seed = None
    if table.enable_prefix_cache:
        cache_seed = seed_of(model_fingerprint, layout, tokenizer)
    info = ModelInfo(
        model_name=table.model_name,
        num_parameters=sum(p.numel() for p in model.parameters()),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        state_dtype=layout.wkv_dtype,
        num_slots=num_slots,
        page_bytes=layout.page_bytes,
        vocab_size=model.dims.vocab_size,
        fingerprint=model_fingerprint,
        max_batch_size=table.max_batch_size,
        max_batch_tokens=table.resolved_max_batch_tokens,
        paragraph_len=table.paragraph_len,
        max_context_len=table.max_context_len,
    )
    limits = limits_of(table)
    return EngineCore(info, tokenizer, runner, limits, stats, cache_seed=cache_seed)


def seed_of(model_fingerprint: str, layout: PageLayout, tokenizer: Tokenizer) -> bytes:
    """What a state depends on besides tokens, as 32 bytes.

    The chat template is not in it: it shows in the tokens, and equal tokens give equal states.
    """
    parts = (model_fingerprint, repr(layout), tokenizer.fingerprint)
    return blake2b("\n".join(parts).encode(), digest_size=32).digest()


def pick_device(table: ModelTable) -> torch.device:
    """`auto` takes the first listed CUDA device where there is one, else the CPU."""
    has_cuda = torch.cuda.is_available()
    if table.device_type == "cpu" or (table.device_type == "auto" and not has_cuda):
        return torch.device("cpu")
    index = table.device_ids[0]
    if not has_cuda or index >= torch.cuda.device_count():
        raise InvalidRequest(
            f"models.{table.model_name}: device_type = {table.device_type!r}, device_ids = "
            f"{list(table.device_ids)}, but this machine shows {torch.cuda.device_count()} CUDA "
            'devices to torch; use device_type = "cpu" or another id',
            field="device_type",
        )
    return torch.device("cuda", index)


def pick_dtype(table: ModelTable, device: torch.device) -> torch.dtype:
    """`auto` is float32 on the CPU, where half types are emulated and slower, else bfloat16."""
    if table.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, table.dtype)
    return dtype


def load(table: ModelTable, device: torch.device, dtype: torch.dtype) -> RWKV7:
    """The weights of a model table, or random ones with `load_format = "dummy"`."""
    if table.load_format == "dummy":
        return dummy_model(table.model, device, dtype)
    assert table.weights_path is not None, "the config loader requires weights_path"
    return load_model(table.weights_path, table.model, device, dtype)


def _warm_up(runner: ModelRunner) -> None:
    """One prefill and one decode step: first calls allocate and choose kernels."""
    zero, first = SlotRef(ZERO_SLOT, 0), SlotRef(ZERO_SLOT + 1, 0)
    start = SeatStart(seat=0, sampling=SamplingParams(temperature=0.0))
    prefill = Row(0, 0, (0, 0), 2, 0, zero, first, sample=True)
    decode = Row(0, 0, None, 1, 2, first, first, sample=True)
    runner.execute(StepPlan(0, (prefill,), (start,)))
    runner.execute(StepPlan(1, (decode,)))


class Engine:
    """RWKV-7 from Python, without a server:

    async with Engine.open("rwkv-lm-tiny") as engine:
        async for delta in engine.generate("User: Hello!\\n\\nAssistant:"):
            ...
    """

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._ids = count()

    @classmethod
    def open(
        cls, name: str, config_dir: Path | str = "config", overrides: Sequence[str] = ()
    ) -> Engine:
        """The first model of config/infer/NAME.toml."""
        cfg = load_infer(Path(config_dir), name, overrides)
        return cls(build(cfg.models[0]))

    async def __aenter__(self) -> Engine:
        self.core.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.core.close()

    async def generate(
        self, prompt: str | Sequence[int], sampling: SamplingParams | None = None
    ) -> AsyncIterator[OutputDelta]:
        """Deltas of one request. A text prompt gets the begin-of-document token 0 in front."""
        ids = (0, *self.core.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        stream = self.core.submit(
            EngineRequest(
                request_id=f"local-{os.getpid()}-{next(self._ids)}",
                prompt_ids=ids,
                sampling=sampling or SamplingParams(),
            )
        )
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.close()
