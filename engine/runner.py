"""The device thread: takes plans from one FIFO, runs the model, sends results back.

Tensors live here and nowhere else. It knows slots, seats and tokens, not requests or text.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.model.rwkv7 import RWKV7, Batch
from engine.plan import ZERO_SLOT, Row, StepPlan, StepResult
from engine.sampler import Sampler
from engine.state.storage import StateStorage

logger = logging.getLogger(__name__)


class ModelRunner:
    """Runs one model on one device. A plain thread: device and inference mode are thread-local."""

    def __init__(
        self,
        model: RWKV7,
        storage: StateStorage,
        sampler: Sampler,
        num_seats: int,
        num_threads: int = 1,
    ) -> None:
        """`num_threads` compute on a CPU. More than there are idle cores is many times slower:
        torch's threads wait for each other by spinning."""
        self._num_threads = num_threads
        self._model = model
        self._storage = storage
        self._sampler = sampler
        # Sampled tokens stay on the device: the next step may be planned before they are known.
        self._next_token = torch.zeros(num_seats, dtype=torch.int64, device=storage.device)
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, on_result: Callable[[StepResult], None]) -> None:
        assert self._thread is None, "the runner is started once"
        self._thread = threading.Thread(
            target=self._run, args=(on_result,), name="device", daemon=True
        )
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def close(self) -> None:
        if self._thread is not None:
            self._plans.put(None)
            self._thread.join()
            self._thread = None

    def _run(self, on_result: Callable[[StepResult], None]) -> None:
        torch.set_num_threads(self._num_threads)
        while (plan := self._plans.get()) is not None:
            started = time.perf_counter()
            try:
                tokens = self.execute(plan)
            except Exception as error:  # the loop decides what a failed step means
                logger.exception("step %d failed", plan.step_id)
                result = StepResult(
                    step_id=plan.step_id,
                    tokens=(),
                    duration_s=time.perf_counter() - started,
                    error=f"{type(error).__name__}: {error}",
                    is_fatal=self._storage.device.type == "cuda",  # CUDA errors are sticky
                )
            else:
                result = StepResult(plan.step_id, tokens, time.perf_counter() - started)
            on_result(result)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> tuple[int, ...]:
        """One step: seats, forward, draws. Returns a token for each sampling row, in plan order."""
        for start in plan.starts:
            self._sampler.start(start.seat, start.sampling)
        # Decode rows first: the recurrence then takes them as one batch of single tokens.
        decode = [row for row in plan.rows if row.num_tokens == 1]
        prefill = [row for row in plan.rows if row.num_tokens > 1]
        sampled: dict[int, int] = {}
        for rows in (decode, prefill):
            if rows:
                self._forward(rows, sampled)
        return tuple(sampled[row.seq_id] for row in plan.rows if row.sample)

    def _forward(self, rows: list[Row], sampled: dict[int, int]) -> None:
        for row in rows:
            assert row.dst.slot != ZERO_SLOT, f"row of sequence {row.seq_id} writes the zero page"
        batch = Batch(
            lengths=tuple(row.num_tokens for row in rows),
            src_slot=self._storage.indices([row.src.slot for row in rows]),
            dst_slot=self._storage.indices([row.dst.slot for row in rows]),
        )
        hidden_TC = self._model(self._tokens(rows), batch, self._storage.state)
        sampling = [row for row in rows if row.sample]
        if not sampling:
            return
        ends = torch.tensor(batch.lengths).cumsum(0) - 1
        picked = ends[[row.sample for row in rows]].to(hidden_TC.device)
        logits = self._model.head(hidden_TC[picked])
        tokens = self._sampler.sample(
            logits,
            [row.seat for row in sampling],
            [row.position + row.num_tokens for row in sampling],
        )
        seats = self._storage.indices([row.seat for row in sampling])
        self._next_token[seats] = self._storage.indices(tokens).clamp_(min=0)
        sampled.update((row.seq_id, token) for row, token in zip(sampling, tokens, strict=True))

    def _tokens(self, rows: list[Row]) -> Tensor:
        known = [row.tokens if row.tokens is not None else (0,) for row in rows]
        tokens = self._storage.indices([token for part in known for token in part])
        waiting = [(i, row.seat) for i, row in enumerate(rows) if row.tokens is None]
        if waiting:
            starts = torch.tensor([0, *(len(part) for part in known)]).cumsum(0)
            places = starts[[i for i, _ in waiting]].to(tokens.device)
            seats = self._storage.indices([seat for _, seat in waiting])
            tokens[places] = self._next_token[seats]
        return tokens
