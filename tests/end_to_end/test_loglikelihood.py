"""Log probabilities of a real server, against the model alone.

The requests are those of lm-eval's `local-completions`: lists of token ids, context and
continuation together, with echo, one token (or none), logprobs 1 and temperature 0; what it does
with the answer is done here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from openai import OpenAI

from tests.end_to_end.site import MODEL, Server, Site
from tests.engine.real_engines import TEXT, Oracle, real_table

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    site = Site(tmp_path_factory.mktemp("loglikelihood"), model={"max_batch_tokens": 40})
    with site.serving() as server:
        yield server


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(real_table("embedded-float32", tmp_path_factory.mktemp("oracle")))


def pairs(oracle: Oracle) -> list[tuple[list[int], list[int]]]:
    """(context, continuation), likely and unlikely ones."""
    encode = oracle._tokenizer.encode
    found = [(TEXT[: 40 * i], TEXT[40 * i : 40 * i + 15]) for i in range(1, 9)]
    choices = [" a little dog.", " the sea.", " 7 qubits", "\n\n"]
    found += [("Once upon a time there was", choice) for choice in choices]
    said = [([0, *encode(text)], list[int]()) for text in ("Once upon a time", TEXT[:100])]
    for context, text in said:
        for _ in range(6):
            text.append(int(oracle.logits([*context, *text])[-1].argmax()))
    return [*(([0, *encode(context)], encode(text)) for context, text in found), *said]


def expected(oracle: Oracle, context: Sequence[int], text: Sequence[int]) -> tuple[float, bool]:
    """Log likelihood of the continuation, and whether it is what the model would say."""
    whole = [*context, *text]
    logprobs = oracle.logits(whole).double().log_softmax(-1)
    total, is_greedy = 0.0, True
    for place in range(len(context), len(whole)):
        row = logprobs[place - 1]
        total += float(row[whole[place]])
        is_greedy &= int(row.argmax()) == whole[place]
    return total, is_greedy


@pytest.mark.parametrize("batch_size", [1, 5, 14])
def test_loglikelihoods_are_those_of_the_model(
    served: Server, oracle: Oracle, batch_size: int
) -> None:
    asked = pairs(oracle)
    likely = 0
    for begin in range(0, len(asked), batch_size):
        batch = asked[begin : begin + batch_size]
        answer = served.post(
            "/v1/completions",
            {
                "model": MODEL,
                "prompt": [[*context, *text] for context, text in batch],
                "echo": True,
                "max_tokens": 1,
                "logprobs": 1,
                "temperature": 0,
                "seed": 1234,
            },
        )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        for choice, (context, text) in zip(choices, batch, strict=True):
            told = slice(len(context), -1)
            logprobs = choice["logprobs"]["token_logprobs"][told]
            tops = choice["logprobs"]["top_logprobs"][told]
            is_greedy = all(
                own == max(top.values()) for own, top in zip(logprobs, tops, strict=True)
            )
            total, is_expected = expected(oracle, context, text)
            assert abs(sum(logprobs) - total) < TOLERANCE
            assert is_greedy == is_expected
            likely += is_greedy
    assert 0 < likely < len(asked), "nothing is shown of is_greedy"


def test_a_token_more_changes_nothing(served: Server, oracle: Oracle) -> None:
    for context, text in pairs(oracle)[::4]:
        body = {"model": MODEL, "prompt": [*context, *text], "echo": True, "logprobs": 5}
        none, one = (
            served.post("/v1/completions", body | {"max_tokens": number, "temperature": 0})
            for number in (0, 1)
        )
        told, more = none["choices"][0]["logprobs"], one["choices"][0]["logprobs"]
        for name in told:
            assert len(more[name]) == len(told[name]) + 1 == len(context) + len(text) + 1
        assert told["tokens"] == more["tokens"][:-1]
        assert told["text_offset"] == more["text_offset"][:-1]
        values = zip(told["token_logprobs"][1:], more["token_logprobs"][1:-1], strict=True)
        assert all(abs(left - right) < TOLERANCE for left, right in values)
        assert none["usage"]["completion_tokens"] == 0


def test_text_prompts_begin_a_document(served: Server, oracle: Oracle) -> None:
    text = TEXT[:60]
    ids = [0, *oracle._tokenizer.encode(text)]
    asks = {"model": MODEL, "echo": True, "logprobs": 0, "max_tokens": 0}
    by_text, by_ids = (
        served.post("/v1/completions", asks | {"prompt": prompt})["choices"][0]
        for prompt in (text, ids)
    )
    assert by_text["text"] == by_ids["text"] == text
    first, second = by_text["logprobs"], by_ids["logprobs"]
    assert first["tokens"] == second["tokens"]
    assert first["token_logprobs"][1:] == pytest.approx(second["token_logprobs"][1:], abs=TOLERANCE)


def test_greedy_answer_is_the_most_probable_one_at_each_token(
    served: Server, oracle: Oracle
) -> None:
    answer = served.complete(TEXT[:80], logprobs=3, return_token_ids=True)["choices"][0]
    ids = [*answer["prompt_token_ids"], *answer["token_ids"]]
    expected_TV = oracle.logits(ids[:-1]).log_softmax(-1)[len(answer["prompt_token_ids"]) - 1 :]
    told = answer["logprobs"]
    for place, token in enumerate(answer["token_ids"]):
        value = told["token_logprobs"][place]
        assert abs(value - float(expected_TV[place][token])) < TOLERANCE
        assert value == max(told["top_logprobs"][place].values())


def test_openai_client_reads_logprobs_whole_and_streamed(served: Server) -> None:
    url = f"{served.process.address}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        asks = {"model": MODEL, "max_tokens": 12, "temperature": 0}
        whole = client.completions.create(prompt=["Once", "Max"], logprobs=2, echo=True, **asks)
        chunks = list(
            client.completions.create(
                prompt=["Once", "Max"], logprobs=2, echo=True, stream=True, **asks
            )
        )
        talk = [{"role": "user", "content": "Hello!"}]
        chat = client.chat.completions.create(
            messages=talk, logprobs=True, top_logprobs=4, **asks
        ).choices[0]
        pieces = list(
            client.chat.completions.create(
                messages=talk, logprobs=True, top_logprobs=4, stream=True, **asks
            )
        )
    for choice in whole.choices:
        assert "".join(choice.logprobs.tokens) == choice.text
        mine = [one.choices[0] for one in chunks if one.choices[0].index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        told = [one.logprobs for one in mine if one.logprobs is not None]
        for name in ("tokens", "text_offset"):
            values = [value for one in told for value in getattr(one, name)]
            assert values == getattr(choice.logprobs, name)
        values = [value for one in told for value in one.token_logprobs]
        assert values[0] is choice.logprobs.token_logprobs[0] is None
        assert values[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=TOLERANCE)
    content = chat.logprobs.content
    assert "".join(one.token for one in content).strip() == chat.message.content.strip()
    assert all(len(one.top_logprobs) == 4 for one in content)
    assert all(one.logprob == one.top_logprobs[0].logprob for one in content), "it is greedy"
    told = [piece.choices[0].logprobs for piece in pieces if piece.choices[0].logprobs]
    assert [one.token for part in told for one in part.content] == [one.token for one in content]


def test_rules_of_sampling_hold_in_a_server(served: Server) -> None:
    plain = served.complete("Once upon a time", max_tokens=30)["choices"][0]["text"]
    words = [word for word in plain.split() if len(word) > 1][:3]
    other = served.complete("Once upon a time", max_tokens=30, bad_words=words)
    assert other["choices"][0]["text"] != plain
    forced = served.complete("Once", max_tokens=8, allowed_token_ids=[0, 33], min_tokens=8)
    assert forced["usage"]["completion_tokens"] == 8
    assert len(set(forced["choices"][0]["text"])) == 1
    space = 1 + ord(" ")
    ended = served.complete("Once", max_tokens=8, allowed_token_ids=[space], bad_words=["  "])
    biased = served.complete("Once", max_tokens=4, logit_bias={"34": 100})["choices"][0]
    assert len(set(biased["text"])) == 1
    (choice,) = ended["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" ", "stop"), "nothing is left to say"
