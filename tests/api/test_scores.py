"""POST /v1/completions/score over the scripted engine, which scores tokens by their position."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.scores import first_request, other_request, score_of
from engine.types import EngineRequest, OutputDelta
from tests.api.harness import Reply, Running, model_table, running


async def score(server: Running, *choices: object, **fields: object) -> Reply:
    body = {"model": "m", "prompt": "hi", "choices": list(choices), **fields}
    return await server.post("/v1/completions/score", body)


async def test_each_choice_has_its_tokens_and_their_sum(tmp_path: Path):
    async with running(tmp_path) as server:
        answer = (await score(server, " a", "bcd", [5], [5, 6])).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    ids = [[33, 98], [99, 100, 101], [5], [5, 6]]
    assert [choice["token_ids"] for choice in answer["choices"]] == ids
    for choice in answer["choices"]:
        assert choice["num_tokens"] == len(choice["token_ids"]) == len(choice["token_logprobs"])
        assert choice["logprob"] == pytest.approx(sum(choice["token_logprobs"]))
        # The script says that the token at position p has the logarithm -p / 8.
        later = [-(3 + place) / 8 for place in range(1, choice["num_tokens"])]
        assert choice["token_logprobs"][1:] == later
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 8, 11)


async def test_the_prompt_is_computed_once_and_single_tokens_need_nothing_more(tmp_path: Path):
    async with running(tmp_path) as server:
        await score(server, "a", "b", "cd")
        first, *others = server.engine.requests
    assert first.prompt_ids == (0, 105, 106)
    assert first.sampling.candidate_token_ids == (98, 99, 100)
    (other,) = others
    assert other.prompt_ids == (0, 105, 106, 100, 101)
    assert (other.branch_at, other.scores_from) == (3, 4)


async def test_states_and_tuned_ones_and_tenants_are_passed_on(tmp_path: Path):
    async with running(tmp_path) as server:
        state = (await server.post("/v1/states", {"prompt": "ab"})).json()["id"]
        after = (await score(server, "xy", state=state, prompt="c", cache_salt="s")).json()
        assert all(one.cache_salt == "s" for one in server.engine.requests[-2:])
        bare = (await score(server, "xy", state=state, prompt=None)).json()
        unknown = await score(server, "x", state="nope")
    assert after["usage"]["prompt_tokens"] == 1
    assert bare["usage"]["prompt_tokens"] == 0
    for answer in (after, bare):
        assert answer["usage"]["prompt_tokens_details"]["state_tokens"] == 3
    # a and b and the begin of the document came before.
    assert after["choices"][0]["token_logprobs"][1] == -(3 + 1 + 1) / 8
    assert bare["choices"][0]["token_logprobs"][1] == -(3 + 1) / 8
    assert (unknown.status, unknown.error["param"]) == (404, "state")


async def test_more_choices_than_can_wait(tmp_path: Path):
    table = model_table(max_batch_size=2, max_waiting=1)
    async with running(tmp_path, table) as server:
        answer = (await score(server, *("ab" for _ in range(300)))).json()
    assert len({str(choice["token_logprobs"]) for choice in answer["choices"]}) == 1
    assert len(answer["choices"]) == 300


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"choices": None}, "choices"),
        ({"choices": []}, "choices"),
        ({"choices": ["a", ""]}, "choices"),
        ({"choices": ["a", []]}, "choices"),
        ({"choices": ["a", 7]}, "choices[1]"),
        ({"choices": [[-1]]}, "choices[0]"),
        ({"choices": ["a"] * 1025}, "choices"),
        ({"choices": "a"}, "choices"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 300]}, "prompt"),
        ({"prompt": ["a"]}, "prompt[0]"),
        ({"initial_state": "nobody"}, "initial_state"),
        ({"state": "s", "initial_state": "t"}, "initial_state"),
        ({"temperature": 0}, "temperature"),
        ({"priority": 0.5}, "priority"),
        ({"model": None}, "model"),
    ],
)
async def test_errors_name_the_field(tmp_path: Path, fields: dict, param: str):
    async with running(tmp_path) as server:
        reply = await score(server, "a", **fields)
    assert (reply.status, reply.error["param"]) == (400, param)


async def test_a_choice_that_no_vocabulary_has_or_that_is_too_long(tmp_path: Path):
    async with running(tmp_path, model_table(max_context_len=16)) as server:
        unknown = await score(server, "a", [5, 301])
        first = await score(server, [301])
        long = await score(server, "a", "b" * 20)
    assert (unknown.status, unknown.error["param"]) == (400, "choices[1]")
    assert (first.status, first.error["param"]) == (400, "choices[0]")
    assert (long.status, long.error["param"]) == (400, "choices[1]")


class TestScores:
    PROMPT = EngineRequest(request_id="r", prompt_ids=(1, 2))

    def test_requests(self):
        first = first_request(self.PROMPT, [(3, 4), (5,), (3,)])
        assert first.sampling.candidate_token_ids == (3, 5)
        assert first.sampling.max_tokens == 1
        other = other_request(self.PROMPT, (3, 4), 7)
        assert (other.request_id, other.prompt_ids) == ("r-7", (1, 2, 3, 4))
        assert (other.branch_at, other.scores_from, other.sampling.max_tokens) == (2, 3, 0)

    @pytest.mark.parametrize(("best", "is_greedy"), [(-0.5, False), (-1.0, True)])
    def test_greedy_is_whatever_nothing_beats(self, best: float, is_greedy: bool):
        first = OutputDelta(tops=(((9, best), (3, -1.0)),))
        score = score_of((3,), first, None)
        assert (score.token_logprobs, score.is_greedy) == ((-1.0,), is_greedy)

    def test_every_token_counts(self):
        first = OutputDelta(tops=(((3, -1.0),),))
        others = OutputDelta(prompt_logprobs=(-2.0,), prompt_tops=(((8, -1.5), (4, -2.0)),))
        score = score_of((3, 4), first, others)
        assert (score.token_logprobs, score.is_greedy) == ((-1.0, -2.0), False)
