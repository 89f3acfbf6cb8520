"""Ways to change the configuration of a running server."""

from __future__ import annotations

import os
from pathlib import Path

from tests.api.harness import Reply, Running

RELOAD = "/admin/models/reload"


def in_place(path: Path, text: str) -> None:
    path.write_text(text)


def by_rename(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + "~")
    temporary.write_text(text)
    os.replace(temporary, path)


def by_delete(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def edit(server: Running, old: str, new: str, write=in_place) -> None:
    text = server.config_file.read_text()
    assert old in text
    write(server.config_file, text.replace(old, new))


async def upsert(server: Running, *tables: dict[str, object], **fields: object) -> Reply:
    return await server.post(RELOAD, {"upsert": list(tables), **fields})


async def num_reloads(server: Running, result: str) -> int:
    text = (await server.service.metrics.render()).decode()
    start = f'rwkv_reloads_total{{result="{result}"'
    line = next(line for line in text.splitlines() if line.startswith(start))
    return int(float(line.split()[1]))
