"""A backend is tried on a model before it serves. Knows no requests and no slots of theirs."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.backend import Backend, Batch
from engine.model.rwkv7 import RWKV7

logger = logging.getLogger(__name__)

# Relative to the reference's logits, in which bfloat16 alone makes about 1e-2.
MAX_ERROR = {torch.float32: 1e-2, torch.float64: 1e-6}
MAX_ERROR_OF_HALVES = 5e-2
LENGTHS = (19, 2)  # a chunk and a part of one, and a short prompt


def take_backend(model: RWKV7, backend: Backend, device: torch.device) -> None:
    """Let the model be computed by `backend` if two prompts and a token after each come out as
    the reference has them; else by the reference, and one line of the log says why."""
    model.kernels = backend
    if backend is reference:
        return
    reason = _fault(model, backend, device)
    if reason is not None:
        logger.warning("kernels: reference (%s)", reason)
        model.kernels = reference


@torch.inference_mode()
def _fault(model: RWKV7, backend: Backend, device: torch.device) -> str | None:
    wanted = _logits(model, reference, device)
    try:
        got = _logits(model, backend, device)
    except Exception as error:
        said = (str(error).strip() or "no reason given").splitlines()[0]
        return f"trial failed with {type(error).__name__}: {said}"
    error_ratio = ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
    limit = MAX_ERROR.get(model.emb.weight.dtype, MAX_ERROR_OF_HALVES)
    if error_ratio <= limit:  # not so for NaN
        return None
    return f"in a trial logits were off by {error_ratio:.1g}, with {limit:.1g} allowed"


def _logits(model: RWKV7, backend: Backend, device: torch.device) -> Tensor:
    """Float64 logits of all tokens of the prompts and of the one after each."""
    model.kernels = backend
    state = model.new_state(4, device)
    first = torch.tensor([1, 2], device=device)
    num_tokens = sum(LENGTHS)
    token_ids = torch.arange(num_tokens + 2, device=device) * 7 % model.dims.vocab_size
    prompts = model(token_ids[:num_tokens], Batch(LENGTHS, first * 0, first), state)
    after = model(token_ids[num_tokens:], Batch((1, 1), first, first), state)
    logits: Tensor = model.head(torch.cat([prompts, after]))
    return logits.double()
