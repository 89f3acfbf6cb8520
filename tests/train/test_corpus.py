"""The texts of the embedded model: form, names, and what is held out."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from train import corpus
from train.smalltalk import NUMBERS, SELF, TALK, conversation, facts


def persona(text: str) -> list[str]:
    return corpus.persona_documents([text], random.Random(0))


def test_every_entry_has_ways_to_ask_and_to_answer() -> None:
    for asks, answers in (*SELF, *TALK):
        assert asks
        assert answers
        assert all(x and x == x.strip() and "\n" not in x for x in (*asks, *answers))


def test_small_talk_has_the_chat_form() -> None:
    turn = r"User: [^\n]+\n\nAssistant: [^\n]+"
    for document in corpus.small_talk_documents(200, random.Random(1)):
        assert re.fullmatch(rf"{turn}(\n\n{turn})*", document), document


def test_sums_in_the_facts_are_right() -> None:
    rng = random.Random(0)
    sums = [x for x in (facts(rng)[1] for _ in range(800)) if " plus " in x]
    assert len(sums) > 50
    for text in sums:
        a, b, c = map(int, re.findall(r"\d+", text))
        assert a + b == c


def test_days_follow_each_other() -> None:
    rng = random.Random(0)
    answers = dict(facts(rng) for _ in range(2000))
    assert answers["What day comes after Sunday?"] == "Monday."
    assert answers["What month comes after May?"] == "June."
    assert all(answers[ask] == answer for ask, answer in NUMBERS)


def test_the_model_says_what_it_is_in_a_good_part_of_the_small_talk() -> None:
    rng = random.Random(0)
    talks = [conversation(rng) for _ in range(500)]
    says = re.compile("RWKV|Tiny|language model|program")
    share = sum(any(says.search(answer) for _, answer in talk) for talk in talks) / len(talks)
    assert share > 0.25


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "User: Hi, I'm [user 1's name].\n\nAssistant: Hi [user 1's name], I'm (User 2's name).",
            "User: Hi, I'm NAME.\n\nAssistant: Hi NAME, I'm Tiny.",
        ),
        (
            "User: My name is [name].\n\nAssistant: Nice to meet you, (name). I'm [your name].",
            "User: My name is NAME.\n\nAssistant: Nice to meet you, NAME. I'm Tiny.",
        ),
        (
            "User: Hello [name]!\n\nAssistant: Hi!",
            "User: Hello Tiny!\n\nAssistant: Hi!",
        ),
        (
            "User: Hi!\n\nAssistant: My name is Sarah.\n\nUser: Hi Sarah!\n\nAssistant: Hi!",
            "User: Hi!\n\nAssistant: My name is Tiny.\n\nUser: Hi Tiny!\n\nAssistant: Hi!",
        ),
    ],
)
def test_names_are_filled_in(text: str, expected: str) -> None:
    (document,) = persona(text)
    pattern = re.escape(expected).replace("NAME", rf"({'|'.join(corpus.USER_NAMES)})", 1)
    pattern = pattern.replace("NAME", r"\1")
    assert re.fullmatch(pattern, document), document


@pytest.mark.parametrize("gap", ["[city]", "(user 1's hometown)", "user 2", "<link>"])
def test_conversations_with_other_gaps_are_dropped(gap: str) -> None:
    assert persona(f"User: I am from {gap}.\n\nAssistant: Me too!") == []


def test_stories_become_answers_without_blank_lines() -> None:
    text = "A cat ran.\n\nThe cat sat. The cat slept.\n<|endoftext|>\n\n<|endoftext|>\nTwo.\n"
    first, second = corpus.story_documents(text, random.Random(3))
    assert re.match(r"User: [^\n]+\n\nAssistant: A cat ran\.\nThe cat sat\. The cat slept\.", first)
    assert "\n\nAssistant: Two." in second


def test_broken_quotes_are_mended_and_other_broken_text_is_dropped() -> None:
    wrong = "“Hi,” it’s me.".encode().decode("cp1252", errors="ignore")
    text = f"{wrong}\n<|endoftext|>\nÃ©tÃ©\n"
    (document,) = corpus.story_documents(text, random.Random(0))
    assert 'Assistant: "Hi," it\'s me.' in document


def test_a_requested_topic_is_in_the_story() -> None:
    story = "A dog saw a dog. The dog was named Rex."
    requests = {corpus._ask_for(story, random.Random(seed)) for seed in range(60)}
    topics = {m[1] for x in requests if (m := re.search(r"about (?:an? )?(\w+)", x))}
    assert topics == {"dog", "Rex"}


def test_held_out_documents_are_not_trained_on() -> None:
    documents = [str(i) for i in range(100)]
    train, held = corpus.hold_out(documents)
    assert held == ["0", "32", "64", "96"]
    assert sorted(train + held, key=int) == documents


def test_a_missing_source_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        corpus.main([str(tmp_path), "--persona", "none.jsonl", "--stories", "none.txt"])
    assert "none.jsonl" in capsys.readouterr().err


def test_the_command_writes_the_same_files_every_time(tmp_path: Path) -> None:
    chats = [f"User: Hi {i}!\n\nAssistant: Hello!" for i in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in chats))
    (tmp_path / "s.txt").write_text("\n<|endoftext|>\n".join(f"Story {i}." for i in range(40)))
    contents = []
    for name in ("a", "b"):
        sources = ["--persona", str(tmp_path / "p.jsonl"), "--stories", str(tmp_path / "s.txt")]
        assert corpus.main([str(tmp_path / name), *sources, "--small-talk", "10"]) == 0
        files = sorted((tmp_path / name).iterdir())
        assert [x.name for x in files] == [
            "train.jsonl", "val-persona.jsonl", "val-stories.jsonl", "val.jsonl",
        ]  # fmt: skip
        contents.append([x.read_text() for x in files])
    assert contents[0] == contents[1]
    train, held_persona, held_stories, held = contents[0]
    assert train.count("\n") == 38 + 38 + 10
    assert held == held_persona + held_stories
    assert not set(train.splitlines()) & set(held.splitlines())
