"""Files that a config points at: missing ones, and replaced ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from config import WORLD_VOCAB, ConfigError, check_files, file_stamps, replaced_files
from tests.config.config_files import TABLE, infer_config, message

WORLD_TABLE = TABLE.replace("vocab.txt", WORLD_VOCAB)


def test_missing_weights_say_which_and_where_to_get_them(tmp_path: Path) -> None:
    config = infer_config(tmp_path, WORLD_TABLE)
    with pytest.raises(ConfigError) as caught:
        check_files(config)
    text = message(caught.value, tmp_path)
    assert text.startswith('infer/i.toml: models[0].weights_path = "infer/a.pth": there is no such')
    assert "https://huggingface.co/BlinkDL/rwkv7-g1" in text
    assert "load_format=dummy" in text


def test_a_missing_vocabulary_says_that_the_world_one_needs_no_file(tmp_path: Path) -> None:
    config = infer_config(tmp_path)
    (tmp_path / "infer" / "a.pth").touch()
    with pytest.raises(ConfigError, match=r'models\[0\]\.tokenizer_vocab_path = ".*"rwkv_vocab_v2'):
        check_files(config)


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    config = infer_config(tmp_path, WORLD_TABLE)
    (tmp_path / "infer" / "a.pth").mkdir()
    with pytest.raises(ConfigError, match="there is no such file"):
        check_files(config)


def test_files_that_are_there_or_not_needed_are_fine(tmp_path: Path) -> None:
    check_files(infer_config(tmp_path, WORLD_TABLE + 'load_format = "dummy"'))
    (tmp_path / "infer" / "a.pth").touch()
    check_files(infer_config(tmp_path, WORLD_TABLE))


def test_a_file_is_replaced_when_size_time_or_inode_differ(tmp_path: Path) -> None:
    config = infer_config(tmp_path)
    weights = (tmp_path / "infer" / "a.pth").resolve()
    assert file_stamps(config) == {}
    weights.write_text("one")
    os.utime(weights, ns=(1, 1))
    before = file_stamps(config)
    assert replaced_files(before, file_stamps(config)) == frozenset()

    def is_seen() -> bool:
        return replaced_files(before, file_stamps(config)) == {weights}

    os.utime(weights, ns=(1, 2))
    assert is_seen()
    weights.write_text("three")
    os.utime(weights, ns=(1, 1))
    assert is_seen()
    other = weights.with_name("other")
    other.write_text("two")
    os.utime(other, ns=(1, 1))
    os.replace(other, weights)
    assert is_seen()


def test_a_file_that_appears_or_vanishes_was_not_replaced(tmp_path: Path) -> None:
    config = infer_config(tmp_path)
    (tmp_path / "infer" / "a.pth").write_text("one")
    there = file_stamps(config)
    assert replaced_files({}, there) == replaced_files(there, {}) == frozenset()
