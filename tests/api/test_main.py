"""`python -m api` as a command: help, and one clear message for what cannot start. No engine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from api.__main__ import default_config_dir, main
from api.listener import Listener
from api.summary import curl_for, summary, url_of
from config import BindAddress, ConfigError
from engine.types import ModelInfo
from tests.api.harness import model_table, write_config

INFO = ModelInfo(
    model_name="it's",
    num_parameters=1_402_880,
    device="cpu",
    dtype="bfloat16",
    state_dtype="float32",
    num_slots=32,
    page_bytes=135_168,
    vocab_size=257,
    fingerprint="f",
    max_batch_size=32,
    max_batch_tokens=100,
    paragraph_len=64,
    max_context_len=0,
)


def start(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "api", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"COLUMNS": "200"},
    )


def test_help_explains_every_option():
    done = start("--help")
    assert done.returncode == 0
    for word in ("--config-dir", "--infer-cfg", "--http-bind-addr", "--set", "rwkv-lm-tiny"):
        assert word in done.stdout


def test_missing_weights_are_named_with_where_to_get_them(tmp_path: Path):
    source = write_config(tmp_path, model_table(load_format="auto", weights_path="../none.pth"))
    done = start("--config-dir", source.config_dir, "--infer-cfg", "test")
    assert done.returncode == 2
    assert "none.pth" in done.stderr
    assert "models[0].weights_path" in done.stderr
    assert "https://huggingface.co/BlinkDL/rwkv7-g1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--infer-cfg", "tets"], "test"),
        (["--infer-cfg", "test", "--set", "max_bach_size=3"], "max_batch_size"),
        (["--infer-cfg", "test", "--http-bind-addr", "nonsense"], "http_bind_addr"),
        (["--infer-cfg", "test", "--http-bind-addr", "no.such.host.invalid:1"], "http_bind_addr"),
    ],
)
def test_wrong_arguments_end_in_one_message(
    tmp_path: Path, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
):
    source = write_config(tmp_path)
    assert main(["--config-dir", str(source.config_dir), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert word in message


def test_port_in_use_is_said_before_anything_is_loaded(tmp_path: Path, capsys):
    source = write_config(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        arguments = ["--config-dir", str(source.config_dir), "--infer-cfg", "test"]
        assert main([*arguments, "--http-bind-addr", address]) == 2
    message = capsys.readouterr().err
    assert address in message
    assert "in use" in message


def test_config_folder_of_the_working_directory_comes_first(tmp_path: Path, monkeypatch):
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert default_config_dir() == Path("config")
    monkeypatch.chdir("/")
    assert (default_config_dir() / "infer" / "rwkv-lm-tiny.toml").is_file()


class TestListener:
    def test_stale_unix_socket_is_replaced_and_a_live_one_refused(self, tmp_path: Path):
        address = BindAddress(unix_path=str(tmp_path / "s"))
        with socket.socket(socket.AF_UNIX) as live:
            live.bind(address.unix_path)
            live.listen()
            with pytest.raises(ConfigError, match="in use"):
                Listener(address)
        Listener(address)
        assert not (tmp_path / "s").exists()

    def test_file_that_is_no_socket_is_left_alone(self, tmp_path: Path):
        (tmp_path / "f").write_text("precious")
        with pytest.raises(ConfigError, match="not a socket"):
            Listener(BindAddress(unix_path=str(tmp_path / "f")))
        assert (tmp_path / "f").read_text() == "precious"

    def test_port_zero_becomes_a_real_one(self):
        listener = Listener(BindAddress(host="127.0.0.1", port=0))
        assert listener.address.port > 0
        listener.close()


class TestSummary:
    def test_it_has_what_people_look_for(self):
        text = summary([INFO], BindAddress(host="0.0.0.0", port=8080), has_api_key=False)
        for part in (
            "it's",
            "1.4 M",
            "cpu",
            "bfloat16",
            "32 on the device",
            "of 135,168 bytes each",
        ):
            assert part in text
        assert "http://127.0.0.1:8080" in text

    @pytest.mark.parametrize(
        ("host", "url"),
        [
            ("127.0.0.1", "http://127.0.0.1:80"),
            ("0.0.0.0", "http://127.0.0.1:80"),
            ("::1", "http://[::1]:80"),
            ("example.org", "http://example.org:80"),
        ],
    )
    def test_address_is_one_to_open(self, host: str, url: str):
        assert url_of(BindAddress(host=host, port=80)) == url

    def test_curl_line_is_quoted_for_the_shell(self):
        line = curl_for(BindAddress(unix_path="/run/a b"), "it's", has_api_key=True)
        shown = subprocess.run(
            ["bash", "-c", f"API_KEY=k; curl() {{ printf '%s\\n' \"$@\"; }}; {line}"],
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        assert "/run/a b" in shown
        assert "Authorization: Bearer k" in shown
        assert '{"model": "it\'s", "messages":' in shown[-1]
