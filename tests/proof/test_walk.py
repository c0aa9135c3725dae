"""The walk over a schedule: one core, one queue of transfers, the links; every time worked out by hand on a small text."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace

import pytest

from partinf.cost.collectives import Network
from partinf.foundation.resources import package_file
from partinf.hardware.chips import chips
from partinf.hardware.rates import PaceRates, Rates
from partinf.hardware.slices import parse_slice
from partinf.proof.hlo import Instruction, Module
from partinf.proof.pace import Pace, pace_of
from partinf.proof.schedule import Reader, Schedule
from partinf.proof.walk import KernelRun

US = 1e-6
# 1 GHz and 1 GB/s: a thousand cycles are a microsecond, and so are a thousand bytes.
PLAIN = Pace(1e9, 1e9, 1.0, 1.0, 1.0, 1e15, 1e15, 0.0, 0.0, "")
SLICE = parse_slice("v5e:2x2")
HEAD = """HloModule jit_step, is_scheduled=true

%multiplied (p.0: bf16[8,16], p.1: bf16[16,32]) -> bf16[8,32] {
  %p.0 = bf16[8,16]{1,0:S(1)} parameter(0)
  %p.1 = bf16[16,32]{1,0:S(1)} parameter(1)
  ROOT %out = bf16[8,32]{1,0:S(1)} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%sum (s.0: f32[], s.1: f32[]) -> f32[] {
  %s.0 = f32[] parameter(0)
  %s.1 = f32[] parameter(1)
  ROOT %s = f32[] add(%s.0, %s.1)
}
"""
GROUPS = "replica_groups={{0,1},{2,3}}, to_apply=%sum"
CHIP = "s8[10,1000]{1,0:S(1)}"


def cycles(count: int) -> str:
    return f'backend_config={{"estimated_cycles":"{count}"}}'


def fetch(name: str, thousands: int) -> str:
    """A transfer of so many thousand bytes towards the chip."""
    part = f"s8[{thousands},1000]{{1,0:S(1)}}"
    return f"%{name} = ((s8[900,1000]{{1,0}}), {part}, s32[]{{:S(2)}}) slice-start(%w), slice={{[0:{thousands}], [0:1000]}}"


def done(name: str) -> str:
    return f"%{name}.done = {CHIP} slice-done(%{name})"


def work(name: str, count: int) -> str:
    return f"%{name} = {CHIP} add(%here, %here), {cycles(count)}"


def entry(*lines: str, before: str = "") -> str:
    parameters = ["%w = s8[900,1000]{1,0} parameter(0)", f"%here = {CHIP} parameter(1)"]
    body = "\n".join(f"  {line}" for line in (*parameters, *lines))
    return f"{HEAD}\n{before}\nENTRY %main (w: s8[900,1000], here: s8[10,1000]) -> s8[10,1000] {{\n{body}\n}}\n"


def read(text: str, pace: Pace = PLAIN, kernels: dict[str, Callable[[Instruction, float], KernelRun]] | None = None) -> Schedule:
    network = Network(SLICE, hop_seconds=US)
    found = Reader(Module(text), SLICE, network, lambda _: 0.25, kernels, pace).read()
    exposed = sum(one.exposed_seconds for one in found.collectives)
    assert found.seconds == pytest.approx(found.compute_seconds + exposed)  # nothing is lost, nothing counted twice
    return found


def spent(schedule: Schedule) -> dict[str, float]:
    """Microseconds by what took them."""
    found: dict[str, float] = {}
    for one in schedule.work:
        kind = one.what.partition(" of ")[0]
        found[kind] = found.get(kind, 0.0) + one.seconds * one.count / US
    return {kind: round(seconds, 3) for kind, seconds in found.items() if seconds}


def test_no_constant_stands_in_two_tables() -> None:
    """What a chip's proof shares with its prices it takes from these: a constant has one home."""
    pace, prices = (tomllib.loads(package_file(f"hardware/{name}.toml").read_text()) for name in ("pace", "calibration"))
    assert not {key for row in pace.values() for key in row} & {key for row in prices.values() for key in row}


def test_a_transfer_overlaps_the_core_and_what_ends_it_waits() -> None:
    assert spent(read(entry(fetch("f", 30), work("a", 10000), done("f"), work("b", 5000)))) == {"add": 15, "waiting in slice-done": 20}
    assert spent(read(entry(fetch("f", 30), work("a", 40000), done("f")))) == {"add": 40}


def test_transfers_queue_one_behind_the_other() -> None:
    text = entry(fetch("f", 30), fetch("g", 20), work("a", 10000), done("g"), done("f"))
    assert read(text).seconds == pytest.approx(50 * US)


def test_own_bytes_come_first_and_put_back_what_is_under_way() -> None:
    own = "%r = s8[10,1000]{1,0:S(1)} slice(%w), slice={[0:10], [0:1000]}"
    assert read(entry(own)).seconds == pytest.approx(10 * US)
    assert read(entry(fetch("f", 100), own)).seconds == pytest.approx(10 * US)
    assert read(entry(fetch("f", 100), own, done("f"))).seconds == pytest.approx(110 * US)  # no byte is had for nothing
    assert read(entry(fetch("f", 4), work("a", 5000), own, done("f"))).seconds == pytest.approx(15 * US)  # what has ended is not put back


def test_the_queue_goes_on_while_a_collective_holds_the_core() -> None:
    reduce = f"%r = f32[1000,1000]{{1,0:S(1)}} all-reduce(%big), {GROUPS}"
    text = entry("%big = f32[1000,1000]{1,0:S(1)} iota()", fetch("f", 30), reduce, done("f"))
    found = read(text)
    (collective,) = found.collectives
    assert collective.seconds > 30 * US
    assert found.seconds == pytest.approx(collective.seconds)
    assert collective.overlapped_fraction == 0


def started(name: str, groups: str) -> list[str]:
    shape = "f32[1000,1000]{1,0:S(1)}"
    return [f"%{name} = ({shape}, {shape}) all-gather-start(%big), dimensions={{0}}, {groups}"]


def test_started_collectives_queue_for_the_links_of_their_axes_alone() -> None:
    big, x, y = "%big = f32[1000,1000]{1,0:S(1)} iota()", "replica_groups={{0,2},{1,3}}", "replica_groups={{0,1},{2,3}}"
    ends = ["%e = f32[1000,1000]{1,0:S(1)} all-gather-done(%c)", "%h = f32[1000,1000]{1,0:S(1)} all-gather-done(%d)"]
    one = read(entry(big, *started("c", x), ends[0])).seconds
    assert read(entry(big, *started("c", x), *started("d", y), *ends)).seconds == pytest.approx(one)
    same = read(entry(big, *started("c", x), *started("d", x), *ends[::-1]))
    assert same.seconds == pytest.approx(2 * one)
    assert [c.overlapped_fraction for c in same.collectives] == [0.0]  # both are waited for in full, in whatever order they are ended
    hidden = read(entry(big, *started("c", x), work("a", round(0.5 * one * 1e9)), ends[0]))
    assert hidden.collectives[0].overlapped_fraction == pytest.approx(0.5, abs=1e-3)
    assert hidden.seconds == pytest.approx(one)


LOOP = """%body (arg: (s32[], s8[900,1000])) -> (s32[], s8[900,1000]) {
  %arg = (s32[], s8[900,1000]{1,0}) parameter(0)
  %w = s8[900,1000]{1,0} get-tuple-element(%arg), index=1
  %here = s8[10,1000]{1,0:S(1)} get-tuple-element(%arg), index=1
@LINES@
  ROOT %again = (s32[], s8[900,1000]{1,0}) tuple(%arg, %w)
}

%condition (arg.1: (s32[], s8[900,1000])) -> pred[] {
  %arg.1 = (s32[], s8[900,1000]{1,0}) parameter(0)
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%limit, %limit), direction=LT
}
"""


def test_a_loop_takes_its_steady_state_once_for_every_trip() -> None:
    lines = "\n".join(f"  {line}" for line in (fetch("f", 30), work("a", 10000), done("f")))
    loop = "%loop = (s32[], s8[900,1000]{1,0}) while(%t), condition=%condition, body=%body"
    text = entry("%t = (s32[], s8[900,1000]{1,0}) tuple(%here, %w)", loop, before=LOOP.replace("@LINES@", lines))
    found = read(text)
    assert found.seconds == pytest.approx(5 * 30 * US)
    assert spent(found) == {"add": 50, "waiting in slice-done": 100}
    # What was started before the loop holds up its first trip alone.
    behind = entry(fetch("g", 40), "%t = (s32[], s8[900,1000]{1,0}) tuple(%here, %w)", loop, before=LOOP.replace("@LINES@", lines))
    assert read(behind).seconds == pytest.approx(5 * 30 * US)


def test_a_branch_counts_by_how_often_it_is_taken() -> None:
    branch = f"%branch (b: s8[10,1000]) -> s8[10,1000] {{\n  %here = {CHIP} parameter(0)\n  {work('a', 8000)}\n}}\n"
    text = entry(f"%c = {CHIP} conditional(%here, %here), branch_computations={{%branch}}", work("b", 1000), before=branch)
    assert read(text).seconds == pytest.approx((0.25 * 8 + 1) * US)


KERNEL = '%spun.3 = s8[10,1000]{1,0:S(1)} custom-call(%w, %here), custom_call_target="tpu_custom_call"'


def test_a_kernel_is_never_had_for_nothing() -> None:
    known = read(entry(KERNEL, KERNEL.replace("spun.3", "spun.4")), kernels={"spun": lambda kernel, runs: KernelRun(14 * US / runs)})
    assert known.seconds == pytest.approx(14 * US)
    assert known.kernels["spun"] == (pytest.approx(14 * US), 2, True)
    unknown = read(entry(KERNEL))
    assert unknown.seconds == pytest.approx(900 * US)  # one read of what lies in HBM
    assert unknown.kernels["spun"] == (pytest.approx(900 * US), 1, False)
    assert unknown.work[0].what.startswith("kernel spun")
    # Of 10 us, while transfers are under way: the bytes that it moves take twice as long, the rest does not.
    begun = (fetch("a", 10), fetch("b", 10), KERNEL, done("a"), done("b"))
    for moved, seconds in ((None, 20), (8000, 16), (4000, 10)):
        (kernel,) = (one for one in read(entry(*begun), kernels={"spun": lambda *_, n=moved: KernelRun(10 * US, n)}).kernels.values())
        assert kernel.seconds == pytest.approx(seconds * US)


def test_when_kernels_begin_is_known_of_those_in_no_loop() -> None:
    twice = read(
        entry(KERNEL, work("a", 2000), KERNEL.replace("spun.3", "spun.4")), kernels={"spun": lambda kernel, runs: KernelRun(3 * US)}
    )
    assert twice.begun == {"spun": (0.0, pytest.approx(5 * US))}
    inside = f"%branch (b: s8[10,1000]) -> s8[10,1000] {{\n  %here = {CHIP} parameter(0)\n  %w = {CHIP} parameter(0)\n  {KERNEL}\n}}\n"
    branch = entry(f"%c = {CHIP} conditional(%here, %here), branch_computations={{%branch}}", before=inside)
    assert read(branch, kernels={"spun": lambda kernel, runs: KernelRun(US)}).begun == {}


def test_the_compilers_cycles_are_corrected_by_kind() -> None:
    pace = replace(PLAIN, product_share=0.7, moving_share=0.375, least_seconds=1.2 * US, small_seconds=0.45 * US)

    def one(line: str, pace: Pace = pace) -> float:
        return round(read(entry("%m = bf16[16,32]{1,0:S(1)} iota()", "%a = bf16[8,16]{1,0:S(1)} iota()", line), pace).seconds / US, 4)

    product = f"%r = bf16[8,32]{{1,0:S(1)}} fusion(%a, %m), kind=kOutput, calls=%multiplied, {cycles(10000)}"
    assert one(product) == 7
    operations = 2 * 8 * 16 * 32
    assert one(product, replace(pace, flops=operations / (9 * US))) == 9  # no faster than the matrix unit
    assert one(product, replace(pace, flops=operations / (12 * US))) == 10  # nor slower than the compiler says
    reads = product.replace("%m)", "%v)").replace("%r =", "%v = bf16[16,32]{1,0} parameter(2)\n  %r =")
    assert one(reads, replace(pace, byte_rate=1024 / (4 * US))) == 10  # as the compiler says, where nothing else is known
    assert one(reads, replace(pace, byte_rate=1024 / (4 * US), reading_share=0.2)) == 4  # most of it: the cycles are a guess at HBM
    assert one(reads, replace(pace, byte_rate=1024 / (3 * US), reading_share=0.2)) == 7  # less than half of it
    assert one(work("r", 1200)) == 0.45
    assert one(work("r", 3200)) == 2.45
    assert one(work("r", 100)) == 0.1
    assert one(f"%r = {CHIP} copy(%here), {cycles(8000)}") == 3
    assert one(f"%r = {CHIP} convert(%here), {cycles(1200)}") == 0.45


@pytest.mark.parametrize("name", sorted(chips()))
def test_every_chip_has_a_pace_with_its_evidence(name: str) -> None:
    pace = pace_of(
        parse_slice(f"{name}:1x1x1" if chips()[name].torus_dims == 3 else f"{name}:1x1" if chips()[name].torus_dims else f"{name}:1")
    )
    assert pace.evidence
    assert 0 < pace.byte_rate <= chips()[name].hbm_bandwidth
    assert 0 < pace.product_share <= 1
    assert 0 <= pace.reading_share <= 1
    assert 0 < pace.moving_share <= 1
    assert 0 <= pace.small_seconds <= pace.least_seconds


def test_what_was_measured_on_a_chip_stands_in_place_of_the_shipped_pace() -> None:
    """A share of 0 is one that was not measured, and the shipped one holds."""
    shipped = pace_of(parse_slice("v5e:4x4"))
    assert (shipped.product_share, shipped.moving_share) == (0.7, 0.5)
    rates = Rates((), 7e11, (), (), 16, "TPU v5 lite", "2026-11-30", "0", 0.1, pace=PaceRates(product_share=0.6, small_seconds=0.3e-6))
    found = pace_of(parse_slice("v5e:4x4", measured=replace(chips()["v5e"], rates=rates)))
    assert (found.byte_rate, found.product_share, found.small_seconds) == (7e11, 0.6, 0.3e-6)
    assert (found.moving_share, found.least_seconds, found.clock) == (shipped.moving_share, shipped.least_seconds, shipped.clock)
    assert "2026-11-30" in found.evidence
