"""The TOML files that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from config import ConfigError, ModelConfig, check_files, load_infer, load_model, load_train
from config.schema import WORLD_VOCAB

CONFIG_DIR = Path(__file__).parents[2] / "config"
# layers, width, and the LoRA ranks (w, a, v, g) of the released checkpoints
SIZES = {
    "rwkv-lm-0.1b": (12, 768, (64, 64, 32, 128)),
    "rwkv-lm-0.4b": (24, 1024, (64, 64, 32, 128)),
    "rwkv-lm-1.5b": (24, 2048, (96, 96, 64, 256)),
    "rwkv-lm-2.9b": (32, 2560, (96, 96, 64, 320)),
    "rwkv-lm-7.2b": (32, 4096, (128, 128, 96, 480)),
    "rwkv-lm-13.3b": (61, 4096, (192, 192, 128, 384)),
}
TINY = "rwkv-lm-tiny"


def names(kind: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / kind).glob("*.toml"))


def num_parameters(model: ModelConfig) -> int:
    """Weights of an official checkpoint, the unused v0, v1, v2 of the first layer included."""
    dim, ranks = model.embedded_dim, model.lora_ranks
    time_mix = 4 * dim * dim + 2 * dim * sum(ranks) + (6 + 3 + 2 + 1 + 2) * dim
    channel_mix = 2 * dim * model.ffn_dim + dim
    layer = time_mix + channel_mix + 4 * dim
    return 2 * model.vocab_size * dim + 4 * dim + model.num_cells * layer


def test_model_and_infer_configs_have_the_same_names() -> None:
    assert names("model") == names("infer") == sorted([*SIZES, TINY])
    assert names("train") == ["rwkv-lm-0.1b", TINY]


@pytest.mark.parametrize("name", SIZES)
def test_model_configs_have_the_shape_of_released_checkpoints(name: str) -> None:
    num_cells, dim, ranks = SIZES[name]
    model = load_model(CONFIG_DIR, name)
    assert (model.num_cells, model.embedded_dim, model.lora_ranks) == (num_cells, dim, ranks)
    assert (model.head_size, model.ffn_dim, model.vocab_size) == (64, 4 * dim, 65536)


def test_parameter_counts_are_the_published_ones() -> None:
    assert num_parameters(load_model(CONFIG_DIR, "rwkv-lm-0.1b")) == 191_084_544
    assert round(num_parameters(load_model(CONFIG_DIR, "rwkv-lm-0.4b")) / 1e6, 2) == 450.83


@pytest.mark.parametrize("name", [*SIZES, TINY])
def test_infer_configs_load(name: str) -> None:
    config = load_infer(CONFIG_DIR, name)
    (table,) = config.models
    assert table.model == load_model(CONFIG_DIR, name)
    assert config.bind_address.host == "127.0.0.1"


@pytest.mark.parametrize("name", SIZES)
def test_infer_configs_of_large_models_name_an_official_checkpoint(name: str) -> None:
    (table,) = load_infer(CONFIG_DIR, name).models
    assert table.tokenizer_vocab_path == WORLD_VOCAB
    assert table.weights_path is not None
    assert table.weights_path.suffix == ".pth"
    assert f"-{name.removeprefix('rwkv-lm-')}-" in table.weights_path.name
    assert table.weights_path.parent == (CONFIG_DIR.parent / "weights").resolve()


def test_a_large_model_without_weights_says_where_they_are() -> None:
    config = load_infer(CONFIG_DIR, "rwkv-lm-7.2b", ["weights_path=absent.pth"])
    with pytest.raises(ConfigError, match=r"7\.2b\.toml: .*absent\.pth.*huggingface\.co/BlinkDL"):
        check_files(config)
    check_files(load_infer(CONFIG_DIR, "rwkv-lm-7.2b", ["load_format=dummy"]))


@pytest.mark.parametrize("name", ["rwkv-lm-0.1b", TINY])
def test_train_configs_load(name: str) -> None:
    config = load_train(CONFIG_DIR, name)
    assert config.model == load_model(CONFIG_DIR, name)
    assert config.run_dir.parent == CONFIG_DIR.parent.resolve() / "runs"


def test_the_0_1b_recipe_is_rwkv_lms() -> None:
    config = load_train(CONFIG_DIR, "rwkv-lm-0.1b")
    assert (config.learning_rate_start, config.learning_rate_end) == (6e-4, 6e-5)
    assert (config.warmup_steps, config.weight_decay, config.adam_eps) == (10, 1e-3, 1e-18)
    assert (config.batch_size, config.context_length) == (16, 512)
