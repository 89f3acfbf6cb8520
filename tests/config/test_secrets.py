"""No mistake around the lines of the keys shows a key: not in the error, nor in what it holds."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from config import ConfigError, diff
from config.edit import patch
from config.loader import parse_infer
from tests.config.config_files import TABLE, infer_config, write_config
from tests.config.secret_mistakes import MISTAKES, SECRET

KEYS = f'api_key = "{SECRET}-a"\napi_keys = ["{SECRET}-b"]\nadmin_api_key = "{SECRET}-c"\n'


def told_of(error: BaseException) -> str:
    """As text, as a traceback, and by whoever looks into it."""
    lines = traceback.format_exception(error)
    return "".join([str(error), repr(error), *lines, error.args[0]])


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_does_not_show_the_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        infer_config(tmp_path, text + "\n" + TABLE)
    assert SECRET not in told_of(caught.value)
    assert SECRET not in f"{caught.value.reason} {caught.value.key} {caught.value.file}"


@pytest.mark.parametrize("text", MISTAKES)
def test_an_edit_of_a_wrong_file_does_not_show_the_key(tmp_path: Path, text: str) -> None:
    path = write_config(tmp_path) / "infer" / "i.toml"

    def reload() -> None:
        edited = patch(f"{text}\n{TABLE}", [{"model_name": "a", "max_waiting": 3}])
        parse_infer(edited, tmp_path, path)

    with pytest.raises(ConfigError) as caught:
        reload()
    assert SECRET not in told_of(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        f"api_key {SECRET}",
        f"api_key:{SECRET}",
        f"api_keys={SECRET}",
        f"api_keys=[{SECRET}]",
        f'api_keys=["{SECRET}", 3]',
        f"admin_api_key={SECRET} x",
        f"api_key= {SECRET}\t.",
        f"={SECRET}",
        f"models.a.api_key={SECRET}",
    ],
)
def test_an_override_does_not_show_the_key(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        infer_config(tmp_path, TABLE, override)
    assert SECRET not in told_of(caught.value)


def test_a_config_and_what_changed_in_it_do_not_show_the_keys(tmp_path: Path) -> None:
    before, after = infer_config(tmp_path), infer_config(tmp_path, KEYS + TABLE)
    assert after.client_api_keys == (f"{SECRET}-a", f"{SECRET}-b")
    assert after.admin_api_key == f"{SECRET}-c"
    plan = diff(before, after)
    assert plan.live_keys == ("api_key", "api_keys", "admin_api_key")
    assert SECRET not in f"{after} {after!r} {plan} {plan!r}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('api_keys = ["k", ""]', "api_keys[1]: must be printable ASCII without spaces"),
        ('api_keys = ["k", "ö"]', "api_keys[1]: must be printable ASCII without spaces"),
        ('api_keys = ["k", "k"]', "api_keys[1]: is the same as api_keys[0]; keys must differ"),
        ('api_key = "k"\napi_keys = ["k"]', "api_key: is the same as api_keys[0]; keys must"),
        ('api_key = "k"\nadmin_api_key = "k"', "admin_api_key: is the same as api_key; keys"),
        ('api_keys = ["k", 3]', "api_keys[1]: expected `str`, got `int`"),
        ('api_keys = "k"', "api_keys: expected an array, got `str`"),
        ('admin_api_key = ""', "admin_api_key: must be printable ASCII without spaces"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, line: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        infer_config(tmp_path, f"{line}\n{TABLE}")
    assert f"i.toml: {expected}" in str(caught.value)
