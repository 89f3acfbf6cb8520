"""The device thread: takes plans from one FIFO, has them executed, sends results back.

It knows plans and threads; the tensors are the executor's.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import torch

from engine.cuda_graph import Recorder
from engine.executor import Read, StepExecutor
from engine.model.served import ServedModel
from engine.plan import StepPlan, StepResult
from engine.sampler import Draws, Sampler
from engine.state.storage import StateStorage

logger = logging.getLogger(__name__)


class _Issued(NamedTuple):
    """A step that the device was asked for, or could not be."""

    step_id: int
    begun_s: float
    read: Read


class ModelRunner:
    """Runs one model on one device. A plain thread: device and inference mode are thread-local.

    Where the device draws tokens by itself, a second thread waits for them, so that the first one
    asks for the next step before they are known.
    """

    def __init__(
        self,
        model: ServedModel,
        storage: StateStorage,
        sampler: Sampler,
        num_seats: int,
        num_threads: int = 1,
        make_recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        """`num_threads` are torch's on a CPU. More than there are idle cores is many times slower:
        they wait for each other by spinning. With `make_recorder`, which is called on
        the device's thread, decode steps are recorded and replayed."""
        self._num_threads = num_threads
        self._device = storage.device
        self._executor = StepExecutor(model, storage, sampler, num_seats)
        self._make_recorder = make_recorder
        self._waits_apart = make_recorder is not None and sampler.on_device is not None
        self._plans: queue.SimpleQueue[StepPlan | Future[None] | None] = queue.SimpleQueue()
        self._issued: queue.SimpleQueue[_Issued | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._on_result: Callable[[StepResult], None] | None = None
        self._last_result_s = 0.0

    def prepare(self) -> None:
        """Warm up and record, before the start. Blocks; raises what is wrong with the device.

        What was recorded must be replayed by the thread that did it.
        """
        if self._make_recorder is None:
            self._executor.warm_up()
            return
        done: Future[None] = Future()
        self._start_threads()
        self._plans.put(done)
        try:
            done.result()
        except BaseException:
            self.close()
            raise

    def start(self, on_result: Callable[[StepResult], None]) -> None:
        assert self._on_result is None, "the runner is started once"
        self._on_result = on_result
        if not self._threads:
            self._start_threads()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def close(self) -> None:
        if self._threads:
            self._plans.put(None)
            for thread in self._threads:
                thread.join()
            self._threads = []
        self._on_result = None  # who listens holds this runner: a cycle would keep the weights

    def execute(self, plan: StepPlan) -> Draws:
        """One step, on the thread of the caller."""
        return self.issue(plan)()

    def issue(self, plan: StepPlan) -> Read:
        """Ask the device for one step; what is returned waits for it."""
        return self._executor.issue(plan)

    def _start_threads(self) -> None:
        targets = {"device": self._run}
        if self._waits_apart:
            targets["device results"] = self._wait
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in targets.items()
        ]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (plan := self._plans.get()) is not None:
            if isinstance(plan, Future):
                self._prepare(plan)
                continue
            begun_s = time.perf_counter()
            try:
                read = self.issue(plan)
            except BaseException as error:
                read = _failing(error)
            issued = _Issued(plan.step_id, begun_s, read)
            if self._waits_apart:
                self._issued.put(issued)
            else:
                self._finish(issued)
        self._issued.put(None)

    def _prepare(self, done: Future[None]) -> None:
        assert self._make_recorder is not None, "nothing to record with"
        try:
            self._executor.warm_up()
            self._executor.record(self._make_recorder())
        except BaseException as error:  # whoever waits for it decides
            done.set_exception(error)
        else:
            done.set_result(None)

    def _wait(self) -> None:
        while (issued := self._issued.get()) is not None:
            self._finish(issued)

    def _finish(self, issued: _Issued) -> None:
        """Wait for a step, and tell of it. Steps in flight have their time one after the other."""
        assert self._on_result is not None, "a plan before the start"
        try:
            draws, error = issued.read(), None
        except BaseException as failure:  # the loop decides what a failed step means
            draws, error = Draws(()), failure
            logger.error("step %d failed", issued.step_id, exc_info=failure)
        now_s = time.perf_counter()
        duration_s = now_s - max(issued.begun_s, self._last_result_s)
        self._last_result_s = now_s
        self._on_result(
            StepResult(
                step_id=issued.step_id,
                tokens=draws.tokens,
                duration_s=duration_s,
                error=None if error is None else f"{type(error).__name__}: {error}",
                is_fatal=error is not None and self._is_fatal(error),
                logprobs=draws.logprobs,
                tops=draws.tops,
                scores=draws.scores,
                hidden=draws.hidden,
                unsound=draws.unsound,
            )
        )

    def _is_fatal(self, error: BaseException) -> bool:
        """CUDA errors are sticky; and what is no Exception was to end this thread."""
        return self._device.type == "cuda" or not isinstance(error, Exception)


def _failing(error: BaseException) -> Read:
    def read() -> Draws:
        raise error

    return read
