"""The time mix of torch's tensors by numba's kernels: checks, threads, autograd.

Legend: T packed tokens, S sequences, H heads, N head size, P that rounded up to 16, C = H*N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.backend import Batch, TimeMixRows, TimeMixWeights
from engine.kernels.cpu.recurrence import LANES, RUN, SEGMENT, backward, forward, scratch_floats
from engine.kernels.cpu.tokens import NUM_PARTIALS

ROWS = ("r", "k", "v", "d", "a", "g", "v_first", "m")
WEIGHTS = ("k_k", "k_a", "r_k", "norm_weight", "norm_bias")  # in the order of their partial sums
# Elements of states that a thread has to move before another one is worth its start: 0.1 ms.
ELEMENTS_PER_THREAD = 1 << 20


@dataclass(frozen=True, slots=True)
class Spans:
    """Where sequences begin, in tokens and in segments; both int64 [S + 1]."""

    starts: NDArray[np.int64]
    segments: NDArray[np.int64]

    @staticmethod
    def of_batch(batch: Batch) -> Spans:
        """Worked out once for all layers."""
        found = batch.notes.get(Spans)
        if not isinstance(found, Spans):
            lengths = np.array([0, *batch.lengths], dtype=np.int64)
            found = Spans(lengths.cumsum(), (-(-lengths // SEGMENT)).cumsum())
            batch.notes[Spans] = found
        return found


def is_float32(rows: TimeMixRows, weights: TimeMixWeights, wkv_pool: Tensor) -> bool:
    """Whether this can be computed here at all."""
    tensors = [wkv_pool, *_tensors(rows, ROWS), *_tensors(weights, WEIGHTS)]
    return all(x.dtype == torch.float32 for x in tensors)


def time_mix(rows: TimeMixRows, weights: TimeMixWeights, batch: Batch, wkv_pool: Tensor) -> Tensor:
    """`Backend.time_mix` in float32. Any head size; gradients of the pool as well."""
    heads = weights.r_k.shape
    tensors = [*_tensors(weights, WEIGHTS), *_tensors(rows, ROWS)]
    extra = -heads[1] % LANES
    if extra:
        tensors = [F.pad(x.reshape(-1, *heads), (0, extra)) for x in tensors]
        tensors = [
            x.flatten(-2).squeeze(0) if i < 5 else x.flatten(1) for i, x in enumerate(tensors)
        ]
    tensors = [x.contiguous() for x in tensors]
    spans = Spans.of_batch(batch)
    if torch.is_grad_enabled():
        states = _padded(wkv_pool[batch.src_slot], extra).contiguous()
        out: Tensor = _TimeMix.apply(spans, heads, states, *tensors)  # type: ignore[no-untyped-call]
    elif extra or not wkv_pool[0].is_contiguous():
        states = _padded(wkv_pool[batch.src_slot], extra).contiguous()
        places = torch.arange(len(batch.lengths))
        is_real = batch.dst_slot >= 0
        out = _infer(spans, heads, tensors, states, places, torch.where(is_real, places, -1))
        wkv_pool[batch.dst_slot[is_real]] = states[is_real, :, : heads[1], : heads[1]]
    else:
        out = _infer(spans, heads, tensors, wkv_pool, batch.src_slot, batch.dst_slot)
    return out.view(-1, heads[0], heads[1] + extra)[..., : heads[1]].flatten(1) if extra else out


def _tensors(of: TimeMixRows | TimeMixWeights, names: Sequence[str]) -> list[Tensor]:
    found = [getattr(of, name) for name in names]
    return [x for x in found if x is not None]


def _padded(states: Tensor, extra: int) -> Tensor:
    return F.pad(states, (0, extra, 0, extra)) if extra else states


def _infer(
    spans: Spans,
    heads: torch.Size,
    tensors: list[Tensor],
    pool: Tensor,
    src_slot: Tensor,
    dst_slot: Tensor,
) -> Tensor:
    out, u, y = (torch.empty_like(tensors[5]) for _ in range(3))
    run = _run(spans, heads, tensors, pool, src_slot, out=out, u=u, y=y)
    run["target"], run["target_slot"] = pool.data_ptr(), pool.stride(0)
    run["dst"] = dst_slot.data_ptr()
    _in_threads(forward, run)
    return out


def _run(
    spans: Spans,
    heads: torch.Size,
    tensors: Sequence[Tensor],
    source: Tensor,
    src_slot: Tensor,
    **others: Tensor,
) -> NDArray[np.void]:
    """What the kernels are told. Whoever calls keeps the tensors until they have returned."""
    size = source.shape[-1]
    run = np.zeros(1, RUN)
    run["num_tokens"], run["num_sequences"] = spans.starts[-1], len(spans.starts) - 1
    run["num_heads"], run["width"] = heads[0], heads[0] * size
    run["size"], run["head_size"] = size, heads[1]
    run["starts"], run["segments"] = spans.starts.ctypes.data, spans.segments.ctypes.data
    run["source"], run["source_slot"] = source.data_ptr(), source.stride(0)
    run["src"] = src_slot.data_ptr()
    for name, tensor in [*zip((*WEIGHTS, *ROWS), tensors, strict=False), *others.items()]:
        assert tensor.is_contiguous(), name
        run[name] = tensor.data_ptr()
    return run


def _in_threads(kernel: Callable[..., None], run: NDArray[np.void]) -> None:
    """As many threads as torch may use, this one among them, each taking the next unit."""
    num_tokens, num_sequences, num_heads, size, head_size, width, *_ = run[0].tolist()
    mask = (np.arange(size) < head_size).astype(np.float32)
    taken = np.zeros(1, np.int32)
    run["mask"], run["taken"] = mask.ctypes.data, taken.ctypes.data
    worthwhile = num_tokens * width * size // ELEMENTS_PER_THREAD
    count = max(1, min(torch.get_num_threads(), num_sequences * num_heads, worthwhile))
    scratch = np.empty((count, scratch_floats(size)), np.float32)
    if count == 1:
        kernel(run, scratch.ctypes.data)
        return
    own, *places = (row.ctypes.data for row in scratch)
    with ThreadPoolExecutor(count - 1, "time-mix") as pool:
        others = [pool.submit(kernel, run, place) for place in places]
        kernel(run, own)
        for other in others:
            other.result()


class _TimeMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spans: Spans, heads: torch.Size, states: Tensor, *tensors: Tensor
    ) -> Tensor:
        out, u, y = (torch.empty_like(tensors[5]) for _ in range(3))
        num_segments = int(spans.segments[-1])
        checkpoints = torch.empty(num_segments, *states.shape[1:])
        places = torch.arange(len(states))
        saved = {"u": u, "y": y, "checkpoints": checkpoints}
        run = _run(spans, heads, tensors, states, places, out=out, **saved)
        _in_threads(forward, run)
        ctx.spans, ctx.heads = spans, heads
        ctx.save_for_backward(states, *saved.values(), *tensors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, u, y, checkpoints, *tensors = ctx.saved_tensors
        d_out = grads[0].contiguous()
        partials = torch.zeros(len(checkpoints), NUM_PARTIALS, d_out.shape[1])
        d_state = torch.empty_like(states) if ctx.needs_input_grad[2] else None
        given = {"u": u, "y": y, "checkpoints": checkpoints, "d_out": d_out, "partials": partials}
        d_rows = [torch.empty_like(x) for x in tensors[len(WEIGHTS) :]]
        found = {f"d_{name}": x for name, x in zip(ROWS, d_rows, strict=False)}
        if d_state is not None:
            found["d_state"] = d_state
        places = torch.arange(len(states))
        _in_threads(backward, _run(ctx.spans, ctx.heads, tensors, states, places, **given, **found))
        sums = zip(partials.sum(0), tensors, strict=False)
        d_weights = [x.view(like.shape) for x, like in sums]
        return (None, None, d_state, *d_weights, *d_rows)
