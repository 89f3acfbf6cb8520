"""The data order, against values computed by hand from RWKV-LM's formulas for MiniPile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.runs import write_dataset
from train.binidx import DatasetError, open_dataset
from train.sampler import MINI_EPOCH_SAMPLES, Sampler, is_prime, magic_prime

MINIPILE_TOKENS = 1_498_226_207


@pytest.mark.parametrize(
    ("context_length", "prime"),
    [(512, 2_926_181), (1024, 1_463_027), (2048, 731_531), (4096, 365_759), (8192, 182_867)],
)
def test_magic_primes_of_minipile(context_length: int, prime: int) -> None:
    assert magic_prime(MINIPILE_TOKENS, context_length) == prime


def test_first_slots_of_minipile() -> None:
    sampler = Sampler(2_926_181, 512)
    assert [sampler.slot(i) for i in range(8)] == [
        1_808_479, 2_763_108, 2_010_037, 1_621_597, 743_938, 1_449_391, 2_884_106, 1_268_052,
    ]  # fmt: skip


def test_first_slot_of_each_mini_epoch_of_minipile() -> None:
    sampler = Sampler(2_926_181, 512)
    slots = [sampler.slot(epoch * MINI_EPOCH_SAMPLES) for epoch in range(4)]
    assert slots == [1_808_479, 1_232_952, 2_600_333, 2_167_310]


@pytest.mark.parametrize("prime", [p for p in range(200) if is_prime(p) and p % 3 == 2])
def test_one_pass_visits_every_slot_once(prime: int) -> None:
    sampler = Sampler(prime, 8)
    for first in (0, prime, 5 * prime):
        slots = sorted(sampler.slot(first + i) for i in range(prime))
        assert slots == list(range(prime))


def test_primes_by_trial_division() -> None:
    assert [n for n in range(30) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]


def test_prime_is_the_largest_of_its_kind_below_the_bound() -> None:
    for num_tokens in range(31, 400):
        bound = num_tokens / 10 - 1
        allowed = [p for p in range(2, 40) if p < bound and p % 3 == 2 and is_prime(p)]
        assert magic_prime(num_tokens, 10) == allowed[-1]


@pytest.mark.parametrize("num_tokens", [1, 10, 29, 30])
def test_too_few_tokens_are_refused_with_the_number_needed(num_tokens: int) -> None:
    with pytest.raises(DatasetError, match="at least 31 are needed"):
        magic_prime(num_tokens, 10)


@pytest.mark.parametrize("num_tokens", [31, 40, 61, 97, 205, 311])
def test_every_window_of_every_pass_lies_inside_the_data(tmp_path: Path, num_tokens: int) -> None:
    write_dataset(tmp_path / "a", [range(1, num_tokens)])
    dataset = open_dataset(tmp_path / "a")
    assert dataset.num_tokens == num_tokens
    sampler = Sampler.for_dataset(dataset, 10)
    for sample in range(30 * sampler.prime):
        assert 0 <= sampler.start(sample) <= num_tokens - 11


def test_first_pass_starts_at_slot_borders_and_later_ones_elsewhere() -> None:
    sampler = Sampler(101, 64)
    assert all(sampler.start(i) == 64 * sampler.slot(i) for i in range(101))
    shifts = {sampler.start(101 * n) - 64 * sampler.slot(101 * n) for n in range(1, 20)}
    assert len(shifts) == 19


def test_a_batch_is_the_windows_of_its_samples(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [[i % 39 + 1 for i in range(300)]])
    dataset = open_dataset(tmp_path / "a")
    sampler = Sampler.for_dataset(dataset, 16)
    batch = sampler.batch(dataset, 5, 3)
    assert batch.shape == (3, 17)
    for row, sample in zip(batch, (5, 6, 7), strict=True):
        start = sampler.slot(sample) * 16
        assert row.tolist() == dataset.tokens[start : start + 17].tolist()


def test_the_samples_of_a_step_do_not_depend_on_how_they_are_split(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [[i % 39 + 1 for i in range(900)]])
    dataset = open_dataset(tmp_path / "a")
    sampler = Sampler.for_dataset(dataset, 16)
    whole = sampler.batch(dataset, 24, 8).tolist()
    parts = [sampler.batch(dataset, 24 + 2 * i, 2).tolist() for i in range(4)]
    assert [row for part in parts for row in part] == whole
