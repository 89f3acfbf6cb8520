"""Every command and snippet of the README, against the embedded model as `make serve` runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.process import PROJECT, ServerProcess

README = (PROJECT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


CURLS = [
    command
    for block in blocks("sh")
    for command in re.split(r"\n(?=curl )", block.strip())
    if command.startswith("curl ")
]
PYTHONS = blocks("python")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`python -m api` with no argument but a free port."""
    log = tmp_path_factory.mktemp("embedded") / "server.log"
    server = ServerProcess(["--http-bind-addr", "127.0.0.1:0"], log)
    yield server
    server.kill()


def here(text: str, server: ServerProcess) -> str:
    return text.replace("http://127.0.0.1:8080", server.address)


@pytest.mark.parametrize("command", CURLS, ids=range(len(CURLS)))
def test_curl_lines_of_the_readme_work(command: str, embedded: ServerProcess) -> None:
    done = subprocess.run(
        ["bash", "-c", here(command, embedded).replace("curl ", "curl -sS --fail-with-body ", 1)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if '"stream": true' in command:
        events = [line[6:] for line in done.stdout.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        text = "".join(
            choice["delta"].get("content") or ""
            for event in events[:-1]
            for choice in json.loads(event)["choices"]
        )
        assert text.strip()
    elif command.endswith("/metrics"):
        assert "rwkv_requests_running" in done.stdout
    else:
        answer = json.loads(done.stdout)
        for choice in answer.get("choices", []):
            assert (choice.get("text") or choice["message"]["content"]).strip()


@pytest.mark.parametrize("code", PYTHONS, ids=range(len(PYTHONS)))
def test_python_snippets_of_the_readme_print_an_answer(
    code: str, embedded: ServerProcess, tmp_path: Path
) -> None:
    path = tmp_path / "snippet.py"
    path.write_text(here(code, embedded))
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 5


def test_the_printed_curl_line_works_when_pasted(embedded: ServerProcess) -> None:
    done = subprocess.run(
        ["bash", "-c", embedded.curl_line], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "data: [DONE]" in done.stdout


def test_toml_of_the_readme_is_a_config(tmp_path: Path) -> None:
    from config import parse_infer

    (block,) = blocks("toml")
    cfg = parse_infer(block, PROJECT / "config", PROJECT / "config/infer/readme.toml")
    assert cfg.models[0].model_name == "rwkv-lm-tiny"


def test_a_7_2b_config_without_its_weights_says_which_file_and_where_to_get_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "api", "--infer-cfg", "rwkv-lm-7.2b"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    for part in ("weights_path", "7.2b", ".pth", "huggingface"):
        assert part in done.stderr.lower() or part in done.stderr
    assert "Traceback" not in done.stderr


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (PROJECT / target).exists(), target
