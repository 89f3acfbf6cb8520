"""What tests of hostile clients share: endless requests of each protocol, and no harm done."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.api.harness import Reply, request_bytes
from tests.end_to_end.site import MODEL, STORY, Server, chat_body, eventually, text_of, user

ENDLESS = 1_000_000
ONE_TOKEN = 1363  # nothing else may be drawn, so that no stop string or token ends the answer
SMALL_BUFFER_BYTES = 4096
SETTLE_S = 20.0


@dataclass(frozen=True)
class Protocol:
    """A route that generates text, and the names of its fields."""

    path: str
    prompt_field: str
    max_tokens_field: str = "max_tokens"

    def body(self, prompt: str, max_tokens: int, **fields: object) -> dict[str, object]:
        asked: object = prompt if self.prompt_field != "messages" else [user(prompt)]
        return {
            "model": MODEL,
            self.prompt_field: asked,
            self.max_tokens_field: max_tokens,
            "temperature": 0,
            **fields,
        }

    def endless(self, prompt: str = STORY, **fields: object) -> bytes:
        """A request whose answer ends when its client goes."""
        body = self.body(prompt, ENDLESS, allowed_token_ids=[ONE_TOKEN], **fields)
        return request_bytes("POST", self.path, body)

    def text(self, reply: Reply) -> str:
        """Of a whole answer."""
        answer = reply.json()
        if self.path == "/v1/responses":
            return str(answer["output"][0]["content"][0]["text"])
        if self.path == "/v1/messages":
            return str(answer["content"][0]["text"])
        return text_of(answer)


PROTOCOLS = {
    "completions": Protocol("/v1/completions", "prompt"),
    "chat": Protocol("/v1/chat/completions", "messages"),
    "responses": Protocol("/v1/responses", "input", "max_output_tokens"),
    "messages": Protocol("/v1/messages", "messages"),
}


def num_files(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.process.pid}/fd"))


def deaf_socket(server: Server) -> socket.socket:
    """A client with small kernel buffers, so that not reading is felt soon."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
    sock.connect(("127.0.0.1", server.process.port))
    return sock


def report(server: Server) -> dict[str, int]:
    """/health of the model."""
    (model,) = server.get("/health")["models"]
    return model


def is_idle(server: Server) -> bool:
    model = report(server)
    return (model["running"], model["waiting"], model["free_slots"]) == (0, 0, model["slots"])


def num_tasks(server: Server) -> int:
    for line in server.ask("GET", "/metrics").body.decode().splitlines():
        if line.startswith("rwkv_tasks "):
            return int(float(line.split()[1]))
    raise AssertionError("no rwkv_tasks")


def honest_answer(server: Server) -> str:
    """What a client that does nothing bad is told; always the same."""
    body = chat_body(messages=[user("Hello! How are you?")], seed=7, temperature=1, max_tokens=16)
    return text_of(server.post("/v1/chat/completions", body))


@contextmanager
def unharmed(server: Server) -> Iterator[None]:
    """Afterwards no slot, descriptor or task is lost, nothing crashed, and others are served."""
    answer = honest_answer(server)
    files, tasks = num_files(server), num_tasks(server)
    num_logged = len(server.log)
    yield
    assert honest_answer(server) == answer
    eventually(lambda: is_idle(server), SETTLE_S)
    eventually(lambda: num_files(server) <= files, SETTLE_S)
    eventually(lambda: num_tasks(server) <= tasks, SETTLE_S)
    assert "Traceback" not in server.log[num_logged:], server.log[num_logged:]
