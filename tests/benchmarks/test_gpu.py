"""The GPU benchmark runs through on a CPU, so that it works when a GPU appears."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.gpu_device import Bench, Row
from benchmarks.gpu_model import random_model, streamed
from benchmarks.gpu_targets import TARGETS, judged
from engine.kernels import reference
from train.utilization import training_flop_per_token

CPU = Bench(torch.device("cpu"), torch.float32, reference)
H100 = "NVIDIA H100 80GB HBM3"


def kept_rows(folder: Path) -> list[Row]:
    (path,) = folder.glob("*-gpu-cpu.json")
    rows: list[Row] = json.loads(path.read_text())
    return rows


def test_every_section_gives_rows_and_none_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name in gpu.SECTIONS if name != "server"]
    assert gpu.main(["--device", "cpu", "--only", *names, "--out", str(tmp_path)]) == 0
    rows = kept_rows(tmp_path)
    assert list(dict.fromkeys(row["section"] for row in rows)) == names
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["figures"]["rows"] == rows
    checks = [row for row in rows if row["section"] == "correctness"]
    assert len(checks) == 15
    assert all(row["is_right"] for row in checks)
    (path,) = tmp_path.glob("*.md")
    lines = path.read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(rows) + 2 * len(names)


@pytest.mark.slow
def test_a_server_of_its_own_answers_all_clients(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--only", "server", "--out", str(tmp_path)]) == 0
    rows = kept_rows(tmp_path)
    assert [(row["clients"], row["requests"]) for row in rows] == [(1, 1), (4, 4)]
    assert all(isinstance(rate := row["tokens_per_s"], float) and rate > 0 for row in rows)


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


def test_a_section_over_its_time_is_cut_off_and_what_it_gave_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def endless(_bench: Bench) -> Iterator[Row]:
        while True:
            yield {"name": "again"}

    monkeypatch.setitem(gpu.SECTIONS, "wkv", (endless, 0.0))
    kept: list[int] = []
    rows = gpu.run(CPU, ["wkv"], lambda rows: kept.append(len(rows)))
    assert [row.get("failed") for row in rows] == [None, "over 0.0 s, cut off"]
    assert kept == [1, 2]


def test_all_sections_together_take_ten_minutes_at_most() -> None:
    assert sum(limit_s for _, limit_s in gpu.SECTIONS.values()) <= 600


def test_a_wrong_kernel_makes_the_run_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_bench: Bench) -> Iterator[Row]:
        yield {"name": "time mix", "error": 1.0, "tolerance": 0.1, "is_right": False}

    monkeypatch.setitem(gpu.SECTIONS, "correctness", (wrong, 10))
    assert gpu.main(["--device", "cpu", "--only", "correctness"]) == 1


def test_targets_are_judged_on_their_card_and_for_their_states_only() -> None:
    row: Row = {"name": "decode", "model": "7.2b", "batch": 256, "state": "float32",
                "tokens_per_s": 16_200.0}  # fmt: skip
    assert judged(row, H100)["verdict"] == "missed by 10.0 %"
    assert judged({**row, "tokens_per_s": 18_000.0}, H100)["verdict"] == "met"
    assert judged({**row, "state": "float16"}, H100)["target"] == 23_000
    assert judged(row, "NVIDIA A100") == row
    assert judged({**row, "name": "decode, int8"}, H100).get("target") is None
    wkv: Row = {"name": "wkv, forward + backward", "shape": [8, 4096, 64], "ms": 15.0}
    assert judged(wkv, H100)["verdict"] == "missed by 25.0 %"
    assert judged({**wkv, "ms": 11.9}, H100)["verdict"] == "met"
    assert len(TARGETS) == 13


def test_operations_of_a_training_step_are_those_that_torch_counts() -> None:
    """Of matrix products alone: the recurrence is taken off."""
    model = random_model(CPU, "tiny").requires_grad_(True)
    tokens = torch.arange(1, 41).view(1, 40)
    with FlopCounterMode(display=False) as counter:
        model.head(model.hidden(tokens)).sum().backward()
    products = counter.get_flop_counts()["Global"]
    counted = sum(flop for op, flop in products.items() if "bmm" not in str(op))
    dims = model.dims
    recurrence = 27 * dims.num_cells * dims.num_heads * dims.head_size**2
    flop = 40 * (training_flop_per_token(model) - recurrence)
    assert counted == pytest.approx(flop, rel=0.02)


def test_what_a_step_reads_leaves_the_embedding_out_and_counts_int8_as_bytes() -> None:
    model, packed = random_model(CPU, "tiny"), random_model(CPU, "tiny", is_int8=True)
    numbers, num_bytes = streamed(model)
    assert numbers == model.num_parameters - 2048 * 192
    assert num_bytes == 4 * numbers
    assert streamed(packed)[0] == numbers
    assert streamed(packed)[1] < 0.45 * num_bytes
