"""The time mix by numba against the definition in float64, token by token, through autograd."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.backend import Backend, Batch, TimeMixRows, TimeMixWeights
from tests.engine.kernels.wkv_cases import relative_error
from tests.train.runs import train_config, trainer
from train.trainer import Trainer

pytest.importorskip("numba")

from engine.kernels.cpu import backend as cpu
from engine.kernels.cpu import time_mix as time_mix_module

NUM_HEADS, NUM_SLOTS, LAYER = 2, 6, 1
LENGTHS = (33, 1, 16, 7)  # two segments and a token, one token, one segment, less
SRC, DST = [3, 0, 5, 2], [3, 1, 4, 2]
ROWS = ("r", "k", "v", "d", "a", "g", "v_first", "m")
WEIGHTS = ("k_k", "k_a", "r_k", "norm_weight", "norm_bias")
# Relative errors in float32, whose sums are in another order: 2e-7 and 4e-7 were seen.
TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 2e-6

Case = tuple[TimeMixRows, TimeMixWeights, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case(num_tokens: int, size: int, has_residual: bool = True) -> Case:
    """Rows, weights and a pool [slots, layers, H, N, N], random, in float64."""
    generator = torch.Generator().manual_seed(size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).float().double()

    width = NUM_HEADS * size
    rows = {name: draw(num_tokens, width) for name in ROWS}
    weights = {name: draw(width) for name in WEIGHTS} | {"r_k": draw(NUM_HEADS, size)}
    made = TimeMixRows(**rows)
    made = made if has_residual else replace(made, v_first=None, m=None)
    return made, TimeMixWeights(**weights), draw(NUM_SLOTS, 2, NUM_HEADS, size, size)


def leaves(of: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a case, each to be differentiated by."""
    rows, weights, pool = of
    found = {name: getattr(rows, name) for name in ROWS}
    found |= {name: getattr(weights, name) for name in WEIGHTS} | {"pool": pool}
    return {
        name: x.detach().to(dtype, copy=True).requires_grad_()
        for name, x in found.items()
        if x is not None
    }


def outputs(backend: Backend, tensors: dict[str, Tensor], batch: Batch) -> Tensor:
    rows = TimeMixRows(**{name: tensors.get(name) for name in ROWS})  # type: ignore[arg-type]
    weights = TimeMixWeights(**{name: tensors[name] for name in WEIGHTS})
    return backend.time_mix(rows, weights, batch, tensors["pool"][:, LAYER])


def gradients(
    backend: Backend, of: Case, lengths: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Of a random sum of the outputs; with them, as `out`."""
    tensors = leaves(of, dtype)
    number = len(lengths)
    batch = Batch(lengths, torch.tensor(SRC[:number]), torch.tensor(DST[:number]))
    out = outputs(backend, tensors, batch)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()  # type: ignore[no-untyped-call]
    found = {"out": out.detach()}
    for name, x in tensors.items():
        assert x.grad is not None, name
        found[name] = x.grad
    return found


def by_definition(
    r: Tensor,
    lw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    lengths: tuple[int, ...],
    states: Tensor,
) -> tuple[Tensor, Tensor]:
    """`reference.wkv7`, one token of one sequence after the other."""
    inputs = [x.split(lengths) for x in (r, lw, k, v, a, b)]
    ys, last = [], []
    for i in range(len(lengths)):
        y, state = reference.wkv7_recurrent(*(x[i][None] for x in inputs), states[i][None])
        ys.append(y[0])
        last.append(state[0])
    return torch.cat(ys), torch.stack(last)


@pytest.fixture
def definition(monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(reference, "wkv7", by_definition)
    return reference


def assert_close(
    got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = GRADIENT_TOLERANCE
) -> None:
    assert got.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert relative_error(got[name], expected) < tolerance, name


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("size", [16, 24, 64])
def test_all_gradients_of_ragged_sequences(
    size: int, has_residual: bool, definition: Backend
) -> None:
    made = case(sum(LENGTHS), size, has_residual)
    wanted = gradients(definition, made, LENGTHS, torch.float64)
    got = gradients(cpu, made, LENGTHS, torch.float32)
    assert relative_error(got["out"], wanted["out"]) < TOLERANCE
    assert_close(got, wanted)
    untouched = [4, 1]  # slots that no sequence began from
    assert not got["pool"][untouched].any()
    assert got["pool"][SRC, LAYER].abs().sum((1, 2, 3)).min() > 0


@pytest.mark.parametrize("raw", [-40.0, 40.0])
def test_extreme_decay(raw: float, definition: Backend) -> None:
    rows, weights, pool = case(40, 16)
    made = replace(rows, d=torch.full_like(rows.d, raw)), weights, pool
    wanted = gradients(definition, made, (40,), torch.float64)
    got = gradients(cpu, made, (40,), torch.float32)
    # A sigmoid of 1 - 4e-18 is 1 in float32, and its slope is nothing.
    saturated = got.pop("d"), wanted.pop("d")
    assert (saturated[0] - saturated[1]).abs().max() < 1e-14
    assert_close(got, wanted)


@pytest.mark.parametrize("size", [16, 64])
def test_one_token_repeated(size: int, definition: Backend) -> None:
    rows, weights, pool = case(70, size)
    same = {name: getattr(rows, name)[:1].repeat(70, 1) for name in ROWS}
    # Decay and rate near 1: what is put in is taken out again, over and over.
    same["d"], same["a"] = torch.full_like(rows.d, -9.0), torch.full_like(rows.a, 9.0)
    made = TimeMixRows(**same), weights, pool
    wanted = gradients(definition, made, (70,), torch.float64)
    got = gradients(cpu, made, (70,), torch.float32)
    plain = gradients(definition, made, (70,), torch.float32)
    for name, expected in wanted.items():  # ill-conditioned: float32 by the definition is off too
        limit = max(GRADIENT_TOLERANCE, 3 * relative_error(plain[name], expected))
        assert relative_error(got[name], expected) < limit, name


def test_a_key_of_zeros(definition: Backend) -> None:
    rows, weights, pool = case(5, 16)
    rows.k[2] = 0.0
    wanted = gradients(definition, (rows, weights, pool), (5,), torch.float64)
    got = gradients(cpu, (rows, weights, pool), (5,), torch.float32)
    # Its own gradient is that of a division by 1e-12: some 1e12, and it hides all others.
    assert relative_error(got["k"][2], wanted["k"][2]) < GRADIENT_TOLERANCE
    for found in (got, wanted):
        found["k"][2] = 0.0
    assert_close(got, wanted)


def test_finite_differences() -> None:
    tensors = leaves(case(20, 16), torch.float32)
    batch = Batch((20,), torch.tensor([3]), torch.tensor([3]))
    out = outputs(cpu, tensors, batch)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()  # type: ignore[no-untyped-call]
    step = 1e-2  # errors of float32 and of the step are both below a thousandth then
    for name, x in tensors.items():
        assert x.grad is not None
        direction = x.grad / x.grad.norm()
        sums = []
        for sign in (-1, 1):
            moved = {**tensors, name: x.detach() + sign * step * direction}
            with torch.no_grad():
                moved["pool"] = moved["pool"].clone()
                out = outputs(cpu, moved, batch)
            sums.append((out.double() * weight).sum().item())
        slope = (sums[1] - sums[0]) / (2 * step)
        assert slope == pytest.approx(x.grad.norm().item(), rel=5e-3), name


@pytest.mark.parametrize("size", [16, 24, 64])
def test_states_go_from_slot_to_slot(size: int, definition: Backend) -> None:
    made = case(sum(LENGTHS), size)
    batch = Batch(LENGTHS, torch.tensor(SRC), torch.tensor(DST))
    wanted, got = (
        {name: x.detach() for name, x in leaves(made, dtype).items()}
        for dtype in (torch.float64, torch.float32)
    )
    with torch.no_grad():
        expected = outputs(definition, wanted, batch)
        assert relative_error(outputs(cpu, got, batch), expected) < TOLERANCE
    assert relative_error(got["pool"], wanted["pool"]) < TOLERANCE
    changed = (got["pool"] != made[2].float()).flatten(2).any(-1).nonzero().tolist()
    assert changed == [[slot, LAYER] for slot in sorted(DST)]


@pytest.mark.parametrize("size", [16, 24])
def test_padding_writes_nothing(size: int) -> None:
    made = case(12, size)
    pool = made[2].float()
    tensors = {**leaves(made, torch.float32), "pool": pool.clone()}
    with torch.no_grad():
        batch = Batch((5, 4, 3), torch.tensor([3, 0, 5]), torch.tensor([3, -1, 4]))
        outputs(cpu, tensors, batch)
    changed = (tensors["pool"] != pool).flatten(1).any(-1).nonzero().flatten().tolist()
    assert changed == [3, 4]


def test_a_prompt_in_parts_is_the_prompt_to_the_last_bit() -> None:
    rows, weights, pool = case(40, 64)
    whole = {k: x.detach() for k, x in leaves((rows, weights, pool), torch.float32).items()}
    parts = {**whole, "pool": whole["pool"].clone()}
    slot = torch.tensor([3])
    with torch.no_grad():
        expected = outputs(cpu, whole, Batch((40,), slot, slot))
        got = []
        for cut in (slice(0, 5), slice(5, 6), slice(6, 40)):
            part = {k: x[cut] if k in ROWS else x for k, x in parts.items()}
            got.append(outputs(cpu, part, Batch((cut.stop - cut.start,), slot, slot)))
    assert torch.equal(torch.cat(got), expected)
    assert torch.equal(parts["pool"], whole["pool"])


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_mix_module, "ELEMENTS_PER_THREAD", 1)
    made = case(sum(LENGTHS), 64)
    found = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        found.append(gradients(cpu, made, LENGTHS, torch.float32))
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


def test_other_types_are_left_to_the_reference_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cpu._say_once.cache_clear()
    made = case(5, 16)
    with caplog.at_level(logging.INFO, logger=cpu.logger.name):
        wanted = gradients(reference, made, (5,), torch.float64)
        for _ in range(2):
            got = gradients(cpu, made, (5,), torch.float64)
    assert all(torch.equal(x, got[name]) for name, x in wanted.items())
    types = "(rows are torch.float64, states torch.float64)"
    assert caplog.messages == [f"kernels: reference for the time mix {types}"]


def _run(tmp_path: Path, name: str, kernels: Backend, **changes: object) -> Trainer:
    # With a large epsilon AdamW leaves small what is small: rounding then moves no weight far.
    cfg = train_config(tmp_path, experiment_name=name, num_steps=3, adam_eps=1e-2, **changes)
    run = trainer(cfg)
    assert run.model.kernels is cpu
    run.model.kernels = kernels
    generator = torch.Generator().manual_seed(0)  # no weight is zero: every gradient is alive
    run.optimizer.weights += 0.1 * torch.randn(run.optimizer.weights.shape, generator=generator)
    run.run()
    return run


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_trainer_steps_are_those_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grad_checkpoint: bool
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("the reference was asked")

    wanted = _run(tmp_path, "reference", reference, grad_checkpoint=grad_checkpoint)
    monkeypatch.setattr(reference, "time_mix", forbidden)
    got = _run(tmp_path, "cpu", cpu, grad_checkpoint=grad_checkpoint)
    metrics = []
    for run in (wanted, got):
        lines = (run.cfg.run_dir / "metrics.jsonl").read_text().splitlines()
        metrics.append([(line["loss"], line["grad_norm"]) for line in map(json.loads, lines)])
    assert metrics[1] == [pytest.approx(pair, rel=1e-5, abs=0) for pair in metrics[0]]
    assert relative_error(got.optimizer.exp_avg, wanted.optimizer.exp_avg) < 1e-5
    assert relative_error(got.optimizer.weights, wanted.optimizer.weights) < 1e-6
