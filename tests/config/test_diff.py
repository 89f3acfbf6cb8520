"""What a changed InferConfig asks of a running server, key by key."""

from __future__ import annotations

from pathlib import Path

import pytest

from config import Change, InferConfig, ReloadPlan, diff
from config.key import keys_of
from config.schema import ModelTable
from tests.config.config_files import MODEL, TABLE, infer_config

B = TABLE.replace('"a"', '"b"')


def plan_of(
    folder: Path, before: str, after: str, *, model: str = MODEL, replaced: tuple[str, ...] = ()
) -> ReloadPlan:
    old: InferConfig = infer_config(folder, before)
    new = infer_config(folder, after, model=model)
    return diff(old, new, {(folder / "infer" / name).resolve() for name in replaced})


def changes(plan: ReloadPlan) -> dict[str, str]:
    return {model.model_name: str(model.change) for model in plan.models}


def test_the_same_config_asks_for_nothing(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TABLE, "# a comment\n" + TABLE)
    assert plan.is_empty
    assert changes(plan) == {"a": "unchanged"}


LINES = {
    "max_context_len = 1": "live",
    "decode_first = false": "live",
    "max_batch_tokens = 999": "live",
    "max_waiting = 3": "live",
    'template = "rwkv-rs"': "live",
    'device_type = "cpu"': "rebuild",
    "device_ids = [1]": "rebuild",
    "max_batch_size = 5": "rebuild",
    "paragraph_len = 128": "rebuild",
    'dtype = "float64"': "rebuild",
    'dtype = "int8"': "rebuild",
    'load_format = "dummy"': "rebuild",
    'state_dtype = "float16"': "rebuild",
    'cuda_graphs = "off"': "rebuild",
    "num_threads = 2": "rebuild",
    "num_state_slots = 9": "rebuild",
    "enable_prefix_cache = false": "rebuild",
    "host_state_mib = 7": "rebuild",
    'state_dir = "states"': "rebuild",
    "disk_state_mib = 7": "rebuild",
    'initial_states = ["poet.pth"]': "rebuild",
    'initial_states = ["poet.pth"]\ninitial_state = "poet"': "rebuild",
    "state_ttl_s = 60.0": "live",
    "time_slice_tokens = 64": "live",
    'context_policy = "report"': "live",
    "max_waiting = 3\nmax_batch_size = 5": "rebuild",
    "max_waiting = 256": "unchanged",  # the default, written out
}


@pytest.mark.parametrize("line", LINES)
def test_a_key_changes_a_model_live_or_by_a_new_replica(tmp_path: Path, line: str) -> None:
    plan = plan_of(tmp_path, TABLE + B, TABLE + line + "\n" + B)
    assert changes(plan) == {"a": LINES[line], "b": "unchanged"}
    keys = [part.split(" =")[0] for part in line.splitlines()]
    changed = plan.models[0].keys
    assert set(changed) == (set() if LINES[line] == "unchanged" else set(keys))


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("a.pth", "b.pth", "weights_path"),
        ("vocab.txt", "w.txt", "tokenizer_vocab_path"),
        ('"m"', '"../model/m.toml"', "model_cfg"),
    ],
)
def test_another_file_needs_a_new_replica(tmp_path: Path, old: str, new: str, key: str) -> None:
    plan = plan_of(tmp_path, TABLE, TABLE.replace(old, new))
    assert (plan.models[0].change, plan.models[0].keys[0]) == (Change.REBUILD, key)


def test_every_key_of_a_model_is_covered_here() -> None:
    tested = {part.split(" =")[0] for line in LINES for part in line.splitlines()}
    tested |= {"weights_path", "tokenizer_vocab_path", "model_cfg"}
    assert tested | {"model_name"} == keys_of(ModelTable).keys()


def test_a_changed_model_config_needs_a_new_replica(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TABLE, TABLE, model=MODEL.replace("num_cells = 2", "num_cells = 3"))
    assert (plan.models[0].change, plan.models[0].keys) == (Change.REBUILD, ("model",))


@pytest.mark.parametrize(
    ("name", "key"), [("a.pth", "weights_path"), ("vocab.txt", "tokenizer_vocab_path")]
)
def test_a_replaced_file_needs_a_new_replica(tmp_path: Path, name: str, key: str) -> None:
    plan = plan_of(tmp_path, TABLE, TABLE, replaced=(name,))
    assert (plan.models[0].change, plan.models[0].keys) == (Change.REBUILD, (key,))
    assert plan_of(tmp_path, TABLE, TABLE, replaced=("other.pth",)).is_empty


def test_replaced_weights_do_not_matter_to_a_dummy_model(tmp_path: Path) -> None:
    dummy = TABLE + 'load_format = "dummy"'
    assert plan_of(tmp_path, dummy, dummy, replaced=("a.pth",)).is_empty


def test_models_come_and_go_by_name(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TABLE + B, B + TABLE.replace('"a"', '"c"'))
    assert changes(plan) == {"b": "unchanged", "c": "added", "a": "removed"}
    assert plan.names(Change.ADDED) == ("c",)
    assert plan.names(Change.REMOVED) == ("a",)
    assert not plan.is_empty


def test_another_order_of_models_asks_for_nothing(tmp_path: Path) -> None:
    assert plan_of(tmp_path, TABLE + B, B + TABLE).is_empty


@pytest.mark.parametrize(
    "line",
    [
        'api_key = "k"',
        'api_keys = ["k"]',
        'admin_api_key = "k"',
        'allowed_origins = ["http://a"]',
        "request_body_limit_bytes = 1",
        "sse_keep_alive_ms = 1",
        "drain_timeout_s = 1",
    ],
)
def test_these_server_keys_change_live(tmp_path: Path, line: str) -> None:
    plan = plan_of(tmp_path, TABLE, f"{line}\n{TABLE}")
    assert (plan.live_keys, plan.restart_keys) == ((line.split(" =")[0],), ())


@pytest.mark.parametrize("line", ['http_bind_addr = "a:1"', "enable_vllm_metrics = false"])
def test_these_server_keys_need_a_restart(tmp_path: Path, line: str) -> None:
    plan = plan_of(tmp_path, TABLE, f"{line}\n{TABLE}")
    assert (plan.live_keys, plan.restart_keys) == ((), (line.split(" =")[0],))
    assert not plan.is_empty
