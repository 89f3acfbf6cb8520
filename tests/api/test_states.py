"""/v1/states: the routes that find, file and move states. Those are made in another file."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.types import StateOptions
from tests.api.harness import Reply, Running, chat_body, model_table, running
from tests.api.scripted import spelled
from tests.api.scripted_engine import MAGIC


async def create(server: Running, **fields: object) -> Reply:
    return await server.post("/v1/states", fields)


async def text_of(server: Running, reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return spelled(server.states.find("", reply.json()["id"]).ids)


def assert_error(reply: Reply, status: int, code: str, param: str | None = None) -> None:
    assert (reply.status, reply.error["code"], reply.error["param"]) == (status, code, param)


class TestOneState:
    async def test_get(self, tmp_path: Path):
        async with running(tmp_path) as server:
            state = (await create(server, prompt="ab")).json()
            assert (await server.get(f"/v1/states/{state['id']}")).json() == state

    async def test_fork_is_a_second_id(self, tmp_path: Path):
        async with running(tmp_path) as server:
            state = (await create(server, prompt="ab", label="one")).json()
            path = f"/v1/states/{state['id']}/fork"
            bare = await server.request("POST", path)
            filed = (await server.post(path, {"label": "two", "ttl_s": 60, "pinned": True})).json()
            assert await text_of(server, bare) == "ab"
        assert bare.json()["parent"] == state["id"]
        assert bare.json()["id"] != state["id"]
        assert (filed["label"], filed["pinned"]) == ("two", True)
        assert filed["expires_at"] - filed["created"] == 60

    @pytest.mark.parametrize("method", ["POST", "PATCH"])
    async def test_change_changes_what_is_given(self, tmp_path: Path, method: str):
        async with running(tmp_path) as server:
            state = (await create(server, prompt="ab", label="one", ttl_s=60)).json()
            path = f"/v1/states/{state['id']}"
            pinned = (await server.request(method, path, {"pinned": True, "label": None})).json()
            assert pinned == state | {"pinned": True}
            named = (await server.request(method, path, {"label": ""})).json()
            assert named == state | {"pinned": True, "label": ""}
            longer = (await server.request(method, path, {"ttl_s": 5000})).json()
            assert longer["expires_at"] >= state["created"] + 5000
            for_ever = (await server.request(method, path, {"ttl_s": 0})).json()
            assert for_ever["expires_at"] is None

    async def test_delete(self, tmp_path: Path):
        async with running(tmp_path) as server:
            state = (await create(server, prompt="ab")).json()
            path = f"/v1/states/{state['id']}"
            reply = await server.request("DELETE", path)
            again = await server.request("DELETE", path)
        assert reply.json() == {"id": state["id"], "object": "state", "deleted": True}
        assert_error(again, 404, "state_not_found", "state")

    async def test_unknown_one_is_404_everywhere(self, tmp_path: Path):
        async with running(tmp_path) as server:
            for method, path in (
                ("GET", ""),
                ("PATCH", ""),
                ("DELETE", ""),
                ("POST", "/fork"),
                ("GET", "/export"),
            ):
                reply = await server.request(method, f"/v1/states/nope{path}")
                assert_error(reply, 404, "state_not_found", "state")

    async def test_wrong_fields_are_refused_by_name(self, tmp_path: Path):
        async with running(tmp_path) as server:
            state = (await create(server, prompt="ab")).json()
            path = f"/v1/states/{state['id']}"
            unknown = await server.post(path, {"lable": "x"})
            negative = await server.post(f"{path}/fork", {"ttl_s": -1})
            text = await server.post(path, b"label=x", content_type="text/plain")
            query = await server.get(f"{path}?limit=3")
        assert_error(unknown, 400, "invalid_value", "lable")
        assert_error(negative, 400, "invalid_value", "ttl_s")
        assert_error(text, 415, "unsupported_media_type")
        assert_error(query, 400, "invalid_value", "limit")

    async def test_wrong_method_says_which_are_right(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = await server.request("PUT", "/v1/states/x", {})
        assert_error(reply, 405, "method_not_allowed")
        assert reply.headers["allow"] == "GET, HEAD, POST, PATCH, DELETE, OPTIONS"


class TestList:
    async def test_newest_come_first_in_pages(self, tmp_path: Path):
        async with running(tmp_path) as server:
            made = [(await create(server, prompt="a", label=str(i))).json() for i in range(5)]
            whole = (await server.get("/v1/states")).json()
            first = (await server.get("/v1/states?limit=2")).json()
            second = (await server.get(f"/v1/states?limit=2&after={first['last_id']}")).json()
            third = (await server.get(f"/v1/states?limit=2&after={second['last_id']}")).json()
        made.reverse()
        assert whole == {
            "object": "list",
            "data": made,
            "first_id": made[0]["id"],
            "last_id": made[-1]["id"],
            "has_more": False,
        }
        assert [page["data"] for page in (first, second, third)] == [made[:2], made[2:4], made[4:]]
        assert [page["has_more"] for page in (first, second, third)] == [True, True, False]

    async def test_empty_list(self, tmp_path: Path):
        async with running(tmp_path) as server:
            reply = (await server.get("/v1/states")).json()
        assert (reply["data"], reply["first_id"], reply["has_more"]) == ([], None, False)

    async def test_wrong_queries_are_refused_by_name(self, tmp_path: Path):
        async with running(tmp_path) as server:
            for query, param in (
                ("limit=0", "limit"),
                ("limit=101", "limit"),
                ("limit=x", "limit"),
                ("after=nope", "after"),
                ("befor=x", "befor"),
                ("limit=1&limit=2", "limit"),
            ):
                reply = await server.get(f"/v1/states?{query}")
                assert_error(reply, 400, "invalid_value", param)


class TestExportAndImport:
    async def test_exported_one_can_be_imported(self, tmp_path: Path):
        async with running(tmp_path) as server:
            state = (await create(server, prompt="ab")).json()
            file = await server.get(f"/v1/states/{state['id']}/export")
            path = "/v1/states/import?label=again%20and%20again&ttl_s=60&pinned=true"
            imported = await server.post(path, file.body, content_type="application/octet-stream")
            assert await text_of(server, imported) == "ab"
        assert file.headers["content-type"] == "application/octet-stream"
        name = f'attachment; filename="{state["id"]}.safetensors"'
        assert file.headers["content-disposition"] == name
        copy = imported.json()
        assert copy["id"] != state["id"]
        assert (copy["label"], copy["pinned"]) == ("again and again", True)
        assert copy["expires_at"] - copy["created"] == 60

    async def test_any_content_type_is_fine(self, tmp_path: Path):
        """curl --data-binary says it is a form."""
        async with running(tmp_path) as server:
            form = "application/x-www-form-urlencoded"
            reply = await server.post("/v1/states/import", MAGIC + b"[1, 2]", content_type=form)
        assert reply.json()["num_tokens"] == 2

    async def test_file_of_another_model_is_400(self, tmp_path: Path):
        async with running(tmp_path) as server:
            foreign = await server.post("/v1/states/import", b"something else")
            empty = await server.post("/v1/states/import", b"")
            unknown = await server.post("/v1/states/import?lable=x", MAGIC + b"[]")
        assert_error(foreign, 400, "state_mismatch")
        assert_error(empty, 400, "invalid_value")
        assert_error(unknown, 400, "invalid_value", "lable")

    async def test_limit_of_bodies_holds(self, tmp_path: Path):
        async with running(tmp_path, request_body_limit_bytes=1000) as server:
            reply = await server.post("/v1/states/import", MAGIC + b"1" * 1000)
        assert_error(reply, 413, "request_too_large")

    async def test_full_is_507(self, tmp_path: Path):
        async with running(tmp_path) as server:
            state = (await create(server, prompt="ab")).json()
            server.states.max_num_states = 1
            imported = await server.post("/v1/states/import", MAGIC + b"[1]")
            forked = await server.request("POST", f"/v1/states/{state['id']}/fork")
        assert_error(imported, 507, "states_full")
        assert_error(forked, 507, "states_full")


class TestSeveralModels:
    async def test_model_must_be_named(self, tmp_path: Path):
        async with running(tmp_path, model_table("m"), model_table("other")) as server:
            for reply in (
                await create(server, prompt="a"),
                await server.get("/v1/states"),
                await server.get("/v1/states/x"),
                await server.post("/v1/states/import", MAGIC + b"[1]"),
            ):
                assert_error(reply, 400, "invalid_value", "model")
                assert "available models: m, other" in reply.error["message"]

    async def test_in_the_body_or_in_the_query(self, tmp_path: Path):
        async with running(tmp_path, model_table("m"), model_table("other")) as server:
            body = (await create(server, prompt="a", model="other")).json()
            query = (await server.post("/v1/states?model=other", {"prompt": "a"})).json()
            listed = (await server.get("/v1/states?model=other")).json()
            elsewhere = await server.get(f"/v1/states/{body['id']}?model=m")
            path = f"/v1/states/{body['id']}/fork"
            forked = (await server.post(path, {"model": "other"})).json()
            changed = await server.post(f"/v1/states/{body['id']}", {"model": "other", "label": ""})
            deleted = await server.request("DELETE", f"/v1/states/{body['id']}?model=other")
        assert [state["id"] for state in listed["data"]] == [query["id"], body["id"]]
        assert {state["model"] for state in (body, query, forked)} == {"other"}
        assert_error(elsewhere, 404, "state_not_found", "state")
        assert (changed.status, deleted.status) == (200, 200)


async def test_key_is_asked_for(tmp_path: Path):
    async with running(tmp_path, api_key="sk-1") as server:
        server.states.add("", (1,), StateOptions())
        assert (await server.get("/v1/states")).status == 401
        listed = await server.get("/v1/states", authorization="sk-1")
    assert listed.json()["data"] == []


async def test_text_of_a_cached_state_is_never_in_its_object(tmp_path: Path):
    async with running(tmp_path) as server:
        reply = await create(server, prompt="secret")
        answer = await server.post("/v1/chat/completions", chat_body(state=reply.json()["id"]))
    assert b"secret" not in reply.body + answer.body
