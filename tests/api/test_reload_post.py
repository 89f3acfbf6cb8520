"""POST /admin/models/reload: file and models change together, or neither."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.errors import WeightsError
from tests.api.harness import eventually, model_table, running
from tests.api.reloading import (
    RELOAD,
    by_rename,
    num_reloads,
    upsert,
)


async def test_upsert_and_remove_change_file_and_models(tmp_path: Path):
    async with running(tmp_path, model_table("a"), model_table("b"), api_key="sk") as server:
        reply = await server.post(
            RELOAD,
            {
                "upsert": [
                    {"model_name": "a", "max_batch_size": 3},
                    {
                        "model_name": "c",
                        "model_cfg": "tiny",
                        "load_format": "dummy",
                        "tokenizer_vocab_path": "../vocab.txt",
                    },
                ],
                "remove_model_names": ["b", "not there"],
            },
            authorization="Bearer sk",
        )
        text = server.config_file.read_text()
        assert await asyncio.to_thread(server.source.load) == server.service.config
        await asyncio.sleep(0.3)  # the watcher looks at the new file and finds nothing to do
    assert reply.status == 200, reply.body
    answer = reply.json()
    assert answer["changed_model_names"] == ["a", "c"]
    assert answer["rebuilt_model_names"] == ["a", "c"]
    assert answer["removed_model_names"] == ["b"]
    assert answer["active_model_names"] == ["a", "c"]
    assert answer["message"]
    assert "# a comment to keep" in text
    assert 'api_key = "sk"' in text
    assert await num_reloads(server, "applied") == 1
    assert len(server.builder.runners) == 4


async def test_dry_run_says_the_same_and_changes_nothing(tmp_path: Path):
    change = {"model_name": "m", "max_batch_size": 3}
    async with running(tmp_path) as server:
        before = server.config_file.read_bytes()
        dry = await upsert(server, change, dry_run=True)
        assert server.config_file.read_bytes() == before
        assert server.service.last_reload is None
        assert len(server.builder.runners) == 1
        wet = await upsert(server, change)
    names = ("changed_model_names", "rebuilt_model_names", "active_model_names")
    assert [dry.json()[name] for name in names] == [wet.json()[name] for name in names]
    assert (dry.json()["dry_run"], wet.json()["dry_run"]) == (True, False)


async def test_live_key_is_changed_without_a_rebuild(tmp_path: Path):
    async with running(tmp_path) as server:
        reply = await upsert(server, {"model_name": "m", "max_waiting": 7})
    assert reply.json()["changed_model_names"] == ["m"]
    assert reply.json()["rebuilt_model_names"] == []
    assert len(server.builder.runners) == 1


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"upsert": [{"model_name": "m", "max_bach_size": 3}]}, "max_batch_size"),
        ({"upsert": [{"model_name": "m", "max_batch_size": 0}]}, "max_batch_size"),
        ({"upsert": [{"max_batch_size": 3}]}, "model_name"),
        ({"upsert": [{"model_name": "new"}]}, "model_cfg"),
        ({"remove_model_names": ["m"]}, "models"),
        ({"dryrun": True}, "dry_run"),
        ({"upsert": 3}, "upsert"),
    ],
)
async def test_wrong_body_is_400_and_changes_nothing(tmp_path: Path, body, word: str):
    async with running(tmp_path) as server:
        before = server.config_file.read_bytes()
        reply = await server.post(RELOAD, body)
        assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
        assert word in reply.error["message"]
        assert server.config_file.read_bytes() == before
        assert (await server.chat()).status == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [(WeightsError("x.pth is corrupt"), 400), (MemoryError("no memory left"), 500)],
)
async def test_failing_build_leaves_the_file_alone(tmp_path: Path, error: Exception, status: int):
    async with running(tmp_path) as server:
        before = server.config_file.read_bytes()
        server.builder.error = error
        reply = await upsert(server, {"model_name": "m", "max_batch_size": 3})
        assert server.config_file.read_bytes() == before
        assert (await server.chat()).status == 200
        assert await num_reloads(server, "rejected") == 1
    assert reply.status == status
    assert str(error) in reply.error["message"]


async def test_file_that_cannot_be_written_undoes_the_build(tmp_path: Path, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("api.reload.write_atomic", full_disk)
    async with running(tmp_path) as server:
        reply = await upsert(server, {"model_name": "m", "max_batch_size": 3})
        assert server.snapshot().num_slots == 8
        assert (await server.chat()).status == 200
        await eventually(lambda: server.builder.runners[1].is_closed)
    assert reply.status == 500
    assert "No space left" in reply.error["message"]


async def test_replaced_vocabulary_is_loaded_again_on_request(tmp_path: Path):
    """The configuration is the same, the file behind it is not."""
    async with running(tmp_path) as server:
        vocab = server.source.config_dir / "vocab.txt"
        by_rename(vocab, vocab.read_text())
        reply = await upsert(server)
    assert reply.json()["rebuilt_model_names"] == ["m"]


async def test_client_that_goes_away_does_not_stop_it_half_way(tmp_path: Path):
    async with running(tmp_path) as server:
        server.builder.build_s = 0.3
        post = asyncio.create_task(upsert(server, {"model_name": "m", "max_batch_size": 3}))
        await asyncio.sleep(0.1)
        post.cancel()
        await eventually(lambda: server.snapshot().num_slots == 3)
        assert await asyncio.to_thread(server.source.load) == server.service.config


async def test_two_at_once_happen_one_after_the_other(tmp_path: Path):
    async with running(tmp_path) as server:
        server.builder.build_s = 0.1
        replies = await asyncio.gather(
            upsert(server, {"model_name": "m", "max_batch_size": 3}),
            upsert(server, {"model_name": "m", "paragraph_len": 32}),
        )
        table = server.service.config.models[0]
    assert [reply.status for reply in replies] == [200, 200]
    assert (table.max_batch_size, table.paragraph_len) == (3, 32)
