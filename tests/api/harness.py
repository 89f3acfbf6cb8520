"""A whole server in the test's own event loop: real sockets and files, scripted engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blockbuster import blockbuster_ctx

from api.guard import GuardedHttp
from api.server import EmbeddedServer, opened
from api.service import Service
from api.source import ConfigSource
from tests.api.scripted import ScriptedBuilder, ScriptedRunner, write_vocab
from tests.api.scripted_engine import ScriptedEngine, ScriptedStates
from tests.event_stream import read_all

MODEL_TOML = """\
model_type = "auto_regressive"
num_cells = 1
vocab_size = 257
embedded_dim = 64
num_heads = 1
"""


class FastGuard(GuardedHttp):
    """The same limits as in earnest, only small enough to wait for."""

    header_timeout_s = 0.4
    body_grace_s = 0.4
    stall_timeout_s = 0.5
    max_header_bytes = 8 * 1024


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        return self.json()["error"]

    def events(self) -> list[dict]:
        """The JSON events of a stream, which must end in [DONE]."""
        events, _ = read_all([self.body])
        assert {event.name for event in events} == {"message"}
        *datas, last = [event.data for event in events]
        assert last == "[DONE]", f"the stream ends in {last}"
        return [json.loads(data) for data in datas]


@dataclass
class Running:
    """A server that listens, with what is behind it."""

    service: Service
    server: EmbeddedServer
    builder: ScriptedBuilder
    source: ConfigSource
    config_file: Path = field(init=False)

    def __post_init__(self) -> None:
        self.config_file = self.source.path

    @property
    def port(self) -> int:
        return self.server.address.port

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def runner(self) -> ScriptedRunner:
        """The newest engine's."""
        return self.builder.runners[-1]

    @property
    def engine(self) -> ScriptedEngine:
        """The newest one."""
        return self.builder.engines[-1]

    @property
    def states(self) -> ScriptedStates:
        """Of the model "m"."""
        return self.builder.disks["m"].states

    def snapshot(self, model_name: str = "m"):
        return self.service.registry.get(model_name).client.snapshot()

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def raw(self, data: bytes, timeout_s: float = 10.0) -> bytes:
        """Everything that comes back until the server closes the connection."""
        reader, writer = await self.open()
        try:
            writer.write(data)
            async with asyncio.timeout(timeout_s):
                return await reader.read()
        finally:
            writer.close()

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request on a connection of its own; `body` is sent as JSON unless it is bytes."""
        sent = request_bytes(method, path, body, headers)
        return parse_reply(await self.raw(sent), is_head=method == "HEAD")

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.request("GET", path, headers=headers)

    async def post(self, path: str, body: object, **headers: str) -> Reply:
        return await self.request("POST", path, body, headers)

    async def chat(self, **fields: object) -> Reply:
        return await self.post("/v1/chat/completions", chat_body(**fields))


def chat_body(**fields: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": "m", "messages": messages, "max_tokens": 5, **fields}


def request_bytes(
    method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> bytes:
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close"]
    if body is not None:
        lines.append(f"Content-Length: {len(data)}")
    given = {name.replace("_", "-").lower(): value for name, value in (headers or {}).items()}
    if body is not None and "content-type" not in given:
        lines.append("Content-Type: application/json")
    lines += [f"{name}: {value}" for name, value in given.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def parse_reply(data: bytes, is_head: bool = False) -> Reply:
    """The one response on a connection, with its framing checked."""
    head, separator, body = data.partition(b"\r\n\r\n")
    assert separator, f"no complete response header in {data[:200]!r}"
    status_line, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.split(": ", 1) for line in lines]
    headers = {name.lower(): value for name, value in pairs}
    if headers.get("transfer-encoding") == "chunked":
        body = dechunk(body)
    elif "content-length" in headers and not is_head:
        assert len(body) == int(headers["content-length"]), "content-length is wrong"
    return Reply(int(status_line.split()[1]), headers, body)


def dechunk(data: bytes) -> bytes:
    whole = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        num_bytes = int(size, 16)
        if num_bytes == 0:
            assert data == b"\r\n", f"after the last chunk: {data!r}"
            return whole
        whole, data = whole + data[:num_bytes], data[num_bytes + 2 :]


def model_table(name: str = "m", **keys: object) -> str:
    """A [[models]] table."""
    values = {
        "model_name": name,
        "model_cfg": "tiny",
        "load_format": "dummy",
        "tokenizer_vocab_path": "../vocab.txt",
        "max_batch_size": 8,
        "paragraph_len": 16,
        "max_context_len": 0,
        **keys,
    }
    return "\n[[models]]\n" + "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in values.items()
    )


def write_config(folder: Path, *tables: str, **keys: object) -> ConfigSource:
    """config/infer/test.toml and what it names; `keys` are the server's."""
    config_dir = folder / "config"
    (config_dir / "infer").mkdir(parents=True, exist_ok=True)
    (config_dir / "model").mkdir(exist_ok=True)
    (config_dir / "model" / "tiny.toml").write_text(MODEL_TOML)
    write_vocab(config_dir / "vocab.txt")
    server = {"http_bind_addr": "127.0.0.1:0", **keys}
    text = "# a comment to keep\n" + "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in server.items()
    )
    text += "".join(tables or (model_table(),))
    (config_dir / "infer" / "test.toml").write_text(text)
    return ConfigSource(config_dir, "test")


@asynccontextmanager
async def running(
    folder: Path,
    *tables: str,
    delay_s: float = 0.0,
    http: type[GuardedHttp] = GuardedHttp,
    **keys: object,
) -> AsyncIterator[Running]:
    """Serve the given model tables (one called "m" if none) with the given server keys."""
    source = write_config(folder, *tables, **keys)
    builder = ScriptedBuilder(delay_s)
    async with opened(source.load(), source, builder, http) as (service, server):
        listening = asyncio.Event()
        task = asyncio.create_task(server.run_until_stopped(listening.set))
        try:
            await wait_first(task, asyncio.create_task(listening.wait()))
            whole = Running(service, server, builder, source)
            with refused_blocking():
                yield whole
        finally:
            for runner in builder.runners:
                runner.gate.set()
            server.should_exit = True
            await task


@contextmanager
def refused_blocking() -> Iterator[None]:
    """Our code may not touch files or sleep on the event loop; a test that makes it fails."""
    with blockbuster_ctx(scanned_modules=["api", "engine", "config"]) as blocking:
        for function in blocking.functions.values():
            function.can_block_in("linecache.py", "updatecache")  # of a traceback to be logged
        yield


async def wait_first(*tasks: asyncio.Task) -> None:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def eventually(condition, timeout_s: float = 5.0) -> float:
    """Seconds until the condition holds; fails when it never does."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    while not condition():
        assert loop.time() - started_s < timeout_s, f"not within {timeout_s} s"
        await asyncio.sleep(0.002)
    return loop.time() - started_s
