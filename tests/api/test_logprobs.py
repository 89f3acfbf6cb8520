"""Log probabilities on the wire: whole and streamed, with echo, stops and pieces of characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api.errors import ApiError
from api.logprobs import LIST_NAMES, ChatLogprobs, CompletionLogprobs, candidate_ids, joined
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, OutputDelta
from tests.api.harness import chat_body, running
from tests.api.scripted import recited

COMPLETION = {"model": "m", "prompt": "ab", "max_tokens": 6, "seed": 7, "logprobs": 1}
SEVEN = -2.0  # what the script says of tokens drawn with that seed
SAID = recited(3, 6)

WORDS = ["你", "好", b"\xe4\xbd", b"\xa0!", "ab", "b c", b"\xff"]
TOKENIZER = Tokenizer(
    {byte + 1: bytes([byte]) for byte in range(256)}
    | {257 + i: word if isinstance(word, bytes) else word.encode() for i, word in enumerate(WORDS)}
)
NI, HAO, NI_BEGIN, NI_END, AB, B_C = range(257, 263)


def next_char(char: str) -> str:
    return chr(ord(char) + 1)


def joined_logprobs(events: list[dict], index: int = 0) -> dict:
    whole = None
    for event in events:
        for choice in event["choices"]:
            if choice["index"] == index:
                whole = joined(whole, choice["logprobs"])
    assert whole is not None
    return whole


async def completion(server, **fields: object) -> dict:
    return (await server.post("/v1/completions", COMPLETION | fields)).json()


async def stream(server, **fields: object) -> list[dict]:
    reply = await server.post("/v1/completions", COMPLETION | fields | {"stream": True})
    return reply.events()


async def test_completion_tells_of_each_token(tmp_path: Path):
    async with running(tmp_path) as server:
        (choice,) = (await completion(server, logprobs=2))["choices"]
    assert choice["text"] == SAID
    assert choice["logprobs"] == {
        "tokens": list(SAID),
        "token_logprobs": [SEVEN] * 6,
        "top_logprobs": [{char: SEVEN, next_char(char): SEVEN - 1} for char in SAID],
        "text_offset": list(range(6)),
    }


async def test_nobody_who_does_not_ask_is_told(tmp_path: Path):
    async with running(tmp_path) as server:
        answer = await completion(server, logprobs=None)
        chat = (await server.chat()).json()
        sent = server.engine.requests
    assert answer["choices"][0]["logprobs"] is None
    assert chat["choices"][0]["logprobs"] is None
    assert not any(one.sampling.has_logprobs for one in sent)
    assert not any(one.scores_from is not None for one in sent)


async def test_token_itself_is_among_the_top_ones_also_of_none(tmp_path: Path):
    async with running(tmp_path) as server:
        (choice,) = (await completion(server, logprobs=0))["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{char: SEVEN} for char in SAID]


@pytest.mark.parametrize("fields", [{}, {"stop": "nothing"}, {"n": 3}, {"echo": True, "n": 2}])
async def test_streamed_pieces_are_the_whole(tmp_path: Path, fields: dict):
    async with running(tmp_path, delay_s=0.002) as server:
        whole = await completion(server, **fields)
        events = await stream(server, **fields)
    for choice in whole["choices"]:
        assert joined_logprobs(events, choice["index"]) == choice["logprobs"]
        texts = [
            one["text"]
            for event in events
            for one in event["choices"]
            if one["index"] == choice["index"]
        ]
        assert "".join(texts) == choice["text"]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_tokens_of_the_stop_string_are_not_told_of(tmp_path: Path, is_stream: bool):
    stop = SAID[2:5]
    async with running(tmp_path, delay_s=0.002) as server:
        if is_stream:
            events = await stream(server, stop=stop)
            logprobs, last = joined_logprobs(events), events[-1]["choices"][0]
        else:
            (last,) = (await completion(server, stop=stop))["choices"]
            logprobs = last["logprobs"]
    assert logprobs["tokens"] == list(SAID[:2])
    assert last["matched_stop_suffix"] == stop
    assert last["generated_tokens"] == 5


@pytest.mark.parametrize("is_stream", [False, True])
async def test_stop_string_that_stays_is_told_of(tmp_path: Path, is_stream: bool):
    fields = {"stop": SAID[2:5], "include_stop_str_in_output": True}
    async with running(tmp_path) as server:
        if is_stream:
            events = await stream(server, **fields)
            logprobs = joined_logprobs(events)
            text = "".join(choice["text"] for event in events for choice in event["choices"])
        else:
            (choice,) = (await completion(server, **fields))["choices"]
            logprobs, text = choice["logprobs"], choice["text"]
    assert text == SAID[:5]
    assert logprobs["tokens"] == list(SAID[:5])


async def test_stop_token_is_told_of_in_completions_only(tmp_path: Path):
    """It was drawn, and evaluation harnesses drop exactly one token at the end."""
    ends = {"stop_token_ids": [1 + ord(SAID[2])], "max_tokens": 6}
    async with running(tmp_path) as server:
        (choice,) = (await completion(server, **ends))["choices"]
        said = (await server.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
        last = {"stop_token_ids": [1 + ord(said[2]["token"])]}
        chat = (await server.chat(logprobs=True, **last)).json()["choices"][0]
    assert choice["text"] == SAID[:2]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == list(SAID[:3])
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    tokens = [one["token"] for one in chat["logprobs"]["content"]]
    assert tokens == [one["token"] for one in said[:2]]


async def test_echo_begins_the_answer_with_the_prompt(tmp_path: Path):
    async with running(tmp_path) as server:
        text = await completion(server, echo=True, logprobs=None)
        ids = await completion(server, echo=True, logprobs=None, prompt=[98, 0, 299, 99])
        events = await stream(server, echo=True, logprobs=None)
        nothing = await completion(server, echo=True, logprobs=None, max_tokens=0)
        streamed = await stream(server, echo=True, logprobs=None, max_tokens=0)
    assert text["choices"][0]["text"] == "ab" + SAID
    assert ids["choices"][0]["text"] == "ab" + recited(4, 6)
    assert events[0]["choices"][0]["text"] == "ab"
    assert "".join(event["choices"][0]["text"] for event in events) == "ab" + SAID
    for answer in (nothing, streamed[-1]):
        assert answer["choices"][0]["finish_reason"] == "length"
    assert nothing["choices"][0]["text"] == "ab"
    assert nothing["usage"]["completion_tokens"] == 0
    assert "".join(event["choices"][0]["text"] for event in streamed) == "ab"


@pytest.mark.parametrize("max_tokens", [0, 2])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_echo_tells_how_probable_the_prompt_was(
    tmp_path: Path, is_stream: bool, max_tokens: int
):
    fields = {"echo": True, "max_tokens": max_tokens, "prompt": "abc"}
    async with running(tmp_path) as server:
        if is_stream:
            logprobs = joined_logprobs(await stream(server, **fields))
        else:
            (choice,) = (await completion(server, **fields))["choices"]
            logprobs = choice["logprobs"]
    said = list(recited(4, max_tokens))
    assert logprobs == {
        "tokens": ["", "a", "b", "c", *said],
        "token_logprobs": [None, -0.125, -0.25, -0.375, *[SEVEN] * max_tokens],
        "top_logprobs": [
            None, {"a": -0.125}, {"b": -0.25}, {"c": -0.375}, *({char: SEVEN} for char in said),
        ],
        "text_offset": [0, 0, 1, 2, 3, 4][: 4 + max_tokens],
    }  # fmt: skip


async def test_token_ids_are_told_of_one_by_one(tmp_path: Path):
    """What evaluation harnesses send: the lists are as long as what was sent, and one more."""
    prompt = [98, 99, 100, 299]
    fields = {"echo": True, "max_tokens": 1, "temperature": 0}
    async with running(tmp_path) as server:
        (choice,) = (await completion(server, prompt=prompt, **fields))["choices"]
        (one,) = (await completion(server, prompt=[98], **fields))["choices"]
    assert [len(choice["logprobs"][name]) for name in LIST_NAMES] == [5] * 4
    assert choice["logprobs"]["token_logprobs"][:4] == [None, -0.125, -0.25, -0.375]
    assert choice["logprobs"]["tokens"][3] == "token_id:299"
    assert one["logprobs"]["token_logprobs"] == [None, SEVEN]


async def test_candidates_are_among_the_top_ones(tmp_path: Path):
    async with running(tmp_path) as server:
        fields = {"candidate_token_texts": ["~", "^", "~"]}
        (choice,) = (await completion(server, **fields))["choices"]
        body = chat_body(logprobs=True, candidate_token_texts=["~"])
        chat = (await server.post("/v1/chat/completions", body)).json()
        wrong = await server.post("/v1/completions", COMPLETION | {"candidate_token_texts": ["xy"]})
        empty = await server.post("/v1/completions", COMPLETION | {"candidate_token_texts": [""]})
    for char, top in zip(SAID, choice["logprobs"]["top_logprobs"], strict=True):
        assert top == {char: SEVEN, "~": -50.0, "^": -50.0}
    for one in chat["choices"][0]["logprobs"]["content"]:
        assert [top["token"] for top in one["top_logprobs"]] == ["~"]
    for reply in (wrong, empty):
        assert (reply.status, reply.error["param"]) == (400, "candidate_token_texts")


async def test_best_of_tells_of_the_chosen(tmp_path: Path):
    async with running(tmp_path) as server:
        server.runner.reads_seed = True
        answer = await completion(server, best_of=4, n=2, seed=10)
    # The seeds 10 and 11 have the highest log probabilities, 0 and -1.
    assert [choice["logprobs"]["token_logprobs"][0] for choice in answer["choices"]] == [0, -1]
    for choice in answer["choices"]:
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


async def test_chat_tells_of_the_tokens_of_its_content(tmp_path: Path):
    async with running(tmp_path) as server:
        whole = (await server.chat(logprobs=True, top_logprobs=2, seed=7)).json()
        events = (await server.chat(logprobs=True, top_logprobs=2, seed=7, stream=True)).events()
    (choice,) = whole["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in content).lstrip() == choice["message"]["content"]
    first = content[0]
    assert first == {
        "token": first["token"],
        "logprob": SEVEN,
        "bytes": [ord(first["token"])],
        "top_logprobs": [
            {"token": char, "logprob": value, "bytes": [ord(char)]}
            for char, value in ((first["token"], SEVEN), (next_char(first["token"]), SEVEN - 1))
        ],
    }
    streamed = [
        one
        for event in events
        if event["choices"][0]["logprobs"]
        for one in event["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == content


async def test_prompts_too_long_to_tell_of_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("api.engine_request.MAX_PROMPT_LOGPROBS", 40)
    async with running(tmp_path) as server:
        fits = await server.post(
            "/v1/completions", COMPLETION | {"echo": True, "prompt": "x" * 19, "logprobs": 1}
        )
        refused = [
            await server.post("/v1/completions", COMPLETION | {"echo": True, "logprobs": 1} | more)
            for more in (
                {"prompt": "x" * 20},
                {"prompt": "x" * 19, "candidate_token_texts": ["a"]},
                {"prompt": "x" * 9, "n": 3},
                {"prompt": ["x" * 9] * 3},
            )
        ]
        without = await server.post(
            "/v1/completions", COMPLETION | {"echo": True, "prompt": "x" * 20, "logprobs": None}
        )
    assert fits.status == without.status == 200
    for reply in refused:
        assert (reply.status, reply.error["param"]) == (400, "echo")


# The writers alone.


def delta(ids: list[int], *, cut: int = 0, reason: FinishReason | None = None) -> OutputDelta:
    """`cut` bytes at the end are no text; the log probability of a token is minus its id."""
    known = filter(TOKENIZER.has_text, ids)
    num_bytes = sum(len(TOKENIZER.token_bytes(token)) for token in known)
    return OutputDelta(
        token_ids=tuple(ids),
        logprobs=tuple(-float(token) for token in ids),
        finish_reason=reason,
        matched_stop="x" if cut else None,
        num_text_bytes=num_bytes - cut,
    )


def test_offsets_count_characters_of_which_pieces_are_tokens():
    lists = CompletionLogprobs(TOKENIZER).answer(delta([NI, NI_BEGIN, NI_END, AB, B_C, HAO]))
    assert lists is not None
    assert lists["tokens"] == ["你", "bytes:\\xe4\\xbd", "bytes:\\xa0\\x21", "ab", "b c", "好"]
    assert lists["text_offset"] == [0, 1, 1, 3, 5, 8]


def test_offsets_go_on_behind_the_prompt_and_from_piece_to_piece():
    writer = CompletionLogprobs(TOKENIZER)
    told = OutputDelta(prompt_logprobs=(-1.0, -2.0))
    lists = writer.prompt((0, NI, NI_BEGIN), told)
    assert lists["text_offset"] == [0, 0, 1]
    assert lists["token_logprobs"] == [None, -1.0, -2.0]
    first, second = writer.answer(delta([NI])), writer.answer(delta([AB, AB]))
    # An unfinished character at the end of the prompt is one of its text.
    assert first is not None
    assert second is not None
    assert (first["text_offset"], second["text_offset"]) == ([2], [3, 5])


def test_names_of_different_tokens_differ():
    writer = CompletionLogprobs(TOKENIZER)
    top = tuple((token, -float(token)) for token in (NI_BEGIN, NI_END, 256, 0, 299, 300))
    lists = writer.answer(OutputDelta(token_ids=(NI,), logprobs=(-0.5,), tops=(top,)))
    assert lists is not None
    (names,) = lists["top_logprobs"]
    assert isinstance(names, dict)
    assert len(names) == 7
    assert list(names.values()) == sorted(names.values(), reverse=True)
    assert json.loads(json.dumps(names)) == names


def test_chat_gives_the_bytes_of_pieces_of_characters():
    told = ChatLogprobs(TOKENIZER).answer(delta([NI_BEGIN, NI_END, 299]))
    assert told is not None
    content = told["content"]
    assert isinstance(content, list)
    assert [one["token"] for one in content] == ["\ufffd", "\ufffd!", "token_id:299"]
    assert [one["bytes"] for one in content] == [[0xE4, 0xBD], [0xA0, 0x21], None]


@pytest.mark.parametrize(("cut", "num_shown"), [(1, 2), (2, 2), (3, 1), (5, 0)])
def test_token_cut_by_the_stop_string_is_told_of_whole(cut: int, num_shown: int):
    """ "ab" and "b c": of what is left of them something must be in the text."""
    end = delta([AB, B_C], cut=cut, reason=FinishReason.STOP)
    lists, chat = CompletionLogprobs(TOKENIZER).answer(end), ChatLogprobs(TOKENIZER).answer(end)
    assert lists is not None
    assert chat is not None
    assert lists["tokens"] == ["ab", "b c"][:num_shown]
    assert [one["token"] for one in chat["content"]] == lists["tokens"]


def test_candidates_are_tokens_of_the_vocabulary_once_each():
    assert candidate_ids(["你", "ab", "你"], TOKENIZER) == (NI, AB)
    for texts in (["你好"], [""], ["a"] * 65):
        with pytest.raises(ApiError):
            candidate_ids(texts, TOKENIZER)
