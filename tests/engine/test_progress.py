"""Progress: a bar for a terminal, one line for a log, nothing on stdout."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from engine.model.progress import shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def load() -> None:
    with shown("weights", "383 MB bfloat16 from x.pth", 1000) as advance:
        for _ in range(4):
            advance(250)


def test_without_a_terminal_only_the_log_hears(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        load()
    assert tuple(capfd.readouterr()) == ("", "")
    (record,) = caplog.records
    assert record.message.startswith("weights: 383 MB bfloat16 from x.pth in 0.")


def test_a_terminal_sees_a_bar_on_stderr(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level(logging.INFO):
        load()
    assert "weights" in terminal.getvalue()
    assert "1.0/1.0 kB" in terminal.getvalue()
    assert capfd.readouterr().out == ""
    assert len(caplog.records) == 1


def test_work_that_fails_is_not_said_to_be_done(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(ValueError, match="damaged"),
        shown("weights", "x", 10),
    ):
        raise ValueError("damaged")
    assert not caplog.records
