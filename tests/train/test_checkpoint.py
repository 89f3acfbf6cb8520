"""Checkpoints: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train import checkpoint
from train.checkpoint import CheckpointError


def save(run_dir: Path, step: int, keep: int = 3) -> Path:
    weights = {"w": torch.full((4, 3), float(step)) + 1 / 3}
    state = {**weights, "w:exp_avg": torch.arange(5.0), "w:step": torch.tensor(float(step))}
    return checkpoint.save(run_dir, step, weights, state, {"note": [step, 0.1 + 0.2]}, keep)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder(run_dir).iterdir())


def test_what_is_saved_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found.step == 7
    assert found.meta["note"] == [7, 0.1 + 0.2]
    assert torch.equal(found.tensors["w"], torch.full((4, 3), 7.0) + 1 / 3)
    assert torch.equal(found.tensors["w:exp_avg"], torch.arange(5.0))


def test_the_servable_file_holds_bf16_weights_only(tmp_path: Path) -> None:
    tensors = load_file(save(tmp_path, 7) / "model.safetensors")
    assert list(tensors) == ["w"]
    assert tensors["w"].dtype == torch.bfloat16


def test_the_servable_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "by_umask").touch()
    mode = (save(tmp_path, 7) / "model.safetensors").stat().st_mode
    assert mode == (tmp_path / "by_umask").stat().st_mode


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9_999, 10_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00009999", "step-00010000"]


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_is_passed_over_with_a_warning(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step-00000002 is damaged" in caplog.text


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", "null"])
def test_a_damaged_manifest_damages_the_checkpoint(tmp_path: Path, manifest: str) -> None:
    (save(tmp_path, 1) / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole"):
        checkpoint.load_newest(tmp_path)


def test_the_manifest_states_real_sizes_and_digests(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_bytes())
    digests = subprocess.run(
        ["sha256sum", "meta.json"], cwd=path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert manifest["meta.json"] == {
        "num_bytes": (path / "meta.json").stat().st_size,
        "sha256": digests[0],
    }
    assert set(manifest) == {"meta.json", "model.safetensors", "state.safetensors"}


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "meta.json").write_text("?")
    save(tmp_path, 2)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found.step == 2
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_damaged_later_checkpoint_does_not_cost_the_one_just_saved(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 9) / "meta.json").write_text("?")
    save(tmp_path, 2, keep=1)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found.step == 2


def test_left_over_temporary_folders_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (checkpoint.folder(tmp_path) / ".tmp-step-00000002-77").mkdir()
    checkpoint.load_newest(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


def test_a_full_disk_keeps_the_older_checkpoint_and_leaves_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


WRITE_BEYOND_LIMIT = """
import resource, signal, sys
from pathlib import Path
import torch
from train import checkpoint
run_dir = Path(sys.argv[1])
weights = {"w": torch.ones(100_000)}
checkpoint.save(run_dir, 1, weights, weights, {}, 3)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (100_000, 300_000):  # within the first file, within the second
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save(run_dir, 2, weights, weights, {}, 3)
    except OSError as error:
        print("OSError", error)
"""


def test_a_real_failing_write_is_an_os_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_BEYOND_LIMIT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert [x.split()[0] for x in done.stdout.splitlines()] == ["OSError", "OSError"]
    assert names(tmp_path) == ["step-00000001"]


# Saves step after step, each in a child that is killed before its k-th operation on files.
KILL_AT_EVERY_POINT = """
import os, pathlib, signal, sys
import torch
from train import checkpoint
run_dir, budget = pathlib.Path(sys.argv[1]), 0

def on_operation(event, _arguments):
    global budget
    if event == "open" or event.startswith(("os.", "shutil.")):
        budget -= 1
        if budget == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def save(step):
    weights = {"w": torch.full((50,), float(step))}
    checkpoint.save(run_dir, step, weights, weights, {"seen": step}, 2)

save(1); save(2)
step = 3
for k in range(1, 500):
    child = os.fork()
    if child == 0:
        budget = k
        sys.addaudithook(on_operation)
        save(step)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    whole = [checkpoint.load(path).step for path in checkpoint.folder(run_dir).glob("step-*")]
    found = checkpoint.load_newest(run_dir)
    assert found.step in (step - 1, step), (k, found.step, step)
    assert found.tensors["w"][0] == found.step == found.meta["seen"]
    assert len(whole) >= 2 and not list(checkpoint.folder(run_dir).glob(".tmp*"))
    step = found.step + 1
    if status == 0:
        print("points", k - 1)
        break
"""


def test_a_kill_at_any_point_of_a_save_leaves_whole_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL_AT_EVERY_POINT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    points = int(done.stdout.split()[1])
    assert points >= 15


def test_nothing_is_logged_when_all_is_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 1)
        checkpoint.load_newest(tmp_path)
    assert caplog.text == ""
