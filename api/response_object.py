"""The response object of /v1/responses, from its first event to its last. Knows no store."""

from __future__ import annotations

from collections.abc import Mapping

from api.encode import AnswerHead
from api.response_body import ResponseBody
from api.response_items import output_part
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
        "parallel_tool_calls": True,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": body.is_stored,
        "system_fingerprint": head.fingerprint,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def output_message(item_id: str, status: str, text: str | None = None) -> dict[str, object]:
    """The one item of the output; without a text, as it is before the first one comes."""
    return {
        "id": item_id,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [] if text is None else [output_part(text)],
    }


def answered(
    response: ResponseObject,
    item_id: str,
    text: str,
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
        "output": [output_message(item_id, status, text)],
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
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input_tokens + end.num_output_tokens,
    }
    if usage.get("context_exceeded"):
        counts["context_exceeded"] = True
    return counts
