"""Servers of the embedded model, one after the other, from one configuration that may change."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.api.harness import Reply
from tests.end_to_end.process import PROJECT, ServerProcess

MODEL = "rwkv-lm-tiny"
TABLE: Mapping[str, object] = {
    "model_name": MODEL,
    "model_cfg": str(PROJECT / "config/model/rwkv-lm-tiny.toml"),
    "weights_path": str(PROJECT / "config/assets/rwkv-lm-tiny.safetensors"),
    "tokenizer_vocab_path": str(PROJECT / "config/assets/rwkv_vocab_tiny.txt"),
    "device_type": "cpu",
    "max_batch_size": 8,
    "paragraph_len": 16,
    "max_context_len": 0,
    "host_state_mib": 32,
}

ALICE, BOB, ADMIN = "sk-alice", "sk-bob", "sk-admin"
KEYS: Mapping[str, object] = {"api_key": ALICE, "api_keys": [BOB], "admin_api_key": ADMIN}

STORY = "Once upon a time there was a cat who lived in a small house near the sea."
ADDED = " One day the cat saw a big fish."  # its tokens are the same behind any sentence


class Site:
    """A folder with config/infer/test.toml; `model` and `keys` may be changed, then `write`."""

    def __init__(self, folder: Path, *, model: Mapping[str, object], **keys: object) -> None:
        self.model = dict(TABLE | model)
        self.keys: dict[str, object] = {"http_bind_addr": "127.0.0.1:0", **keys}
        self._folder = folder
        self._num_starts = 0
        for name in ("infer", "model"):
            (folder / "config" / name).mkdir(parents=True)

    @property
    def config_file(self) -> Path:
        return self._folder / "config/infer/test.toml"

    @property
    def state_dir(self) -> Path:
        """The one folder of this model in `state_dir`, beside the stored responses."""
        (found,) = filter(Path.is_dir, Path(str(self.model["state_dir"])).iterdir())
        return found

    def files(self, kind: str) -> list[Path]:
        """Those in `pages` or `records`, by name."""
        folder = self.state_dir / kind
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".tmp-"))

    def write(self) -> None:
        """In one move, as a running server must not read half a file."""
        text = _lines(self.keys) + "\n[[models]]\n" + _lines(self.model)
        target = self.config_file
        target.with_suffix(".new").write_text(text)
        os.replace(target.with_suffix(".new"), target)

    @contextmanager
    def serving(
        self,
        module: str = "api",
        env: Mapping[str, str] | None = None,
        max_open_files: int | None = None,
    ) -> Iterator[Server]:
        """A server of its own, killed at the end; of another `module` one with a fault."""
        self.write()
        self._num_starts += 1
        log = self._folder / f"server-{self._num_starts}.log"
        given = ["--config-dir", self._folder / "config", "--infer-cfg", "test"]
        process = ServerProcess(given, log, module=module, env=env, max_open_files=max_open_files)
        key = self.keys.get("api_key")
        try:
            yield Server(process, None if key is None else str(key))
        finally:
            process.kill()


class Server:
    """A running process, and what clients with one API key ask it."""

    def __init__(self, process: ServerProcess, key: str | None = None) -> None:
        self.process = process
        self.key = key

    def asking_as(self, key: str | None) -> Server:
        """The same process, for a client with another key or none."""
        return Server(self.process, key)

    @property
    def log(self) -> str:
        return self.process.log.read_text()

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    def ask(self, method: str, path: str, body: object = None) -> Reply:
        return self.process.request(method, path, body, **self.headers)

    def get(self, path: str) -> Any:
        return well(self.ask("GET", path))

    def post(self, path: str, body: object = None) -> Any:
        return well(self.ask("POST", path, body))

    def state(self, **fields: object) -> Any:
        return self.post("/v1/states", fields)

    def states(self) -> list[Any]:
        data: list[Any] = self.get("/v1/states?limit=100")["data"]
        return data

    def chat(self, *messages: Mapping[str, object], **fields: object) -> Any:
        asked = {"messages": list(messages)} if messages else {}
        return self.post("/v1/chat/completions", chat_body(**asked, **fields))

    def complete(self, prompt: str | Sequence[int] | None = None, **fields: object) -> Any:
        asked = {} if prompt is None else {"prompt": prompt}
        return self.post("/v1/completions", chat_body(**asked, **fields))

    def gauge(self, name: str, **labels: str) -> float:
        """One sample of /metrics."""
        for line in self.ask("GET", "/metrics").body.decode().splitlines():
            wanted = [f'{key}="{value}"' for key, value in labels.items()]
            if line.startswith(f"{name}{{") and all(label in line for label in wanted):
                return float(line.split()[-1])
        raise AssertionError(f"no {name} {labels} in the metrics")


def chat_body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "temperature": 0, "max_tokens": 24, **fields}


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, object]:
    return {"role": "system", "content": text}


SYSTEM = system("You are Tiny. You are kind, and you like short answers.")


def text_of(answer: Any) -> str:
    """Of the first choice."""
    choice = answer["choices"][0]
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


def cached_of(answer: Any) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def well(reply: Reply) -> Any:
    assert reply.status == 200, reply
    return reply.json()


def refusal(reply: Reply) -> tuple[int, str, str | None]:
    """Status, code and field of an answer that is an error in OpenAI's shape."""
    error = reply.error
    assert error.keys() == {"message", "type", "param", "code"}, reply
    return reply.status, error["code"], error["param"]


def eventually(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.02)


def _lines(keys: Mapping[str, object]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
