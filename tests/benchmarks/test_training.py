"""The benchmark of training steps runs through, and all three ways compute the same."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("numba")

from benchmarks import training


def test_every_engine_has_a_row_of_each_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "SHAPES", {"rwkv-lm-tiny": (2, 5)})
    training.main(["--rounds", "1"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["rows"]
    names = [engine.name for engine in training.ENGINES]
    expected = [(case, name) for case in ("time mix", "step") for name in names]
    assert [(row["case"], row["engine"]) for row in rows] == expected
    assert all(row["ms"] > 0 for row in rows)
    losses = [row["loss"] for row in rows if row["case"] == "step"]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
