"""Editing an infer TOML: what changes, what stays to the byte, and that writing is atomic."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from config import ConfigError, patch, write_atomic

TEXT = """\
# the head of the file
http_bind_addr = '127.0.0.1:8080'  # single quotes
api_key = "s3cret"                 # must survive
request_body_limit_bytes = 52_428_800

# about a
[[models]]
model_name = "a" # A
max_batch_size = 0x10
device_ids = [ 0, # a comment inside
]

# about b
[[models]]
model_name = "b"
model_cfg_path = 'old'             # an alias
# the end of b

# about c
[[models]]
model_name = "c"
"""


def test_a_changed_key_changes_one_line() -> None:
    edited = patch(TEXT, [{"model_name": "a", "max_batch_size": 8}])
    assert edited == TEXT.replace("0x10", "8")


def test_a_new_key_goes_behind_the_last_key_of_its_table() -> None:
    edited = patch(TEXT, [{"model_name": "b", "dtype": "float32"}])
    line = "model_cfg_path = 'old'             # an alias\n"
    assert edited == TEXT.replace(line, line + 'dtype = "float32"\n')


def test_equal_values_stay_as_they_are_written() -> None:
    assert patch(TEXT, [{"model_name": "a", "max_batch_size": 16, "device_ids": [0]}]) == TEXT


def test_a_key_is_changed_under_the_spelling_the_file_has() -> None:
    assert patch(TEXT, [{"model_name": "b", "model_cfg": "old"}]) == TEXT
    edited = patch(TEXT, [{"model_name": "b", "model_cfg": "new"}])
    assert edited == TEXT.replace("'old'", '"new"')


def test_none_takes_a_key_out() -> None:
    edited = patch(TEXT, [{"model_name": "a", "max_batch_size": None, "dtype": None}])
    assert edited == TEXT.replace("max_batch_size = 0x10\n", "")


def test_an_unknown_name_appends_a_table() -> None:
    edited = patch(TEXT, [{"model_name": "d", "paragraph_len": 64, "dtype": None}])
    assert edited == TEXT + '\n[[models]]\nmodel_name = "d"\nparagraph_len = 64\n'


def test_a_file_without_final_newline_or_models_can_be_appended_to() -> None:
    added = '[[models]]\nmodel_name = "d"\n'
    assert patch("api_key = 'k'", [{"model_name": "d"}]) == f"api_key = 'k'\n{added}"
    assert patch("", [{"model_name": "d"}]) == added
    assert patch(TEXT.rstrip(), [{"model_name": "d"}]) == f"{TEXT}\n{added}"


def test_a_removed_table_leaves_all_comments_around_it() -> None:
    table = "[[models]]\nmodel_name = \"b\"\nmodel_cfg_path = 'old'             # an alias\n"
    assert patch(TEXT, remove=["b"]) == TEXT.replace(table, "")
    first = TEXT[TEXT.index("[[models]]") : TEXT.index("\n# about b")]
    assert patch(TEXT, remove=["a"]) == TEXT.replace(first, "")
    assert patch(TEXT, remove=["c"]) == TEXT.replace('[[models]]\nmodel_name = "c"\n', "")


def test_removing_what_is_not_there_changes_nothing() -> None:
    assert patch(TEXT, remove=["x", "x"]) == TEXT


def test_all_models_can_be_exchanged() -> None:
    edited = patch(TEXT, [{"model_name": "d"}], ["a", "b", "c"])
    data = tomli.loads(edited)
    assert data["models"] == [{"model_name": "d"}]
    assert data["api_key"] == "s3cret"


def test_removing_the_last_model_leaves_the_verdict_to_the_loader() -> None:
    assert "models" not in tomli.loads(patch(TEXT, remove=["a", "b", "c"]))


def test_models_in_one_line_are_edited_too() -> None:
    text = 'models = [{model_name="a"}, {model_name="b"}] # one line\n'
    edited = patch(text, [{"model_name": "a", "dtype": "auto"}, {"model_name": "c"}], ["b"])
    expected = [{"model_name": "a", "dtype": "auto"}, {"model_name": "c"}]
    assert tomli.loads(edited)["models"] == expected
    assert edited.endswith("# one line\n")


def test_models_between_other_tables_are_edited_or_refused() -> None:
    text = "[[models]]\nmodel_name='a'\n[ipc]\nenabled=false\n[[models]]\nmodel_name='b'\n"
    edited = patch(text, [{"model_name": "a", "dtype": "auto"}])
    expected = [{"model_name": "a", "dtype": "auto"}, {"model_name": "b"}]
    assert tomli.loads(edited) == {"models": expected, "ipc": {"enabled": False}}


@pytest.mark.parametrize(
    ("upsert", "remove", "expected"),
    [
        ([{"dtype": "auto"}], [], r"upsert\[0\]\.model_name = null: must be the name of a model"),
        ([{"model_name": 3}], [], r"upsert\[0\]\.model_name = 3: must be the name of a model"),
        ([{"model_name": "a"}] * 2, [], r'upsert\[1\]\.model_name = "a": is named twice'),
        ([{"model_name": "a"}], ["a"], r'upsert\[0\]\.model_name = "a": is named twice'),
        ([{"model_name": "a", "dtyp": 1}], [], r'upsert\[0\]\.dtyp: unknown key; did you mean "dt'),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    upsert: list[dict[str, object]], remove: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        patch(TEXT, upsert, remove)


@pytest.mark.parametrize("text", ["a = ", "models = 3", "models = [3]", "[models]\na = 1"])
def test_a_text_that_cannot_be_edited_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        patch(text, [{"model_name": "a"}])


MODEL_NAMES = ("a", "b", "c", "d e", 'q"uote', "ünï")
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "max_batch_size": st.integers(1, 9),
    "decode_first": st.booleans(),
    "weights_path": st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    "device_ids": st.lists(st.integers(0, 3), max_size=2),
    "model_cfg": st.sampled_from(["m", "n"]),
}
CHANGE = st.fixed_dictionaries(
    {}, optional={key: st.none() | value for key, value in VALUES.items()}
)
COMMENT = st.sampled_from(["", "\n", "# note\n", "\n# note\n", "# one\n\n# two\n\n"])


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[str, dict[str, object]]]:
    """A TOML text with [[models]] and loose comments, and the models by name."""
    names = draw(st.lists(st.sampled_from(MODEL_NAMES), unique=True, max_size=4))
    text = "# head\n" + draw(st.sampled_from(["", 'api_key = "k" # secret\n']))
    for name in names:
        size = draw(st.integers(1, 9))
        text += draw(COMMENT) + f"[[models]]\nmodel_name = {_quoted(name)} # {size}\n"
        text += draw(COMMENT) + f"max_batch_size = {size} # kept\n" + draw(COMMENT)
    models = {model["model_name"]: model for model in tomli.loads(text).get("models", [])}
    return text, models


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '\\"') + '"'


@given(
    document=documents(),
    changes=st.dictionaries(st.sampled_from(MODEL_NAMES), CHANGE, max_size=3),
    removed=st.lists(st.sampled_from(MODEL_NAMES), max_size=3),
)
def test_any_edit_gives_the_expected_data_and_keeps_the_rest(
    document: tuple[str, dict[str, dict[str, object]]],
    changes: dict[str, dict[str, object]],
    removed: list[str],
) -> None:
    text, models = document
    removed = [name for name in removed if name not in changes]
    edited = patch(text, [{"model_name": n, **change} for n, change in changes.items()], removed)

    expected = {name: dict(model) for name, model in models.items() if name not in removed}
    for name, change in changes.items():
        merged = expected.setdefault(name, {"model_name": name}) | change
        expected[name] = {key: value for key, value in merged.items() if value is not None}
    data = tomli.loads(edited)
    assert data.get("models", []) == list(expected.values())
    assert data.get("api_key") == tomli.loads(text).get("api_key")
    if set(models) - set(removed):  # else the comments behind the last header have no place
        loose = [line for line in text.splitlines() if line.startswith("#")]
        kept = [line for line in edited.splitlines() if line.startswith("#")]
        assert set(removed) & set(models) or kept == loose
        assert len(kept) <= len(loose)
    assert patch(edited, [{"model_name": n, **c} for n, c in changes.items()], removed) == edited


def test_writing_replaces_the_file_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "i.toml"
    path.write_text("old")
    path.chmod(0o640)
    write_atomic(path, "nëw")
    assert path.read_text() == "nëw"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["i.toml"]


def test_writing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "i.toml"
    target.write_text("old")
    (tmp_path / "i.toml").symlink_to(target)
    write_atomic(tmp_path / "i.toml", "new")
    assert (tmp_path / "i.toml").is_symlink()
    assert target.read_text() == "new"


def test_a_new_file_is_private(tmp_path: Path) -> None:
    write_atomic(tmp_path / "i.toml", "new")
    assert stat.S_IMODE((tmp_path / "i.toml").stat().st_mode) == 0o600


@pytest.mark.parametrize("failing", ["fsync", "replace", "fchmod"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "i.toml"
    path.write_text("old")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["i.toml"]


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """No stand-in here: the kernel refuses all bytes after the first ten."""
    path = tmp_path / "i.toml"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(path, "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["i.toml"]
