"""Pipeline: the plans on their way through the device, and the way back for results.

The border between the event loop and the device thread. Knows neither sequences nor text.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from time import perf_counter

from engine.plan import Runner, StepPlan, StepResult
from engine.stopping import stop_in_thread

logger = logging.getLogger(__name__)


class Pipeline:
    """At most `depth` plans in flight. Everything but `_receive` is called on the event loop.

    `on_result` is called on the loop when a result has come that `take` will give.
    """

    def __init__(self, runner: Runner, depth: int, on_result: Callable[[], None]) -> None:
        if depth < 1:
            raise ValueError(f"depth = {depth}: at least one plan must be in flight")
        self._runner = runner
        self._depth = depth
        self._on_result = on_result
        self._plans: deque[StepPlan] = deque()
        self._results: deque[StepResult] = deque()
        self._busy_since_s = 0.0  # last result taken, or the plan that ended an idle time
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_empty(self) -> bool:
        return not self._plans

    @property
    def has_room(self) -> bool:
        return len(self._plans) < self._depth

    @property
    def seconds_since_result(self) -> float | None:
        """How long the oldest plan has been the device's only duty; None when there is none."""
        return perf_counter() - self._busy_since_s if self._plans else None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._runner.start(self._receive)

    def submit(self, plan: StepPlan) -> None:
        assert self.has_room, f"step {plan.step_id} beyond the depth of {self._depth}"
        if not self._plans:
            self._busy_since_s = perf_counter()
        self._plans.append(plan)
        self._runner.submit(plan)

    def take(self) -> tuple[StepPlan, StepResult] | None:
        """The oldest plan with its result, or None when that has not come."""
        if not self._results:
            return None
        self._busy_since_s = perf_counter()
        return self._plans.popleft(), self._results.popleft()

    def forget(self) -> None:
        """Nobody is interested in what is in flight any more."""
        self._plans.clear()
        self._results.clear()

    async def close(self, timeout_s: float) -> bool:
        """Stop the runner; False if it did not stop in time and was left behind."""
        self.forget()
        return await stop_in_thread(self._runner.close, "runner close", timeout_s)

    def _receive(self, result: StepResult) -> None:
        """Called by the runner, from any thread."""
        assert self._loop is not None, "a result before the start"
        try:
            self._loop.call_soon_threadsafe(self._arrive, result)
        except RuntimeError:
            logger.warning("result of step %d came after the event loop", result.step_id)

    def _arrive(self, result: StepResult) -> None:
        if not self._plans:
            return  # forgotten
        self._results.append(result)
        self._on_result()
