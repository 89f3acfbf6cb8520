"""A step that raises, values that are not finite, a device thread that ends, and deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.faulty import Fault, seed_of
from tests.end_to_end.protocols import BODIES, KINDS, Outcome, ask
from tests.end_to_end.site import (
    MODEL,
    STORY,
    Server,
    Site,
    chat_body,
    eventually,
    refusal,
    system,
    text_of,
    user,
)

FAULTY = "tests.end_to_end.faulty"
LATE = 60  # a position in the answers to all questions, which are longer
LONG = " ".join(f"{STORY} And then, for the {number}. time, it rained." for number in range(12))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("faulty"), model={}, sse_keep_alive_ms=50)


@pytest.fixture(scope="module")
def server(site: Site) -> Iterator[Server]:
    with site.serving(FAULTY) as running:
        yield running


@pytest.fixture(scope="module")
def texts(server: Server) -> dict[str, str]:
    """What the answers are when nothing is wrong."""
    return {path: ask(server, path, num_tokens=80).text for path in BODIES}


def model_of(server: Server) -> Any:
    return server.ask("GET", "/health").json()["models"][0]


def assert_nothing_is_left(server: Server) -> None:
    eventually(lambda: model_of(server)["running"] == model_of(server)["waiting"] == 0)
    model = model_of(server)
    assert model["free_slots"] == model["slots"]
    assert not model["dead"]


def assert_failed(outcome: Outcome, is_stream: bool, word: str) -> None:
    """In the shape of the protocol."""
    assert not outcome.is_complete
    assert outcome.status == (200 if is_stream else 500)
    assert outcome.error is not None, outcome
    assert word in outcome.error["message"]
    if outcome.path == "/v1/messages":
        assert outcome.error["type"] == "api_error"
    elif outcome.path != "/v1/responses":
        assert outcome.error["code"] == "engine_error"


@pytest.mark.parametrize(
    ("fault", "word", "num_kinds"),
    [
        (Fault.ERROR, "injected failure", len(KINDS)),
        (Fault.MEMORY, "injected want of memory", 2),
        (Fault.LOGITS, "not finite", 2),
        (Fault.STATE, "not finite", len(KINDS)),
    ],
)
def test_a_fault_of_one_request_is_told_and_the_next_is_served(
    server: Server, texts: dict[str, str], fault: Fault, word: str, num_kinds: int
) -> None:
    for path, is_stream in KINDS[:num_kinds]:
        seed = seed_of(fault, LATE)
        outcome = ask(server, path, num_tokens=80, stream=is_stream, seed=seed)
        assert_failed(outcome, is_stream, word)
        assert texts[path].startswith(outcome.text)
        assert is_stream == (outcome.text != "")
    for path, text in texts.items():
        assert ask(server, path, num_tokens=80).text == text
    assert_nothing_is_left(server)


@pytest.mark.parametrize("fault", [Fault.LOGITS, Fault.STATE])
def test_values_that_are_not_finite_fail_their_row_only(
    server: Server, texts: dict[str, str], fault: Fault
) -> None:
    """The others run in the same steps, before, during and after."""
    with ThreadPoolExecutor(9) as pool:
        slowly = {"num_tokens": 50, "seed": seed_of(Fault.SLOW)}
        others = [pool.submit(ask, server, path, stream=True, **slowly) for path in BODIES]
        eventually(lambda: model_of(server)["running"] == len(others))
        faults = {"num_tokens": 50, "seed": seed_of(fault, LATE - 30)}
        kinds = KINDS[2:5]
        futures = [pool.submit(ask, server, path, stream=st, **faults) for path, st in kinds]
        for future, (_, is_stream) in zip(futures, kinds, strict=True):
            assert_failed(future.result(), is_stream, "not finite")
        assert model_of(server)["running"] == len(others), "the faults came too late"
        for future in others:
            outcome = future.result()
            assert outcome.is_good
            assert texts[outcome.path].startswith(outcome.text)
    assert_nothing_is_left(server)


def test_a_state_that_is_not_finite_is_nowhere_to_begin_from(server: Server) -> None:
    """Not for who waits for it, nor for who comes later, nor for its owner."""
    num_states, shared = len(server.states()), system(LONG)
    bad = chat_body(
        messages=[shared, user(LONG)], seed=seed_of(Fault.STATE, 100), return_state=True
    )
    good = chat_body(messages=[shared, user("Why?")])
    expected = [
        text_of(server.post("/v1/chat/completions", body | {"cache_salt": "other", "seed": 1}))
        for body in (bad | {"return_state": False}, good)
    ]
    with ThreadPoolExecutor(9) as pool:
        slow = pool.submit(ask, server, "/v1/completions", seed=seed_of(Fault.SLOW), num_tokens=80)
        eventually(lambda: model_of(server)["running"] == 1)
        futures = [
            pool.submit(server.ask, "POST", "/v1/chat/completions", body)
            for body in (bad, good, good)
        ]
        replies = [future.result() for future in futures]
        assert slow.result().is_good
    assert refusal(replies[0]) == (500, "engine_error", None)
    assert "not finite" in replies[0].error["message"]
    assert [text_of(reply.json()) for reply in replies[1:]] == [expected[1]] * 2
    whole = server.post("/v1/chat/completions", bad | {"seed": 1, "return_state": False})
    assert text_of(whole) == expected[0]
    assert len(server.states()) == num_states
    assert_nothing_is_left(server)


def test_the_end_of_the_device_thread_is_told_and_health_is_red(tmp_path: Path) -> None:
    site = Site(tmp_path, model={"state_dir": str(tmp_path / "states")})
    with site.serving(FAULTY) as server:
        state = server.state(prompt=STORY)
        before = server.complete(" He ran.", state=state["id"])
        eventually(lambda: len(site.files("records")) == 1)
        for (_, is_stream), outcome in zip(KINDS, die(server), strict=True):
            assert_failed(outcome, is_stream, "injected death")
        check_is_red(server)
        # A new replica helps, and where the device is well it can be had without a restart.
        upsert = {"upsert": [{"model_name": MODEL, "max_batch_size": 9}]}
        server.post("/admin/models/reload", upsert)
        assert server.get("/health")["status"] == "ok"
        assert text_of(server.complete(" He ran.", state=state["id"])) == text_of(before)
        ask(server, "/v1/completions", seed=seed_of(Fault.DEATH))
        assert server.ask("GET", "/health").status == 503
        assert server.process.stop() == 1, "a supervisor sees that it was no good end"


def die(server: Server) -> list[Outcome]:
    """One of eight requests takes the device thread with it."""
    slowly = {"num_tokens": 50, "seed": seed_of(Fault.SLOW)}
    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(ask, server, path, stream=st, **slowly) for path, st in KINDS[:-1]]
        eventually(lambda: model_of(server)["running"] == len(futures))
        last = pool.submit(ask, server, KINDS[-1][0], stream=True, seed=seed_of(Fault.DEATH, 20))
        return [future.result() for future in (*futures, last)]


def check_is_red(server: Server) -> None:
    health = server.ask("GET", "/health")
    assert (health.status, health.json()["status"]) == (503, "dead")
    (model,) = health.json()["models"]
    assert (model["dead"], model["accepting"], model["running"]) == (True, False, 0)
    assert model["error"] == "SystemExit: injected death"
    assert [server.ask("GET", f"/health/{kind}").status for kind in ("live", "ready")] == [503] * 2
    assert server.gauge("rwkv_replica_up") == 0
    for path in BODIES:
        refused = ask(server, path)
        assert refused.status == 503
        assert refused.error is not None
        assert "out of service" in refused.error["message"]
    refused = server.ask("POST", "/v1/states", {"model": MODEL, "prompt": STORY})
    assert refused.status == 503


@pytest.mark.parametrize(("path", "is_stream"), KINDS)
def test_deadline_ends_the_answer(server: Server, path: str, is_stream: bool) -> None:
    slowly = {"num_tokens": 50, "seed": seed_of(Fault.SLOW)}
    outcome = ask(server, path, stream=is_stream, timeout_ms=250, **slowly)
    assert outcome.status == (200 if is_stream else 504)
    assert not outcome.is_complete
    assert outcome.error is not None
    assert "timeout_ms" in outcome.error["message"]
    if not is_stream:
        assert outcome.headers["x-should-retry"] == "false"
    assert_nothing_is_left(server)


@pytest.mark.parametrize("path", list(BODIES))
def test_a_long_prompt_keeps_its_connection_alive(server: Server, path: str) -> None:
    fields: dict[str, object] = {"messages": [user(LONG)]}
    if path in ("/v1/completions", "/v1/responses"):
        fields = {"prompt": LONG} if path == "/v1/completions" else {"input": LONG}
    slowly = {"num_tokens": 2, "seed": seed_of(Fault.SLOW), "cache_salt": path}
    outcome = ask(server, path, stream=True, **slowly, **fields)
    assert outcome.is_good
    sign = b"event: ping\n" if path == "/v1/messages" else b": keep-alive\n\n"
    assert outcome.body.count(sign) >= 2
