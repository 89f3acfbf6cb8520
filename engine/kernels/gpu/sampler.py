"""Draws one token per row on a GPU: the arrays of seats, checks, launches. Needs triton.

What a draw means is told by `engine.sampler`. Knows seats as numbers in arrays, no requests.

Legend: B rows, S seats, V vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from engine.kernels.gpu.draw import adjust_kernel, pick_kernel, weigh_kernel

TILE_WARPS, ROW_WARPS = 4, 8


@dataclass(frozen=True, slots=True)
class SeatArrays:
    """What the kernels know of each seat, on the device.

    The penalty of a token is its entry times the seat's scale: so all of them decay by one
    multiplication, and only the drawn token's entry is written. A row is written anew when its
    scale falls below LEAST_SCALE, once in 64 / log2(1 / decay) draws.
    """

    floats: Tensor  # [S, NUM_FLOATS] float32
    integers: Tensor  # [S, NUM_INTEGERS] int64; the seed's bits are those of an unsigned number
    allowed: Tensor  # [2, S, W] int32: bits of what may be drawn; [1] until min_tokens are drawn
    biases: Tensor  # [S, V] float32, read where HAS_BIASES
    penalties: Tensor  # [S, V] float32, read and written where HAS_PENALTIES
    scales: Tensor  # [S] float32
    num_drawn: Tensor  # [S] int64


def draw(
    logits_BV: Tensor,
    seats_B: Tensor,
    positions_B: Tensor,
    arrays: SeatArrays,
    masks_BW: Tensor | None = None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens [B] int64 and log probabilities [B] float32, all on the device; logits stay.

    Seats and positions are integers on the device; a row of a negative seat is padding: nothing of
    it is read, and what it draws is undefined. No two rows may share a seat. Masks are int32 with a
    bit for each token, 1 where it may be drawn, the lowest of the first word for token 0.
    """
    num_rows, vocab_size = logits_BV.shape
    num_seats = arrays.scales.shape[0]
    assert arrays.penalties.shape == (num_seats, vocab_size), arrays.penalties.shape
    assert logits_BV.stride(1) == 1, logits_BV.stride()
    assert seats_B.shape == positions_B.shape == (num_rows,)
    device = logits_BV.device
    tokens_B = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs_B = torch.empty(num_rows, device=device)
    if num_rows == 0:
        return tokens_B, logprobs_B
    if masks_BW is not None:
        assert masks_BW.dtype == torch.int32, masks_BW.dtype
        assert masks_BW.shape == (num_rows, -(-vocab_size // 32)), masks_BW.shape
        assert masks_BW.stride(1) == 1, masks_BW.stride()
    tile = tile or choose_tile(vocab_size)
    num_tiles = -(-vocab_size // tile)
    shape = dict(TILE=tile, T=num_tiles)
    weights = torch.empty(num_rows, num_tiles * tile, device=device)
    stats = torch.empty(num_rows, 4, num_tiles, device=device)
    best_ids = torch.empty(num_rows, num_tiles, dtype=torch.int32, device=device)
    seat_rules = (arrays.floats, arrays.integers)
    seat_state = (arrays.penalties, arrays.scales, arrays.num_drawn)
    adjust_kernel[(num_rows, num_tiles)](
        logits_BV,
        logits_BV.stride(0),
        seats_B,
        arrays.integers,
        arrays.allowed,
        arrays.biases,
        *seat_state,
        logits_BV if masks_BW is None else masks_BW,
        0 if masks_BW is None else masks_BW.stride(0),
        weights,
        stats,
        best_ids,
        num_seats,
        V=vocab_size,
        HAS_MASKS=masks_BW is not None,
        num_warps=TILE_WARPS,
        **shape,
    )
    shape["T_POWER"] = triton.next_power_of_2(num_tiles)
    weigh_kernel[(num_rows, num_tiles)](
        seats_B, *seat_rules, weights, stats, num_warps=TILE_WARPS, **shape
    )
    pick_kernel[(num_rows,)](
        logits_BV,
        logits_BV.stride(0),
        seats_B,
        positions_B,
        *seat_rules,
        *seat_state,
        weights,
        stats,
        best_ids,
        tokens_B,
        logprobs_B,
        V=vocab_size,
        num_warps=ROW_WARPS,
        **shape,
    )
    return tokens_B, logprobs_B


def choose_tile(vocab_size: int) -> int:
    """As many tokens as 8 warps take with 4 loads of 16 bytes in flight each; fewer are enough for
    a vocabulary that is smaller."""
    size: int = triton.next_power_of_2(vocab_size)
    return min(4096, max(128, size))
