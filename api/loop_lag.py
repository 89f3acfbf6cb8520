"""How late the event loop is: what every other client waits while one thing is done on it."""

from __future__ import annotations

import asyncio
from time import perf_counter

from api.stats import Histogram

PERIOD_S = 0.05
LAG_S = (0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


def lag_histogram() -> Histogram:
    return Histogram(LAG_S)


async def observe_lag(lag: Histogram, period_s: float = PERIOD_S) -> None:
    """Until it is cancelled. Timers of uvloop are a millisecond early or late by themselves."""
    while True:
        begun_s = perf_counter()
        await asyncio.sleep(period_s)
        lag.observe(max(0.0, perf_counter() - begun_s - period_s))
