"""Counts how the house is built: rooms, arrows between them, and circles between files.

    python -m tests.core.rooms [DIRECTORY] [--arrows]

A room is what stands directly in `partinf/`, a folder or a module, and each of the folders `experiments/` and `tpu_scripts/`. An arrow
goes from one room to another when any file of the first imports any file of the second; imports inside functions and those for type
checkers alone count like all others, because a reader follows them too. A circle is a set of files each of which reaches all others of it
by imports. The package's own `__init__` is lazy and hands names on: what it names for type checkers is an arrow, and closes no circle.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("partinf", "experiments", "tpu_scripts")
_FACE = "partinf/__init__.py"


@dataclass(frozen=True)
class House:
    """What the imports of a checkout say.

    Attributes:
        files: path from the root → the files that it imports.
        rooms: names of the rooms, paths from the root.
        arrows: (room that imports, room that is imported) → the files that do, with what they import.
        circles: sets of files, each sorted.
    """

    files: Mapping[str, frozenset[str]]
    rooms: tuple[str, ...]
    arrows: Mapping[tuple[str, str], tuple[tuple[str, str], ...]]
    circles: tuple[tuple[str, ...], ...]


def read_house(root: Path = ROOT) -> House:
    """The house in a directory."""
    paths = sorted(path.relative_to(root) for place in PLACES for path in (root / place).rglob("*.py"))
    modules = {name: path for path in paths for name in _names(path)}
    files = {str(path): frozenset(map(str, _imported((root / path).read_text(), modules))) - {str(path)} for path in paths}
    arrows: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for file, others in files.items():
        for other in sorted(others):
            if room_of(file) != room_of(other):
                arrows.setdefault((room_of(file), room_of(other)), []).append((file, other))
    rooms = tuple(sorted({room_of(file) for file in files}))
    circles = circles_of({file: others if file != _FACE else frozenset() for file, others in files.items()})
    return House(files, rooms, {pair: tuple(found) for pair, found in sorted(arrows.items())}, circles)


def room_of(file: str) -> str:
    """The room in which a file stands."""
    parts = Path(file).parts
    return "/".join(parts[:2]) if parts[0] == "partinf" else parts[0]


def _names(path: Path) -> tuple[str, ...]:
    """What a file is imported as: scripts import each other by their bare names."""
    dotted = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    return (dotted, path.stem) if path.parts[0] == "tpu_scripts" else (dotted,)


def _imported(source: str, modules: Mapping[str, Path]) -> Iterator[Path]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name:
                yield modules[name]


def circles_of(files: Mapping[str, Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    """Strongly connected sets of more than one file (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[str, ...]] = []

    def visit(file: str) -> None:
        order[file] = low[file] = len(order)
        stack.append(file)
        for other in files[file]:
            if other not in order:
                visit(other)
                low[file] = min(low[file], low[other])
            elif other in stack:
                low[file] = min(low[file], order[other])
        if low[file] == order[file]:
            circle = stack[stack.index(file) :]
            del stack[-len(circle) :]
            if len(circle) > 1:
                found.append(tuple(sorted(circle)))

    for file in files:
        if file not in order:
            visit(file)
    return tuple(sorted(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--arrows", action="store_true", help="also every arrow, with how many imports it stands for")
    args = parser.parse_args()
    house = read_house(args.directory)
    print(f"{len(house.rooms)} rooms, {len(house.arrows)} arrows between rooms, {len(house.circles)} circles between files")
    for circle in house.circles:
        print("circle:", ", ".join(circle))
    for (one, other), imports in house.arrows.items() if args.arrows else ():
        print(f"{one} -> {other}: {len(imports)}")


if __name__ == "__main__":
    main()
