"""FusedRWKV7: the model on a CPU, one call into compiled code for a whole step.

It is called as `RWKV7` is, on the same states. A row's result does not depend on what is computed
beside it, nor on how a prompt is cut into chunks, to the last bit.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kernels.backend import Batch
from engine.kernels.cpu import records
from engine.kernels.cpu.features import description
from engine.kernels.cpu.heads import SCRATCH_SIZES
from engine.kernels.cpu.step import follow, lead, send_home
from engine.kernels.cpu.team import NUM_WORDS
from engine.kernels.cpu.tiles import BLOCK, FLOAT_TILE, INT8_TILE
from engine.model.pack import PackedWeights, padded
from engine.model.rwkv7 import ModelDims, State
from engine.state.layout import PageLayout

logger = logging.getLogger(__name__)

PATIENCE_S = 1.5  # kernels that were compiled before are there in less
BUFFERS = ("x", "r", "k", "v", "v_first", "d", "a", "g", "m", "last", "last_ffn")
MIN_ROWS = 16
MAX_ROWS = max(FLOAT_TILE.rows, INT8_TILE.rows)


class FusedRWKV7:
    """One step at a time; every call comes from one thread."""

    mixes_lengths = True  # a row is a row

    def __init__(self, dims: ModelDims, weights: PackedWeights, num_threads: int) -> None:
        self.dims = dims
        self._weights = weights
        self._num_threads = num_threads
        self._run = np.zeros(1, records.RUN)
        self._rows = np.zeros(records.NUM_ROWS, records.ROWS)
        self._buffers: list[np.ndarray[Any, Any]] = []
        self._max_rows = 0
        self._team = np.zeros(NUM_WORDS, np.int32)
        self._scratch = self._new_scratch()
        self._reserve(MIN_ROWS)
        for thread in range(1, num_threads):
            threading.Thread(
                target=_follow,
                args=(self._team, thread, *self._arguments()),
                name=f"model-{thread}",
                daemon=True,
            ).start()
        weakref.finalize(self, _send_home, self._team)
        self._compile()

    @property
    def num_parameters(self) -> int:
        return self._weights.num_parameters

    @property
    def layout(self) -> PageLayout:
        dims = self.dims
        return PageLayout(
            num_cells=dims.num_cells,
            num_heads=dims.num_heads,
            head_size=dims.head_size,
            vocab_size=dims.vocab_size,
            wkv_dtype="float32",
            shift_dtype="float32",
        )

    def new_state(self, num_slots: int, device: torch.device | str = "cpu") -> State:
        """Zero states."""
        wkv, shift = (
            torch.zeros(num_slots, *tensor.shape)
            for tensor in (self.layout.tensors["wkv"], self.layout.tensors["shift"])
        )
        return State(wkv=wkv, shift=shift)

    def __call__(self, tokens_T: Tensor, batch: Batch, state: State) -> Tensor:
        """Hidden rows [T, C] after ln_out; `state` is read at src and written at dst in place."""
        num_rows = tokens_T.shape[0]
        self._reserve(num_rows)
        hidden = torch.empty(num_rows, self.dims.embedded_dim)
        starts = np.zeros(len(batch.lengths) + 1, np.int64)
        np.cumsum(batch.lengths, out=starts[1:])
        assert starts[-1] == num_rows, f"{num_rows} tokens for lengths {batch.lengths}"
        run = self._run[0]
        run["job"], run["num_rows"], run["num_seqs"] = records.STEP, num_rows, len(batch.lengths)
        run["tokens"], run["starts"] = tokens_T.data_ptr(), starts.ctypes.data
        run["src"], run["dst"] = batch.src_slot.data_ptr(), batch.dst_slot.data_ptr()
        run["wkv"], run["wkv_slot"] = state.wkv.data_ptr(), state.wkv.stride(0)
        run["shift"], run["shift_slot"] = state.shift.data_ptr(), state.shift.stride(0)
        run["hidden"] = hidden.data_ptr()
        self._lead()
        return hidden

    def head(self, hidden_RC: Tensor) -> Tensor:
        """Logits [R, V] of hidden rows."""
        num_rows = hidden_RC.shape[0]
        logits = torch.empty(num_rows, self.dims.vocab_size)
        if num_rows == 0:
            return logits
        self._reserve(num_rows)
        hidden_RC = hidden_RC.contiguous()
        run = self._run[0]
        run["job"], run["num_rows"] = records.HEAD, num_rows
        run["hidden"], run["logits"] = hidden_RC.data_ptr(), logits.data_ptr()
        self._lead()
        return logits

    def _compile(self) -> None:
        """Have all threads ready; the first time on a machine, that takes a while."""
        started_s = time.perf_counter()
        told = threading.Timer(PATIENCE_S, logger.info, ("kernels: compiling, once (20 s)",))
        told.daemon = True
        told.start()
        self._run[0]["job"] = records.NOTHING
        self._lead()
        told.cancel()
        seconds = time.perf_counter() - started_s
        logger.info(
            "kernels: fused (%s), %d threads%s",
            description(),
            self._num_threads,
            f", compiled in {seconds:.0f} s" if seconds > PATIENCE_S else "",
        )

    def _lead(self) -> None:
        lead(self._team.ctypes.data, *self._arguments())

    def _arguments(self) -> tuple[Any, ...]:
        weights = self._weights
        return (
            self._num_threads,
            weights.model,
            weights.layers,
            weights.matrices,
            self._rows,
            self._run,
        )

    def _new_scratch(self) -> np.ndarray[Any, Any]:
        size = padded(
            max(
                MAX_ROWS * BLOCK,
                2 * padded(self.dims.embedded_dim),
                SCRATCH_SIZES * self.dims.head_size,
            )
        )
        scratch = _zeros(self._num_threads * size, np.float32)
        self._run[0]["scratch"], self._run[0]["scratch_size"] = scratch.ctypes.data, size
        return scratch

    def _reserve(self, num_rows: int) -> None:
        """Room for so many rows, from now on."""
        if num_rows <= self._max_rows:
            return
        self._max_rows = max(MIN_ROWS, 1 << (num_rows - 1).bit_length())
        width, dims = padded(self.dims.embedded_dim), self.dims
        self._buffers = []
        for name in BUFFERS:
            buffer = _zeros(self._max_rows * width, np.float32)
            self._run[0][name] = buffer.ctypes.data
            self._buffers.append(buffer)
        ranks = (dims.w_lora_rank, dims.a_lora_rank, dims.g_lora_rank, dims.v_lora_rank)
        widths = [width] * 6 + [padded(rank) for rank in ranks]
        widths += [width, width, padded(dims.ffn_dim), width]
        is_int8 = self._weights.model[0]["kind"] == records.INT8
        for record, stride in zip(self._rows, widths, strict=True):
            values = _zeros(self._max_rows * stride, np.int8 if is_int8 else np.float32)
            scales = _zeros(self._max_rows * stride // 64, np.float32)
            corrections = _zeros(self._max_rows * stride // 64, np.int32)
            record["values"], record["scales"] = values.ctypes.data, scales.ctypes.data
            record["corrections"], record["stride"] = corrections.ctypes.data, stride
            self._buffers += [values, scales, corrections]


def _follow(team: np.ndarray[Any, Any], thread: int, *arguments: Any) -> None:
    """Holds what the compiled code has the addresses of."""
    follow(team.ctypes.data, thread, *arguments)


def _send_home(team: np.ndarray[Any, Any]) -> None:
    send_home(team.ctypes.data)


def _zeros(count: int, dtype: type) -> np.ndarray[Any, Any]:
    """At the beginning of a cache line."""
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype)
