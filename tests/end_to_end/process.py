"""The server as a process of its own, on random weights that need no file."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.api.harness import Reply, model_table, parse_reply, request_bytes, write_config

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
PROJECT = Path(__file__).parents[2]


class ServerProcess:
    """A running `python -m api`. `summary` is what it printed when it was ready."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        log: Path,
        cwd: Path = PROJECT,
        *,
        module: str = "api",
        env: Mapping[str, str] | None = None,
        max_open_files: int | None = None,
    ) -> None:
        """`module` is run instead, one that is the same but for a fault."""
        self.log = log
        self._log_file = log.open("w")
        self.process = subprocess.Popen(
            [*limited(max_open_files), sys.executable, "-m", module, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
        )
        self.summary = self._read_summary()

    @property
    def address(self) -> str:
        """As printed: http://HOST:PORT or unix:/PATH."""
        line = next(line for line in self.summary.splitlines() if "address" in line)
        return line.split()[1]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def curl_line(self) -> str:
        return next(line for line in self.summary.splitlines() if line.startswith("curl "))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(STOP_TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log_file.close()
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.wait()

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def raw(self, data: bytes) -> bytes:
        """Everything that comes back until the server closes."""
        with self.connect() as sock:
            sock.sendall(data)
            return read_all(sock)

    def request(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        return parse_reply(self.raw(request_bytes(method, path, body, headers)))

    def rss_mib(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def _read_summary(self) -> str:
        assert self.process.stdout is not None
        lines: list[str] = []
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not (lines and lines[-1].startswith("curl ")):
            line = self.process.stdout.readline()
            if not line or time.monotonic() > deadline_s:
                self.kill()
                raise AssertionError(f"the server did not start:\n{self.log.read_text()}")
            lines.append(line)
        return "".join(lines)


@contextmanager
def serving(
    folder: Path, *tables: str, arguments: Sequence[str] = (), **keys: object
) -> Iterator[ServerProcess]:
    """A server for 32 at once (or the given tables) on a free port; killed at the end."""
    table = model_table(max_batch_size=32, paragraph_len=64, device_type="cpu")
    source = write_config(folder, *(tables or (table,)), **keys)
    given = ["--config-dir", source.config_dir, "--infer-cfg", "test", *arguments]
    server = ServerProcess(given, folder / "server.log")
    try:
        yield server
    finally:
        server.kill()


class Poller:
    """/health again and again on one connection, as fast as the server answers."""

    def __init__(self, server: ServerProcess) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)

    def __enter__(self) -> Poller:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def model(self) -> dict:
        self._connection.request("GET", "/health")
        return json.loads(self._connection.getresponse().read())["models"][0]

    def seconds_until(self, timeout_s: float = 10.0, **wanted: object) -> float:
        """Until /health says so of the first model."""
        started_s = time.monotonic()
        while True:
            model = self.model()
            now_s = time.monotonic()
            if all(model[key] == value for key, value in wanted.items()):
                return now_s - started_s
            assert now_s - started_s < timeout_s, f"not {wanted} within {timeout_s} s: {model}"


def long_prompt(server: ServerProcess, num_tokens: int) -> str:
    """A prompt that random weights continue greedily for so long without ending the document."""
    for number in range(50):
        prompt = f"prompt number {number}"
        body = completion(prompt, num_tokens)
        reply = server.request("POST", "/v1/completions", body).json()
        if reply["choices"][0]["finish_reason"] == "length":
            return prompt
    raise AssertionError("every prompt ends at once")


def limited(max_open_files: int | None) -> list[str]:
    """The beginning of a command that may have so many files open."""
    if max_open_files is None:
        return []
    return ["bash", "-c", f'ulimit -n {max_open_files} && exec "$@"', "bash"]


def completion(prompt: str, num_tokens: int, **fields: object) -> dict[str, object]:
    return {
        "model": "m",
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        **fields,
    }


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)
