"""Grammars: what they let through, what is refused with a reason, and that masks are obeyed."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Sequence
from functools import cache

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import grammar as grammar_module
from engine.errors import InvalidRequest
from engine.grammar import GrammarCompiler
from engine.grammar_text import choice, compose, json_schema, lark, regex
from engine.masks import Masks
from engine.plan import NO_TOKEN
from engine.sampler import Sampler
from engine.tokenizer import Tokenizer
from engine.types import SamplingParams
from tests.engine.real_engines import CONFIG_DIR

VOCAB_SIZE = 2100  # of a model; more than the vocabulary has


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(CONFIG_DIR / "assets/rwkv_vocab_tiny.txt")


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer(), VOCAB_SIZE)


def bits(mask: bytes) -> np.ndarray:
    return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:VOCAB_SIZE]


def wander(grammar: str, seed: int, max_tokens: int = 400) -> str | None:
    """A text drawn at random from all that the grammar allows; None if it does not end."""
    rng, matcher, ids = random.Random(seed), compiler().matcher(grammar), list[int]()
    while len(ids) < max_tokens:
        (allowed,) = bits(matcher.allowed()).nonzero()
        token = 0 if allowed[0] == 0 and rng.random() < 0.3 else int(rng.choice(allowed))
        if token == 0:
            return b"".join(map(tokenizer().token_bytes, ids)).decode()
        matcher.update([token])
        ids.append(token)
    return None


def accepts(grammar: str, text: str) -> bool:
    matcher = compiler().matcher(grammar)
    for token in tokenizer().encode(text):
        if not bits(matcher.allowed())[token]:
            return False
        matcher.update([token])
    return bool(bits(matcher.allowed())[0])


SMALL = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -3, "maximum": 40},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "maxLength": 6},
            {"type": "string", "enum": ["red", "gr\u00fcn", 'a"b']},
            {"type": "string", "pattern": "^[a-f]{2,4}$"},
            {"const": {"a": [1, "x"]}},
            {"type": "string", "format": "date"},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda item: {"type": "array", "items": item, "maxItems": 3}, inner),
        st.builds(
            lambda fields, all_needed: {
                "type": "object",
                "properties": fields,
                "required": sorted(fields) if all_needed else [],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b", "long name"]), inner, max_size=3),
            st.booleans(),
        ),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(schema=SMALL, seed=st.integers(0, 1000))
def test_whatever_a_schema_lets_through_is_valid_json_without_blank_lines(
    schema: dict[str, object], seed: int
) -> None:
    text = wander(json_schema(schema), seed)
    assert text is not None, "bounded schemas end"
    jsonschema.validate(json.loads(text), schema)
    assert not re.search(r"\n\s*\n", text)


@settings(max_examples=60, deadline=None)
@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**6), 10**6)
        | st.text('ab\u00e9\n"\\/ ', max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("ab ", max_size=3), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    indent=st.sampled_from([None, 2]),
)
def test_any_object_may_be_written_where_one_is_asked_for(
    value: object, indent: int | None
) -> None:
    text = json.dumps({"value": value}, ensure_ascii=False, indent=indent)
    assert accepts(json_schema({"type": "object"}), text)
    assert accepts(json_schema({"type": "object"}, lead=" "), f" {text}")
    assert not accepts(json_schema({"type": "object"}, lead=" "), text)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (regex(r"\d{3}-[a-c]+"), ["123-a", "999-abc"], ["12-a", "123-", "123-d"]),
        (regex("a/b[/]\\/\nx"), ["a/b//\nx"], ["a/b", "a/b//x"]),
        (choice(["yes", "no", 'a "b"\n/c/']), ["yes", "no", 'a "b"\n/c/'], ["ye", "yesno", ""]),
        (lark('start: "a" start "b" | "c"'), ["c", "acb", "aacbb"], ["acbb", "ab", "aac"]),
        (choice(["x"], lead="\n"), ["\nx"], ["x", "\n"]),
        (
            choice(["x"], lead=r">(.|\n)*</think>\n"),
            [">\nhm\n</think>\nx", "></think>\nx"],
            ["x", ">x", ">a</think>\nb</think>\nx", "a</think>\nx"],
        ),
        (json_schema(True), ["1", '"a"', "[]", "{}"], ["", "a"]),
        (compose("start: @n @n", {"n": {"lark_grammar": 'start: "1" | "2"'}}), ["12"], ["1"]),
    ],
)
def test_grammars_accept_what_they_say(grammar: str, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


def test_unlimited_white_space_is_not_json_here() -> None:
    grammar = json_schema({"type": "object"})
    assert accepts(grammar, '{\n  "a": 1\n}')
    assert not accepts(grammar, '{\n\n"a": 1}')
    assert not accepts(grammar, '{  "a": 1}')


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (json_schema({"not": {"type": "string"}}), "not"),
        (json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (json_schema({"type": "strin"}), "strin"),
        (json_schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (json_schema({"type": "string", "format": "blah"}), "blah"),
        (json_schema({"$ref": "http://example.com/x"}), "http://example.com/x"),
        (json_schema({"type": "integer", "minimum": 3, "maximum": 1}), "minimum"),
        (json_schema(3), "schema must be an object or boolean"),
        (json_schema(False), "schema is false"),
        (regex("(a"), "unclosed group"),
        (lark("start: foo"), "foo"),
        (lark("foo: /x/"), "start"),
        ('{"grammars": ["\ud800"]}', "surrogate"),
        ("", "mpty"),
        ("nonsense", ""),
        (json_schema({"enum": ["x" * 300_000]}), "262144"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(grammar: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler().matcher(grammar)
    assert caught.value.field == "grammar"
    assert reason in str(caught.value)
    assert len(str(caught.value)) <= 500


def test_lenient_schemas_leave_out_what_cannot_be_enforced() -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    assert accepts(json_schema(schema, is_lenient=True), "[1, 1]")
    assert not accepts(json_schema(schema, is_lenient=True), '["a"]')


def test_schema_cannot_switch_the_options_of_the_library() -> None:
    schema = {"type": "array", "x-guidance": {"lenient": True, "whitespace_flexible": True}}
    assert not accepts(json_schema(schema), "[\n\n]")
    with pytest.raises(InvalidRequest):
        compiler().matcher(json_schema(schema | {"uniqueItems": True}))


def test_deep_and_wide_schemas_end_in_time() -> None:
    deep = '{"type": "array", "items": ' * 20_000 + "{}" + "}" * 20_000
    with pytest.raises(InvalidRequest):
        compiler().matcher(f'{{"grammars": [{{"json_schema": {deep[:200_000]}}}]}}')
    nested: dict[str, object] = {}
    for _ in range(900):
        nested = {"type": "array", "items": nested}
    with pytest.raises(ValueError, match="no JSON form"):
        json_schema(nested)
    nodes = {
        f"d{i}": {"type": "object", "properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "ab"}}
        for i in range(40)
    }
    compiler().matcher(json_schema({"$ref": "#/$defs/d0", "$defs": nodes | {"d40": {}}}))


async def test_prepared_grammar_is_at_hand_and_the_oldest_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_NUM_COMPILED", 2)
    grammars = GrammarCompiler(tokenizer(), VOCAB_SIZE)
    compiled = list[str]()
    inner = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda text: (compiled.append(text), inner(text))[1])
    a, b, c = (choice([name]) for name in "abc")
    await asyncio.gather(*(grammars.prepare(text) for text in (a, b)))
    grammars.matcher(a)
    assert sorted(compiled) == sorted([a, b])
    await grammars.prepare(c)  # b is the one not used since
    grammars.matcher(a)
    assert compiled[2:] == [c]
    grammars.matcher(b)
    assert compiled[2:] == [c, b]
    with pytest.raises(InvalidRequest):
        await grammars.prepare("nonsense")


def test_long_grammars_are_kept_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of many thousand characters takes tens of megabytes."""
    a, b, c = (choice([name * 300]) for name in "abc")
    monkeypatch.setattr(grammar_module, "MAX_COMPILED_CHARS", len(a) + len(b))
    grammars = GrammarCompiler(tokenizer(), VOCAB_SIZE)
    for text in (a, b, a, c):
        grammars.matcher(text)
    assert list(grammars._compiled) == [a, c]
    assert grammars._num_chars == len(a) + len(c)


def test_matchers_of_one_grammar_do_not_know_each_other() -> None:
    grammar = choice(["ab", "cd"])
    first, second = compiler().matcher(grammar), compiler().matcher(grammar)
    before = second.allowed()
    first.update(tokenizer().encode("a"))
    assert second.allowed() == before != first.allowed()


def test_matcher_made_from_its_tokens_is_where_it_was() -> None:
    grammar = json_schema({"type": "object"})
    ids = tokenizer().encode('{"a": [1, {"b": "c')
    whole, stepwise = compiler().matcher(grammar), compiler().matcher(grammar)
    whole.update(ids)
    for token in ids:
        stepwise.allowed()
        stepwise.update([token])
    assert whole.allowed() == stepwise.allowed()


def test_matcher_that_was_broken_allows_nothing() -> None:
    matcher = compiler().matcher(choice(["ab"]))
    matcher.update(tokenizer().encode("x"))
    assert not any(matcher.allowed())
    matcher.update([0])
    assert not any(matcher.allowed())


def test_matcher_whose_masks_take_too_long_allows_nothing_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matcher = compiler().matcher(regex("a*"))
    monkeypatch.setattr(grammar_module, "MAX_MASK_S", 0.0)
    num_allowed = sum(any(matcher.allowed()) for _ in range(50))
    assert num_allowed == grammar_module.NUM_MEASURED - 1


@pytest.mark.parametrize("num_texts", [2000, 10_000])
def test_thousands_of_texts_to_choose_from_are_followed(num_texts: int) -> None:
    grammar = choice([f"text {number}" for number in range(num_texts)])
    assert accepts(grammar, f"text {num_texts - 1}")
    assert not accepts(grammar, f"text {num_texts}")


@given(texts=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4))
def test_a_choice_is_of_texts_to_the_letter(texts: list[str]) -> None:
    grammar = choice(texts)
    for text in texts:
        assert accepts(grammar, text)
        assert accepts(grammar, f"{text}.") == (f"{text}." in texts)


def test_ids_without_text_are_never_allowed() -> None:
    mask = bits(compiler().matcher(regex(r"(.|\n)*")).allowed())
    without = tokenizer().ids_without_text(VOCAB_SIZE)
    assert len(without) >= VOCAB_SIZE - 2048
    assert not mask[list(without)].any()
    assert mask.sum() > 1900


@given(
    allowed=st.lists(
        st.none() | st.lists(st.booleans(), min_size=21, max_size=21), min_size=1, max_size=5
    )
)
def test_masks_leave_what_they_allow_and_only_that(allowed: list[list[bool] | None]) -> None:
    logits = torch.arange(21.0).repeat(len(allowed), 1)
    masks = [
        None if row is None else np.packbits(row, bitorder="little").tobytes() + b"\xff"
        for row in allowed
    ]
    Masks(torch.device("cpu")).apply(logits, masks)
    for row, mask in zip(logits.tolist(), allowed, strict=True):
        kept = [True] * 21 if mask is None else mask
        assert row == [float(i) if keep else float("-inf") for i, keep in enumerate(kept)]


def drawn(params: Sequence[SamplingParams], num_tokens: int) -> list[list[int]]:
    """Tokens of rows that are drawn together, from logits that know no grammar."""
    sampler = Sampler(len(params), tokenizer().ids_without_text(VOCAB_SIZE), torch.device("cpu"),
                      grammars=compiler())  # fmt: skip
    for seat, one in enumerate(params):
        sampler.start(seat, one)
    generator = torch.Generator().manual_seed(1)
    tokens: list[list[int]] = [[] for _ in params]
    for position in range(num_tokens):
        logits = torch.randn(len(params), VOCAB_SIZE, generator=generator)
        draws = sampler.sample(logits, range(len(params)), [position] * len(params))
        for row, token in zip(tokens, draws.tokens, strict=True):
            row.append(token)
    return tokens


def text_of(ids: Sequence[int]) -> str:
    return tokenizer().decode(ids[: ids.index(0)])


def test_each_row_follows_its_own_grammar_or_none() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    rows = drawn(
        [
            SamplingParams(seed=1, grammar=choice(["one", "two"])),
            SamplingParams(seed=2),
            SamplingParams(temperature=0.0, grammar=regex("x{5,9}")),
            SamplingParams(seed=4, grammar=json_schema(schema), presence_penalty=2.0, top_p=0.9),
        ],
        100,
    )
    assert text_of(rows[0]) in ("one", "two")
    assert rows[1].count(0) < 3
    assert re.fullmatch("x{5,9}", text_of(rows[2]))
    jsonschema.validate(json.loads(text_of(rows[3])), schema)


def test_nothing_left_to_draw_is_told_and_draws_nothing() -> None:
    x_ids = [token for token in range(1, 2048) if b"x" in tokenizer().token_bytes(token)]
    stuck = SamplingParams(seed=1, grammar=regex("x+"), banned_token_ids=tuple(x_ids))
    greedy = SamplingParams(temperature=0.0, grammar=regex("x+"), banned_token_ids=tuple(x_ids))
    rows = drawn([stuck, greedy, SamplingParams(seed=3)], 2)
    assert rows[0] == rows[1] == [NO_TOKEN, NO_TOKEN]
    assert all(token >= 0 for token in rows[2])
