"""Chips and slices: the table's sources, the axes of a slice, its factorisations, and slices that no chip offers."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput
from partinf.hardware.chips import TABLE, Chip, CloudType, Price, chip_of_kind, chips
from partinf.hardware.slices import Link, parse_slice


@pytest.mark.parametrize("name", chips())
def test_every_chip_names_its_source(name: str) -> None:
    chip = chips()[name]
    assert chip.source
    assert chip.usable_hbm <= chip.hbm
    assert chip.torus_dims in (0, 2, 3)
    assert chip.link_bandwidth > 0 if chip.torus_dims else chip.switch_bandwidth > 0


@pytest.mark.parametrize("name", chips())
def test_the_table_states_every_key_of_a_chip_or_says_that_it_has_none(name: str) -> None:
    """So a new chip is one section of one file, and nothing of it can be forgotten."""
    row = tomllib.loads(resources.package_file(TABLE).read_text())[name]
    everything = {field.name for field in fields(Chip)} - {"name", "rates"}
    torus = {"torus_dims", "wrap_multiple", "sides", "side_multiple", "max_axis", "link_bandwidth", "devices_per_chip", "core_links"}
    of_the_compiler = {"clock", "matrix_side", "host_shape", "compiler_config"}
    switched = {"node_size", "switch_bandwidth", "machines"}
    assert set(row) == everything - (switched if row["family"] == "tpu" else torus | of_the_compiler | {"cloud", "price"})
    for key, kind in (("cloud", CloudType), ("price", Price)):
        if row.get(key):
            assert set(row[key]) == {field.name for field in fields(kind)}


@pytest.mark.parametrize("name", [name for name, chip in chips().items() if chip.cloud])
def test_every_topology_of_a_type_is_a_slice_of_its_chip(name: str) -> None:
    cloud = chips()[name].cloud
    assert cloud is not None
    for number, topology in cloud.topologies:
        assert parse_slice(f"{name}:{topology}").num_chips * cloud.cores_per_number == int(number)
    assert math.prod(chips()[name].host_shape) == cloud.chips_per_host


def test_torus_axes() -> None:
    slice_ = parse_slice("v4:4x4x2")
    assert slice_.axis_sizes == {"x": 4, "y": 4, "z": 2}
    assert not any(axis.wraps for axis in slice_.axes)  # less than whole cubes is a mesh throughout
    assert all(axis.wraps for axis in parse_slice("v4:4x4x8").axes)
    assert [axis.wraps for axis in parse_slice("v5e:8x16").axes] == [False, True]
    assert slice_.num_devices == 32
    assert slice_.name == "v4:4x4x2"


def test_two_devices_per_chip_are_an_axis() -> None:
    slice_ = parse_slice("tpu7x:2x2x4")
    assert slice_.axes[-1].name == "core"
    assert slice_.axes[-1].link is Link.CORE
    assert (slice_.num_chips, slice_.num_devices) == (16, 32)


def test_slices_are_joined_by_an_axis_of_their_own() -> None:
    slice_ = parse_slice("v5e:4x4*2")
    assert slice_.axes[0].name == "dcn"
    assert slice_.axes[0].link is Link.DCN
    assert slice_.num_chips == 32
    assert parse_slice(slice_.name) == slice_


def test_factors_know_their_stride() -> None:
    slice_ = parse_slice("v4:16x4x4", "x0:4,x1:4,y:4,z:4")
    x0, x1 = slice_.axes[:2]
    assert (x0.stride, x1.stride) == (4, 1)
    assert x0.torus == x1.torus == "x"
    assert slice_.mesh == "x0:4,x1:4,y:4,z:4"


@pytest.mark.parametrize(
    ("text", "mesh", "words"),
    [
        ("v4:4x4", None, "3D torus"),
        ("v4:4x4x3", None, "nearest 2 or 4"),
        ("v5e:4x32", None, "valid sides are 1, 2, 4, 8 or 16"),
        ("v4", None, "expected CHIP:SHAPE"),
        ("v44:4x4x4", None, "unknown chip 'v44'"),
        ("v4:4x4x4*0", None, "0 slices"),
        ("h200:2x2x2x2", None, "one to three axes"),
        ("v4:4x4x4", "x:4,y:4", "torus axis z must multiply to 4"),
        ("v4:4x4x4", "x:4,y:4,z:4,w:2", "'w' is no factor"),
        ("h200:8", "4x4", "must multiply to the 8 devices"),
        ("h200:8", "a:2,a:4", "named twice"),
        ("h200:8", "dcn:8", "cannot name a factor"),
    ],
)
def test_refused(text: str, mesh: str | None, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        parse_slice(text, mesh)


@given(st.sampled_from(["v4", "v5e", "v5p", "v6e", "tpu7x"]), st.data())
def test_names_are_read_back(name: str, data: st.DataObject) -> None:
    chip = chips()[name]
    sides = [side for side in range(1, 65) if chip.offers_side(side)]
    shape = [data.draw(st.sampled_from(sides)) for _ in range(chip.torus_dims)]
    slice_ = parse_slice(f"{name}:{'x'.join(map(str, shape))}")
    assert slice_.num_devices == math.prod(axis.size for axis in slice_.axes)
    assert parse_slice(slice_.name, None if chip.devices_per_chip > 1 else slice_.mesh) == slice_


@pytest.mark.parametrize(
    ("name", "slice_"),
    [
        ("v4-8", "v4:2x2x1"),
        ("v5e-16", "v5e:4x4"),  # the number counts chips
        ("v5litepod-16", "v5e:4x4"),
        ("v5p-8", "v5p:2x2x1"),  # here it counts cores, two per chip
        ("v5p-12288", "v5p:16x16x24"),
        ("v6e-8", "v6e:2x4"),
        ("tpu7x-8", "tpu7x:2x2x1"),
        ("v5litepod-16*2", "v5e:4x4*2"),
        ("h100x8", "h100:8"),
        ("a100-80x4", "a100-80:4"),
        ("h100x8*2", "h100:8*2"),
        ("a3-highgpu-8g", "h100:8"),
        ("p5.48xlarge", "h100:8"),
    ],
)
def test_what_clouds_call_a_slice(name: str, slice_: str) -> None:
    assert parse_slice(name) == parse_slice(slice_)
    assert parse_slice(name).not_rented is None


@pytest.mark.parametrize("chip", [chip for chip in chips().values() if chip.cloud], ids=lambda chip: chip.name)
def test_a_slice_knows_its_type(chip: Chip) -> None:
    for number, topology in chip.cloud.topologies:
        assert parse_slice(f"{chip.name}:{topology}").cloud_name == f"{chip.cloud.prefix}-{number}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e-12", "no such type; v5e comes as v5e-1, v5e-4, v5e-8, v5e-16"),
        ("v5p-4", "no such type; v5p comes as v5p-8, v5p-16"),
        ("v5lite-16", "did you mean 'v5litepod-16'"),
        ("v6ex8", "expected CHIP:SHAPE"),
        ("h100x", "expected CHIP:SHAPE"),
        ("h100x0", "at least 1 device"),
        ("v5litepod-16*0", "0 slices"),
    ],
)
def test_names_that_no_cloud_has(name: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(words)):
        parse_slice(name)


def test_shapes_that_can_be_rented() -> None:
    """Those of the cloud's types, whichever way round, and whole cubes where those are free."""
    for name in ("v4:4x2x2", "v4:4x4x16", "v5p:4x4x12", "v5e:4x2", "h100:2", "h100:16", "cpu:12", "cpu:2x2x2"):
        assert parse_slice(name).not_rented is None, name
    for name, near in {"v5e:2x1": "v5e:1x1 or v5e:2x2", "v5e:1x8": "v5e:2x2 or v5e:2x4", "v4:2x2x8": "v4:2x2x4 or v4:2x4x4"}.items():
        assert parse_slice(name).not_rented is not None
        assert near in str(parse_slice(name).not_rented)
    assert "nodes of 8" in str(parse_slice("h100:12").not_rented)
    assert {shape for shape in chips()["v4"].rented_shapes(256) if math.prod(shape) == 256} == {(4, 8, 8), (4, 4, 16)}
    for chip in chips().values():
        shapes = list(chip.rented_shapes(256))
        assert all(chip.rents(shape) for shape in shapes)
        assert [math.prod(shape) for shape in shapes] == sorted(math.prod(shape) for shape in shapes)
        if chip.cloud is not None:
            assert {shape for shape in chip.cloud.shapes.values() if math.prod(shape) <= 256} <= set(shapes)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("cpu", "cpu"),
    ],
)
def test_devices_are_recognised_by_jaxs_name(kind: str, chip: str) -> None:
    assert chip_of_kind(kind).name == chip


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(InvalidInput, match="'Quantum 9000'"):
        chip_of_kind("Quantum 9000")


@pytest.mark.parametrize("name", ["v5e:4x2*2", "tpu7x:2x2x2", "v4:2x2x2", "h200:8*2"])
def test_a_mesh_is_read_as_it_is_printed(name: str) -> None:
    slice_ = parse_slice(name)
    assert parse_slice(name, slice_.mesh) == slice_
    with pytest.raises(InvalidInput, match="'dcn' cannot name a factor"):
        parse_slice(name, f"dcn:8,{slice_.mesh}")
