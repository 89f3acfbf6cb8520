"""TOML to dataclasses: what is read, and what every mistake says."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from config import WORLD_VOCAB, ConfigError, load_infer, load_model, load_train, parse_infer
from tests.config.config_files import (
    MODEL,
    TABLE,
    TRAIN,
    infer_config,
    message,
    train_config,
    write_config,
)

SECOND_TABLE = TABLE.replace('"a"', '"b"')


def test_defaults_are_those_of_rwkv_rs(tmp_path: Path) -> None:
    config = infer_config(tmp_path)
    table = config.models[0]
    assert (config.http_bind_addr, config.request_body_limit_bytes) == ("0.0.0.0:8080", 52428800)
    assert (config.sse_keep_alive_ms, config.allowed_origins, config.api_key) == (10000, None, None)
    assert (table.max_batch_size, table.paragraph_len, table.max_context_len) == (4, 256, 4096)
    assert (table.decode_first, table.device_ids, table.device_type) == (True, (0,), "auto")
    assert (table.resolved_max_batch_tokens, table.max_waiting, table.template) == (516, 256, "g1")


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    table = infer_config(tmp_path, TABLE.replace("vocab.txt", "../vocab/v.txt")).models[0]
    assert table.weights_path == (tmp_path / "infer" / "a.pth").resolve()
    assert table.tokenizer_vocab_path == str((tmp_path / "vocab" / "v.txt").resolve())


def test_default_paths_start_at_the_file_too(tmp_path: Path) -> None:
    config = train_config(tmp_path)
    assert config.run_dir == (tmp_path / "train" / "logs" / "run").resolve()
    assert config.data_prefix == (tmp_path / "train" / "data" / "text").resolve()


def test_absolute_and_home_paths_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = TABLE.replace("a.pth", "~/a.pth").replace("vocab.txt", "/v/vocab.txt")
    table = infer_config(tmp_path, text).models[0]
    assert table.weights_path == (tmp_path / "home").resolve() / "a.pth"
    assert table.tokenizer_vocab_path == "/v/vocab.txt"


def test_a_linked_file_keeps_its_name(tmp_path: Path) -> None:
    """Download caches link NAME.safetensors to files that are named by their hash."""
    write_config(tmp_path)
    (tmp_path / "blob").write_text("")
    (tmp_path / "infer" / "a.pth").symlink_to(tmp_path / "blob")
    weights = load_infer(tmp_path, "i").models[0].weights_path
    assert weights is not None
    assert weights.name == "a.pth"


def test_world_vocabulary_is_a_name_and_not_a_path(tmp_path: Path) -> None:
    table = infer_config(tmp_path, TABLE.replace("vocab.txt", WORLD_VOCAB)).models[0]
    assert table.tokenizer_vocab_path == WORLD_VOCAB
    near_miss = TABLE.replace("vocab.txt", f"{WORLD_VOCAB}.txt")
    path = infer_config(tmp_path, near_miss).models[0].tokenizer_vocab_path
    assert path == str((tmp_path / "infer" / f"{WORLD_VOCAB}.txt").resolve())


def test_model_cfg_is_a_bare_name_or_a_path(tmp_path: Path) -> None:
    by_name = infer_config(tmp_path).models[0].model
    by_path = infer_config(tmp_path, TABLE.replace('"m"', '"../model/m.toml"')).models[0].model
    assert by_name == by_path == load_model(tmp_path, "m")
    assert by_name.name == "m"


def test_aliases_of_rwkv_rs_are_read(tmp_path: Path) -> None:
    assert infer_config(tmp_path, TABLE.replace("model_cfg", "model_cfg_path")).models[0].model
    assert train_config(tmp_path, TRAIN + "context_len = 64").context_length == 64


def test_device_type_0_is_cuda(tmp_path: Path) -> None:
    assert infer_config(tmp_path, TABLE + "device_type = 0").models[0].device_type == "cuda"


def test_ipc_is_accepted_while_it_is_off(tmp_path: Path) -> None:
    text = '[ipc]\nenabled = false\nservice_name = "x"\nmax_inflight_requests = 4\n' + TABLE
    assert infer_config(tmp_path, text).ipc.service_name == "x"


def test_api_key_is_never_shown(tmp_path: Path) -> None:
    config = infer_config(tmp_path, 'api_key = "s3cret"\n' + TABLE)
    assert config.api_key == "s3cret"
    assert "s3cret" not in f"{config} {config!r}"
    for text in ('api_key = ["s3cret"]\n', 'api_key = " s3cret"\n', 'api_kye = "s3cret"\n'):
        with pytest.raises(ConfigError) as caught:
            infer_config(tmp_path, text + TABLE)
        assert "api_k" in str(caught.value)
        assert "s3cret" not in f"{caught.value} {caught.value!r}"


def test_dummy_weights_need_no_path(tmp_path: Path) -> None:
    text = TABLE.replace('weights_path = "a.pth"', 'load_format = "dummy"')
    assert infer_config(tmp_path, text).models[0].weights_path is None


INFER_ERRORS = {
    # appended to the [[models]] table: what the message says after "infer/i.toml: models[0]."
    "paragraph_ln = 3": 'paragraph_ln: unknown key; did you mean "paragraph_len"?',
    "paragraph_len = 0": "paragraph_len = 0: expected `int` >= 1",
    'paragraph_len = "x"': 'paragraph_len = "x": expected `int`, got `str`',
    "paragraph_len = 1.5": "paragraph_len = 1.5: expected `int`, got `float`",
    "paragraph_len = true": "paragraph_len = true: expected `int`, got `bool`",
    "decode_first = 1": "decode_first = 1: expected `bool`, got `int`",
    'dtype = "bf16"': 'dtype = "bf16": not one of these; did you mean "bfloat16"? there are: '
    "auto, float32, bfloat16, float16, float64",
    'template = "chatml"': 'template = "chatml": not one of these; there are: g1, rwkv-rs',
    "device_type = 1": "device_type = 1: not one of these; there are: auto, cpu, cuda, 0",
    "device_type = false": "device_type = false: not one of these; there are: auto, cpu, cuda, 0",
    "device_ids = []": "device_ids = []: name one device",
    "device_ids = [0, 1]": "device_ids = [0, 1]: name one device, such as [0]: several devices",
    "device_ids = [-1]": "device_ids[0] = -1: expected `int` >= 0",
    "device_ids = 0": "device_ids = 0: expected an array, got `int`",
    "num_state_slots = 3": "num_state_slots = 3: must be 0 or at least max_batch_size = 4",
    "max_batch_tokens = 259": "max_batch_tokens = 259: must be 0 or at least max_batch_size + "
    "paragraph_len = 260",
    "max_context_len = -1": "max_context_len = -1: expected `int` >= 0",
    'model_cfg_path = "m"': "model_cfg_path: is another spelling of model_cfg, which is given",
}


@pytest.mark.parametrize("line", INFER_ERRORS)
def test_a_mistake_in_a_model_table_names_file_key_and_value(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        infer_config(tmp_path, TABLE + line)
    expected = f"infer/i.toml: models[0].{INFER_ERRORS[line]}"
    assert message(caught.value, tmp_path).lower().startswith(expected.lower())


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"a.pth"', '"a.mpk"', 'weights_path = "infer/a.mpk": is a Burn record of rwkv-rs; use'),
        ('"a.pth"', '"a.bpk"', 'weights_path = "infer/a.bpk": is a Burn record of rwkv-rs; use'),
        ('"a.pth"', '""', 'weights_path = "": must not be empty'),
        ('"a.pth"', "3", "weights_path = 3: expected `str`, got `int`"),
        ('weights_path = "a.pth"', "", "weights_path: missing"),
        ('model_name = "a"', "", "model_name: missing (the name clients ask for)"),
        ('"a"', '""', 'model_name = "": must not be empty'),
        ('"a"', '"a "', 'model_name = "a ": must not begin or end with white space'),
        ('"a"', '"a\\u0000b"', 'model_name = "a\\u0000b": must not contain control characters'),
        ('"m"', '"n"', 'model_cfg = "n": no model config "n" in model; there are: m'),
        ('"m"', '"./n.toml"', ""),  # the file that is missing is not infer/i.toml: see below
    ],
)
def test_a_changed_model_table_says_what_is_wrong(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        infer_config(tmp_path, TABLE.replace(old, new, 1))
    start = f"infer/i.toml: models[0].{expected}" if expected else "infer/n.toml: cannot be read"
    assert message(caught.value, tmp_path).startswith(start)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("http_bind_adr = 3", 'http_bind_adr: unknown key; did you mean "http_bind_addr"?'),
        ('http_bind_addr = "8080"', 'http_bind_addr = "8080": expected "host:port"'),
        ('http_bind_addr = ":80"', 'http_bind_addr = ":80": expected "host:port"'),
        ('http_bind_addr = "::1:80"', 'http_bind_addr = "::1:80": expected "host:port"'),
        ('http_bind_addr = "h:65536"', 'http_bind_addr = "h:65536": the port must be'),
        ('http_bind_addr = "h:http"', 'http_bind_addr = "h:http": the port must be'),
        ('http_bind_addr = "unix:a"', 'http_bind_addr = "unix:a": the path of a Unix socket must'),
        ("request_body_limit_bytes = 0", "request_body_limit_bytes = 0: expected `int` >= 1"),
        ("drain_timeout_s = -1", "drain_timeout_s = -1: expected `float` >= 0.0"),
        ("drain_timeout_s = inf", "drain_timeout_s = Infinity: must be a finite number"),
        ("drain_timeout_s = nan", "drain_timeout_s = NaN: must be a finite number"),
        ('allowed_origins = "a"', 'allowed_origins = "a": expected an array, got `str`'),
        ('allowed_origins = ["a"]', 'allowed_origins = "a": expected "https://host"'),
        ('allowed_origins = ["http://a/"]', 'allowed_origins = "http://a/": expected'),
        ('api_key = ""', "api_key: must be printable ASCII without spaces"),
        ('api_key = "a b"', "api_key: must be printable ASCII without spaces"),
        ("ipc = 3", "ipc = 3: expected an [ipc] table"),
        ("ipc.enabled = true", "ipc.enabled = true: not supported; use http_bind_addr = "),
        ("ipc.enable = true", 'ipc.enable: unknown key; did you mean "enabled"?'),
    ],
)
def test_a_mistake_in_a_server_key_says_what_is_wrong(
    tmp_path: Path, line: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        infer_config(tmp_path, f"{line}\n{TABLE}")
    assert message(caught.value, tmp_path).startswith(f"infer/i.toml: {expected}")


@pytest.mark.parametrize("text", ["", "models = []", "[ipc]"])
def test_at_least_one_model_is_needed(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"i\.toml: models: needs at least one \[\[models\]\]"):
        infer_config(tmp_path, text)


@pytest.mark.parametrize("text", ["models = 3", "models = ['a']", "[models]\nmodel_name = 'a'"])
def test_models_are_tables(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"i\.toml: models = .*: expected \[\[models\]\] tables"):
        infer_config(tmp_path, text)


def test_the_second_table_is_named_by_its_index(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\[1\]\.max_batch_size = 0: expected"):
        infer_config(tmp_path, TABLE + SECOND_TABLE + "max_batch_size = 0")


def test_model_names_must_differ(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'models\[1\]\.model_name = "a": is also the name of m'):
        infer_config(tmp_path, TABLE + TABLE)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("num_heads = 2", "num_heads = 3", "num_heads = 3: must divide embedded_dim = 128"),
        ("num_heads = 2", "", "num_heads: missing (heads; must divide embedded_dim)"),
        ("num_cells = 2", "num_cell = 2", 'num_cell: unknown key; did you mean "num_cells"?'),
        (
            "",
            'model_type = "sequence_embedding"\n',
            'model_type = "sequence_embedding": only "auto',
        ),
        ("", "dropout_prob = 0.01\n", "dropout_prob = 0.01: RWKV-7 has no dropout (rwkv-rs reads"),
        ("", "with_token_shift = false\n", "with_token_shift = false: RWKV-7 always has"),
        ("", "with_deep_embed_att = true\n", "with_deep_embed_att = true: DeepEmbed is not supp"),
        ("", "with_deep_embed_ffn = true\n", "with_deep_embed_ffn = true: DeepEmbed is not supp"),
        ("", "channel_mix_dim_scale = 3.3\n", "channel_mix_dim_scale = 3.3: times embedded_dim"),
        ("", "w_lora_rank = 0\n", "w_lora_rank = 0: expected `int` >= 1"),
    ],
)
def test_a_mistake_in_a_model_config_names_that_file(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    model = MODEL.replace(old, new, 1) if old else new + MODEL
    with pytest.raises(ConfigError) as caught:
        infer_config(tmp_path, model=model)
    assert message(caught.value, tmp_path).startswith(f"model/m.toml: {expected}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('dataset_format = "rwkv"', 'dataset_format = "rwkv": only "rwkv_legacy" (binidx)'),
        ('dataset_format = "bin"', 'dataset_format = "bin": not one of these; there are: rwkv_leg'),
        ("num_nodes = 2", "num_nodes = 2: only 1 is supported: several devices come later"),
        ("num_devices_per_node = 8", "num_devices_per_node = 8: only 1 is supported"),
        ("paragraph_length = 256", "paragraph_length = 256: must equal context_length = 512"),
        ("use_tui = true", "use_tui = true: not supported: progress is shown"),
        ("upload_to_wandb = true", "upload_to_wandb = true: not supported: leave the key out"),
        ('wandb_project_name = "p"', 'wandb_project_name = "p": not supported: leave'),
        ('wandb_api_key = "hidden"', "wandb_api_key: not supported: leave the key out"),
        ("save_freq = 10", "save_freq = 10: not supported: use save_every_steps"),
        ("adam_beta1 = 1.0", "adam_beta1 = 1.0: expected `float` < 1.0"),
        ("gradient_clip_val = 0", "gradient_clip_val = 0: expected `float` > 0.0"),
        ('val_dataset = "val"', "tokenizer_vocab_path: missing: bits per byte on val_dataset need"),
        ('val_dataset = "a/b"', 'val_dataset = "a/b": is a name, not a path'),
        ('record_path = ""', 'record_path = "": must not be empty; leave the key out instead'),
        ("context_len = 1\ncontext_length = 1", "context_length: is another spelling of context_"),
    ],
)
def test_a_mistake_in_a_train_config_says_what_is_wrong(
    tmp_path: Path, line: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        train_config(tmp_path, TRAIN + line)
    assert message(caught.value, tmp_path).startswith(f"train/t.toml: {expected}")


@pytest.mark.parametrize(
    ("key", "value"), [("optimizer", '"adam"'), ("experiment_name", '"a/b"'), ("model_cfg", '"x"')]
)
def test_required_train_keys_are_checked(tmp_path: Path, key: str, value: str) -> None:
    lines = [line for line in TRAIN.splitlines() if not line.startswith(key)]
    with pytest.raises(ConfigError, match=rf"t\.toml: {key}: missing"):
        train_config(tmp_path, "\n".join(lines))
    with pytest.raises(ConfigError, match=rf"t\.toml: {key} = {value}"):
        train_config(tmp_path, "\n".join([*lines, f"{key} = {value}"]))


def test_paragraph_length_may_equal_context_length(tmp_path: Path) -> None:
    config = train_config(tmp_path, TRAIN + "context_len = 64\nparagraph_length = 64")
    assert config.paragraph_length == 64


def test_tokens_per_step_count_accumulation(tmp_path: Path) -> None:
    lines = "batch_size_per_device = 3\nnum_accumulation_steps_per_device = 5\ncontext_length = 7"
    config = train_config(tmp_path, TRAIN + lines)
    assert (config.batch_size, config.num_tokens_per_step) == (15, 105)


def test_broken_toml_is_placed_by_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        infer_config(tmp_path, 'api_key = "k"\nhttp_bind_addr = oops\n' + TABLE)
    assert message(caught.value, tmp_path) == "infer/i.toml:2:18: is not TOML: Invalid value"


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"i\.toml:6:\d+: is not TOML: Cannot overwrite a value"):
        infer_config(tmp_path, TABLE + 'model_name = "b"\n')


def test_a_file_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "infer" / "i.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"i\.toml: is not UTF-8: byte 0xe9 at offset 5"):
        load_infer(tmp_path, "i")


@pytest.mark.parametrize("load", [load_infer, load_train, load_model])
@pytest.mark.parametrize("name", ["rwkv-lm-tyny", "../infer/rwkv-lm-tiny", "", "rwkv-lm-tiny.toml"])
def test_an_unknown_config_name_lists_what_exists(tmp_path: Path, load, name: str) -> None:  # type: ignore[no-untyped-def]
    for kind in ("model", "infer", "train"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "rwkv-lm-tiny.toml").write_text("")
        (tmp_path / kind / "rwkv-lm-1b.toml").write_text("")
    with pytest.raises(ConfigError, match=r"there are: rwkv-lm-1b, rwkv-lm-tiny$") as caught:
        load(tmp_path, name)
    assert not name.startswith("rwkv") or 'did you mean "rwkv-lm-tiny"?' in str(caught.value)


def test_a_wrong_config_folder_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*/nowhere/infer; --config-dir"):
        load_infer(tmp_path / "nowhere", "i")


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=4,
    ).filter(lambda value: value is not None),
    key=st.sampled_from(["paragraph_len", "device_ids", "dtype", "weights_path", "model_cfg"]),
)
def test_any_value_gives_a_config_or_a_config_error(tmp_path_factory, key, value) -> None:  # type: ignore[no-untyped-def]
    """Never another exception, whatever is written: the reload loop relies on it."""
    folder = write_config(tmp_path_factory.getbasetemp() / "any_value")
    document = tomlkit.parse(TABLE)
    try:
        document["models"][0][key] = value  # type: ignore[index]
        text = document.as_string()
    except (ValueError, TypeError):
        return  # tomlkit cannot write it: nor can a user
    with contextlib.suppress(ConfigError):
        config = parse_infer(text, folder, folder / "infer" / "i.toml")
        assert config.models[0].paragraph_len >= 1


def test_importing_config_does_not_import_torch() -> None:
    code = "import sys, config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
