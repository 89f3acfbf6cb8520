"""The command that makes datasets from text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.tokenizer import Tokenizer
from train.binidx import open_dataset
from train.data import main
from train.vocab import BYTES, write_vocabulary

Out = pytest.CaptureFixture[str]


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    write_vocabulary(tmp_path / "vocab.txt", [*BYTES, b"the ", "né".encode()])
    return tmp_path / "vocab.txt"


def texts(prefix: Path, vocab: Path) -> list[str]:
    tokenizer = Tokenizer.load(vocab)
    return [tokenizer.decode(x.tolist()) for x in open_dataset(prefix).documents()]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": x}) + "\n" for x in documents))
    return path


def test_jsonl_becomes_documents_with_a_final_zero(
    tmp_path: Path, vocab: Path, capsys: Out
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["the end", "  né 😀\n", "", " \n "])
    assert main(["from-jsonl", str(tmp_path / "a"), str(source), "--vocab", str(vocab)]) == 0
    assert texts(tmp_path / "a", vocab) == ["the end", "né 😀"]
    assert open_dataset(tmp_path / "a").tokens.tolist()[:5] == [257, 102, 111, 101, 0]
    assert "2 documents" in capsys.readouterr().out


def test_text_is_cut_at_the_marker_lines(tmp_path: Path, vocab: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n<|endoftext|>\nthree <|endoftext|> four\n")
    (tmp_path / "b.txt").write_text("five")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert main(["from-text", str(tmp_path / "out"), *files, "--vocab", str(vocab)]) == 0
    expected = ["one\n\ntwo", "three <|endoftext|> four", "five"]
    assert texts(tmp_path / "out", vocab) == expected


def test_another_marker_can_be_given(tmp_path: Path, vocab: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n---\ntwo\n")
    arguments = ["from-text", str(tmp_path / "out"), str(tmp_path / "a.txt")]
    assert main([*arguments, "--vocab", str(vocab), "--marker=---"]) == 0
    assert texts(tmp_path / "out", vocab) == ["one", "two"]


def test_held_out_documents_are_in_the_other_dataset_only(tmp_path: Path, vocab: Path) -> None:
    documents = [f"document {i}" for i in range(200)]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    arguments = ["from-jsonl", str(tmp_path / "a"), str(source), "--vocab", str(vocab)]
    assert main([*arguments, "--val-fraction", "0.2"]) == 0
    train, val = texts(tmp_path / "a", vocab), texts(tmp_path / "a_val", vocab)
    assert sorted(train + val) == sorted(documents)
    assert 20 < len(val) < 60
    assert main([*arguments, "--val-fraction", "0.2", "--seed", "9"]) == 0
    assert texts(tmp_path / "a_val", vocab) != val


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "expected"),
        ("[1]", "expected"),
        ('{"txt": "a"}', "expected"),
        ('{"text": 5}', "expected a string"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('"text"', "expected"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(
    tmp_path: Path, vocab: Path, capsys: Out, line: str, what: str
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "fine"}\n\n' + line + "\n")
    assert main(["from-jsonl", str(tmp_path / "a"), str(source), "--vocab", str(vocab)]) == 1
    error = capsys.readouterr().err
    assert f"{source}:3: " in error
    assert what in error
    assert not list(tmp_path.glob("a.*in*")) + list(tmp_path.glob("a.id*"))


def test_text_that_is_not_utf8_is_named(tmp_path: Path, vocab: Path, capsys: Out) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\n")
    arguments = ["from-text", str(tmp_path / "a"), str(tmp_path / "a.txt")]
    assert main([*arguments, "--vocab", str(vocab)]) == 1
    assert "a.txt:2: not UTF-8" in capsys.readouterr().err


def test_input_without_text_is_refused(tmp_path: Path, vocab: Path, capsys: Out) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["", " "])
    assert main(["from-jsonl", str(tmp_path / "a"), str(source), "--vocab", str(vocab)]) == 1
    assert "holds no text" in capsys.readouterr().err
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--val-fraction", "1"], "--val-fraction 1.0"),
        (["--vocab", "no-such-vocabulary.txt"], "no-such-vocabulary.txt"),
    ],
)
def test_bad_options_are_named(
    tmp_path: Path, vocab: Path, capsys: Out, arguments: list[str], what: str
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    given = ["from-jsonl", str(tmp_path / "a"), str(source), "--vocab", str(vocab)]
    assert main([*given, *arguments]) == 1
    assert what in capsys.readouterr().err


def test_a_vocabulary_beyond_uint16_is_refused(tmp_path: Path, capsys: Out) -> None:
    lines = [f"{i + 1} {x!r} 1\n" for i, x in enumerate(BYTES)]
    (tmp_path / "big.txt").write_text("".join(lines) + "70000 'ab' 2\n")
    source = write_jsonl(tmp_path / "a.jsonl", ["ab"])
    vocab = str(tmp_path / "big.txt")
    assert main(["from-jsonl", str(tmp_path / "a"), str(source), "--vocab", vocab]) == 1
    assert "70000" in capsys.readouterr().err


def test_a_fraction_that_holds_out_nothing_is_refused(
    tmp_path: Path, vocab: Path, capsys: Out
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    arguments = ["from-jsonl", str(tmp_path / "a"), str(source), "--vocab", str(vocab)]
    assert main([*arguments, "--val-fraction", "0.001"]) == 1
    assert "holds out 0 of 2 documents" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.bin"))


def test_info_shows_tokens_and_primes(tmp_path: Path, vocab: Path, capsys: Out) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * 1999])
    main(["from-jsonl", str(tmp_path / "a"), str(source), "--vocab", str(vocab)])
    capsys.readouterr()
    assert main(["info", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "2000 tokens, 1 documents, largest id 121" in out
    assert "context_length 128: magic prime 11" in out
    assert "context_length 512: magic prime 2" in out
    assert "1024" not in out


def test_info_of_nothing_is_an_error(tmp_path: Path, capsys: Out) -> None:
    assert main(["info", str(tmp_path / "none")]) == 1
    assert "no such file" in capsys.readouterr().err
