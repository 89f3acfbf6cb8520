"""--set key=value: what it changes, how values are read, and what mistakes say."""

from __future__ import annotations

from pathlib import Path

import pytest

from config import WORLD_VOCAB, ConfigError
from tests.config.config_files import (
    MODEL,
    TABLE,
    TRAIN,
    infer_config,
    message,
    train_config,
    write_config,
)

TWO_MODELS = TABLE + TABLE.replace('"a"', '"b-0.1"')


def test_a_model_key_applies_to_every_model(tmp_path: Path) -> None:
    config = infer_config(tmp_path, TWO_MODELS, "max_batch_size=9", "decode_first=false")
    assert [table.max_batch_size for table in config.models] == [9, 9]
    assert not any(table.decode_first for table in config.models)


def test_a_model_can_be_named_even_with_dots_in_its_name(tmp_path: Path) -> None:
    config = infer_config(tmp_path, TWO_MODELS, "models.b-0.1.max_batch_size=9")
    assert [table.max_batch_size for table in config.models] == [4, 9]


def test_the_last_override_of_a_key_wins(tmp_path: Path) -> None:
    config = infer_config(tmp_path, TABLE, "max_waiting=1", "models.a.max_waiting=2")
    assert config.models[0].max_waiting == 2


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("http_bind_addr=127.0.0.1:1", "http_bind_addr", "127.0.0.1:1"),
        ('http_bind_addr="127.0.0.1:1"', "http_bind_addr", "127.0.0.1:1"),
        (" http_bind_addr = 127.0.0.1:1 ", "http_bind_addr", "127.0.0.1:1"),
        ("drain_timeout_s=2", "drain_timeout_s", 2.0),
        ('allowed_origins=["http://a", "http://b"]', "allowed_origins", ("http://a", "http://b")),
        ("api_key=a=b", "api_key", "a=b"),
        ("api_key=1234", "api_key", "1234"),  # a number to TOML, a text to this key
        ("api_key=true", "api_key", "true"),
    ],
)
def test_values_are_toml_with_quotes_left_out(
    tmp_path: Path, override: str, key: str, value: object
) -> None:
    assert getattr(infer_config(tmp_path, TABLE, override), key) == value


def test_relative_paths_start_at_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    (tmp_path / "other.toml").write_text(MODEL.replace("num_cells = 2", "num_cells = 7"))
    overrides = ("weights_path=w.pth", "tokenizer_vocab_path=v.txt", "model_cfg=other.toml")
    table = infer_config(tmp_path, TABLE, *overrides).models[0]
    here = tmp_path.resolve()
    assert table.weights_path == here / "w.pth"
    assert table.tokenizer_vocab_path == str(here / "v.txt")
    assert table.model.num_cells == 7


def test_names_that_are_no_paths_stay_names(tmp_path: Path) -> None:
    overrides = (f"tokenizer_vocab_path={WORLD_VOCAB}", "model_cfg=m")
    table = infer_config(tmp_path, TABLE, *overrides).models[0]
    assert (table.tokenizer_vocab_path, table.model_cfg) == (WORLD_VOCAB, "m")


def test_an_alias_replaces_the_key_and_the_other_way_round(tmp_path: Path) -> None:
    assert train_config(tmp_path, TRAIN + "context_length = 8", "context_len=9").context_length == 9
    assert train_config(tmp_path, TRAIN + "context_len = 8", "context_length=9").context_length == 9


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_batch", "--set: expected key=value, got 'max_batch'"),
        ("=3", "--set: expected key=value, got no key in front"),
        ("max_batch_sise=3", '--set: max_batch_sise: unknown key; did you mean "max_batch_size"?'),
        ("qqq=3", "--set: qqq: unknown key; there are: http_bind_addr, "),
        ("models.a.qq=3", "--set: qq: unknown key; there are: model_name, "),
        (
            "models.aa.dtype=auto",
            '--set: models.aa.dtype: no model of this name; did you mean "a"?',
        ),
        ("models.dtype=auto", "--set: models.dtype: no model of this name; there are: a"),
        ("models=[]", "--set: models: is a table: change it in the file"),
        ("ipc=1", "--set: ipc: is a table: change it in the file"),
        ("paragraph_len=x", '--set: paragraph_len = "x": expected `int`, got `str`'),
        ("paragraph_len=0", "--set: paragraph_len = 0: expected `int` >= 1"),
        ("paragraph_len=1\nmax_waiting=2", "--set: paragraph_len = "),
        ("model_name=", '--set: model_name = "": must not be empty'),
        ("device_ids=[0,1]", "infer/i.toml with --set: models[0].device_ids = [0, 1]: name one"),
    ],
)
def test_a_mistake_names_the_override_and_not_the_file(
    tmp_path: Path, override: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        infer_config(tmp_path, TABLE, override)
    assert message(caught.value, tmp_path).startswith(expected)


def test_a_mistake_in_a_train_override_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'^--set: num_stps: unknown key; did you mean "num_step'):
        train_config(tmp_path, TRAIN, "num_stps=3")


def test_an_overridden_api_key_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        infer_config(tmp_path, TABLE, "api_key=s3 cret")
    assert "s3" not in str(caught.value)
