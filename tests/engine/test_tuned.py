"""Tuned initial states: the community's orientation, and every file that is none."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.errors import StateMismatch
from engine.model.rwkv7 import State
from engine.model.weights import dummy_model, load_model
from engine.state.layout import PageLayout
from engine.state.pagefile import PageFormat
from engine.state.tuned import load_tuned
from tests.engine.pages import FORMAT, LAYOUT, MODEL, TOKENIZER, page_file, random_tensors
from tests.engine.test_rwkv7 import model_config, official_model, run

H, N = LAYOUT.num_heads, LAYOUT.head_size


def time_states(layout: PageLayout = LAYOUT) -> dict[str, Tensor]:
    """One matrix for each layer, as RWKV-PEFT saves them."""
    generator = torch.Generator().manual_seed(4)
    shape = layout.wkv_shape[1:]
    return {
        f"blocks.{i}.att.time_state": torch.randn(shape, generator=generator)
        for i in range(layout.num_cells)
    }


def save(folder: Path, content: object, name: str = "poet.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def test_the_state_continues_as_in_the_rwkv_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = model_config(num_cells=3, vocab_size=97, embedded_dim=128, num_heads=2)
    weights = {
        name: t.view(1, 1, -1) if name.split(".")[-1].startswith("x_") else t
        for name, t in dummy_model(cfg, "cpu", torch.float32, seed=1).state_dict().items()
    }
    torch.save(weights, tmp_path / "model.pth")
    model = load_model(tmp_path / "model.pth", cfg, device="cpu", dtype=torch.float32)
    layout = PageLayout(
        num_cells=3, num_heads=2, head_size=64, vocab_size=97,
        wkv_dtype="float32", shift_dtype="float32",
    )  # fmt: skip
    trained = time_states(layout)
    tuned = load_tuned(save(tmp_path, trained), PageFormat(layout, MODEL, TOKENIZER)).tensors

    oracle = official_model(tmp_path / "model", monkeypatch)
    oracle_state = oracle.generate_zero_state()
    for i in range(cfg.num_cells):  # as RWKV-Runner does for RWKV-7
        oracle_state[i * 3 + 1] = trained[f"blocks.{i}.att.time_state"].float().contiguous()
    tokens = [0, 5, 17, 96, 3]
    expected = oracle.forward(tokens, oracle_state, full_output=True)[0]

    def logits(wkv: Tensor) -> Tensor:
        return run(model, tokens, State(wkv=wkv[None].clone(), shift=tuned["shift"][None].clone()))

    scale = expected.abs().max()
    assert (logits(tuned["wkv"]) - expected).abs().max() < 1e-4 * scale
    assert (logits(tuned["wkv"].mT.contiguous()) - expected).abs().max() > 0.05 * scale
    assert (logits(torch.zeros_like(tuned["wkv"])) - expected).abs().max() > 0.05 * scale


def test_layers_heads_and_rows_lie_where_they_belong(tmp_path: Path) -> None:
    trained = time_states()
    tuned = load_tuned(save(tmp_path, trained), FORMAT)
    assert tuned.name == "poet"
    assert tuned.tensors.keys() == {"wkv", "shift"}
    assert tuned.tensors["shift"].shape == LAYOUT.shift_shape
    assert tuned.tensors["shift"].dtype == torch.bfloat16
    assert not tuned.tensors["shift"].any()
    wkv = tuned.tensors["wkv"]
    assert wkv[1, 2, 3, 0] == trained["blocks.1.att.time_state"][2, 0, 3]
    assert wkv.is_contiguous()


@pytest.mark.parametrize("saved_as", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wkv_dtype", ["float32", "float64"])
def test_any_floating_point_becomes_that_of_the_layout(
    tmp_path: Path, saved_as: torch.dtype, wkv_dtype: str
) -> None:
    trained = {name: tensor.to(saved_as) for name, tensor in time_states().items()}
    page_format = PageFormat(replace(LAYOUT, wkv_dtype=wkv_dtype), MODEL, TOKENIZER)
    wkv = load_tuned(save(tmp_path, trained), page_format).tensors["wkv"]
    assert wkv.dtype == getattr(torch, wkv_dtype)
    assert torch.equal(wkv[0].mT, trained["blocks.0.att.time_state"].to(wkv.dtype))


def test_parameters_in_an_ordered_dict_are_as_good(tmp_path: Path) -> None:
    plain = load_tuned(save(tmp_path, time_states()), FORMAT)
    parameters = OrderedDict((k, torch.nn.Parameter(v)) for k, v in time_states().items())
    assert load_tuned(save(tmp_path, parameters), FORMAT).digest == plain.digest


def test_equal_states_have_equal_digests_whatever_the_file(tmp_path: Path) -> None:
    tuned = load_tuned(save(tmp_path, time_states()), FORMAT)
    path = tmp_path / "exported.safetensors"
    path.write_bytes(FORMAT.encode(page_file(1, num_tokens=0, has_logits=False), tuned.tensors))
    exported = load_tuned(path, FORMAT)
    assert exported.name == "exported"
    assert exported.digest == tuned.digest
    assert len(tuned.digest) == 16
    other = time_states()
    other["blocks.1.att.time_state"][0, 0, 1] += 1
    assert load_tuned(save(tmp_path, other), FORMAT).digest != tuned.digest


def test_an_exported_state_begins_without_its_logits(tmp_path: Path) -> None:
    path = tmp_path / "exported.safetensors"
    path.write_bytes(FORMAT.encode(page_file(1), random_tensors(1)))
    tuned = load_tuned(path, FORMAT)
    assert tuned.tensors.keys() == {"wkv", "shift"}
    assert torch.equal(tuned.tensors["shift"], random_tensors(1)["shift"])


def test_the_file_may_be_replaced_once_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, time_states())
    tuned = load_tuned(path, FORMAT)
    before = tuned.tensors["wkv"].clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(tuned.tensors["wkv"], before)


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in time_states().items() if key != name}


FIRST, LAST = "blocks.0.att.time_state", "blocks.1.att.time_state"
THIRD = "blocks.2.att.time_state"
HUGE = torch.full((H, N, N), 1e300, dtype=torch.float64)
NO_ADAPTER = "not a checkpoint or an adapter"
BAD_CONTENT = [
    (without(LAST), f"1 missing ({LAST})", "tuned for this model"),
    (time_states() | {THIRD: torch.zeros(H, N, N)}, f"1 unexpected ({THIRD})", "this model"),
    (time_states() | {"emb.weight": torch.zeros(7)}, "(emb.weight)", "time_state tensors only"),
    ({"emb.weight": torch.zeros(7, 12)}, "2 missing", NO_ADAPTER),
    ({}, "found 0 tensors", NO_ADAPTER),
    ({0: torch.zeros(1)}, "1 unexpected (0)", NO_ADAPTER),
    (time_states() | {LAST: torch.zeros(N, N, H)}, "shape (3, 4, 4)", "of shape (4, 4, 3)"),
    (time_states() | {LAST: torch.zeros(1, H, N, N)}, LAST, "of shape (1, 3, 4, 4)"),
    (time_states() | {FIRST: torch.zeros(H, N, N).int()}, FIRST, "found torch.int32"),
    (time_states() | {FIRST: torch.full((H, N, N), torch.nan)}, "finite", "earlier state"),
    (time_states() | {FIRST: HUGE}, "in float32", "diverged"),
    ([torch.zeros(1)], "expected a dict of tensors", "as RWKV-PEFT does"),
    ({FIRST: 1.0}, "expected a dict of tensors", "as RWKV-PEFT does"),
]


@pytest.mark.parametrize(("content", "found", "remedy"), BAD_CONTENT)
def test_a_file_of_something_else_is_refused_by_name(
    tmp_path: Path, content: object, found: str, remedy: str
) -> None:
    path = save(tmp_path, content)
    message = refusal(path)
    assert found in message
    assert remedy in message


def refusal(path: Path) -> str:
    with pytest.raises(StateMismatch) as info:
        load_tuned(path, FORMAT)
    assert info.value.field == "initial_states"
    message = str(info.value)
    assert message.startswith(f"initial_states: {path}")
    assert "\n" not in message
    assert len(message) < 1000
    return message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("none.pth", "none.safetensors"):
        assert "No such file" in refusal(tmp_path / name)
    (tmp_path / "folder.pth").mkdir()
    assert "Is a directory" in refusal(tmp_path / "folder.pth")


@pytest.mark.parametrize("size", [0, 1, 100, 1000, -1])
def test_a_truncated_pth_is_refused(tmp_path: Path, size: int) -> None:
    path = save(tmp_path, time_states())
    path.write_bytes(path.read_bytes()[:size])
    assert "truncated" in refusal(path)


def test_garbage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "poet.pth"
    for garbage in (
        b"\0" * 1000,
        b"\x80\x02}q\x00.",
        b"PK\x03\x04" + b"x" * 500,
        bytes(range(256)),
    ):
        path.write_bytes(garbage)
        assert "expected a .pth" in refusal(path)


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_nothing_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = save(tmp_path, {FIRST: Attack(trap)})
    assert "expected a .pth" in refusal(path)
    path.write_bytes(pickle.dumps(Attack(trap)))
    assert "expected a .pth" in refusal(path)
    assert not trap.exists()


def test_an_exported_state_of_another_model_or_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "exported.safetensors"
    other = PageFormat(LAYOUT, "other", TOKENIZER)
    path.write_bytes(other.encode(page_file(1), random_tensors(1)))
    assert f"model_fingerprint: expected '{MODEL}', found 'other'" in refusal(path)
    path.write_bytes(b"")
    assert "truncated" in refusal(path)
