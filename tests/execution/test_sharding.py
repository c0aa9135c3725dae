"""Where devices stand in a mesh: by their coordinates, whatever order jax lists them in; and that one module builds meshes and specs."""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import partinf
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.partition.sharding import by_place, device_mesh
from tests.execution.harness import make_plan


@dataclass(frozen=True)
class Place:
    """What a TPU device says of itself."""

    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0


def test_devices_stand_where_their_coordinates_say() -> None:
    places = [Place((x + 4, y, z)) for x in range(4) for y in range(4) for z in range(8)]  # a slice that begins at x = 4
    slice_ = parse_slice("v4:4x4x8", "x0:2,x1:2,y:4,z:8")
    mesh = np.array(by_place(slice_, random.Random(0).sample(places, len(places))), dtype=object).reshape(2, 2, 4, 8)
    for (x0, x1, y, z), place in np.ndenumerate(mesh):
        assert place.coords == (4 + 2 * x0 + x1, y, z)


def test_slices_come_first_and_cores_last() -> None:
    places = [Place((x, y, 0), core, number) for number in range(2) for x in range(2) for y in range(2) for core in range(2)]
    slice_ = parse_slice("tpu7x:2x2x1*2")
    ordered = by_place(slice_, random.Random(1).sample(places, len(places)))
    assert [(place.slice_index, *place.coords, place.core_on_chip) for place in ordered] == sorted(
        (place.slice_index, *place.coords, place.core_on_chip) for place in places
    )


def test_too_few_devices_are_refused() -> None:
    layout = make_layout({"x": "ffn"}, {"x": "heads"})
    plan = make_plan("8", layout)
    with pytest.raises(InvalidInput, match="needs 8 devices, here are 3 cpu devices"):
        device_mesh(plan, device_mesh(plan).devices.ravel()[:3].tolist())


def test_one_module_builds_meshes_and_partition_specs() -> None:
    package, builders = Path(partinf.__file__).parent, {}
    for path in package.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        if found := (imported | named) & {"PartitionSpec"} | (called | named) & {"Mesh", "AbstractMesh", "make_mesh"}:
            builders[path.relative_to(package).as_posix()] = found
    assert builders == {"partition/sharding.py": {"PartitionSpec", "Mesh", "AbstractMesh"}}
