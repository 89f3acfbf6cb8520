"""The ends of answers as JSON."""

from __future__ import annotations

import json

import pytest

from api.encode import AnswerHead, Encoder
from api.encode_chat import ChatEncoder
from api.encode_completion import CompletionEncoder
from engine.types import FinishReason, OutputDelta, StateInfo

STATE = StateInfo(
    state_id="s",
    num_tokens=3,
    num_bytes=8,
    created_unix_s=1.5,
    expires_unix_s=None,
    label="",
    is_pinned=False,
    has_logits=True,
    parent_id=None,
    tier="host",
)


def end(**fields: object) -> OutputDelta:
    return OutputDelta(finish_reason=FinishReason.LENGTH, **fields)


def encoder(kind: type[ChatEncoder] | type[CompletionEncoder], returns_state: bool) -> Encoder:
    head = AnswerHead(
        answer_id="a", created=1, model_name="m", fingerprint="f", returns_state=returns_state
    )
    return kind(head)


@pytest.mark.parametrize("kind", [ChatEncoder, CompletionEncoder])
@pytest.mark.parametrize(
    ("returns_state", "delta", "expected"),
    [
        (False, end(), {}),
        (True, end(), {"state": None}),
        (True, end(state=STATE), {"state": "s"}),
        (False, end(state=STATE), {"state": "s"}),
        (True, end(resume_id="r"), {"resume": "r"}),
    ],
)
def test_end_says_what_was_kept_and_what_goes_on(
    kind: type[ChatEncoder], returns_state: bool, delta: OutputDelta, expected: dict[str, object]
):
    (chunk,) = encoder(kind, returns_state).last(0, delta)
    whole = encoder(kind, returns_state).whole([delta], {})
    for answer in (json.loads(chunk), json.loads(whole)):
        found = {name: answer[name] for name in ("state", "resume") if name in answer}
        assert {name: value and value["id"] for name, value in found.items()} == expected
        assert answer["choices"][0]["finish_reason"] == "length"
