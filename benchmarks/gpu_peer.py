"""The same recurrence by flash-linear-attention (PyPI: fla-core), where it is installed.

It computes the recurrence alone; its inputs are what ours are after their preparation. Without it
there is nothing to compare with, and rows have no column for it.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor

from benchmarks.gpu_device import Bench

LOWER_BOUND = -1.0001 * math.exp(-0.5)  # of the log decay; 1.0001 for what rounding adds

Wkv = Callable[..., tuple[Tensor, Tensor | None]]


def has_fla(bench: Bench) -> bool:
    """Its kernels need a GPU, and einops, which fla-core asks for."""
    return bench.device.type == "cuda" and find_spec("fla") is not None


def fla_version() -> str:
    return str(importlib.import_module("fla").__version__)


def microseconds(measure: Callable[[], float]) -> float | str:
    """Of what `measure` gives in seconds, or why not: our rows go on without it."""
    try:
        return measure() * 1e6
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}".splitlines()[0]


def chunked(inputs: tuple[Tensor, ...], first: Tensor | None, lengths: tuple[int, ...]) -> Tensor:
    """y of r, log w, k, v, a, b [T, H, N], by chunk_rwkv7: for prompts and for training."""
    compute = cast(Wkv, importlib.import_module("fla.ops.rwkv7").chunk_rwkv7)
    options: dict[str, object] = {"scale": 1.0, "initial_state": first, "output_final_state": True}
    if "lower_bound" in inspect.signature(compute).parameters:
        options["lower_bound"] = LOWER_BOUND  # the faster kernels, since 0.6
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
    else:
        shape = (1, sum(lengths))
        ends = torch.tensor((0, *lengths)).cumsum(0)
        options["cu_seqlens"] = ends.to(inputs[0].device)
    r, w, k, v, a, b = (x.view(*shape, *x.shape[1:]) for x in inputs)
    y, _ = compute(r=r, w=w, k=k, v=v, a=a, b=b, **options)
    return y.flatten(0, 1)


def one_token(
    inputs: tuple[Tensor, ...], kk: Tensor, rate: Tensor, state_BHNN: Tensor
) -> tuple[Tensor, Tensor | None]:
    """By fused_mul_recurrent_rwkv7, which its models decode with; the state after is new memory."""
    compute = cast(Wkv, importlib.import_module("fla.ops.rwkv7").fused_mul_recurrent_rwkv7)
    r, w, k, v = (x.unsqueeze(1) for x in inputs[:4])
    return compute(
        r=r, w=w, k=k, v=v, kk=kk.unsqueeze(1), a=rate.unsqueeze(1), scale=1.0,
        initial_state=state_BHNN, output_final_state=True,
    )  # fmt: skip
