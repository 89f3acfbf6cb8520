"""docs/states.md: each command of its recipes, what they print, and the table of sizes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from config import load_infer
from engine.state.layout import PageLayout
from tests.conftest import find_free_port
from tests.end_to_end.process import PROJECT, ServerProcess
from tests.end_to_end.site import Server, eventually, text_of

TEXT = (PROJECT / "docs" / "states.md").read_text()
RECIPES = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##)", TEXT, re.DOTALL | re.MULTILINE))
# A block of commands, and the block right after it that says what they print.
BLOCK = re.compile(r"```sh\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
DONE = "done, all of it"


def blocks(text: str) -> list[tuple[str, str]]:
    return [(command, output or "") for command, output in BLOCK.findall(text)]


class Shell:
    """A bash that is given one block after the other, as by somebody who pastes them."""

    def __init__(self, folder: Path, address: str, other: str = "") -> None:
        self._addresses = {"http://127.0.0.1:8080": address, "http://127.0.0.1:8081": other}
        self._bash = subprocess.Popen(
            ["bash", "-eu"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        preamble = TEXT[TEXT.index("## Recipes") : TEXT.index("### ")]
        self.run(*blocks(preamble)[0])

    def run(self, command: str, output: str) -> None:
        """Fails unless the block prints exactly that."""
        for address, ours in self._addresses.items():
            command = command.replace(address, ours)
        command = re.sub(r"\bcurl ", "curl -sS --fail-with-body ", command)
        stdin, stdout = self._bash.stdin, self._bash.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{command}\necho {DONE}\n")
        stdin.flush()
        lines = []
        while (line := stdout.readline()) != f"{DONE}\n":
            assert line, f"it stopped in {command!r} after {lines}"
            lines.append(line)
        assert "".join(lines) == output, command

    def close(self) -> None:
        self._bash.kill()
        self._bash.communicate()


@contextmanager
def pasting(folder: Path, address: str, other: str = "") -> Iterator[Shell]:
    shell = Shell(folder, address, other)
    try:
        yield shell
    finally:
        shell.close()


@contextmanager
def serving(log: Path, *arguments: str) -> Iterator[Server]:
    process = ServerProcess(arguments, log)
    try:
        yield Server(process)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def address() -> str:
    """Like the address of the documentation, the same one after a restart."""
    return f"127.0.0.1:{find_free_port()}"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, address: str) -> list[str]:
    """As in the documentation but for the places."""
    assert 'make serve ARGS="--set state_dir=~/rwkv-states"' in TEXT
    folder = tmp_path_factory.mktemp("rwkv-states")
    return ["--http-bind-addr", address, "--set", f"state_dir={folder}"]


@pytest.fixture(scope="module")
def server(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("log") / "log", *given) as server:
        yield server


def test_there_are_five_recipes() -> None:
    assert list(RECIPES) == [
        "Persona",
        "Branch",
        "Regenerate",
        "Resume after restart",
        "Move to another machine",
    ]
    assert TEXT.count("```sh\n") == 1 + sum(len(blocks(recipe)) for recipe in RECIPES.values())


@pytest.mark.parametrize("name", ["Persona", "Branch", "Regenerate"])
def test_recipe_does_what_it_says(name: str, server: Server, tmp_path: Path) -> None:
    with pasting(tmp_path, server.process.address) as shell:
        for command, output in blocks(RECIPES[name]):
            shell.run(command, output)
    for answer in tmp_path.glob("*.json"):
        assert text_of(json.loads(answer.read_text())).strip()


def test_move_to_another_machine(server: Server, tmp_path: Path) -> None:
    """And the snippet that computes the checksum of the file."""
    export, *rest = blocks(RECIPES["Move to another machine"])
    other = f"127.0.0.1:{find_free_port()}"
    (value,) = re.findall(r"-m api --http-bind-addr 127.0.0.1:8081 --set '(.*?)'\n", TEXT)
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    with pasting(tmp_path, server.process.address, f"http://{other}") as shell:
        shell.run(*export)
        value = value.replace("owl", f"{tmp_path}/owl")
        with serving(tmp_path / "log", "--http-bind-addr", other, "--set", value):
            for command, output in rest:
                shell.run(command, output)
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "True\n", done.stderr


def test_resume_after_restart(
    server: Server, given: list[str], tmp_path: Path, address: str
) -> None:
    """Comes last of those that share the server, since it stops it."""
    before, ask, *after = blocks(RECIPES["Resume after restart"])
    with pasting(tmp_path, f"http://{address}") as shell:
        shell.run(*before)
        shell.run(*ask)
        eventually(lambda: server.gauge("rwkv_requests_running") == 1)
        assert server.process.stop() == 0, server.log
        with serving(tmp_path / "log", *given) as again:
            for command, output in after:
                shell.run(command, output)
            whole = again.chat({"role": "user", "content": "Tell me a story."}, max_tokens=400)
    parts = [json.loads((tmp_path / name).read_text()) for name in ("first.json", "second.json")]
    assert "".join(text_of(part) for part in parts) == text_of(whole)


def test_sizes_are_those_of_the_shipped_models() -> None:
    table = TEXT[TEXT.index("<!-- sizes -->") : TEXT.index("<!-- end -->")]
    rows = re.findall(
        r"^\| (rwkv-lm-[\w.]+).*?\| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \|$", table, re.M
    )
    names = {path.stem for path in (PROJECT / "config/infer").glob("*.toml")}
    assert {name for name, *_ in rows} == names
    for name, num_bytes, mib, per_gib in rows:
        model = load_infer(PROJECT / "config", name).models[0].model
        layout = PageLayout(
            num_cells=model.num_cells,
            num_heads=model.num_heads,
            head_size=model.embedded_dim // model.num_heads,
            vocab_size=model.vocab_size,
            wkv_dtype="float32",
            shift_dtype="float32" if name == "rwkv-lm-tiny" else "bfloat16",
        )
        assert num_bytes == f"{layout.page_bytes:,}"
        assert mib == f"{layout.page_bytes / 2**20:.1f}"
        assert per_gib == f"{2**30 // layout.page_bytes:,}"


def test_links_lead_somewhere() -> None:
    for target, place in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", TEXT):
        path = PROJECT / "docs" / target if target else PROJECT / "docs/states.md"
        assert target.startswith("https://") or path.exists(), target
        if place:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert place in {heading.lower().replace(" ", "-") for heading in headings}
