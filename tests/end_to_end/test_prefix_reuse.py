"""What users see of the states that are kept: cached_tokens, and the same answers as without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.end_to_end.process import ServerProcess

PARAGRAPH_LEN = 16
SYSTEM = "You are Tiny. You are kind, you like short answers, and you never talk about the weather."
STORY = "Once upon a time there was a cat who lived in a small house near the sea. " * 6


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("reuse") / "server.log"
    server = ServerProcess(["--http-bind-addr", "127.0.0.1:0"], log)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The same without reuse."""
    log = tmp_path_factory.mktemp("plain") / "server.log"
    off = ["--http-bind-addr", "127.0.0.1:0", "--set", "enable_prefix_cache=false"]
    server = ServerProcess(off, log)
    yield server
    server.kill()


def post(server: ServerProcess, path: str, **fields: object) -> dict[str, Any]:
    body = {"model": "rwkv-lm-tiny", "temperature": 0, "max_tokens": 24, **fields}
    reply = server.request("POST", path, body)
    assert reply.status == 200, reply
    answer: dict[str, Any] = reply.json()
    return answer


def chat(server: ServerProcess, messages: list[dict[str, str]], **fields: object) -> dict[str, Any]:
    return post(server, "/v1/chat/completions", messages=messages, **fields)


def cached(answer: dict[str, Any]) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def last_boundary(num_tokens: int) -> int:
    """The deepest one that leaves a token to compute."""
    return (num_tokens - 1) // PARAGRAPH_LEN * PARAGRAPH_LEN


def test_an_identical_prompt_is_not_computed_again(
    embedded: ServerProcess, plain: ServerProcess
) -> None:
    first, again = (post(embedded, "/v1/completions", prompt=STORY) for _ in range(2))
    assert cached(first) == 0
    assert cached(again) == first["usage"]["prompt_tokens"]  # the logits of its end were kept
    expected = post(plain, "/v1/completions", prompt=STORY)
    assert cached(expected) == 0
    assert first["choices"] == again["choices"] == expected["choices"]


def test_every_further_turn_of_a_chat_computes_only_what_is_new(
    embedded: ServerProcess, plain: ServerProcess
) -> None:
    messages = [{"role": "system", "content": SYSTEM}]
    before = 0
    for question in ("Hello! Who are you?", "What do you like?", "Tell me a story.", "Thank you!"):
        messages.append({"role": "user", "content": question})
        answer = chat(embedded, messages)
        assert answer["choices"][0]["message"] == chat(plain, messages)["choices"][0]["message"]
        assert cached(answer) >= last_boundary(before) if before else cached(answer) == 0
        before = answer["usage"]["prompt_tokens"]
        messages.append(answer["choices"][0]["message"])


def test_users_with_one_system_prompt_share_its_state(embedded: ServerProcess) -> None:
    system = {"role": "system", "content": STORY}
    answers = [
        chat(embedded, [system, {"role": "user", "content": f"Question {number}?"}])
        for number in range(4)
    ]
    # The second one shows where prompts part, so from the third on the state is there.
    for answer in answers[2:]:
        assert cached(answer) >= 96


def test_another_salt_shares_nothing(embedded: ServerProcess) -> None:
    prompt = "A prompt for two tenants who must not learn of each other. " * 4
    mine = [post(embedded, "/v1/completions", prompt=prompt, cache_salt="me") for _ in range(2)]
    theirs = post(embedded, "/v1/completions", prompt=prompt, cache_salt="them")
    assert cached(mine[1]) > 0
    assert cached(theirs) == 0
    assert theirs["choices"] == mine[0]["choices"] == mine[1]["choices"]


def test_reuse_shows_in_the_metrics(embedded: ServerProcess) -> None:
    def hits() -> float:
        text = embedded.request("GET", "/metrics").body.decode()
        name = 'rwkv_prefix_cache_hits_total{model_name="rwkv-lm-tiny"} '
        return float(next(line for line in text.splitlines() if line.startswith(name)).split()[1])

    prompt = "Metrics count what was not computed. " * 5
    post(embedded, "/v1/completions", prompt=prompt)
    before = hits()
    again = post(embedded, "/v1/completions", prompt=prompt)
    assert hits() - before == cached(again) > 0
