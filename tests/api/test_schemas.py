"""Request bodies: what is accepted, what it means, and how errors name the field."""

from __future__ import annotations

import json

import pytest

from api.chat import ChatMessage
from api.errors import ApiError
from api.schemas import ChatBody, CompletionBody, parse_chat, parse_completion
from engine.types import SamplingParams

# As printed in rwkv-rs, examples/rwkv-lm/README.md.
RWKV_RS_BODY = r"""
{
  "model": "rwkv-7.2b-g1e",
  "messages": [
    {"role": "User", "content": "Hello!"}
  ],
  "stream": false,
  "max_tokens": 4096,
  "temperature": 1.0,
  "top_k": 500,
  "top_p": 0.3,
  "presence_penalty": 0.5,
  "repetition_penalty": 0.5,
  "penalty_decay": 0.996,
  "stop": ["\nUser:"]
}
"""


def chat(**fields: object) -> ChatBody:
    messages = [{"role": "user", "content": "hi"}]
    return parse_chat(json.dumps({"model": "m", "messages": messages, **fields}).encode())


def completion(**fields: object) -> CompletionBody:
    return parse_completion(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def params(**fields: object) -> SamplingParams:
    return chat(**fields).to_params()


def call(name: str, arguments: str) -> dict[str, object]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def refusal(**fields: object) -> ApiError:
    def check() -> None:
        body = chat(**fields)
        body.chat_messages()
        body.to_params()
        _ = body.timeout_s

    with pytest.raises(ApiError) as caught:
        check()
    assert caught.value.status == 400
    return caught.value


def test_rwkv_rs_body_is_understood_field_by_field():
    body = parse_chat(RWKV_RS_BODY.encode())
    assert body.model == "rwkv-7.2b-g1e"
    assert body.chat_messages() == [ChatMessage("user", "Hello!")]
    assert body.stream is False
    sampling = body.to_params()
    assert sampling == SamplingParams(
        temperature=1.0,
        top_k=500,
        top_p=0.3,
        presence_penalty=0.5,
        repetition_penalty=0.5,
        penalty_decay=0.996,
        max_tokens=4096,
        stop=("\nUser:",),
        seed=sampling.seed,
    )


def test_defaults_are_those_of_rwkv_rs():
    sampling = params()
    assert sampling == SamplingParams(seed=sampling.seed, max_tokens=256)
    assert params().seed != params().seed


def test_null_is_absent():
    names = (*ChatBody.__struct_fields__, "tools", "n", "logprobs", "response_format", "user")
    nulls = dict.fromkeys((name for name in names if name not in ("messages", "model")), None)
    assert params(**nulls, seed_=1).max_tokens == 256


def test_integers_may_be_written_with_a_point():
    sampling = params(max_tokens=5.0, top_k=3.0, seed=7.0, temperature=1)
    assert (sampling.max_tokens, sampling.top_k, sampling.seed) == (5, 3, 7)


def test_names_of_openai_for_the_same_thing():
    assert params(max_completion_tokens=9).max_tokens == 9
    assert params(max_completion_tokens=9, max_tokens=9).max_tokens == 9
    assert params(frequency_penalty=0.25).repetition_penalty == 0.25
    assert refusal(max_completion_tokens=9, max_tokens=8).param == "max_completion_tokens"
    assert refusal(frequency_penalty=0, repetition_penalty=1).param == "frequency_penalty"


def test_seed_may_be_any_64_bit_integer():
    assert params(seed=2**64 - 1).seed == 2**64 - 1
    assert params(seed=-1).seed == 2**64 - 1
    assert refusal(seed=2**64).param == "seed"


def test_stop_is_one_string_or_several():
    assert params(stop="x").stop == ("x",)
    assert params(stop=["x", "yy"]).stop == ("x", "yy")
    assert chat(stop=[]).to_params(("default",)).stop == ()
    assert chat().to_params(("default",)).stop == ("default",)


def test_ignore_eos_is_about_the_default_stop_too():
    assert chat(ignore_eos=True).to_params(("default",)).stop == ()
    assert chat(ignore_eos=True, stop="x").to_params(("default",)).stop == ("x",)


def test_constraints_are_understood_field_by_field():
    sampling = params(
        min_p=0.05,
        min_tokens=3,
        stop_token_ids=[5, 0, 5],
        include_stop_str_in_output=True,
        logit_bias={"17": -100, "0": 2.5},
        allowed_token_ids=[9, 8, 9],
        bad_words=["ab", "c", "ab"],
    )
    assert sampling == SamplingParams(
        min_p=0.05,
        min_tokens=3,
        stop_token_ids=(0, 5),
        includes_stop=True,
        logit_bias=((17, -100.0), (0, 2.5)),
        allowed_token_ids=(9, 8),
        bad_words=("ab", "c"),
        seed=sampling.seed,
    )


def test_end_of_the_document_may_be_ignored():
    assert params(ignore_eos=True).stop_token_ids == ()
    assert params(ignore_eos=True, stop_token_ids=[7]).stop_token_ids == (7,)
    assert params(ignore_eos=False).stop_token_ids == (0,)


def test_logprobs_are_asked_for_in_each_protocol_s_own_way():
    assert chat().num_top_logprobs is None
    assert chat(logprobs=False, top_logprobs=0).num_top_logprobs is None
    assert chat(logprobs=True).num_top_logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).num_top_logprobs == 20
    assert completion().num_top_logprobs is None
    assert completion(logprobs=0).num_top_logprobs == 0
    assert completion(logprobs=5.0).num_top_logprobs == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [("logprobs", 6), ("logprobs", -1), ("logprobs", True), ("logprobs", 1.5), ("max_tokens", -1)],
)
def test_completions_have_ranges_of_their_own(field: str, value: object):
    with pytest.raises(ApiError) as caught:
        completion(**{field: value}).to_params()
    assert caught.value.param == field


def test_completions_may_ask_for_no_token():
    assert completion(max_tokens=0).to_params().max_tokens == 0


def test_echo_is_refused_where_it_could_not_be_repeated():
    with pytest.raises(ApiError) as caught:
        completion(echo=True, resumable=True)
    assert caught.value.param == "echo"


@pytest.mark.parametrize("name", ["return_state", "resumable"])
def test_what_works_for_one_answer_is_refused_for_several_prompts(name: str):
    with pytest.raises(ApiError) as caught:
        completion(prompt=["a", "b"], **{name: True})
    assert caught.value.param == name


@pytest.mark.parametrize("temperature", [0, 0.001, 1000])
def test_temperatures_at_the_borders(temperature: float):
    assert params(temperature=temperature).temperature == temperature


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 0.0005),
        ("temperature", 1000.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("max_tokens", 1e300),
        ("max_completion_tokens", 0),
        ("presence_penalty", "x"),
        ("penalty_decay", [1]),
        ("stop", ""),
        ("stop", ["ok", ""]),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 1025]),
        ("seed", 1.5),
        ("seed", "abc"),
        ("stream", "yes"),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", True),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", [1] * 1025),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": -100.5}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"01": 1}),
        ("logit_bias", {"1.0": 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", {"9999999999": 1}),
        ("logit_bias", {"1" * 5000: 1}),
        ("logit_bias", [1]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("bad_words", [""]),
        ("bad_words", ["x" * 257]),
        ("bad_words", ["x"] * 129),
        ("bad_words", "x"),
        ("ignore_eos", 1),
        ("include_stop_str_in_output", "no"),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("top_logprobs", 1),
        ("candidate_token_texts", ["x"]),
        ("timeout_ms", 0),
        ("timeout_ms", 2**31),
        ("request_id", ""),
        ("request_id", "a/b"),
        ("request_id", "x" * 129),
        ("request_id", "a\n"),
        ("messages", []),
        ("messages", None),
        ("messages", "hi"),
        ("stream_options", {"include_usage": True}),
        ("model", 3),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object):
    assert refusal(**{field: value}).param == field


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0]"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "messages[0].tool_call_id"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0]"),
        ({"role": "user", "tool_calls": [call("f", "{}")]}, "messages[0].tool_calls"),
        (
            {"role": "assistant", "tool_calls": [call("f", "{}"), call("f", "[1]")]},
            "messages[0].tool_calls[1].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [call("f", '{"a"')]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [call('f"', "{}")]},
            "messages[0].tool_calls[0].function.name",
        ),
    ],
)
def test_wrong_messages_are_refused_by_place(message: dict[str, object], param: str):
    assert refusal(messages=[message]).param == param


def test_messages_in_every_accepted_form():
    messages = [
        {"role": " SYSTEM ", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "User", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
        {"role": "assistant", "content": None},
        {"role": "Tool", "content": "e", "tool_call_id": "1", "name": "ignored"},
    ]
    assert chat(messages=messages).chat_messages() == [
        ChatMessage("system", "a"),
        ChatMessage("system", "b"),
        ChatMessage("user", "c\nd"),
        ChatMessage("assistant", ""),
        ChatMessage("tool", "e"),
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("functions", [{}]),
        ("modalities", ["text", "audio"]),
        ("prompt_logprobs", 1),
        ("echo", True),
        ("use_beam_search", True),
    ],
)
def test_what_is_not_there_yet_is_refused_and_not_dropped(field: str, value: object):
    error = refusal(**{field: value})
    assert (error.param, error.code) == (field, "unsupported_parameter")
    assert "not supported yet" in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("tools", []),
        ("tool_choice", "auto"),
        ("response_format", {"type": "text"}),
        ("logprobs", False),
        ("logit_bias", {}),
        ("reasoning_effort", "none"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("user", "me"),
        ("metadata", {"a": "b"}),
        ("parallel_tool_calls", True),
        ("never_heard_of", 1),
    ],
)
def test_what_asks_for_nothing_passes(field: str, value: object):
    assert chat(**{field: value}).model == "m"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", ["text"]),
        ("", [""]),
        (["one"], ["one"]),
        (["one", "two"], ["one", "two"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2]], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        (["one", [3]], ["one", (3,)]),
    ],
)
def test_prompts_in_every_accepted_form(prompt: object, expected: object):
    body = parse_completion(json.dumps({"model": "m", "prompt": prompt}).encode())
    assert body.prompts() == expected
    assert body.num_prompts == len(body.prompts())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": None},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ["a", 1]},
        {"prompt": [[1], []]},
        {"prompt": ["a"] * 2049},
        {"prompt": [1, "a"]},
        {"prompt": [-1]},
        {"prompt": [2**40]},
        {"prompt": [1.5]},
        {"prompt": {"a": 1}},
    ],
)
def test_other_prompts_are_refused(fields: dict[str, object]):
    with pytest.raises(ApiError) as caught:
        parse_completion(json.dumps({"model": "m", **fields}).encode()).prompts()
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith("prompt")


@pytest.mark.parametrize(("field", "value"), [("suffix", "x"), ("top_logprobs", 2)])
def test_completions_refuse_their_own_unsupported_fields(field: str, value: object):
    with pytest.raises(ApiError) as caught:
        parse_completion(json.dumps({"model": "m", "prompt": "x", field: value}).encode())
    assert caught.value.param == field
