"""Checkpoints that survive a kill at any moment, a full disk and a damaged file.

Knows files and named tensors, not what they mean. Layout of a run folder:

    ckpt/step-00001000/   model.safetensors   bf16 weights under their official names: servable
                          state.safetensors   fp32 weights and the optimiser's moments
                          meta.json           whatever the trainer needs to go on
                          manifest.json       size and SHA-256 of the three, written last

A checkpoint is built in ckpt/.tmp-*, flushed to the disk and renamed: it is there whole or not
at all. There is no pointer to the newest one that could go stale.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.model.weights import save_safetensors

logger = logging.getLogger(__name__)

MODEL, STATE, META, MANIFEST = (
    "model.safetensors",
    "state.safetensors",
    "meta.json",
    "manifest.json",
)
_STEP_DIR = re.compile(r"step-(\d{8})")
Meta = dict[str, object]


class CheckpointError(Exception):
    """A checkpoint cannot be used, and no older one can take its place."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    step: int  # optimiser steps done
    tensors: dict[str, Tensor]  # of state.safetensors
    meta: Meta


def folder(run_dir: Path) -> Path:
    return run_dir / "ckpt"


def save(
    run_dir: Path,
    step: int,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    meta: Meta,
    keep: int,
) -> Path:
    """Write ckpt/step-N and then remove all but the newest `keep` up to N.

    `weights` are stored in bf16, `state` as it is. An OSError (a full disk) leaves the older
    checkpoints as they were and no temporary folder behind.
    """
    parent = folder(run_dir)
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / f"step-{step:08d}"
    temporary = parent / f".tmp-{target.name}-{os.getpid()}"
    try:
        temporary.mkdir()
        bf16 = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
        save_safetensors(temporary / MODEL, bf16, {"step": str(step)})
        save_file({k: v.detach().contiguous() for k, v in state.items()}, temporary / STATE)
        _write_json(temporary / META, {"step": step, **meta})
        _write_json(temporary / MANIFEST, _manifest(temporary))
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
    except SafetensorError as error:  # what safetensors makes of a failed write
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(str(error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():  # a damaged one that a resumed run has caught up with
        _discard(target)
    temporary.rename(target)
    _fsync(parent)
    older = [path for path in _step_dirs(parent) if _step_of(path) < step]
    for path in older[max(0, keep - 1) :]:
        _discard(path)
    return target


def load_newest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says, or None if there is none.

    Damaged ones are named in a warning and passed over. Raises CheckpointError if all are.
    """
    parent = folder(run_dir)
    for path in parent.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    found = _step_dirs(parent)
    for path in found:
        try:
            return load(path)
        except CheckpointError as error:
            logger.warning("%s; trying an older checkpoint", error)
    if found:
        raise CheckpointError(
            f"{parent}: none of {len(found)} checkpoints is whole; remove the folder to start anew"
        )
    return None


def load(path: Path) -> Checkpoint:
    """One checkpoint folder, checked against its manifest. Raises CheckpointError."""
    try:
        expected = json.loads((path / MANIFEST).read_bytes())
        actual = _manifest(path)
        if expected != actual:
            names = [name for name in actual if expected.get(name) != actual[name]]
            raise CheckpointError(f"{path} is damaged: {', '.join(names)} differs from {MANIFEST}")
        meta = json.loads((path / META).read_bytes())
        return Checkpoint(path, meta["step"], load_file(path / STATE), meta)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _manifest(path: Path) -> dict[str, dict[str, object]]:
    entries: dict[str, dict[str, object]] = {}
    for name in (MODEL, STATE, META):
        with (path / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[name] = {"num_bytes": (path / name).stat().st_size, "sha256": digest}
    return entries


def _step_dirs(parent: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in parent.glob("step-*") if _STEP_DIR.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    match = _STEP_DIR.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def _discard(path: Path) -> None:
    """Rename first, so that a kill in the middle leaves no half checkpoint under its name."""
    doomed = path.with_name(f".tmp-old-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
