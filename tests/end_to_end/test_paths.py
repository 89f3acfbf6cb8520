"""Names that clients send never become paths: nothing outside is read, written or deleted."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.api.harness import request_bytes
from tests.end_to_end.site import ADMIN, BOB, MODEL, STORY, Server, Site, eventually, refusal

CONTENT = "n0b0dys-business"
NAMES = ["canary", "canary.json", "canary.safetensors", "canary.toml", "canary.pth"]


@pytest.fixture
def outside(closed_site: Site, closed_server: Server) -> Iterator[Path]:
    """The folder that `state_dir` lies in, with files at every level that are not to be found."""
    folder = Path(str(closed_site.model["state_dir"])).parent
    paths = [place / name for place in (folder, closed_site.state_dir) for name in NAMES]
    for path in paths:
        path.write_text(CONTENT)
    yield folder
    for path in paths:
        assert path.read_text() == CONTENT
        path.unlink()


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """All files with size and time of the last change, but for what the server writes by itself."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".log" and "sqlite3" not in path.name:
            status = path.stat()
            is_page = path.parent.name == "pages"  # has the time of its last use
            times = (0, 0) if is_page else (status.st_size, status.st_mtime_ns)
            found[str(path.relative_to(folder))] = times
    return found


def listing_with(folder: Path, state_id: str) -> dict[str, tuple[int, int]]:
    """Once that state is on the disk: its page, then its record."""
    eventually(lambda: f"{state_id}.json" in " ".join(listing(folder)))
    return listing(folder)


def assert_untouched(folder: Path, before: dict[str, tuple[int, int]]) -> None:
    """Nothing is gone or changed, and only the cache may have left another page."""
    after = listing(folder)
    assert before.items() <= after.items()
    assert all("/pages/" in name for name in after.keys() - before.keys())


def names_of(folder: Path) -> list[str]:
    """Ways to say the canary's path from wherever files have names of ids."""
    stems = ["../canary", "../../canary", "../../../canary", f"{folder}/canary", f"file://{folder}"]
    odd = ["..\\canary", "..\\..\\canary", "....//canary", "..;/canary", "~/canary", ".", "..", ""]
    odd += [
        "\0",
        "state-x\0",
        "../canary\0.json",
        "*",
        "'; DROP TABLE responses; --",
        "a\r\nX-A: b",
    ]
    odd += ["état-😀\u202e", "．．／canary", "x" * 10_240, "../" * 3000 + "canary", "con", "-", "%"]
    return [*stems, *(f"{stem}.{end}" for stem in stems for end in ("json", "safetensors")), *odd]


def spellings(name: str) -> list[bytes]:
    """The name in a URL: as it is where that is a URL at all, in escapes, and in twice escaped."""
    escaped = quote(name, safe="").encode()
    plain = quote(name, safe="/\\:;.~*'()%").encode()
    return [
        plain,
        escaped,
        escaped.replace(b".", b"%2e").replace(b"%2F", b"%2f"),
        escaped.replace(b"%", b"%25"),
        escaped.replace(b"%2F", b"%c0%af"),
        escaped + b"%00",
    ]


ODD_PATHS = [
    b"%",
    b"%zz",
    b"%ff%fe",
    b"\xc3\xa9",
    b"\xff",
    b"\x01",
    b"a b",
    b"?",
    b"#",
    b"{state_id}",
]


def raw(server: Server, method: str, path: bytes, body: object = None) -> tuple[int, bytes]:
    """Status and answer to exactly these bytes, which clients would normalise."""
    request = request_bytes(method, "PATH", body, server.headers)
    answer = server.process.raw(request.replace(b"PATH", path, 1))
    return int(answer.split()[1]), answer


URLS = [
    ("GET", b"/v1/states/%b"),
    ("GET", b"/v1/states/%b/export"),
    ("POST", b"/v1/states/%b/fork"),
    ("PATCH", b"/v1/states/%b"),
    ("DELETE", b"/v1/states/%b"),
    ("GET", b"/v1/responses/%b"),
    ("GET", b"/v1/responses/%b/input_items"),
    ("DELETE", b"/v1/responses/%b"),
    ("GET", b"/v1/models/%b"),
    ("GET", b"/%b"),
]
ABOUT_THE_LIST = (b"/v1/states", b"/v1/responses", b"/v1/models", b"/")  # with nothing behind it


def test_ids_in_urls(closed_server: Server, outside: Path) -> None:
    kept = closed_server.state(prompt=STORY * 20)
    before = listing_with(outside, kept["id"])
    for spelling in [*ODD_PATHS, *(one for name in names_of(outside) for one in spellings(name))]:
        for method, pattern in URLS:
            path = pattern % spelling
            if path.split(b"?")[0].split(b"#")[0].rstrip(b"/") in (*ABOUT_THE_LIST, b""):
                continue
            body = {} if method in ("POST", "PATCH") else None
            status, answer = raw(closed_server, method, path, body)
            assert status in (400, 404, 405), (method, path, answer)
            assert CONTENT.encode() not in answer, (method, path)
            assert b"\nx-a:" not in answer.lower(), (method, path)
    assert_untouched(outside, before)
    assert "Traceback" not in closed_server.log
    assert closed_server.get(f"/v1/states/{kept['id']}")["id"] == kept["id"]
    assert closed_server.ask("DELETE", f"/v1/states/{kept['id']}").status == 200
    eventually(lambda: kept["id"] not in " ".join(listing(outside)))


PROMPT: dict[str, object] = {"model": MODEL, "prompt": "a", "max_tokens": 1}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
BODIES: list[tuple[str, dict[str, object], str]] = [
    ("/v1/completions", PROMPT, "state"),
    ("/v1/completions", PROMPT, "initial_state"),
    ("/v1/completions", PROMPT, "model"),
    ("/v1/completions", {"model": MODEL}, "resume"),
    ("/v1/chat/completions", CHAT, "state"),
    ("/v1/chat/completions", CHAT, "initial_state"),
    ("/v1/states", {}, "response"),
    ("/v1/states", {"prompt": "a"}, "state"),
    ("/v1/states", {"prompt": "a"}, "initial_state"),
    ("/v1/responses", {"model": MODEL, "input": "a"}, "previous_response_id"),
    ("/v1/messages", CHAT, "initial_state"),
    ("/v1/embeddings", {"model": MODEL, "input": "a"}, "initial_state"),
    ("/tokenize", {"prompt": "a"}, "model"),
]
FREE_TEXT: list[tuple[str, dict[str, object], str]] = [
    ("/v1/completions", PROMPT, "cache_salt"),
    ("/v1/completions", PROMPT, "user"),
    ("/v1/completions", PROMPT, "request_id"),
    ("/abort_request", {}, "rid"),
]


def test_names_in_bodies(closed_server: Server, outside: Path) -> None:
    before = listing(outside)
    for name in names_of(outside):
        for path, body, field in BODIES:
            reply = closed_server.ask("POST", path, body | {field: name})
            assert reply.status in (400, 404), (path, field, name, reply)
            assert CONTENT.encode() not in reply.body, (path, field, name)
        for path, body, field in FREE_TEXT:
            reply = closed_server.ask("POST", path, body | {field: name})
            assert reply.status in (200, 400), (path, field, name, reply)
            assert CONTENT.encode() not in reply.body, (path, field, name)
    assert_untouched(outside, before)


def test_labels_are_no_names(closed_server: Server, outside: Path) -> None:
    """They may be any text of their length, and are in the record only."""
    before, made = listing(outside), []
    for name in [name for name in names_of(outside) if len(name) <= 256]:
        state = closed_server.state(prompt=STORY, label=name)
        assert state["label"] == name
        made.append(state["id"])
    exported = closed_server.ask("GET", f"/v1/states/{made[0]}/export")
    assert exported.headers["content-disposition"] == (
        f'attachment; filename="{made[0]}.safetensors"'
    )
    for state_id in made:
        assert closed_server.ask("DELETE", f"/v1/states/{state_id}").status == 200
    eventually(lambda: not any(one in " ".join(listing(outside)) for one in made))
    assert_untouched(outside, before)


def rewritten(data: bytes, metadata: dict[str, str], names: dict[str, str]) -> bytes:
    """A state file with other metadata and tensors of other names, its checksum mended."""
    (num_bytes,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + num_bytes])
    tensors = data[8 + num_bytes :]
    told = header["__metadata__"] | metadata
    del told["checksum"]
    lines = "".join(f"{key}={value}\n" for key, value in sorted(told.items()))
    told["checksum"] = blake2b(lines.encode() + tensors, digest_size=16).hexdigest()
    places = {names.get(key, key): value for key, value in header.items() if key != "__metadata__"}
    head = json.dumps({"__metadata__": told, **places}).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + tensors


def test_names_in_files_to_import(closed_server: Server, outside: Path) -> None:
    state = closed_server.state(prompt=STORY)
    data = closed_server.ask("GET", f"/v1/states/{state['id']}/export").body
    same = closed_server.ask("POST", "/v1/states/import", rewritten(data, {}, {}))
    assert same.status == 200, same  # so it is not the checksum that refuses the others
    assert closed_server.ask("DELETE", f"/v1/states/{same.json()['id']}").status == 200
    files = []
    for name in names_of(outside):
        files.append(rewritten(data, {"digest": name}, {}))
        files.append(rewritten(data, {}, {"wkv": name}))
        files.append(rewritten(data, {name: name}, {}))
    before = listing_with(outside, state["id"])
    for file in files:
        reply = closed_server.ask("POST", "/v1/states/import", file)
        assert reply.status == 400, reply
        assert CONTENT.encode() not in reply.body
    assert_untouched(outside, before)
    assert closed_server.ask("DELETE", f"/v1/states/{state['id']}").status == 200
    eventually(lambda: state["id"] not in " ".join(listing(outside)))


@pytest.mark.parametrize("key", ["weights_path", "tokenizer_vocab_path", "model_cfg"])
@pytest.mark.parametrize("name", ["canary", "canary.toml", "canary.pth", "canary.safetensors"])
def test_admins_may_name_files_but_are_not_shown_them(
    closed_server: Server, outside: Path, key: str, name: str
) -> None:
    """docs/api.md says that whoever may reload has files opened with the server's rights."""
    before = listing(outside)
    target = str(outside / name) if key != "model_cfg" else f"{outside}/canary.toml"
    body = {"upsert": [{"model_name": MODEL, key: target}]}
    for client in (closed_server, closed_server.asking_as(BOB)):
        refused = client.ask("POST", "/admin/models/reload", body)
        assert refusal(refused) == (403, "admin_key_required", None)
    reply = closed_server.asking_as(ADMIN).ask("POST", "/admin/models/reload", body)
    assert reply.status == 400, reply
    assert CONTENT not in reply.body.decode() + closed_server.log
    assert_untouched(outside, before)
