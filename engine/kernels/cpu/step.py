"""One step of the whole model, phase by phase: what every thread of a team does.

Rows are tokens; those of a sequence follow each other. A phase reads what the one before has
written, so all meet in between; within a phase items are independent, and no two write the same.
"""

from __future__ import annotations

from numba import njit

from engine.kernels.cpu.heads import mix_all_heads
from engine.kernels.cpu.mixing import embed, leave_rows, mix_channels, mix_tokens
from engine.kernels.cpu.products import (
    add_product,
    leave_ranks,
    multiply_head,
    prepare_head,
    project,
    square_hidden,
)
from engine.kernels.cpu.records import (
    FFN_HIDDEN,
    FFN_KEY,
    FFN_VALUE,
    HEAD,
    LAST,
    NUM_MATRICES,
    OUTPUT,
    READ,
    STEP,
)
from engine.kernels.cpu.team import announce, await_job, dismiss, meet


@njit(cache=True, nogil=True)
def follow(team, thread, num_threads, model, layers, matrices, rows, run):
    """A member of the team, until it is dismissed."""
    job = 0
    while True:
        job = await_job(team, job)
        if job < 0:
            return
        _work(team, thread, num_threads, model[0], layers, matrices, rows, run[0])


@njit(cache=True, nogil=True)
def lead(team, num_threads, model, layers, matrices, rows, run):
    """Do the job in `run`, with the others."""
    announce(team)
    _work(team, 0, num_threads, model[0], layers, matrices, rows, run[0])


@njit(cache=True, nogil=True)
def send_home(team):
    dismiss(team)


@njit(cache=True, nogil=True)
def _work(team, thread, num_threads, model, layers, matrices, rows, run):
    scratch = run.scratch + 4 * thread * run.scratch_size
    if run.job == HEAD:
        prepare_head(team, model, rows[LAST], run)
        meet(team, num_threads)
        multiply_head(
            team, model, matrices[model.num_layers * NUM_MATRICES], rows[LAST], run, scratch
        )
        meet(team, num_threads)
        return
    if run.job != STEP:
        meet(team, num_threads)
        return
    embed(team, model, run, scratch)
    meet(team, num_threads)
    for index in range(model.num_layers):
        layer = layers[index]
        first = index * NUM_MATRICES
        mix_tokens(team, model, layer, index, rows, run, scratch)
        meet(team, num_threads)
        project(team, model, matrices, first, index, rows, run, scratch)
        meet(team, num_threads)
        leave_ranks(team, model, matrices, first, index, rows, run, scratch)
        meet(team, num_threads)
        mix_all_heads(team, num_threads, model, layer, index, rows, run, scratch)
        meet(team, num_threads)
        add_product(team, model, matrices[first + OUTPUT], rows[READ], run, scratch)
        meet(team, num_threads)
        mix_channels(team, model, layer, index, rows, run, scratch)
        meet(team, num_threads)
        square_hidden(team, model, matrices[first + FFN_KEY], index, rows, run, scratch)
        meet(team, num_threads)
        add_product(team, model, matrices[first + FFN_VALUE], rows[FFN_HIDDEN], run, scratch)
        meet(team, num_threads)
    leave_rows(team, model, run, scratch)
    meet(team, num_threads)
