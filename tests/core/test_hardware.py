"""Chips and slices: the table's sources, the axes of a slice, its factorisations, and slices that no chip offers."""

from __future__ import annotations

import math
import tomllib
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput
from partinf.hardware.chips import TABLE, Chip, CloudType, Price, chip_of_kind, chips
from partinf.hardware.slices import Link, parse_slice, valid_sides


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
    of_the_compiler = {"clock", "host_shape", "compiler_config"}
    switched = {"node_size", "switch_bandwidth"}
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
    shape = [data.draw(st.sampled_from(valid_sides(chip))) for _ in range(chip.torus_dims)]
    slice_ = parse_slice(f"{name}:{'x'.join(map(str, shape))}")
    assert slice_.num_devices == math.prod(axis.size for axis in slice_.axes)
    assert parse_slice(slice_.name, None if chip.devices_per_chip > 1 else slice_.mesh) == slice_


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
