"""Raw sockets against the process: leaving, not reading, sending half or too much."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from tests.api.harness import parse_reply, request_bytes
from tests.end_to_end.process import Poller, ServerProcess, completion, long_prompt, read_all

WITHIN_S = 0.1
NUM_ENDLESS_TOKENS = 1_000_000


@pytest.fixture(scope="module")
def prompt(server: ServerProcess) -> str:
    return long_prompt(server, num_tokens=300)


def start_endless(server: ServerProcess, prompt: str, *, is_stream: bool) -> socket.socket:
    sock = server.connect()
    body = completion(prompt, NUM_ENDLESS_TOKENS, stream=is_stream)
    sock.sendall(request_bytes("POST", "/v1/completions", body))
    return sock


@pytest.mark.parametrize("is_stream", [True, False])
def test_client_gone_frees_its_slot_within_100_ms(
    server: ServerProcess, prompt: str, is_stream: bool
):
    """The best of three, since this machine may be busy with other things."""
    times_s = []
    with Poller(server) as poller:
        num_slots = poller.model()["slots"]
        for _ in range(3):
            sock = start_endless(server, prompt, is_stream=is_stream)
            poller.seconds_until(running=1, free_slots=num_slots - 1)
            sock.close()
            times_s.append(poller.seconds_until(running=0, free_slots=num_slots))
    assert min(times_s) < WITHIN_S, times_s
    assert max(times_s) < 2, times_s


def test_slow_reader_neither_slows_others_nor_grows_memory(server: ServerProcess, prompt: str):
    with Poller(server) as poller:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        body = completion(prompt, NUM_ENDLESS_TOKENS, stream=True)
        sock.sendall(request_bytes("POST", "/v1/completions", body))
        poller.seconds_until(running=1)
        before_mib = server.rss_mib()
        started_s = time.monotonic()
        answer = server.request("POST", "/v1/completions", completion(prompt, 100))
        elapsed_s = time.monotonic() - started_s
        assert poller.model()["running"] == 1, "the slow one still runs"
        assert server.rss_mib() - before_mib < 20
        sock.close()
        poller.seconds_until(running=0, free_slots=poller.model()["slots"])
    assert answer.status == 200
    assert elapsed_s < 20


def test_half_sent_requests_cost_nobody_else(server: ServerProcess):
    half = request_bytes("POST", "/v1/completions", completion("x", 4))[:-5]
    socks = [server.connect() for _ in range(20)]
    for sock in socks:
        sock.sendall(half)
    assert server.request("POST", "/v1/completions", completion("x", 4)).status == 200
    for sock in socks:
        sock.close()
    assert server.request("POST", "/v1/completions", completion("x", 4)).status == 200


def test_request_in_single_bytes_is_a_request(server: ServerProcess):
    with server.connect() as sock:
        for byte in request_bytes("POST", "/v1/completions", completion("x", 4)):
            sock.sendall(bytes([byte]))
        assert parse_reply(read_all(sock)).status == 200


def test_large_header_is_431(server: ServerProcess):
    answer = server.raw(b"GET / HTTP/1.1\r\nx: " + b"a" * 100_000 + b"\r\n\r\n")
    assert parse_reply(answer).status == 431


def test_chunked_body_over_the_limit_is_413(server: ServerProcess):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%b\r\n" % (30_000, b"x" * 30_000)
    with server.connect() as sock:
        sock.sendall(head)
        for _ in range(5):
            sock.sendall(chunk)
        assert parse_reply(read_all(sock)).error["code"] == "request_too_large"


def test_stream_is_well_framed_however_it_is_cut(server: ServerProcess, prompt: str):
    """Every event is one data line and a blank line; the text needs no reassembly."""
    body = completion(prompt, 50, stream=True, stream_options={"include_usage": True})
    reply = server.request("POST", "/v1/completions", body)
    blocks = reply.body.decode().split("\n\n")
    assert blocks.pop() == ""
    assert blocks.pop() == "data: [DONE]"
    for block in blocks:
        assert block.startswith(("data: {", ":"))
        assert "\n" not in block
    usage = json.loads(blocks[-1].removeprefix("data: "))
    assert usage["usage"]["completion_tokens"] == 50


def test_40_requests_on_32_seats_all_finish(server: ServerProcess, prompt: str):
    replies = []

    def ask() -> None:
        replies.append(server.request("POST", "/v1/completions", completion(prompt, 30)))

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = {reply.json()["choices"][0]["text"] for reply in replies}
    assert [reply.status for reply in replies] == [200] * 40
    assert len(texts) == 1, "the same request gives the same text in every slot and batch"
