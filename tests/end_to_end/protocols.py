"""One question in the four protocols, whole and as a stream, and what became of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.api.harness import parse_reply, request_bytes
from tests.end_to_end.process import read_all
from tests.end_to_end.site import MODEL, STORY, Server, user

QUESTION = "Tell me a story."
BODIES: Mapping[str, Mapping[str, object]] = {
    "/v1/chat/completions": {"messages": [user(QUESTION)]},
    "/v1/completions": {"prompt": STORY},
    "/v1/responses": {"input": QUESTION},
    "/v1/messages": {"messages": [user(QUESTION)]},
}
LIMITS = {"/v1/responses": "max_output_tokens"}
KINDS = [(path, is_stream) for path in BODIES for is_stream in (False, True)]
FAILED_EVENTS = ("error", "response.failed")


@dataclass
class Outcome:
    """`error` is the error object, of a whole answer or an event; `text` what came before."""

    path: str
    status: int
    text: str = ""
    error: dict[str, Any] | None = None
    is_complete: bool = False  # it says itself that it is at its end
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def is_good(self) -> bool:
        return self.status == 200 and self.error is None and self.is_complete


def body_of(path: str, *, num_tokens: int = 24, **fields: object) -> dict[str, object]:
    limit = LIMITS.get(path, "max_tokens")
    return {"model": MODEL, "temperature": 0, limit: num_tokens, **BODIES[path], **fields}


def ask(
    server: Server,
    path: str,
    *,
    on_part: Callable[[bytes], None] | None = None,
    **fields: Any,
) -> Outcome:
    """`on_part` is given the bytes as they come."""
    body = body_of(path, **fields)
    with server.process.connect() as sock:
        sock.settimeout(120)
        sock.sendall(request_bytes("POST", path, body, server.headers))
        data = read_all(sock) if on_part is None else _read_parts(sock, on_part)
    return outcome_of(path, data)


def outcome_of(path: str, data: bytes) -> Outcome:
    reply = parse_reply(data)
    outcome = Outcome(path, reply.status, headers=reply.headers, body=reply.body)
    if reply.headers["content-type"].startswith("text/event-stream"):
        _read_events(outcome, reply.body.decode())
        return outcome
    answer = reply.json()
    outcome.error = answer.get("error")
    if outcome.error is None and reply.status == 200:
        outcome.text, outcome.is_complete = _whole(path, answer)
    return outcome


def _whole(path: str, answer: Any) -> tuple[str, bool]:
    if path == "/v1/responses":
        text = "".join(part["text"] for item in answer["output"] for part in item["content"])
        return text, answer["status"] in ("completed", "incomplete")
    if path == "/v1/messages":
        return "".join(part["text"] for part in answer["content"]), bool(answer["stop_reason"])
    (choice,) = answer["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text, choice["finish_reason"] in ("stop", "length")


def _read_events(outcome: Outcome, text: str) -> None:
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        kind = event.get("type", "")
        if "error" in event or kind in FAILED_EVENTS:
            outcome.error = event.get("error") or event.get("response", {}).get("error") or event
            continue
        for choice in event.get("choices", []):
            outcome.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            outcome.is_complete |= choice["finish_reason"] in ("stop", "length")
        if kind == "response.output_text.delta":
            outcome.text += event["delta"]
        if kind == "content_block_delta":
            outcome.text += event["delta"]["text"]
        ends = ("response.completed", "response.incomplete", "message_stop")
        outcome.is_complete |= kind in ends


def _read_parts(sock: socket.socket, on_part: Callable[[bytes], None]) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
        on_part(part)
    return b"".join(parts)
