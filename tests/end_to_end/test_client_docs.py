"""docs/clients.md: each of its examples, as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.end_to_end.process import PROJECT
from tests.end_to_end.site import Server, Site

TEXT = (PROJECT / "docs" / "clients.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
PYTHONS = {
    name: block.group(1)
    for name, section in SECTIONS.items()
    if (block := re.search(r"```python\n(.*?)```", section, re.DOTALL))
}
TASK = {
    "task": "TASK",
    "dataset_path": "json",
    "test_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "Once upon a time there was",
    "doc_to_choice": ["a little dog", "7 qubits"],
    "doc_to_target": "label",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    with Site(tmp_path_factory.mktemp("clients"), model={}).serving() as running:
        yield running


def run(server: Server, folder: Path, *command: str, timeout_s: float = 110) -> str:
    address = server.process.address
    here = [part.replace("http://127.0.0.1:8080", address) for part in command]
    done = subprocess.run(
        here,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_client_has_an_example():
    assert {"anthropic", "langchain-openai", "litellm", "instructor"} <= PYTHONS.keys()


@pytest.mark.parametrize("name", PYTHONS)
def test_python_of_the_document_runs(server: Server, tmp_path: Path, name: str):
    module = name.replace("-", "_")
    if find_spec(module) is None:
        pytest.skip(f"{name} is not installed: `make clients` has an environment with all of them")
    assert run(server, tmp_path, sys.executable, "-c", PYTHONS[name]).strip()


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: `make clients`")
def test_line_of_lm_eval_runs(server: Server, tmp_path: Path):
    (tmp_path / "data.jsonl").write_text('{"label": 0}\n' * 3)
    data = {"dataset_kwargs": {"data_files": str(tmp_path / "data.jsonl")}}
    (tmp_path / "TASK.yaml").write_text(json.dumps(TASK | data))  # JSON is YAML
    (line,) = re.findall(r"```sh\n(.*?)```", SECTIONS["lm-eval"], re.DOTALL)
    line = line.replace("lm_eval ", f"{Path(sys.executable).parent}/lm_eval ", 1)
    table = run(
        server, tmp_path, "bash", "-c", f"{line.strip()} --include_path {tmp_path}", timeout_s=600
    )
    assert re.search(r"\|TASK *\|.*\|acc *\|.*\| *1\|", table), table
