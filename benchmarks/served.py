"""A server as a process of its own, and how long it takes to answer. Knows no engine.

Whatever speaks OpenAI's protocol and reports `cached_tokens` is asked in the same way, so servers
that are compared get the same prompts over the same client.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NotRequired, TypedDict
from urllib.parse import urlsplit

ANSWER_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60


class Details(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    prompt_tokens_details: Details


class Delta(TypedDict, total=False):
    content: str | None


class Choice(TypedDict, total=False):
    text: str
    delta: Delta


class Event(TypedDict):
    """What is read of a chunk of a stream."""

    choices: list[Choice]
    usage: NotRequired[Usage | None]


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. The server itself counts which prompt tokens it did not have to compute."""

    text: str
    num_prompt_tokens: int
    num_cached_tokens: int
    first_token_s: float  # from sending to the first piece of text, or to the end without any


class Server:
    """One server process. A context manager; `restart` keeps everything but the process."""

    def __init__(self, name: str, model_name: str, command: Sequence[str], log: Path) -> None:
        """`command` prints a line with its address, http://HOST:PORT, once it answers."""
        self.name = name
        self._model_name = model_name
        self._command = list(command)
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self.address = ""  # HOST:PORT, once it answers

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Return once it answers. Raises SystemExit with the end of its log if it never does."""
        with self._log.open("a") as log:
            process = subprocess.Popen(
                self._command,
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # each has a setting of its own
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://[\w.]+:\d+", line):
                self._process, self.address = process, urlsplit(found.group()).netloc
                return
        process.stdout.close()
        tail = "\n".join(self._log.read_text().splitlines()[-20:])
        raise SystemExit(f"{self.name} ended with code {process.wait()}:\n{tail}")

    def stop(self) -> None:
        """Ask it to end, as a service manager would, and wait until it has."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"{self.name} did not stop in {STOP_TIMEOUT_S} s", file=sys.stderr)
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, f"{self.name} does not run"
        return self._process.pid

    def restart(self) -> None:
        self.stop()
        self.start()

    def complete(self, prompt_ids: Sequence[int], num_tokens: int = 1) -> Reply:
        """A greedy continuation of token ids. Safe to call from several threads, as is `chat`."""
        return self._ask("/v1/completions", {"prompt": list(prompt_ids), "max_tokens": num_tokens})

    def chat(self, messages: Sequence[Mapping[str, str]], num_tokens: int = 1) -> Reply:
        """A greedy answer to chat messages, by the server's own template."""
        body = {"messages": list(messages), "max_tokens": num_tokens}
        return self._ask("/v1/chat/completions", body)

    def _ask(self, path: str, fields: Mapping[str, object]) -> Reply:
        options = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps({"model": self._model_name, **fields, **options})
        connection = http.client.HTTPConnection(self.address, timeout=ANSWER_TIMEOUT_S)
        started = time.perf_counter()
        pieces: list[str] = []
        first_s: float | None = None
        usage: Usage | None = None
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"{self.name}: {response.status} {response.read().decode()}")
            for event in _events(response):
                text = _text(event)
                if text and first_s is None:
                    first_s = time.perf_counter() - started
                pieces.append(text)
                usage = event.get("usage") or usage
        finally:
            connection.close()
        first_s = first_s or time.perf_counter() - started
        assert usage is not None, f"{self.name} did not say what it had cached"
        num_cached = usage["prompt_tokens_details"]["cached_tokens"]
        return Reply("".join(pieces), usage["prompt_tokens"], num_cached, first_s)


def _events(response: http.client.HTTPResponse) -> Iterator[Event]:
    for line in response:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def _text(event: Event) -> str:
    """What a chunk adds, in either of OpenAI's two forms."""
    choices = event["choices"]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


def our_server(
    name: str, model_name: str, infer_cfg: str, config_dir: Path, sets: Sequence[str], log: Path
) -> Server:
    """`python -m api` on a free port, not started yet."""
    command = [sys.executable, "-m", "api", "--infer-cfg", infer_cfg]
    command += ["--config-dir", str(config_dir), "--http-bind-addr", "127.0.0.1:0"]
    command += ["--log-level", "warning", *(part for item in sets for part in ("--set", item))]
    return Server(name, model_name, command, log)
