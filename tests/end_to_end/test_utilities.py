"""Embeddings, scores and tokens of the embedded model, by a server of its own and real clients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI

from tests.end_to_end.site import MODEL, Server, Site

TEXTS = [
    "Once upon a time there was a little dog.",
    "Once upon a time there was a little cat.",
    "Max liked to play in the park with his friends.",
    "a",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    site = Site(tmp_path_factory.mktemp("utilities"), model={})
    with site.serving() as running:
        yield running


def logprobs_of(server: Server, ids: list[int]) -> list[float]:
    """Of all tokens but the first, by an echo."""
    answer = server.complete(ids, echo=True, logprobs=1, max_tokens=0)
    found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    return found


class TestEmbeddings:
    def test_the_openai_client_gets_unit_vectors_that_do_not_depend_on_company(
        self, server: Server
    ) -> None:
        with OpenAI(base_url=f"{server.process.address}/v1", api_key="x") as client:
            together = client.embeddings.create(model=MODEL, input=TEXTS)
            alone = [client.embeddings.create(model=MODEL, input=text) for text in TEXTS]
        assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
        rows = [np.array(item.embedding) for item in together.data]
        for row, one in zip(rows, alone, strict=True):
            assert math.isclose(np.linalg.norm(row), 1.0, rel_tol=1e-6)
            np.testing.assert_allclose(row, one.data[0].embedding, atol=1e-4)
        assert rows[0] @ rows[1] > rows[0] @ rows[3]

    def test_a_text_and_its_tokens_are_the_same(self, server: Server) -> None:
        ids = server.post("/tokenize", {"prompt": TEXTS[0]})["tokens"]
        given = server.post("/v1/embeddings", {"model": MODEL, "input": [TEXTS[0], ids]})
        first, second = (np.array(item["embedding"]) for item in given["data"])
        np.testing.assert_allclose(first, second, atol=1e-4)


class TestScores:
    def score(self, server: Server, choices: list[Any], **fields: object) -> Any:
        body = {"model": MODEL, "prompt": TEXTS[0], "choices": choices, **fields}
        return server.post("/v1/completions/score", body)

    def test_they_are_what_an_echo_of_the_whole_text_says(self, server: Server) -> None:
        prompt = server.post("/tokenize", {"prompt": TEXTS[0]})["tokens"]
        choices = [" The dog was happy.", " He", " Zzz xq.", [7]]
        answer = self.score(server, choices)
        for choice in answer["choices"]:
            expected = logprobs_of(server, [*prompt, *choice["token_ids"]])[len(prompt) - 1 :]
            assert choice["token_logprobs"] == pytest.approx(expected, abs=1e-4)
            assert choice["logprob"] == pytest.approx(sum(expected), abs=1e-3)
        assert answer["usage"]["prompt_tokens"] == len(prompt)

    def test_the_greedy_answer_is_greedy(self, server: Server) -> None:
        told = {"temperature": 0, "max_tokens": 5, "return_token_ids": True, "ignore_eos": True}
        greedy = server.complete(TEXTS[0], **told)["choices"][0]["token_ids"]
        other = [*greedy[:-1], (greedy[-1] + 1) % 200]
        answer = self.score(server, [greedy, other, greedy[:1]])
        assert [choice["is_greedy"] for choice in answer["choices"]] == [True, False, True]

    def test_a_state_stands_for_its_text(self, server: Server) -> None:
        state = server.state(model=MODEL, prompt=TEXTS[0])["id"]
        choices = [" The dog was happy.", " He"]
        whole = self.score(server, choices)
        bare = self.score(server, choices, state=state, prompt=None)
        for one, other in zip(whole["choices"], bare["choices"], strict=True):
            assert one["token_logprobs"] == pytest.approx(other["token_logprobs"], abs=1e-4)

    def test_forks_compute_the_prompt_once(self, server: Server) -> None:
        """By the counter of what was computed: one prompt, and the tokens of the choices."""
        prompt = " ".join(TEXTS[:3]) * 3 + " Yes."
        tokens = server.post("/tokenize", {"prompt": prompt})["count"]
        before = server.gauge("rwkv_prefix_cache_hits_total")
        asked = server.gauge("rwkv_prefix_cache_queries_total")
        choices = [f" {word} x" for word in "abcdefgh"]
        answer = self.score(server, choices, prompt=prompt)
        hits = server.gauge("rwkv_prefix_cache_hits_total") - before
        queried = server.gauge("rwkv_prefix_cache_queries_total") - asked
        num_scored = answer["usage"]["completion_tokens"]
        assert tokens % 16, "the end of the prompt lies off the grid"
        assert queried == 9 * tokens + num_scored
        assert hits == 8 * tokens + answer["usage"]["prompt_tokens_details"]["cached_tokens"]


class TestTokens:
    def test_as_lm_eval_uses_them(self, server: Server) -> None:
        info = server.get("/tokenizer_info")
        bare = {"prompt": info["eos_token"], "add_special_tokens": False}
        assert server.post("/tokenize", bare)["tokens"] == [0]
        for text in [*TEXTS, "Ünïcödé 语言 🦆 \n\n x"]:
            ids = server.post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
            assert server.post("/detokenize", {"tokens": ids})["prompt"] == text

    def test_rendered_prompts_are_what_is_answered(self, server: Server) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "seed": 1}
        rendered = server.post("/v1/chat/completions/render", body)
        whole = server.post("/v1/chat/completions", body | {"max_tokens": 8})
        answer = server.complete(
            rendered["token_ids"],
            max_tokens=8,
            seed=1,
            temperature=1,
            stop=rendered["sampling_params"]["stop"],
        )
        assert answer["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
        message = whole["choices"][0]["message"]["content"]
        assert answer["choices"][0]["text"].lstrip() == message


def test_the_document_and_its_page_are_there(server: Server, tmp_path: Path) -> None:
    assert server.get("/openapi.json")["openapi"] == "3.1.0"
    assert b"/v1/embeddings" in server.ask("GET", "/docs").body
