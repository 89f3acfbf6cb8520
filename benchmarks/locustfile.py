"""Chat users for locust: turns with history, time to first token and inter-token latency as stats.

    locust -f benchmarks/locustfile.py --headless -u 8 -r 4 -t 20s --host http://127.0.0.1:8080

Three request types are reported beside the plain POST: `first token`, `between tokens` (the mean
of each answer) and `answer` (the whole stream, length = tokens). Any failure makes locust exit 1.
"""

from __future__ import annotations

import os
import time
from typing import Any

import orjson
from locust import FastHttpUser, between, events, task

MODEL = os.environ.get("MODEL", "rwkv-lm-tiny")
QUESTIONS = ("Hello! How are you?", "What do you like to eat?", "Tell me about your family.")
MAX_TURNS = 4


@events.quitting.add_listener
def fail_on_errors(environment: Any, **_: Any) -> None:
    if environment.stats.total.num_failures:
        environment.process_exit_code = 1


class ChatUser(FastHttpUser):
    """One person: asks, reads the streamed answer, thinks for a moment, goes on or starts anew."""

    host = "http://127.0.0.1:8080"
    wait_time = between(0.2, 1.0)

    def on_start(self) -> None:
        self.messages: list[dict[str, str]] = []

    @task
    def turn(self) -> None:
        if len(self.messages) >= 2 * MAX_TURNS:
            self.messages = []
        question = QUESTIONS[len(self.messages) // 2 % len(QUESTIONS)]
        self.messages.append({"role": "user", "content": question})
        answer = self.ask()
        if answer is None:
            self.messages.pop()
        else:
            self.messages.append({"role": "assistant", "content": answer or "..."})

    def ask(self) -> str | None:
        """Stream one answer and report its times; None after a failure."""
        body = {
            "model": MODEL,
            "messages": self.messages,
            "max_tokens": 48,
            "top_p": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started = time.perf_counter()
        stamps: list[float] = []
        text, usage = "", None
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text[:200]}")
                return None
            # The response's own iterators wait for full buffers and would hide token times.
            raw = response._response
            while line := raw.readline(b"\n"):
                if line.startswith(b"data: [DONE]"):
                    break
                if not line.startswith(b"data: "):
                    continue
                event = orjson.loads(line[6:])
                if "error" in event:
                    response.failure(event["error"]["message"])
                    return None
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    if content := choice["delta"].get("content"):
                        text += content
                        stamps.append(time.perf_counter())
            if usage is None:
                response.failure("the stream ended without usage and [DONE]")
                return None
        self.report("answer", time.perf_counter() - started, usage["completion_tokens"])
        if stamps:
            self.report("first token", stamps[0] - started, 1)
        if len(stamps) > 1:
            self.report("between tokens", (stamps[-1] - stamps[0]) / (len(stamps) - 1), 1)
        return text

    def report(self, name: str, seconds: float, length: int) -> None:
        self.environment.events.request.fire(
            request_type="CHAT",
            name=name,
            response_time=seconds * 1e3,
            response_length=length,
            exception=None,
            context={},
        )
