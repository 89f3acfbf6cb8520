"""The response object of /v1/responses, from its first event to its last. Knows no store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from api.encode import AnswerHead
from api.response_body import ResponseBody
from engine.types import FinishReason, OutputDelta, SamplingParams

ResponseObject = dict[str, object]


def response_object(
    body: ResponseBody, head: AnswerHead, sampling: SamplingParams
) -> ResponseObject:
    """A response that has just been accepted."""
    return {
        "id": head.answer_id,
        "object": "response",
        "created_at": head.created,
        "status": "in_progress",
        "completed_at": None,
        "background": body.is_background,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": sampling.max_tokens,
        "metadata": body.metadata or {},
        "model": head.model_name,
        "output": [],
        "previous_response_id": body.previous_response_id,
        "service_tier": "default",
        "store": body.is_stored,
        "system_fingerprint": head.fingerprint,
        "temperature": sampling.temperature,
        "top_logprobs": 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        **body.echo(),
    }


def answered(
    response: ResponseObject,
    output: Sequence[Mapping[str, object]],
    end: OutputDelta,
    usage: Mapping[str, object],
    completed_s: int,
) -> ResponseObject:
    """The response with its answer. An answer that was cut off is `incomplete`."""
    is_cut = end.finish_reason is FinishReason.LENGTH
    status = "incomplete" if is_cut else "completed"
    return response | {
        "status": status,
        "completed_at": None if is_cut else completed_s,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": output,
        "usage": _usage_object(end, usage),
    }


def failed(response: ResponseObject, message: str) -> ResponseObject:
    error = {"code": "server_error", "message": message}
    return response | {"status": "failed", "error": error}


def cancelled(response: ResponseObject) -> ResponseObject:
    return response | {"status": "cancelled"}


def _usage_object(end: OutputDelta, usage: Mapping[str, object]) -> dict[str, object]:
    """Input tokens are all that the answer rests on; those of a state were not computed again."""
    num_input_tokens = end.num_state_tokens + end.num_prompt_tokens
    counts: dict[str, object] = {
        "input_tokens": num_input_tokens,
        "input_tokens_details": {
            "cached_tokens": end.num_state_tokens + end.num_cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": end.num_output_tokens,
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": num_input_tokens + end.num_output_tokens,
    }
    if usage.get("context_exceeded"):
        counts["context_exceeded"] = True
    return counts
