"""The part of a model table that a running replica can take over. Knows no scheduler."""

from __future__ import annotations

from config import ModelTable
from engine.types import LiveLimits


def limits_of(table: ModelTable) -> LiveLimits:
    return LiveLimits(
        decode_first=table.decode_first,
        max_batch_tokens=table.resolved_max_batch_tokens,
        max_waiting=table.max_waiting,
        max_context_len=table.max_context_len,
        rejects_long_context=table.context_policy == "reject",
        time_slice_tokens=table.time_slice_tokens,
    )
