"""The GPU benchmark runs through on a CPU, so that it works when a GPU appears."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_device import Bench, Row


def test_every_section_gives_rows_and_none_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["section"] for row in rows} == set(gpu.SECTIONS)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["figures"]["rows"] == rows
    assert (tmp_path / "gpu.md").read_text().count("\n") == len(rows)


def test_a_section_that_fails_is_a_row_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_bench: Bench) -> Iterator[Row]:
        yield {"name": "first"}
        raise RuntimeError("out of memory")

    monkeypatch.setitem(gpu.SECTIONS, "wkv", (broken, 10))
    assert gpu.main(["--device", "cpu", "--only", "wkv", "device"]) == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["rows"]
    assert rows[1] == {"section": "wkv", "failed": "RuntimeError: out of memory"}
    assert rows[-1]["name"] == "matrix product"
