"""What an import may cost: `import partinf` loads nothing, and the pure column never loads jax.

import-linter checks the same rules on the text of the imports; this checks what an interpreter really loads.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

# Everything else under partinf/ is pure. Commands are checked with the command line.
_JAX_COLUMN = (
    "partition",
    "transformer",
    "checkpoint",
    "proof",
    "execution",
    "measure",
    "experiment.execute",
    "cli",
    "__main__",
)
_HEAVY = ("jax", "jaxlib", "flax", "orbax", "chex", "optax", "tensorstore")


def _loaded(run_python: Run, imports: str) -> set[str]:
    done = run_python("-c", f"import sys\n{imports}\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def _modules(root: Path) -> list[str]:
    paths = (path.relative_to(root).with_suffix("") for path in (root / "partinf").rglob("*.py"))
    return sorted({".".join(path.parts).removesuffix(".__init__") for path in paths})


def _is_pure(module: str) -> bool:
    return not any(module == f"partinf.{name}" or module.startswith(f"partinf.{name}.") for name in _JAX_COLUMN)


def test_importing_the_package_loads_nothing(run_python: Run) -> None:
    loaded = _loaded(run_python, "import partinf")
    assert {name for name in loaded if name.startswith("partinf")} == {"partinf"}
    assert not loaded & {*_HEAVY, "numpy", "rich", "tokenizers", "safetensors"}


def test_the_pure_column_never_loads_jax(run_python: Run, root: Path) -> None:
    pure = [module for module in _modules(root) if _is_pure(module)]
    assert "partinf.foundation.resources" in pure
    loaded = _loaded(run_python, "\n".join(f"import {module}" for module in pure))
    assert set(pure) <= loaded
    guilty = [module for module in pure if loaded & set(_HEAVY) and _loaded(run_python, f"import {module}") & set(_HEAVY)]
    assert not guilty


@pytest.mark.parametrize("module", ["errors", "limits", "rounding", "documents", "caches", "resources"])
def test_the_lowest_floor_needs_the_standard_library_only(run_python: Run, module: str) -> None:
    loaded = {name.partition(".")[0] for name in _loaded(run_python, f"import partinf.foundation.{module}")}
    bare = {name.partition(".")[0] for name in _loaded(run_python, "")}
    standard = set(__import__("sys").stdlib_module_names)
    assert loaded - bare - standard <= {"partinf"}


@pytest.mark.parametrize("command", ["simulate", "run"])
def test_a_simulation_never_loads_jax(run_python: Run, tmp_path: Path, command: str) -> None:
    described = tmp_path / "some.toml"
    described.write_text('model = "demo"\nslice = "cpu:2x2x2"\nlayout = "ws-2d"\nweights = "f32"\nrequests = 2\nrounds = 0\n')
    flags = {
        "simulate": ["--model", "demo", "--slice", "cpu:2x2x2", "--layout", "ws-2d", "--requests", "2", "--lengths", "fixed:4:4"],
        "run": [str(described), "--on", "simulator"],
    }[command]
    done = run_python("-c", f"import sys\nfrom partinf.cli import main\nassert main({[command, *flags]}) == 0\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & set(_HEAVY)
    assert "partinf.simulation.cost_runner" in done.stdout.split()


def _file(root: Path, module: str) -> Path:
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports_jax(path: Path) -> bool:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return any(name.partition(".")[0] in _HEAVY for name in named)


def test_mypy_checks_every_file_that_imports_no_jax(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["files"] == ["partinf"]
    assert settings["strict"] is True
    assert "exclude" not in settings
    unchecked = {name for table in settings["overrides"] if table.get("ignore_errors") for name in table["module"]}
    skipped = {name for table in settings["overrides"] if not table.get("ignore_errors") for name in table["module"]}
    assert not [name for name in skipped if name.startswith("partinf")]
    files = {module: _file(root, module) for module in _modules(root)}
    assert unchecked <= {name for name, path in files.items() if _imports_jax(path)}
    assert not [name for name, path in files.items() if re.search(r"#\s*mypy:", path.read_text())]
