"""Hardware files and the rates in them: what is written is read, what is wrong is listed, and prices are made of nothing else."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from partinf.cost.calibration import calibration_for
from partinf.cost.items import LOGITS as ITEM
from partinf.cost.ledger import EntryKind, Op, Part
from partinf.cost.pricing import Pricing
from partinf.foundation.errors import InvalidInput
from partinf.hardware.chips import chips
from partinf.hardware.hardware_file import check_devices, default_path, read_hardware, write_hardware
from partinf.hardware.rates import CollectiveRate, Curve, PaceRates, Rates, TypeRates
from partinf.hardware.slices import make_slice, parse_slice
from partinf.workload import DType

RATES = Rates(
    products=(("f32", Curve((1.0, 4.0), (1e9, 4e9))), ("bf16", Curve((1.0,), (2e9,)))),
    memory=8e9,
    types=(("f32", TypeRates(1e9, 2e9, 4e9, math.inf, 1e8, 2e-5, 1e-3)),),
    collectives=(CollectiveRate("all-gather", 2, 1e-4, 1.0), CollectiveRate("all-gather", 8, 3e-4, 2.0)),
    devices=8,
    device_kind="cpu",
    date="2026-01-02",
    jax="0.0",
    error=0.1,
    spread=(("reading memory", 0.02),),
    pace=PaceRates(0.7, 0.5, 1.2e-6, 4.5e-7),
)
CHIP = replace(chips()["cpu"], rates=RATES, switch_bandwidth=1e9)


def test_a_curve_is_a_power_law_between_sizes_and_constant_beyond() -> None:
    curve = Curve((1.0, 4.0, 8.0), (1e9, 4e9, 4e9))
    assert [curve(size) for size in (0.5, 1, 2, 4, 6, 100)] == pytest.approx([1e9, 1e9, 2e9, 4e9, 4e9, 4e9])


def test_a_file_gives_back_the_chip(tmp_path: Path) -> None:
    path = tmp_path / "cpu.toml"
    path.write_text(write_hardware(CHIP))
    assert read_hardware(path) == CHIP


def test_what_no_measurement_finds_is_as_the_table_has_it(tmp_path: Path) -> None:
    """A file that was written before the table had these keys describes the same chip."""
    path = tmp_path / "v4.toml"
    measured = replace(chips()["v4"], rates=RATES)
    text = write_hardware(measured)
    path.write_text(text)
    assert read_hardware(path) == measured
    stated = ("sides", "side_multiple", "core_links", "clock", "host_shape", "compiler_config")
    old = "\n".join(line for line in text.splitlines() if line.partition(" = ")[0] not in stated)
    path.write_text(old)
    assert read_hardware(path) == measured
    unpaced = replace(measured, rates=replace(RATES, pace=None))
    path.write_text(write_hardware(unpaced))
    assert read_hardware(path) == unpaced
    path.write_text(old.replace('name = "v4"', 'name = "mine"'))
    mine = read_hardware(path)
    assert (mine.clock, mine.cloud, mine.price) == (0.0, None, None)
    assert parse_slice("mine:3x5x1", measured=mine).num_devices == 15  # a chip that names no sides has them all
    path.write_text(text.replace("sides = [1, 2]", "sides = [1.5, 0]").replace('family = "tpu"', 'family = "tpuu"'))
    with pytest.raises(InvalidInput, match=r"family = 'tpuu'(.|\n)*sides = |sides = (.|\n)*family = 'tpuu'"):
        read_hardware(path)


def test_everything_wrong_with_a_file_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "cpu.toml"
    text = write_hardware(CHIP)
    path.write_text(
        text.replace("hbm_bandwidth =", "hbm_bandwith =").replace('date = "2026-01-02"\n', "").replace("choice = 1", "choice = -1")
    )
    with pytest.raises(InvalidInput) as caught:
        read_hardware(path)
    offences = "\n".join(caught.value.offences)
    for expected in (
        "unknown key 'hbm_bandwith'; did you mean 'hbm_bandwidth'?",
        "'hbm_bandwidth' is missing",
        "'date' is missing",
        "choice = -1",
    ):
        assert expected in offences
    path.write_text(text.replace("[memory]", "[memry]"))
    with pytest.raises(InvalidInput, match=r"section \[memory\] is missing(.|\n)*unknown section \[memry\]"):
        read_hardware(path)
    with pytest.raises(InvalidInput, match="no such file"):
        read_hardware(tmp_path / "none.toml")


def test_the_devices_of_a_cpu_share_it() -> None:
    check_devices(CHIP, 8)
    with pytest.raises(InvalidInput, match="measured with 8 devices.*--devices 4 measures those"):
        check_devices(CHIP, 4)
    alone = replace(CHIP, family="gpu", rates=replace(RATES, devices=1, collectives=()))
    check_devices(alone, 1)
    with pytest.raises(InvalidInput, match="no rates of collectives"):
        check_devices(alone, 8)


def test_the_default_place_names_kind_and_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_path("NVIDIA H200", 8) == tmp_path / "partinf" / "hardware" / "nvidia-h200-8.toml"


def test_a_measured_chip_stands_for_the_one_of_the_table() -> None:
    assert parse_slice("cpu:2x2x2", measured=CHIP).chip is CHIP
    assert parse_slice("v4:4x4x4", measured=CHIP).chip is chips()["v4"]
    assert calibration_for(CHIP).measured
    assert "2026-01-02" in calibration_for(CHIP).source
    assert calibration_for(CHIP, "none").rates is None


def test_prices_by_hand() -> None:
    slice_ = make_slice(CHIP, (2, 4))
    pricing = Pricing(slice_, calibration_for(CHIP)).of_types(DType.F32, DType.F32)
    # 2 rows run at 2 GFLOP/s: 4 MFLOP take 2 ms, longer than 8 MB of weights at 8 GB/s; an operation takes 20 µs.
    assert pricing.product(ITEM, Part.FFN, 1, 4e6, 1.0, 8e6, shape=(2, 1000, 1000)).seconds == pytest.approx(2e-5 + 2e-3)
    assert pricing.product(ITEM, Part.FFN, 1, 4e6, 1.0, 80e6, shape=(2, 1000, 1000)).seconds == pytest.approx(2e-5 + 10e-3)
    core = pricing.product(ITEM, Part.ATTENTION, 1, 2e6, 1.0, 0.0, 1e6, kind=EntryKind.ATTENTION)
    assert core.seconds == pytest.approx(2e-5 + 1e-3 + 1e-3)
    assert pricing.product(ITEM, Part.ATTENTION, 1, 4e6, 1.0, kind=EntryKind.ATTENTION, prompt=True).seconds == pytest.approx(2e-5 + 1e-3)
    assert pricing.traffic(ITEM, Part.SAMPLING, 1, 1e5).seconds == pytest.approx(1e-3)
    assert [entry.seconds for entry in pricing.dispatch()] == [1e-3]
    # 1 MB among 4: half way between 2 and 8 ways, 1.5 times the 0.75 ms that the links take.
    assert pricing.network.seconds(Op.ALL_GATHER, ("y",), 1e6) == pytest.approx(2e-4 + 1.5 * 0.75e-3)


def test_a_measured_chip_that_reads_ahead_reads_weights_during_what_leaves_memory_alone() -> None:
    """As by the shipped constants: where layers are compiled one by one, and no matrix that is left to its product."""
    chip = replace(chips()["v5e"], rates=replace(RATES, memory=8e11, products=(("f32", Curve((1.0, 64.0), (1e12, 1e14))),)))
    one_by_one, looped = (
        Pricing(make_slice(chip, (2, 4)), calibration_for(chip)).compiled(way).of_types(DType.F32, DType.F32) for way in (True, False)
    )
    work = (ITEM, Part.FFN, 1, 1e9, 1.0, 8e6)
    read, again = (one.product(*work, shape=(1, 1000, 1000)) for one in (one_by_one, looped))
    assert read.seconds == again.seconds
    assert (read.early, again.early) == (pytest.approx(1e-5 - 1e-5, abs=1e-12), 0.0)
    waits = one_by_one.product(ITEM, Part.FFN, 1, 1e8, 1.0, 8e6, shape=(1, 1000, 1000))
    assert waits.early == pytest.approx(1e-5 - 1e-6)
    assert waits.free == RATES.types[0][1].op_seconds
    large = one_by_one.product(ITEM, Part.FFN, 1, 1e8, 1.0, 2 * one_by_one.program.fetched_matrix, shape=(1, 1000, 1000))
    assert large.early == 0
    assert one_by_one.fetch_seconds == one_by_one.program.fetched_bytes / 8e11


def test_types_and_collectives_that_were_not_measured_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no rates for int8, only for f32, bf16"):
        RATES.product("int8")
    with pytest.raises(InvalidInput, match="no rates of all-reduce"):
        RATES.collective("all-reduce", 2)
