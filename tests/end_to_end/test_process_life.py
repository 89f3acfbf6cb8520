"""Start, reload under load, signals and exit codes of the real process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.api.harness import Reply, parse_reply, request_bytes
from tests.end_to_end.process import (
    Poller,
    ServerProcess,
    completion,
    long_prompt,
    read_all,
    serving,
)

ENDLESS = 1_000_000


def test_printed_curl_line_works_when_pasted(server: ServerProcess):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    line = server.curl_line.replace('"stream": true', '"stream": true, "max_tokens": 4')
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("data: [DONE]\n\n")


@pytest.mark.slow  # test_faults_reload.py storms harder
def test_reloads_under_load_fail_no_request(tmp_path: Path):
    with serving(tmp_path) as server:
        config_file = tmp_path / "config" / "infer" / "test.toml"
        replies: list[Reply] = []
        is_over = threading.Event()

        def ask() -> None:
            while not is_over.is_set():
                body = completion("x", 20, stream=True)
                replies.append(server.request("POST", "/v1/completions", body))

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            with Poller(server) as poller:
                text = config_file.read_text()
                temporary = config_file.with_suffix(".tmp")
                temporary.write_text(text.replace("max_batch_size = 32", "max_batch_size = 5"))
                os.replace(temporary, config_file)
                poller.seconds_until(max_batch_size=5, timeout_s=30)
                config_file.write_text(text.replace("max_batch_size = 32", "max_batch_size = 6"))
                poller.seconds_until(max_batch_size=6, timeout_s=30)
                config_file.write_text("max_batch_size = = 6")
                wait_for_report(server, "rejected")
                config_file.write_text(text)
                poller.seconds_until(max_batch_size=32, timeout_s=30)
                upsert = {"upsert": [{"model_name": "m", "max_batch_size": 7}]}
                dry = server.request("POST", "/admin/models/reload", upsert | {"dry_run": True})
                assert poller.model()["max_batch_size"] == 32
                wet = server.request("POST", "/admin/models/reload", upsert)
                assert poller.model()["max_batch_size"] == 7
        finally:
            is_over.set()
            for client in clients:
                client.join()
        assert server.stop() == 0
    assert dry.json()["rebuilt_model_names"] == wet.json()["rebuilt_model_names"] == ["m"]
    assert "max_batch_size = 7" in config_file.read_text()
    assert len(replies) >= 8
    texts = set()
    for reply in replies:
        assert reply.status == 200, reply.body
        events = reply.events()
        assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        texts.add("".join(event["choices"][0]["text"] for event in events))
    assert len(texts) == 1, "a rebuilt model of the same weights gives the same text"


def wait_for_report(server: ServerProcess, result: str) -> None:
    deadline_s = time.monotonic() + 30
    while True:
        report = server.request("GET", "/health").json()["last_reload"]
        if report is not None and report["result"] == result:
            return
        assert time.monotonic() < deadline_s, report
        time.sleep(0.05)


class TestSignals:
    def test_running_stream_finishes_and_the_exit_code_is_0(self, tmp_path: Path):
        with serving(tmp_path) as server:
            prompt = long_prompt(server, 200)
            with server.connect() as sock, Poller(server) as poller:
                body = completion(prompt, 200, stream=True)
                sock.sendall(request_bytes("POST", "/v1/completions", body))
                poller.seconds_until(running=1)
                server.process.send_signal(signal.SIGTERM)
                events = parse_reply(read_all(sock)).events()
            assert server.wait() == 0, server.log.read_text()
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert "Traceback" not in server.log.read_text()

    def test_endless_streams_are_ended_read_or_not(self, tmp_path: Path):
        """The reader gets an event that says why; who never reads does not hold the exit."""
        with serving(tmp_path, drain_timeout_s=0.3) as server:
            prompt = long_prompt(server, 200)
            body = completion(prompt, ENDLESS, stream=True)
            with server.connect() as sock, socket.socket() as deaf, Poller(server) as poller:
                sock.sendall(request_bytes("POST", "/v1/completions", body))
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                deaf.connect(("127.0.0.1", server.port))
                deaf.sendall(request_bytes("POST", "/v1/completions", body))
                poller.seconds_until(running=2)
                server.process.send_signal(signal.SIGTERM)
                events = parse_reply(read_all(sock)).events()
                assert server.wait() == 0, server.log.read_text()
        assert events[-1]["error"]["code"] == "draining"
        assert "Traceback" not in server.log.read_text()

    def test_second_signal_exits_at_once(self, tmp_path: Path):
        with serving(tmp_path) as server:
            prompt = long_prompt(server, 100)
            with server.connect() as sock, Poller(server) as poller:
                body = completion(prompt, ENDLESS, stream=True)
                sock.sendall(request_bytes("POST", "/v1/completions", body))
                poller.seconds_until(running=1)
                server.process.send_signal(signal.SIGTERM)
                poller.seconds_until(accepting=False)
                started_s = time.monotonic()
                assert server.stop() == 128 + signal.SIGTERM
                assert time.monotonic() - started_s < 5


def test_unix_socket_overrides_and_interrupt(tmp_path: Path):
    path = tmp_path / "rwkv.sock"
    address = f"unix:{path}"
    given = ["--http-bind-addr", address, "--set", "max_batch_size=3", "--set", "api_key=sk-set"]
    with serving(tmp_path, arguments=given) as server:
        assert server.address == address
        assert "6 on the device" in server.summary  # three to run in, three for snapshots
        for key, status in (("sk-set", 200), ("sk-other", 401)):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                headers = {"authorization": f"Bearer {key}"}
                body = completion("x", 3)
                sock.sendall(request_bytes("POST", "/v1/completions", body, headers))
                assert parse_reply(read_all(sock)).status == status
        assert server.stop(signal.SIGINT) == 0
    assert not path.exists()


def test_python_m_api_alone_serves_the_embedded_model(tmp_path: Path):
    server = ServerProcess(["--http-bind-addr", "127.0.0.1:0"], tmp_path / "log")
    try:
        body = {
            "model": "rwkv-lm-tiny",
            "messages": [{"role": "user", "content": "Hello! How are you?"}],
            "temperature": 0,
        }
        reply = server.request("POST", "/v1/chat/completions", body)
        assert server.stop() == 0
    finally:
        server.kill()
    (choice,) = reply.json()["choices"]
    assert choice["finish_reason"] == "stop"
    words = choice["message"]["content"].split()
    assert len(words) >= 2, json.dumps(choice)
    assert choice["message"]["content"].isascii()
