"""How many values a JSON text holds, before it is parsed. Knows no fields.

Parsing holds the event loop, and 50 MB of brackets become lists for seconds and a gigabyte.
"""

from __future__ import annotations

import asyncio

from api.errors import ApiError

MAX_NUM_VALUES = 1_000_000  # some tenths of a second


async def check_num_values(data: bytes) -> None:
    """Raise ApiError 413 for more list entries, object members and brackets than anyone needs.

    Runs beside the loop where it takes long.
    """
    if len(data) <= MAX_NUM_VALUES:  # each of them takes a byte at least
        return
    if await asyncio.to_thread(has_too_many_values, data, MAX_NUM_VALUES):
        raise ApiError(
            413,
            f"the body has more than {MAX_NUM_VALUES:,} JSON values; send a long prompt as a text",
            code="request_too_large",
        )


def has_too_many_values(data: bytes, most: int) -> bool:
    """Each step is one quick pass over the bytes. Text that is no JSON gets any answer."""
    if _num_marks(data) <= most:
        return False
    plain = data.replace(rb"\\", b"").replace(rb"\"", b"")
    # Every quote that is left begins or ends a string, and a member of an object has two of them.
    if plain.count(b'"') > 4 * most + 2:
        return True
    return _num_marks(b"".join(plain.split(b'"')[::2])) > most


def _num_marks(text: bytes) -> int:
    return sum(text.count(mark) for mark in (b",", b"[", b"{"))
