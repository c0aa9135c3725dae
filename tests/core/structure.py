"""Who imports whom in the package, read from the text of its files: every import counts, also one within a function or for type checkers.

python -m tests.core.structure        # rooms, arrows between them, circles
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]

Graph = Mapping[str, set[str]]
"""Module → modules that it imports."""


def imports(root: Path = ROOT, package: str = "partinf") -> Graph:
    """Of all modules of the package but its own `__init__`, which imports lazily whatever is asked for."""
    files = {_module(path.relative_to(root)): path for path in (root / package).rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        if module != package:
            named = {_known(name, files) for node in ast.walk(ast.parse(path.read_text())) for name in _names(node)}
            graph[module] = {name for name in named if name and name not in (module, package)}
    return graph


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _known(name: str, files: Mapping[str, Path]) -> str:
    """The module that is named, or in which the name stands; empty for what is no module of the package."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name


def rooms(graph: Graph) -> dict[str, set[str]]:
    """The same between the packages and modules that lie directly in the package."""
    found: dict[str, set[str]] = {}
    for module, targets in graph.items():
        room = module.split(".")[1]
        found.setdefault(room, set()).update({target.split(".")[1] for target in targets} - {room})
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others of the group."""
    reach = {module: _reached(graph, module) for module in graph}
    groups = {
        frozenset([module, *(other for other in reach[module] if module in reach[other])]) for module in graph if module in reach[module]
    }
    return sorted(sorted(group) for group in groups)


def _reached(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        new = graph.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def main() -> None:
    graph = imports()
    between = rooms(graph)
    print(f"{len(graph)} files, {sum(map(len, graph.values()))} imports; {len(between)} rooms, {sum(map(len, between.values()))} arrows")
    for label, found in (("files", circles(graph)), ("rooms", circles(between))):
        print(f"circles of {label}: {'; '.join(' ↔ '.join(group) for group in found) or 'none'}")


if __name__ == "__main__":
    main()
