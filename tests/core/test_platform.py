"""The table of platforms: nothing outside it knows a platform by name, and no code knows a chip by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import partinf
from partinf.cost.program import PROGRAMS
from partinf.foundation.errors import InvalidInput
from partinf.hardware.chips import chips
from partinf.hardware.platform import CPU, GPU, PLATFORMS, TPU, platform_named
from partinf.workload import DType

PACKAGE = Path(partinf.__file__).parent
TABLE = "hardware/platform.py"
NAMES = {*PLATFORMS, "cuda", "rocm", "metal"}
# Where a name may stand, and why.
NAMED: dict[str, str] = {
    "proof/topology.py": "an argument of jax's, which describes TPU slices alone",
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def constants(module: ast.Module, wanted: set[str]) -> list[int]:
    """Lines with a string that is one of these names."""
    return [node.lineno for node in ast.walk(module) if isinstance(node, ast.Constant) and node.value in wanted]


def compared_rows(module: ast.Module) -> list[int]:
    """Lines that compare with a row of the table, or with its name: a branch on a platform by another spelling."""
    rows = {"CPU", "GPU", "TPU"}

    def is_row(node: ast.expr) -> bool:
        return (isinstance(node, ast.Name) and node.id in rows) or (isinstance(node, ast.Attribute) and is_row(node.value))

    compares = [node for node in ast.walk(module) if isinstance(node, ast.Compare)]
    return [node.lineno for node in compares if any(map(is_row, (node.left, *node.comparators)))]


def test_no_branch_on_a_platform_stands_outside_the_table() -> None:
    found = {name: constants(module, NAMES) + compared_rows(module) for name, module in sources() if name != TABLE}
    assert {name for name, lines in found.items() if lines} == set(NAMED), {name: lines for name, lines in found.items() if lines}


def test_no_code_knows_a_chip_by_name() -> None:
    names = set(chips()) - set(PLATFORMS)
    assert not {name: lines for name, module in sources() if (lines := constants(module, names))}


def test_every_chip_has_a_platform_and_every_row_names_what_exists() -> None:
    assert {chip.platform.name for chip in chips().values()} == set(PLATFORMS)
    for platform in PLATFORMS.values():
        assert platform.default_type in list(DType)
        assert platform.slow_single_row <= set(DType)
        assert platform.default_program in PROGRAMS


def test_an_unknown_platform_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InvalidInput, match="platform 'tpuu': not in the table; did you mean 'tpu'.*known: cpu, gpu, tpu"):
        platform_named("tpuu")
    with pytest.raises(InvalidInput, match="platform 'metal'"):
        _ = replace(chips()["cpu"], family="metal").platform


def test_the_environment_of_virtual_devices_says_how_many() -> None:
    assert CPU.environment(4) == {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    assert GPU.environment(4) == {"JAX_PLATFORMS": "gpu"}
    assert not TPU.virtual
