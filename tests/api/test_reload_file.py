"""The configuration files change: what the running server makes of it."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from api.source import ConfigSource
from config import InferConfig
from engine.errors import WeightsError
from tests.api.harness import eventually, model_table, running
from tests.api.reloading import (
    by_delete,
    by_rename,
    edit,
    in_place,
    num_reloads,
)


@pytest.mark.parametrize("write", [in_place, by_rename, by_delete])
async def test_every_way_of_saving_is_seen_more_than_once(tmp_path: Path, write):
    async with running(tmp_path) as server:
        for before, after in ((8, 9), (9, 10), (10, 11)):
            edit(server, f"max_batch_size = {before}", f"max_batch_size = {after}", write)
            await eventually(lambda n=after: server.snapshot().num_slots == n)
        assert (await server.chat()).status == 200
    assert len(server.builder.runners) == 4
    assert await num_reloads(server, "applied") == 3


async def test_swapped_links_are_seen(tmp_path: Path):
    """As Kubernetes mounts a ConfigMap: infer/test.toml -> ..data/test.toml -> a version."""
    async with running(tmp_path) as server:
        folder = server.config_file.parent
        text = server.config_file.read_text()
        for version, size in (("v1", 8), ("v2", 9), ("v3", 10)):
            (folder / version).mkdir()
            new = text.replace("max_batch_size = 8", f"max_batch_size = {size}")
            (folder / version / "test.toml").write_text(new)
            link = folder / "..data_tmp"
            link.symlink_to(version)
            os.replace(link, folder / "..data")
            if version == "v1":
                file_link = folder / "link"
                file_link.symlink_to("..data/test.toml")
                os.replace(file_link, server.config_file)
            await eventually(lambda n=size: server.snapshot().num_slots == n)


async def test_target_of_a_link_is_watched(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("api.watch.POLL_S", 60.0)
    async with running(tmp_path) as server:
        await asyncio.sleep(0.3)  # for the watch to begin
        target = tmp_path / "elsewhere" / "target.toml"
        target.parent.mkdir()
        target.write_text(server.config_file.read_text())
        server.config_file.unlink()
        server.config_file.symlink_to(target)
        await asyncio.sleep(0.5)
        in_place(target, target.read_text().replace("max_batch_size = 8", "max_batch_size = 9"))
        await eventually(lambda: server.snapshot().num_slots == 9)


async def test_half_written_file_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch):
    """Half of it is valid as well: the 1 of 12."""
    is_read = threading.Event()
    load = ConfigSource.load

    def load_and_tell(source: ConfigSource) -> InferConfig:
        config = load(source)
        is_read.set()
        return config

    async with running(tmp_path) as server:
        monkeypatch.setattr(ConfigSource, "load", load_and_tell)
        text = server.config_file.read_text()
        text = text.replace("max_batch_size = 8", "max_batch_size = 12")
        half = text.index("max_batch_size = 1") + len("max_batch_size = 1")
        in_place(server.config_file, text[:half])
        await asyncio.to_thread(is_read.wait, 5)
        in_place(server.config_file, text)
        await eventually(lambda: server.snapshot().num_slots == 12)
    assert [table.max_batch_size for table in server.builder.tables] == [8, 12]


async def test_model_config_is_watched_too(tmp_path: Path):
    async with running(tmp_path) as server:
        path = server.source.config_dir / "model" / "tiny.toml"
        by_rename(path, path.read_text().replace("num_cells = 1", "num_cells = 2"))
        await eventually(lambda: len(server.builder.runners) == 2)
        await eventually(lambda: server.builder.runners[0].is_closed)
    assert server.builder.tables[1].model.num_cells == 2


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("max_batch_size = ", None),
        ('max_batch_size = "many"', "models[0].max_batch_size"),
        ("max_bach_size = 3", "models[0].max_bach_size"),
    ],
)
async def test_broken_file_keeps_the_old_configuration_and_says_so(
    tmp_path: Path, text: str, key: str | None, caplog
):
    async with running(tmp_path) as server:
        edit(server, "max_batch_size = 8", text)
        await eventually(lambda: server.service.last_reload is not None)
        report = (await server.get("/health")).json()["last_reload"]
        assert (await server.chat()).status == 200
        assert server.snapshot().num_slots == 8
        assert await num_reloads(server, "rejected") == 1
        edit(server, text, "max_batch_size = 9")
        await eventually(lambda: server.snapshot().num_slots == 9)
        mended = (await server.get("/health")).json()["last_reload"]
    assert (report["result"], report["source"], report["key"]) == ("rejected", "file", key)
    assert "test.toml" in report["file"]
    assert report["message"] in caplog.text
    assert mended["result"] == "applied"


async def test_model_that_cannot_be_built_changes_nothing(tmp_path: Path):
    async with running(tmp_path) as server:
        server.builder.error = WeightsError("x.pth is corrupt")
        edit(server, "max_batch_size = 8", "max_batch_size = 9")
        await eventually(lambda: server.service.last_reload is not None)
        assert "x.pth is corrupt" in server.service.last_reload.message
        assert server.snapshot().num_slots == 8
        assert (await server.chat()).status == 200


async def test_limits_change_on_the_running_replica(tmp_path: Path):
    async with running(tmp_path) as server:
        edit(server, "max_context_len = 0", "max_context_len = 10")
        await eventually(lambda: server.service.last_reload is not None)
        assert (await server.chat()).error["code"] == "context_length_exceeded"
        model = (await server.get("/v1/models/m")).json()
        assert model["max_model_len"] == 10
    assert len(server.builder.runners) == 1


async def test_server_keys_change_at_once(tmp_path: Path):
    async with running(tmp_path) as server:
        edit(
            server,
            "# a comment",
            'api_key = "sk-1"\nrequest_body_limit_bytes = 50\n# a comment',
        )
        await eventually(lambda: server.service.last_reload is not None)
        assert (await server.get("/v1/models")).status == 401
        assert (await server.get("/v1/models", authorization="sk-1")).status == 200
        body = b"x" * 51
        reply = await server.post("/v1/completions", body, authorization="sk-1")
        assert reply.status == 413


async def test_address_is_not_changed_but_the_need_of_a_restart_said(tmp_path: Path):
    async with running(tmp_path) as server:
        edit(server, "127.0.0.1:0", "127.0.0.1:1")
        await eventually(lambda: server.service.last_reload is not None)
        assert "restart the server for http_bind_addr" in server.service.last_reload.message
        assert (await server.chat()).status == 200


async def test_models_come_and_go(tmp_path: Path):
    async with running(tmp_path) as server:
        text = server.config_file.read_text()
        in_place(server.config_file, text + model_table("second"))
        await eventually(lambda: server.service.registry.names == ["m", "second"])
        assert (await server.chat(model="second")).status == 200
        in_place(server.config_file, text.replace('"m"', '"second"'))
        await eventually(lambda: server.service.registry.names == ["second"])
        assert (await server.chat()).status == 404
        await eventually(lambda: server.builder.runners[0].is_closed)
    assert len(server.builder.runners) == 2
