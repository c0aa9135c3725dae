"""The tables of the README, from results.json and experts.json: `python -m experiments.every_assignment.table` writes them into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.results import place, read

_MESHES = {"8": "8", "4x2": "4×2", "2x4": "2×4", "2x2x2": "2×2×2"}
_WAYS = {"kernels": "by the CPU's kernels", "tiles": "tile by tile"}
_FAMILIES = {"gemma3_text": "Gemma 3", "gpt_neox": "GPT-NeoX", "olmo2": "OLMo 2"}


def _lines(rows: Mapping[str, Mapping[str, str]]) -> str:
    """A row per name, a column per mesh that any of them has."""
    meshes = [mesh for mesh in _MESHES if any(mesh in cells for cells in rows.values())]
    lines = [f"| | {' | '.join(_MESHES[mesh] for mesh in meshes)} |", "|---" * (1 + len(meshes)) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells.get(mesh, '') for mesh in meshes)} |" for name, cells in rows.items())])


def _of(counts: Mapping[str, int]) -> str:
    return f"{counts['passed']} of {counts['passed'] + counts['failed']}"


def _counts(found: Mapping[str, Any], key: str) -> dict[str, str]:
    """By mesh, what passed of the entries whose name has the mesh in place of `{}`."""
    return {mesh: _of(found[key.format(mesh)]) for mesh in _MESHES if key.format(mesh) in found}


def dense(found: Mapping[str, Any]) -> str:
    rows = {f"equal to the reference, {shown}": _counts(found["equal"], f"{{}}, {way}") for way, shown in _WAYS.items()}
    return _lines(rows | {"accounts equal": _counts(found["accounts"], "{}")})


def families(found: Mapping[str, Any]) -> str:
    pairs = [(family, way) for family in _FAMILIES for way in _WAYS]
    return _lines({f"{_FAMILIES[family]}, {_WAYS[way]}": _counts(found["families"], f"{family} {{}}, {way}") for family, way in pairs})


def experts(found: Mapping[str, Any]) -> str:
    def passed(part: str) -> dict[str, str]:
        return {mesh: f"{one['passed']} of {one['of']}" for mesh, one in found[part]["meshes"].items()}

    def largest(part: str) -> dict[str, str]:
        return {mesh: f"{one['largest']:.1e}" for mesh, one in found[part]["meshes"].items()}

    return _lines(
        {
            "equal to the reference, however rows are routed": passed("sublayers"),
            "largest difference": largest("sublayers"),
            "accounts equal": passed("accounts"),
            "whole steps of ragged prompts, drawn": passed("whole steps"),
            "largest difference of these": largest("whole steps"),
        }
    )


def main() -> None:
    found = read(__file__)
    tables = {"dense": dense(found), "families": families(found), "experts": experts(read(__file__, "experts.json"))}
    for mark, table in tables.items():
        print(table, end="\n\n")
        place(__file__, table, mark)


if __name__ == "__main__":
    main()
