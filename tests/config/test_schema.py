"""Rules that hold for objects built by hand as well, and values derived from keys."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from config import BindAddress, ConfigError, InferConfig, LoraRanks, ModelConfig, ModelTable
from config.key import keys_of
from config.schema import IpcConfig, TrainConfig
from tests.config.config_files import TABLE, infer_config

CLASSES = (ModelConfig, ModelTable, InferConfig, IpcConfig, TrainConfig)
WORLD_SIZE = 65536


def model(**changes: Any) -> ModelConfig:
    shape = {"num_cells": 2, "vocab_size": WORLD_SIZE, "embedded_dim": 768, "num_heads": 12}
    return ModelConfig(**{**shape, **changes})


@pytest.mark.parametrize(
    ("dim", "ranks"),
    [
        (128, (32, 32, 32, 64)),
        (512, (64, 64, 32, 128)),
        (768, (64, 64, 32, 128)),
        (1024, (64, 64, 64, 160)),
        (2048, (128, 128, 64, 224)),
        (2560, (128, 128, 96, 256)),
        (4096, (160, 160, 96, 320)),
    ],
)
def test_unset_ranks_follow_the_formula_of_rwkv_lm(dim: int, ranks: tuple[int, ...]) -> None:
    assert model(embedded_dim=dim, num_heads=dim // 64).lora_ranks == LoraRanks(*ranks)


def test_a_written_rank_wins_over_the_formula() -> None:
    assert model(v_lora_rank=5).lora_ranks == LoraRanks(w=64, a=64, v=5, g=128)


def test_head_size_and_channel_mix_width_follow_from_the_keys() -> None:
    config = model(num_heads=6, channel_mix_dim_scale=3.5)
    assert (config.head_size, config.ffn_dim) == (128, 2688)


def test_objects_built_by_hand_are_held_to_the_rules() -> None:
    with pytest.raises(ConfigError, match="num_heads = 7: must divide"):
        model(num_heads=7)
    with pytest.raises(ConfigError, match="weights_path: missing"):
        ModelTable(model=model(), model_name="a", model_cfg="m", tokenizer_vocab_path="v")
    with pytest.raises(ConfigError, match="models: needs at least one"):
        InferConfig(models=())


def test_configs_cannot_be_changed() -> None:
    config = model()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_cells = 3  # type: ignore[misc]
    assert not hasattr(config, "__dict__")


@pytest.mark.parametrize("limit", [0, 260, 1000])
def test_max_batch_tokens_0_means_two_paragraphs_and_all_sequences(limit: int) -> None:
    table = ModelTable(
        model=model(),
        model_name="a",
        model_cfg="m",
        tokenizer_vocab_path="v",
        weights_path=Path("a.pth"),
        max_batch_tokens=limit,
    )
    assert table.resolved_max_batch_tokens == (limit or 4 + 2 * 256)


@pytest.mark.parametrize(
    ("num_state_slots", "is_cached", "expected"), [(0, True, 8), (0, False, 4), (5, True, 5)]
)
def test_num_state_slots_0_means_a_snapshot_beside_each_sequence(
    num_state_slots: int, is_cached: bool, expected: int
) -> None:
    table = ModelTable(
        model=model(),
        model_name="a",
        model_cfg="m",
        tokenizer_vocab_path="v",
        load_format="dummy",
        num_state_slots=num_state_slots,
        enable_prefix_cache=is_cached,
    )
    assert table.resolved_num_state_slots == expected


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:8080", BindAddress(host="0.0.0.0", port=8080)),
        ("localhost:0", BindAddress(host="localhost", port=0)),
        ("[::1]:8080", BindAddress(host="::1", port=8080)),
        ("unix:/run/rwkv.sock", BindAddress(unix_path="/run/rwkv.sock")),
    ],
)
def test_bind_addresses_of_all_forms(text: str, address: BindAddress) -> None:
    assert BindAddress.parse(text) == address


@pytest.mark.parametrize("text", ["", "a", "a:", ":1", "[]:1", "a b :1", "a:-1", "a:٣", "unix:"])
def test_other_texts_are_no_bind_address(text: str) -> None:
    with pytest.raises(ConfigError, match="http_bind_addr"):
        BindAddress.parse(text)


def test_a_unix_path_that_the_system_cannot_take_is_refused() -> None:
    assert BindAddress.parse("unix:/" + "a" * 106).unix_path
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        BindAddress.parse("unix:/" + "a" * 107)


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_key_is_documented_and_spelled_once(config_class: type) -> None:
    specs = keys_of(config_class)
    spellings = [name for key, spec in specs.items() for name in (key, *spec.key.aliases)]
    assert len(set(spellings)) == len(spellings)
    assert all(spec.key.doc.strip() == spec.key.doc != "" for spec in specs.values())


def test_server_keys_and_model_keys_do_not_share_a_name() -> None:
    """`--set KEY=VALUE` could not tell them apart."""
    assert not keys_of(InferConfig).keys() & keys_of(ModelTable).keys()


def test_the_only_accepted_value_is_the_default() -> None:
    for config_class in CLASSES:
        for spec in keys_of(config_class).values():
            assert spec.key.only is None or spec.default == spec.key.only.value


def test_initial_states_are_named_by_their_files(tmp_path: Path) -> None:
    lines = 'initial_states = ["poet.pth", "b/lawyer.pth"]\ninitial_state = "lawyer"\n'
    table = infer_config(tmp_path, TABLE + lines).models[0]
    folder = (tmp_path / "infer").resolve()
    assert table.initial_states == (folder / "poet.pth", folder / "b" / "lawyer.pth")


@pytest.mark.parametrize(
    ("lines", "key", "reason"),
    [
        ('initial_state = "poet"', "initial_state", "none of initial_states"),
        ('initial_states = ["a/x.pth", "b/x.pth"]', "initial_states", "two files are named 'x'"),
        ('state_dir = "s"\nhost_state_mib = 0', "host_state_mib", "pass through host memory"),
    ],
)
def test_states_that_cannot_be_served_are_refused(
    tmp_path: Path, lines: str, key: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        infer_config(tmp_path, TABLE + lines + "\n")
    assert caught.value.key.endswith(key)
