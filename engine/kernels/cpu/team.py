"""A team of threads that go through the phases of a step together.

One thread leads and calls from Python; the others wait in compiled code, without the
interpreter's lock, for the next job. Within a phase every thread takes the next item until there
is none; between phases they meet. Whoever waits spins for a moment, since phases are short, and
then sleeps, since the others may have lost their processor to somebody else.

The words they share lie in one int32 array, a cache line apart.
"""

from __future__ import annotations

from numba import njit

from engine.kernels.cpu.atomic import (
    atomic_add,
    atomic_load,
    atomic_store,
    pause,
    sleep_while,
    wake_all,
)

JOB, STOPPED, ARRIVED, PHASE, SLEEPERS, ITEM, JOB_SLEEPERS = (16 * i for i in range(7))
NUM_WORDS = 16 * 8
SPINS = 2000  # some 30 microseconds


@njit(cache=True, nogil=True)
def next_item(team):
    """A number nobody else gets in this phase, from 0."""
    return atomic_add(team, ITEM, 1)


@njit(cache=True, nogil=True)
def meet(team, num_threads):
    """Go on when all have come; items count from 0 again."""
    phase = atomic_load(team, PHASE)
    if atomic_add(team, ARRIVED, 1) == num_threads - 1:
        atomic_store(team, ARRIVED, 0)
        atomic_store(team, ITEM, 0)
        atomic_add(team, PHASE, 1)
        if atomic_load(team, SLEEPERS) > 0:
            wake_all(team, PHASE)
    else:
        _wait(team, PHASE, phase, SLEEPERS)


@njit(cache=True, nogil=True)
def _wait(team, word, value, sleepers):
    """Until a word is no longer `value`."""
    for _ in range(SPINS):
        if atomic_load(team, word) != value:
            return
        pause()
    atomic_add(team, sleepers, 1)
    while atomic_load(team, word) == value:
        sleep_while(team, word, value)
    atomic_add(team, sleepers, -1)


@njit(cache=True, nogil=True)
def await_job(team, last):
    """The number of the job after `last`, or -1 when there will be none."""
    _wait(team, JOB, last, JOB_SLEEPERS)
    return -1 if atomic_load(team, STOPPED) else last + 1


@njit(cache=True, nogil=True)
def announce(team):
    """There is a job. It wraps around after 2**32 of them, as `await_job` does."""
    atomic_add(team, JOB, 1)
    if atomic_load(team, JOB_SLEEPERS) > 0:
        wake_all(team, JOB)


@njit(cache=True, nogil=True)
def dismiss(team):
    """Send everybody home."""
    atomic_store(team, STOPPED, 1)
    announce(team)
