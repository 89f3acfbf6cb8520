"""Who may import whom, what loads torch, and how long a file may be.

Reads the imports of every file by AST, so also those inside functions count, and asks a fresh
interpreter what really gets loaded.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("config", "engine", "api", "train")
MAX_LINES = 400

# What each package may import of the others.
MAY_IMPORT = {
    "config": (),
    "engine": ("config",),
    "api": ("config", "engine"),
    "train": ("config", "engine.model", "engine.kernels", "engine.tokenizer", "engine.errors"),
}

# The integers' side of the engine: importing one of these must not load torch.
WITHOUT_TORCH = (
    "engine",
    "engine.admission",
    "engine.batch",
    "engine.client",
    "engine.core",
    "engine.errors",
    "engine.keeper",
    "engine.output",
    "engine.persistence",
    "engine.pipeline",
    "engine.plan",
    "engine.response",
    "engine.scheduler",
    "engine.sequence",
    "engine.state.cache",
    "engine.state.files",
    "engine.state.matching",
    "engine.state.order",
    "engine.state.owners",
    "engine.state.page",
    "engine.state.parts",
    "engine.state.pool",
    "engine.state.prefix",
    "engine.state.snapshots",
    "engine.state.store",
    "engine.state.tiers",
    "engine.suspension",
    "engine.tokenizer",
    "engine.turns",
    "engine.types",
)
# Scheduling knows integers only: neither text nor the event loop.
INTEGERS_ONLY = (
    "engine.plan",
    "engine.scheduler",
    "engine.sequence",
    "engine.state.cache",
    "engine.state.files",
    "engine.state.matching",
    "engine.state.order",
    "engine.state.owners",
    "engine.state.page",
    "engine.state.pool",
    "engine.state.prefix",
    "engine.state.snapshots",
    "engine.state.tiers",
    "engine.turns",
)
NOT_INTEGERS = ("asyncio", "engine.tokenizer", "engine.output", "engine.client", "threading")


@cache
def files_of(folder: str) -> tuple[Path, ...]:
    return tuple(sorted((ROOT / folder).rglob("*.py")))


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Full names of the modules that a file imports, `from a import b` as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offences(package: str) -> list[str]:
    allowed = (package, *MAY_IMPORT[package])
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of(package)
        for name in sorted(imports_of(path))
        if name.partition(".")[0] in PACKAGES
        and not any(is_inside(name, other) or is_inside(other, name) for other in allowed)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    assert files_of(package), f"no files in {package}"
    assert offences(package) == []


def test_nobody_imports_tests_or_benchmarks() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package in PACKAGES
        for path in files_of(package)
        for name in imports_of(path)
        if name.partition(".")[0] in ("tests", "benchmarks")
    ]
    assert found == []


def test_one_module_knows_prometheus() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in files_of(package)
        if any(is_inside(name, "prometheus_client") for name in imports_of(path))
    }
    assert found == {"api/metrics.py"}


def test_scheduling_knows_integers_only() -> None:
    found = [
        f"{module} imports {name}"
        for module in INTEGERS_ONLY
        for name in imports_of(ROOT / f"{module.replace('.', '/')}.py")
        if any(is_inside(name, other) for other in NOT_INTEGERS)
    ]
    assert found == []


def modules_of(package: str) -> list[str]:
    """Every module of a package but its command line."""
    paths = [path.relative_to(ROOT) for path in files_of(package) if path.name != "__main__.py"]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_torch_is_not_loaded_by_the_server_or_the_integers_side_of_the_engine() -> None:
    modules = [*WITHOUT_TORCH, *modules_of("config"), *modules_of("api")]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(f'import {name} loads torch')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", [*PACKAGES, "benchmarks", "tests"])
def test_no_file_is_too_long(folder: str) -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n")
        for path in files_of(folder)
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_begins_with_a_docstring(package: str) -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files_of(package)}
    bare = [str(path) for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
    assert bare == []


def test_imports_are_seen_inside_functions_too(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import a.b\ndef f():\n    from c import d, e\n")
    assert imports_of(path) == {"a.b", "c", "c.d", "c.e"}
