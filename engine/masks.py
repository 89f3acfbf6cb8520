"""Masks: bits that say which tokens may be drawn -> logits. Knows neither grammars nor seats.

Legend: R rows, G those of them with a mask, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Masks:
    """Takes away the chances of the tokens that a mask does not allow.

    A mask has one bit per token; eight of them are looked up at once, which is many times faster
    than taking the bits apart, and leaves an eighth of a byte per token to bring to the device.
    """

    def __init__(self, device: torch.device) -> None:
        values = [
            [0.0 if byte >> bit & 1 else -torch.inf for bit in range(8)] for byte in range(256)
        ]
        self._biases = torch.tensor(values, device=device)  # [256, 8]

    def apply(self, logits_RV: Tensor, masks: Sequence[bytes | None]) -> None:
        """In place. One mask per row, the lowest bit of its first byte being id 0; None allows
        everything."""
        places = [i for i, mask in enumerate(masks) if mask is not None]
        if not places:
            return
        num_bytes = -(-logits_RV.shape[-1] // 8)
        joined = bytearray().join(mask[:num_bytes] for mask in masks if mask is not None)
        bytes_n = torch.frombuffer(joined, dtype=torch.uint8).to(logits_RV.device).int()
        biases = self._biases.index_select(0, bytes_n).view(len(places), -1)
        biases_GV = biases[:, : logits_RV.shape[-1]]
        if len(places) == len(masks):
            logits_RV += biases_GV
        else:
            rows = torch.tensor(places, device=logits_RV.device)
            logits_RV[rows] += biases_GV
