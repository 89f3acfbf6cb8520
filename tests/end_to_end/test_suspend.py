"""Answers that a graceful stop suspends, and that go on in the next process to the same text."""

from __future__ import annotations

import json
import resource
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.api.harness import parse_reply, request_bytes
from tests.end_to_end.process import read_all
from tests.end_to_end.site import (
    MODEL,
    STORY,
    Server,
    Site,
    chat_body,
    eventually,
    refusal,
    text_of,
    user,
)

NUM_TOKENS = 400
NUM_TOKENS_OF_LONG = 160
NUM_EVENTS_BEFORE = 8  # of each stream, when the server is told to stop
DRAWN = {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.4, "repetition_penalty": 0.2}
DRAWN |= {"penalty_decay": 0.99}


@dataclass
class Asked:
    """A request on its way, and the parts of its answer as they come."""

    path: str
    body: dict[str, Any]
    expected: str = ""
    text: str = ""
    end: dict[str, Any] = field(default_factory=dict)  # the object with the finish_reason
    num_events: int = 0

    @property
    def finish_reason(self) -> str:
        reason: str = self.end["choices"][0]["finish_reason"]
        return reason

    @property
    def resume_id(self) -> str:
        assert self.finish_reason == "suspended", self.end
        resume_id: str = self.end["resume"]["id"]
        return resume_id

    def ask(self, server: Server) -> None:
        data = request_bytes("POST", self.path, self.body, server.headers)
        with server.process.connect() as sock:
            sock.sendall(data)
            if self.body.get("stream"):
                self._read_events(sock)
            else:
                self.end = parse_reply(read_all(sock)).json()
                self.text += text_of(self.end)

    def resume(self, server: Server) -> None:
        """Go on in another process; the new part comes after what was there."""
        is_stream = self.body.get("stream", False)
        self.body = {"model": MODEL, "resume": self.resume_id, "stream": is_stream}
        self.ask(server)

    def _read_events(self, sock: socket.socket) -> None:
        for line in sock.makefile():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                (choice,) = event["choices"]
                self.text += (
                    choice["text"] if "text" in choice else choice["delta"].get("content", "")
                )
                self.num_events += 1
                if choice["finish_reason"]:
                    self.end = event


def long_one(server: Server, **fields: object) -> Asked:
    """A completion of many tokens, with the text that it has undisturbed."""
    for number in range(50):
        prompt = f"This is story number {number}. {STORY}"
        body = chat_body(prompt=prompt, max_tokens=NUM_TOKENS, seed=number, **fields)
        answer = server.post("/v1/completions", body)
        if answer["usage"]["completion_tokens"] >= NUM_TOKENS_OF_LONG:
            return Asked("/v1/completions", body, text_of(answer))
    raise AssertionError("every answer is short")


def with_late_stop(asked: Asked) -> Asked:
    """The same with a stop string that it has late in its text, and for the first time there."""
    text = asked.expected
    stop = next(
        text[begin : begin + 5]
        for begin in range(len(text) * 3 // 4, len(text))
        if text.index(text[begin : begin + 5]) == begin
    )
    body = asked.body | {"stop": ["something else", stop]}
    return Asked(asked.path, body, text[: text.index(stop)])


def story(server: Server) -> Asked:
    """A greedy answer of about 300 tokens, streamed."""
    body = chat_body(messages=[user("Tell me a story.")], max_tokens=NUM_TOKENS)
    expected = text_of(server.post("/v1/chat/completions", body))
    return Asked("/v1/chat/completions", body | {"stream": True}, expected)


def place(folder: Path) -> Site:
    model = {"state_dir": str(folder / "states"), "max_batch_size": 4}
    return Site(folder, model=model, api_key="sk-one")


def begin(pool: ThreadPoolExecutor, server: Server, requests: list[Asked]) -> list[Future[None]]:
    """All of them under way, the streams with some text."""
    futures = [pool.submit(asked.ask, server) for asked in requests]
    streams = [asked for asked in requests if asked.body.get("stream")]
    eventually(lambda: all(asked.num_events >= NUM_EVENTS_BEFORE for asked in streams))
    return futures


def test_suspended_answers_go_on_to_the_text_of_undisturbed_ones(tmp_path: Path) -> None:
    """Greedy and drawn, streamed and whole, with penalties and stop strings; and who waits."""
    site = place(tmp_path)
    with site.serving() as server, ThreadPoolExecutor() as pool:
        greedy, drawn = story(server), long_one(server, **DRAWN)
        stopped = with_late_stop(drawn)
        stop = stopped.body["stop"][-1]
        streamed, ordinary = (
            Asked(drawn.path, drawn.body | {"stream": True}, drawn.expected) for _ in range(2)
        )
        waiting = [Asked(drawn.path, dict(drawn.body), drawn.expected) for _ in range(2)]
        running = [greedy, stopped, streamed]
        for asked in (*running, *waiting):
            asked.body["resumable"] = True
        greedy.body["return_state"] = {"label": "the story"}
        futures = begin(pool, server, [ordinary, *running])
        futures += [pool.submit(asked.ask, server) for asked in waiting]
        eventually(lambda: server.gauge("rwkv_requests_waiting") == 2)
        assert server.process.stop() == 0, server.log
        for future in futures:
            future.result()
        assert "Traceback" not in server.log
    assert (ordinary.text, ordinary.finish_reason) == (ordinary.expected, "stop")
    for asked in running:
        assert asked.expected.startswith(asked.text)
        assert len(asked.text) < len(asked.expected)
        assert "state" not in asked.end
    assert [asked.text for asked in waiting] == ["", ""]
    with site.serving() as server, ThreadPoolExecutor() as pool:
        used_up = [asked.resume_id for asked in (*running, *waiting)]
        check_owner(site, server, used_up[0])
        others = [pool.submit(asked.resume, server) for asked in (stopped, streamed, *waiting)]
        for future in others:
            future.result()
        # One is stopped a second time.
        greedy.num_events = 0
        futures = [pool.submit(greedy.resume, server)]
        eventually(lambda: greedy.num_events >= NUM_EVENTS_BEFORE)
        for resume_id in used_up:
            again = {"model": MODEL, "resume": resume_id}
            reply = server.ask("POST", "/v1/completions", again)
            assert refusal(reply) == (404, "state_not_found", "resume")
        assert server.process.stop() == 0, server.log
        futures[0].result()
        assert "Traceback" not in server.log
    for asked in (stopped, streamed, *waiting):
        assert asked.text == asked.expected
    assert stopped.end["choices"][0]["matched_stop_suffix"] == stop
    with site.serving() as server:
        greedy.resume(server)
        state = greedy.end["state"]
        assert state["label"] == "the story"
        further = server.chat(user("Why?"), state=state["id"])
        messages = [user("Tell me a story."), {"role": "assistant", "content": greedy.text}]
        assert text_of(further) == text_of(server.chat(*messages, user("Why?")))
        assert site.files("records") == [site.state_dir / "records" / f"{state['id']}.json"]
    assert greedy.text == greedy.expected


def check_owner(site: Site, server: Server, resume_id: str) -> None:
    """Another key cannot go on with it."""
    mine, site.keys["api_key"] = site.keys["api_key"], "sk-two"
    other = Server(server.process, "sk-two")
    site.write()
    eventually(lambda: other.ask("GET", "/v1/models").status == 200)
    reply = other.ask("POST", "/v1/completions", {"model": MODEL, "resume": resume_id})
    assert refusal(reply) == (404, "state_not_found", "resume")
    site.keys["api_key"] = mine
    site.write()
    eventually(lambda: server.ask("GET", "/v1/models").status == 200)


def test_what_cannot_be_written_is_finished_instead(tmp_path: Path) -> None:
    """The disk is full when the server is told to stop: files have a limit, from outside."""
    site = place(tmp_path)
    with site.serving() as server, ThreadPoolExecutor() as pool:
        asked = story(server)
        asked.body["resumable"] = True
        (future,) = begin(pool, server, [asked])
        limits = (100_000, resource.RLIM_INFINITY)
        resource.prlimit(server.process.process.pid, resource.RLIMIT_FSIZE, limits)
        assert server.process.stop() == 0, server.log
        future.result()
        assert "File too large" in server.log
        assert "Traceback" not in server.log
    assert (asked.text, asked.finish_reason) == (asked.expected, "stop")
    assert site.files("records") == []
