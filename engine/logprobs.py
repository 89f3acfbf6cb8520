"""How probable the model itself finds given tokens, and which ones it finds most probable.

Knows logits as the model gave them and what a request asks to be told; no seats and no draws.

Legend: R rows, V vocabulary, K the most that any row asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.plan import Scores
from engine.types import SamplingParams, TopLogprobs


def score(logits_RV: Tensor, tokens: Sequence[int], asked: Sequence[SamplingParams]) -> Scores:
    """Log softmax of one token per row, in float32 at least, and what else its request asks for.

    A token has the same number as itself among the most probable ones, to the last bit.
    """
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    norms_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    tokens_R1 = torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device).unsqueeze(-1)
    logprobs: list[float] = (logits_RV.gather(-1, tokens_R1) - norms_R1).squeeze(-1).tolist()
    if not any(params.has_top_logprobs for params in asked):
        return Scores(tuple(logprobs))
    most = _most_probable(logits_RV, norms_R1, [params.num_top_logprobs for params in asked])
    candidates = _candidates(logits_RV, norms_R1, [params.candidate_token_ids for params in asked])
    tops = (first + second for first, second in zip(most, candidates, strict=True))
    return Scores(tuple(logprobs), tuple(tops))


def _most_probable(
    logits_RV: Tensor, norms_R1: Tensor, counts: Sequence[int]
) -> Sequence[TopLogprobs]:
    """As many as each row asks for, the most probable first."""
    most = min(max(counts), logits_RV.shape[-1])
    values_RK, ids_RK = logits_RV.topk(most, dim=-1)
    rows = zip(ids_RK.tolist(), (values_RK - norms_R1).tolist(), counts, strict=True)
    return [tuple(zip(ids[:n], values[:n], strict=True)) for ids, values, n in rows]


def _candidates(
    logits_RV: Tensor, norms_R1: Tensor, candidates: Sequence[tuple[int, ...]]
) -> Sequence[TopLogprobs]:
    """Those that each row asks for, in its order."""
    found = []
    for row, ids in enumerate(candidates):
        values = (logits_RV[row, list(ids)] - norms_R1[row]).tolist() if ids else []
        found.append(tuple(zip(ids, values, strict=True)))
    return found
