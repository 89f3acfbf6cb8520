"""The CPU benchmark runs end to end on a tiny model, and its peer computes what we compute."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the fused kernels are numba's")

from benchmarks import cpu, gguf
from benchmarks.cpu_limits import Limits, floor
from benchmarks.cpu_llama import LlamaModel
from benchmarks.cpu_model import SHAPES, write_checkpoint
from engine.kernels.backend import Batch
from engine.model.rwkv7 import RWKV7
from engine.model.weights import load_checkpoint


def test_last_line_has_a_row_of_each_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "cpu --models tiny --cases b1 b8 prefill512 --rounds 1 --threads 1 --no-peers"
    monkeypatch.setattr("sys.argv", command.split())
    monkeypatch.setattr(cpu, "DTYPES", {"int8": "int8"})
    cpu.main()
    rows = json.loads(capsys.readouterr().out.strip().split("\n")[-1])["rows"]
    found = {(row["engine"], row["dtype"], row["model"], row["case"]) for row in rows}
    cases = ("b1", "b8", "prefill512")
    assert found == {(e, "int8", "tiny", case) for e in ("ours", "floor") for case in cases}
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_floor_is_that_of_the_study() -> None:
    """design figures of another machine: 31.5 GB/s read, 43 rewritten, 1,140 Gop/s of int8."""
    limit = Limits(31.5e9, 43e9, 320e9, 1140e9)
    found = [floor(SHAPES["0.1b"], "int8", case, limit) for case in ("b1", "b8", "b32")]
    assert found == pytest.approx([206, 1416, 2783], rel=0.02)


def test_q8_0_blocks_hold_the_values() -> None:
    values = torch.randn(6, 96).numpy()
    values[1, :32] = 0
    blocks = gguf._q8_0(values)
    assert blocks.nbytes == 34 * 18
    scales = blocks["scale"].astype(np.float32)[:, None]
    decoded = (blocks["values"] * scales).reshape(6, 96)
    assert np.abs(decoded - values).max() <= 0.51 * scales.max() + 1e-3 * np.abs(values).max()


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 5e-3), ("q8_0", 5e-2)])
def test_llama_cpp_computes_the_same_model(tmp_path: Path, dtype: str, limit: float) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp comes with `pip install xllamacpp`")
    weights, dims = tmp_path / "tiny.pth", SHAPES["tiny"]
    write_checkpoint(dims, weights)
    gguf.write_gguf(weights, cpu.VOCABULARY, tmp_path / "tiny.gguf", dtype)
    prompts = [[1, 2, 3, 40], [500, 60]]
    peer = LlamaModel(tmp_path / "tiny.gguf", 2, 1)
    got = torch.stack([torch.tensor(row) for row in peer.feed(prompts)]).double()
    model = RWKV7(dims)
    model.load_state_dict(load_checkpoint(weights))
    ids, slots = torch.tensor([id for prompt in prompts for id in prompt]), torch.tensor([1, 2])
    with torch.inference_mode():
        hidden = model.double()(ids, Batch((4, 2), slots * 0, slots), model.new_state(3, "cpu"))
        wanted = model.head(hidden[[3, 5]])
    assert (got - wanted).norm() / wanted.norm() < limit
