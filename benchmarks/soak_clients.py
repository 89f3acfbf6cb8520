"""What the clients of a soak do: one request or a few, in every protocol, well or badly behaved.

Each returns what it was answered, so that whoever runs it can tell whether that changes over time.
Prompts come from a small set, answers are greedy. Knows nothing of measuring.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

TIMEOUT_S = 120
TOPICS = ("a cat", "two dogs", "the sea", "an old house", "a small boat", "my friend", "the snow")
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"]}
WEATHER = {"name": "weather", "parameters": CITY | {"additionalProperties": False}}


class Failed(Exception):
    """Not the answer that such a request must have."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client was told, and when: seconds from sending to the first text, and gaps."""

    text: str
    first_s: float | None = None
    gaps_s: tuple[float, ...] = ()


class Client:
    """One connection at a time, as most clients are. Not safe to share between threads."""

    def __init__(self, address: str, model_name: str, random: Random) -> None:
        self._address, self.model_name, self._random = address, model_name, random

    def ask(
        self, method: str, path: str, fields: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """The JSON of a 200. Raises Failed."""
        with _closing(self._send(method, path, fields)) as connection:
            response = connection.getresponse()
            data = response.read()
        if response.status != 200:
            raise Failed(f"{method} {path}: {response.status} {data[:300]!r}")
        found: dict[str, Any] = json.loads(data)
        return found

    def generate(self, path: str, fields: Mapping[str, object]) -> dict[str, Any]:
        """A greedy answer as one object. Raises Failed."""
        return self.ask("POST", path, self._greedy(fields))

    def stream(self, path: str, fields: Mapping[str, object]) -> Iterator[dict[str, Any]]:
        """The events of a greedy answer; leaving it in the middle closes the connection."""
        with _closing(self._send("POST", path, self._greedy(fields, stream=True))) as connection:
            response = connection.getresponse()
            if response.status != 200:
                raise Failed(f"{path}: {response.status} {response.read()[:300]!r}")
            last = b""
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise Failed(f"{path}: {event['error']}")
                    yield event
                last = line.strip() or last
            if last != b"data: [DONE]" and b"stop" not in last and b"completed" not in last:
                raise Failed(f"{path}: the stream ends with {last[:200]!r}")

    def topic(self) -> str:
        return self._random.choice(TOPICS)

    def pick(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def _greedy(self, fields: Mapping[str, object], **more: object) -> dict[str, object]:
        return {"model": self.model_name, "temperature": 0, **more, **fields}

    def _send(
        self, method: str, path: str, fields: Mapping[str, object] | None
    ) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
        if fields is None:
            connection.request(method, path)
        else:
            body = json.dumps(fields)
            connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection


class _closing:
    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection

    def __enter__(self) -> http.client.HTTPConnection:
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _messages(topic: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell me about {topic}."}]


def chat_stream(client: Client) -> Answer:
    """The common case, and the one that is timed."""
    fields = {"messages": _messages(client.topic()), "max_tokens": 40}
    started = last = time.perf_counter()
    text, first_s, gaps = "", None, list[float]()
    for event in client.stream("/v1/chat/completions", fields):
        piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
        if not piece:
            continue
        now = time.perf_counter()
        if first_s is None:
            first_s = now - started
        else:
            gaps.append(now - last)
        last, text = now, text + piece
    return Answer(text, first_s, tuple(gaps))


def chat_turns(client: Client) -> Answer:
    """A conversation that is sent whole each time."""
    messages, text = _messages(client.topic()), ""
    for _ in range(3):
        fields = {"messages": messages, "max_tokens": 24}
        choice = client.generate("/v1/chat/completions", fields)["choices"][0]
        said = choice["message"]["content"]
        text += f"{said}|"
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Why?"}]
    return Answer(text)


def several(client: Client) -> Answer:
    """Two prompts with two candidates each, with their log probabilities."""
    prompts = [f"Once there was {client.topic()}", "One day"]
    fields = {"prompt": prompts, "n": 2, "max_tokens": 12, "logprobs": 2, "seed": 1}
    choices = client.generate("/v1/completions", fields)["choices"]
    return Answer("|".join(choice["text"] for choice in choices))


def long_prompt(client: Client) -> Answer:
    """Read in many steps, in between those of others."""
    prompt = f"A story about {client.topic()}. " * client.pick(20, 60)
    fields = {"prompt": prompt, "max_tokens": 8}
    return Answer(client.generate("/v1/completions", fields)["choices"][0]["text"])


def structured(client: Client) -> Answer:
    """JSON that a schema describes."""
    kind = {"type": "json_schema", "json_schema": {"name": "city", "schema": WEATHER["parameters"]}}
    fields = {"messages": _messages(client.topic()), "max_tokens": 60, "response_format": kind}
    choice = client.generate("/v1/chat/completions", fields)["choices"][0]
    text = choice["message"]["content"]
    if choice["finish_reason"] == "stop" and json.loads(text)["city"] not in ("Rome", "Paris"):
        raise Failed(f"not of its schema: {text!r}")
    return Answer(text)


def tool_call(client: Client) -> Answer:
    """A call that has to be made, as a stream."""
    tools = [{"type": "function", "function": WEATHER}]
    fields = {"messages": _messages(client.topic()), "max_tokens": 80, "tools": tools}
    text = ""
    for event in client.stream("/v1/chat/completions", fields | {"tool_choice": "required"}):
        for choice in event["choices"]:
            for call in choice["delta"].get("tool_calls", ()):
                text += call["function"]["arguments"]
    return Answer(text)


def responses(client: Client) -> Answer:
    """Two turns that the server remembers, which are then forgotten."""
    first = client.generate(
        "/v1/responses", {"input": f"Hello {client.topic()}", "max_output_tokens": 16}
    )
    fields = {"input": "Why?", "max_output_tokens": 16, "previous_response_id": first["id"]}
    last, text = {}, ""
    for event in client.stream("/v1/responses", fields):
        last = event
        text += event["delta"] if event["type"] == "response.output_text.delta" else ""
    for found in (first["id"], last["response"]["id"]):
        client.ask("DELETE", f"/v1/responses/{found}")
    return Answer(text)


def messages(client: Client) -> Answer:
    """Anthropic's protocol."""
    text = ""
    for event in client.stream(
        "/v1/messages", {"messages": _messages(client.topic()), "max_tokens": 24}
    ):
        if event["type"] == "content_block_delta":
            text += event["delta"].get("text", "")
    return Answer(text)


def states(client: Client) -> Answer:
    """A state is kept, forked, gone on from, and deleted."""
    prompt = f"There was {client.topic()}"
    kept = client.ask("POST", "/v1/states", {"prompt": prompt})["id"]
    fork = client.ask("POST", f"/v1/states/{kept}/fork", {})["id"]
    fields = {"state": fork, "prompt": " and", "max_tokens": 12}
    text = client.generate("/v1/completions", fields)["choices"][0]["text"]
    for found in (kept, fork):
        client.ask("DELETE", f"/v1/states/{found}")
    return Answer(text)


def numbers(client: Client) -> Answer:
    """Embeddings and scores."""
    topic = client.topic()
    model: dict[str, object] = {"model": client.model_name}
    vectors = client.ask("POST", "/v1/embeddings", model | {"input": [topic, "it"]})["data"]
    fields = {"prompt": f"I saw {topic}", "choices": [" here", " and"]}
    scores = client.ask("POST", "/v1/completions/score", model | fields)["choices"]
    text = "".join(f"{vector['embedding'][0]:.3f} " for vector in vectors)
    return Answer(text + "".join(f"{score['logprob']:.3f} " for score in scores))


def leaves(client: Client) -> Answer:
    """Goes away in the middle of its answer."""
    fields = {"messages": _messages(client.topic()), "max_tokens": 400, "ignore_eos": True}
    wanted = client.pick(1, 20)
    for number, _ in enumerate(client.stream("/v1/chat/completions", fields)):
        if number == wanted:
            break
    return Answer("")


def refused(client: Client) -> Answer:
    """Sends what must be refused, and is told so."""
    try:
        client.generate("/v1/chat/completions", {"messages": [], "max_tokens": -1})
    except Failed as error:
        if ": 400 " in str(error):
            return Answer("")
        raise
    raise Failed("nonsense was answered")


# How often each is met.
KINDS: Mapping[Callable[[Client], Answer], int] = {
    chat_stream: 30,
    chat_turns: 8,
    several: 8,
    long_prompt: 6,
    structured: 6,
    tool_call: 6,
    responses: 8,
    messages: 8,
    states: 6,
    numbers: 6,
    leaves: 6,
    refused: 2,
}
