"""A running engine for one model: wires weights, state, runner and core together.

`build` is for the server; `Engine` is for Python users.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from hashlib import blake2b
from io import BytesIO
from itertools import count
from pathlib import Path
from types import TracebackType

import torch

from config import ModelTable, load_infer
from engine.core import EngineCore
from engine.cuda_graph import CudaRecorder, Recorder
from engine.errors import InvalidRequest, WeightsError
from engine.grammar import GrammarCompiler
from engine.limits import limits_of
from engine.loading import load_served, pick_device, pick_layout
from engine.plan import SlotRef
from engine.runner import ModelRunner
from engine.sampler import Sampler, choose_device_sampler, choose_host_sampler
from engine.state.disk import PageDisk, folder_of
from engine.state.frames import HostFrames
from engine.state.layout import PageLayout
from engine.state.page import PageFile
from engine.state.pagefile import PageFormat, digest_of
from engine.state.parts import StateParts
from engine.state.storage import StateStorage
from engine.state.tuned import load_tuned
from engine.tokenizer import Tokenizer
from engine.types import (
    EngineRequest,
    ModelInfo,
    OutputDelta,
    SamplingParams,
    StatsSink,
)

logger = logging.getLogger(__name__)

MIB = 2**20
MIN_OTHER_FRAMES = 4  # beside those of initial states: to swap, to load, to save


def build(table: ModelTable, stats: StatsSink | None = None) -> EngineCore:
    """Load, allocate and warm up one replica. Blocks for as long as the weights take to read.

    The caller starts it on its event loop with `core.start()`. Raises EngineError:
    a device, vocabulary or checkpoint that is not there or does not fit.
    """
    device = pick_device(table)
    tokenizer = Tokenizer.load(table.tokenizer_vocab_path)
    loaded = load_served(table, device)
    model = loaded.model
    if tokenizer.vocab_size > model.dims.vocab_size:
        raise WeightsError(
            f"tokenizer_vocab_path: {table.tokenizer_vocab_path} has ids up to "
            f"{tokenizer.vocab_size - 1}, the model only {model.dims.vocab_size} tokens"
        )
    layout = pick_layout(table, model)
    num_slots = table.resolved_num_state_slots
    num_frames = table.host_state_mib * MIB // layout.page_bytes
    frames = HostFrames(layout, num_frames, is_pinned=device.type == "cuda")
    storage = StateStorage(layout, num_slots, device, frames)
    grammars = GrammarCompiler(tokenizer, model.dims.vocab_size)
    num_seats = table.max_batch_size
    banned_ids = tokenizer.ids_without_text(model.dims.vocab_size)
    sampler = Sampler(
        num_seats=num_seats,
        banned_ids=banned_ids,
        device=device,
        tokenizer=tokenizer,
        grammars=grammars,
        on_device=choose_device_sampler(num_seats, model.dims.vocab_size, device, banned_ids),
        on_host=choose_host_sampler(num_seats, device, banned_ids, loaded.draw_threads),
    )
    runner = ModelRunner(
        model,
        storage,
        sampler,
        table.max_batch_size,
        loaded.torch_threads,
        pick_recorder(table, device),
    )
    model_fingerprint = loaded.fingerprint
    seed = seed_of(model_fingerprint, layout, tokenizer)
    page_format = PageFormat(layout, model_fingerprint, tokenizer.fingerprint)
    parts = StateParts(
        seed=seed if table.enable_prefix_cache else None,
        disk=open_disk(table, seed, frames, page_format),
        codec=HostCodec(page_format, frames),
        tuned=load_initial_states(table, page_format, frames),
    )
    info = ModelInfo(
        model_name=table.model_name,
        num_parameters=model.num_parameters,
        device=str(device),
        dtype=loaded.dtype,
        state_dtype=layout.wkv_dtype,
        num_slots=num_slots,
        page_bytes=layout.page_bytes,
        vocab_size=model.dims.vocab_size,
        fingerprint=model_fingerprint,
        max_batch_size=table.max_batch_size,
        max_batch_tokens=table.resolved_max_batch_tokens,
        paragraph_len=table.paragraph_len,
        max_context_len=table.max_context_len,
        initial_states=tuple(parts.tuned),
        num_frames=num_frames,
        num_files=0 if parts.disk is None else table.disk_state_mib * MIB // layout.page_bytes,
    )
    limits = limits_of(table)
    runner.prepare()  # last: from here on it may have threads, which somebody must close
    try:
        return EngineCore(info, tokenizer, runner, limits, stats, parts=parts, grammars=grammars)
    except BaseException:
        runner.close()
        raise


def open_disk(
    table: ModelTable, seed: bytes, frames: HostFrames, page_format: PageFormat
) -> PageDisk | None:
    """The folder of this model in `state_dir`. Raises InvalidRequest if it cannot be used."""
    if table.state_dir is None:
        return None
    return PageDisk(
        folder_of(table.state_dir, seed),
        frames,
        page_format.layout,
        page_format.model_fingerprint,
        page_format.tokenizer_fingerprint,
    )


def load_initial_states(
    table: ModelTable, page_format: PageFormat, frames: HostFrames
) -> dict[str, PageFile]:
    """The tuned states by name, in the lowest frames in order. Raises StateMismatch."""
    found = {}
    if len(table.initial_states) + MIN_OTHER_FRAMES > frames.num_frames and table.initial_states:
        raise InvalidRequest(
            f"host_state_mib = {table.host_state_mib} has room for {frames.num_frames} states: too"
            f" few for {len(table.initial_states)} initial_states and any other; raise it",
            "host_state_mib",
        )
    for number, path in enumerate(table.initial_states, start=1):
        state = load_tuned(path, page_format)
        tensors = frames.frame_tensors(number)
        for name, tensor in state.tensors.items():
            tensors[name].copy_(tensor)
        found[path.stem] = PageFile(state.digest, 0, has_logits=False)
    return found


class HostCodec:
    """Pages in frames to and from the bytes of an exported file: a FrameCodec."""

    def __init__(self, page_format: PageFormat, frames: HostFrames) -> None:
        self._format = page_format
        self._frames = frames

    def encode(self, file: PageFile, frame: SlotRef) -> bytes:
        return self._format.encode(file, self._frames.frame_tensors(frame.slot))

    def decode(self, data: bytes, frame: SlotRef) -> PageFile:
        tensors = self._frames.frame_tensors(frame.slot)
        file = self._format.read(BytesIO(data), tensors)
        if not file.has_logits:
            del tensors["logits"]
        return PageFile(digest_of(tensors), file.num_tokens, file.has_logits)


def seed_of(model_fingerprint: str, layout: PageLayout, tokenizer: Tokenizer) -> bytes:
    """What a state depends on besides tokens, as 32 bytes.

    The chat template is not in it: it shows in the tokens, and equal tokens give equal states.
    """
    parts = (model_fingerprint, repr(layout), tokenizer.fingerprint)
    return blake2b("\n".join(parts).encode(), digest_size=32).digest()


def pick_recorder(table: ModelTable, device: torch.device) -> Callable[[], Recorder] | None:
    """What decode steps are recorded with, if they are: on GPUs only."""
    if device.type != "cuda":
        return None
    if table.cuda_graphs == "off":
        logger.info('cuda graphs: off (cuda_graphs = "off")')
        return None
    return partial(CudaRecorder, device)


class Engine:
    """RWKV-7 from Python, without a server:

    async with Engine.open("rwkv-lm-tiny") as engine:
        async for delta in engine.generate("User: Hello!\\n\\nAssistant:"):
            ...
    """

    def __init__(self, core: EngineCore, initial_state: str | None = None) -> None:
        """`initial_state`: name of the tuned state that prompts begin from, None = zeros."""
        self.core = core
        self._initial_state = initial_state
        self._ids = count()

    @classmethod
    def open(
        cls, name: str, config_dir: Path | str = "config", overrides: Sequence[str] = ()
    ) -> Engine:
        """The first model of config/infer/NAME.toml."""
        cfg = load_infer(Path(config_dir), name, overrides)
        return cls(build(cfg.models[0]), cfg.models[0].initial_state)

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
        if sampling is not None and sampling.grammar is not None:
            await self.core.prepare(sampling.grammar)
        stream = self.core.submit(
            EngineRequest(
                request_id=f"local-{os.getpid()}-{next(self._ids)}",
                prompt_ids=ids,
                sampling=sampling or SamplingParams(),
                initial_state=self._initial_state,
            )
        )
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.close()
