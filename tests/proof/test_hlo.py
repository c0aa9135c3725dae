"""Reading compiled programs, on small texts in the compiler's notation."""

from __future__ import annotations

import importlib.util
import math

import pytest

from partinf.cost.collectives import Network
from partinf.hardware.slices import parse_slice
from partinf.proof.hlo import Module, groups, shapes
from partinf.proof.schedule import CARRIERS, Reader, Schedule, axes_of
from partinf.proof.traffic import collective_op, hbm_bytes

SLICE = parse_slice("v4:2x2x2")
X, YZ = "{{0,4},{1,5},{2,6},{3,7}}", "{{0,1,2,3},{4,5,6,7}}"

PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[64,128]{1,0:T(8,128)(2,1)})->bf16[64,128]{1,0}}

FileNames
1 "/somewhere/partinf/transformer/forward.py"
2 "/somewhere/partinf/transformer/ffn.py"
3 "/somewhere/partinf/partition/collectives.py"

FunctionNames
1 "forward"
2 "ffn"
3 "move"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=20 end_line=20 column=1 end_column=2}
3 {file_name_id=3 function_name_id=3 line=30 end_line=30 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%add.1 (reduce_scatter.1: bf16[], reduce_scatter.2: bf16[]) -> bf16[] {
  %reduce_scatter.1 = bf16[] parameter(0)
  %reduce_scatter.2 = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%reduce_scatter.1, %reduce_scatter.2)
}

%fused (p.0: bf16[3,64,128], p.1: s32[]) -> bf16[1,64,128] {
  %p.0 = bf16[3,64,128]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %slice = bf16[1,64,128]{2,1,0} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,64,128}
}

%body (arg: (s32[], bf16[64,128], bf16[3,64,128])) -> (s32[], bf16[64,128], bf16[3,64,128]) {
  %arg = (s32[], bf16[64,128]{1,0}, /*index=2*/bf16[3,64,128]{2,1,0}) parameter(0)
  %index = s32[] get-tuple-element(%arg), index=0
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %weights = bf16[3,64,128]{2,1,0} get-tuple-element(%arg), index=2
  %layer = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%weights, %index), kind=kLoop, calls=%fused, @CYCLES@
  %pair = (s32[], bf16[64,128]{1,0}, bf16[64,128]{1,0}) custom-call(%x), custom_call_target="whatever"
  %second = bf16[64,128]{1,0} get-tuple-element(%pair), index=2
  %copied = bf16[64,128]{1,0} copy(%second)
  %ar = bf16[64,128]{1,0} all-reduce(%x), replica_groups=@X@, to_apply=%add.1
  %start = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) all-gather-start(%ar), replica_groups=@YZ@, dimensions={0}, @AT@
  %work = bf16[64,128]{1,0:S(1)} fusion(%ar), kind=kLoop, calls=%nothing, backend_config={"estimated_cycles":"1050"}
  %done = bf16[256,128]{1,0} all-gather-done(%start)
  ROOT %out = (s32[], bf16[64,128]{1,0}, bf16[3,64,128]{2,1,0}) tuple(%index, %ar, %weights)
}

%condition (arg.1: (s32[], bf16[64,128], bf16[3,64,128])) -> pred[] {
  %arg.1 = (s32[], bf16[64,128]{1,0}, bf16[3,64,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg.1), index=0
  %three = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

ENTRY %main (a: bf16[64,128], w: bf16[3,64,128]) -> bf16[64,128] {
  %zero = s32[] constant(0)
  %a = bf16[64,128]{1,0} parameter(0), metadata={op_name="batch"}
  %w = bf16[3,64,128]{2,1,0} parameter(1), metadata={op_name="params[\\'layers\\'][\\'wo\\']"}
  %t = (s32[], bf16[64,128]{1,0}, bf16[3,64,128]{2,1,0}) tuple(%zero, %a, %w)
  %loop = (s32[], bf16[64,128]{1,0}, bf16[3,64,128]{2,1,0}) while(%t), condition=%condition, body=%body
  ROOT %r = bf16[64,128]{1,0} get-tuple-element(%loop), index=1
}
"""
CYCLES = 'backend_config={"estimated_cycles":"2100"}'
AT = 'metadata={op_name="jit(step)/all_gather" stack_frame_id=3}'


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(PROGRAM.replace("@X@", X).replace("@CYCLES@", CYCLES).replace("@YZ@", YZ).replace("@AT@", AT))


@pytest.fixture(scope="module")
def schedule(module: Module) -> Schedule:
    return Reader(module, SLICE, Network(SLICE)).read()


def test_a_loop_runs_as_often_as_its_condition_says(module: Module) -> None:
    assert [(block.name, times) for block, times in module.blocks()] == [("main", 1), ("body", 3)]


def test_a_slice_of_stacked_weights_reads_one_layer(module: Module) -> None:
    body = module.computations["body"]
    assert hbm_bytes(module, body, body.by_name["layer"]) == 64 * 128 * 2 + 4  # and the index; the result stays on the chip


def test_what_an_instruction_reads_is_named_by_where_it_comes_from(module: Module) -> None:
    body = module.computations["body"]
    assert module.argument(body, body.by_name["layer"]) == "params['layers']['wo']"
    assert module.argument(body, body.by_name["copied"]) == ""  # second of another tuple than the loop's
    assert module.argument(body, body.by_name["ar"]) == ""  # the batch is neither


def test_collectives_have_kind_axes_bytes_and_count(schedule: Schedule) -> None:
    found = {(c.op, c.axes, c.dtype, c.bytes, c.count, c.requested) for c in schedule.collectives}
    assert found == {
        ("all-reduce", ("x",), "bfloat16", 64 * 128 * 2, 3, "reduce-scatter"),  # its reduction shows what was requested
        ("all-gather", ("y", "z"), "bfloat16", 256 * 128 * 2, 3, "all-gather"),
    }


def test_the_source_is_the_line_that_caused_the_movement(schedule: Schedule) -> None:
    (gather,) = (c for c in schedule.collectives if c.op == "all-gather")
    assert gather.source_op == "partinf/transformer/ffn.py:20 ffn"


def test_modules_that_move_for_others_are_where_the_reader_looks_for_them() -> None:
    for path in CARRIERS:
        assert importlib.util.find_spec(path.removesuffix(".py").replace("/", ".")) is not None, path


def test_work_between_start_and_done_hides_as_much_as_it_takes(schedule: Schedule) -> None:
    gather, reduce = sorted(schedule.collectives, key=lambda c: c.op)
    assert gather.overlapped_fraction == pytest.approx(min(1.0, 1e-6 / gather.seconds))  # 1050 cycles of 1.05 GHz
    assert 0 < gather.overlapped_fraction < 1
    assert reduce.overlapped_fraction == 0


def test_a_loop_between_start_and_done_hides_what_it_runs() -> None:
    text = PROGRAM.replace("@X@", X).replace("@CYCLES@", CYCLES).replace("@YZ@", YZ).replace("@AT@", AT)
    begin = (
        "  %begin = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) all-gather-start(%a), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}"
    )
    end = "  %end = bf16[256,128]{1,0} all-gather-done(%begin)"
    text = text.replace("  %loop = ", f"{begin}\n  %loop = ").replace("  ROOT %r = ", f"{end}\n  ROOT %r = ")
    (around,) = (c for c in Reader(Module(text), SLICE, Network(SLICE)).read().collectives if c.op == "all-gather" and c.axes == ("x",))
    assert around.overlapped_fraction == pytest.approx(min(1.0, 3 * 3150 / 1.05e9 / around.seconds))


def test_every_instruction_takes_the_longer_of_cycles_and_bytes(schedule: Schedule) -> None:
    array = 64 * 128 * 2
    moved = (3 * array + 4) + 2 * array  # what has no cycles: the custom call and the copy
    assert schedule.compute_seconds == pytest.approx(3 * (3150 / 1.05e9 + moved / (0.95 * 1.2e12)))
    assert schedule.seconds == pytest.approx(schedule.compute_seconds + sum(c.exposed_seconds for c in schedule.collectives))
    copy = next(work for work in schedule.work if work.moves)
    assert (copy.count, copy.what) == (3, "fusion of params['layers']['wo'] bf16[1, 64, 128]")


def test_groups_in_all_notations() -> None:
    def collective(text: str):  # type: ignore[no-untyped-def]
        line = f"ENTRY %m (a: f32[8]) -> f32[8] {{\n  ROOT %r = f32[8]{{0}} all-reduce(%a), replica_groups={text}, to_apply=%s\n}}"
        return Module(line).computations["m"].instructions[0]

    assert groups(collective("{{0,1},{2,3}}")) == [(0, 1), (2, 3)]
    assert groups(collective("[2,4]<=[8]")) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert groups(collective("[4,2]<=[2,4]T(1,0)")) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert groups(collective("mesh['a'=2,'b'=4] {'b'}")) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert groups(collective("mesh['a'=2,'b'=4] {'a','b'}")) == [tuple(range(8))]
    assert groups(collective("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}")) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert groups(collective("mesh['a'=2,'b'=4] {'b':(2)2}")) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups(collective("mesh['a'=2,'b'=4] {'b':(1)2}")) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    with pytest.raises(ValueError, match="cannot be read"):
        groups(collective("somehow"))
    sizes = {"x": 2, "y": 2, "z": 2}
    assert axes_of([(0, 4), (1, 5)], sizes) == ("x",)
    assert axes_of([(0, 1, 2, 3)], sizes) == ("y", "z")
    assert axes_of([(0, 5)], sizes) == ("x", "z")
    assert axes_of([], sizes) == ()


def test_transfers_between_slices_are_collectives() -> None:
    def op(kind: str) -> str | None:
        line = (
            f"  %s = (bf16[8]{{0}}, u32[], token[]) send(%a, %t), channel_id=2, frontend_attributes={{_xla_megascale_transfer_type={kind}}}"
        )
        return collective_op(Module(f"ENTRY %m (a: bf16[8]) -> token[] {{\n{line}\n}}").computations["m"].instructions[0])

    assert [op(f'"{kind}"') for kind in ("ONE_TO_ONE", "ALL_REDUCE", "ALL_GATHER")] == ["collective-permute", "all-reduce", "all-gather"]
    assert op("none") is None  # to the host, not to another slice
    with pytest.raises(ValueError, match="SOMETHING between slices"):
        op('"SOMETHING"')


@pytest.mark.parametrize(("sent", "arriving"), [(16, 64), (64, 16)])
def test_rows_that_are_exchanged_count_the_places_of_those_that_a_device_may_send(sent: int, arriving: int) -> None:
    numbers = "".join(f"  %n{number} = s32[8]{{0}} constant(0)\n" for number in range(4))
    exchange = f'ragged-all-to-all(%a, %b, %n0, %n1, %n2, %n3), replica_groups={X}, metadata={{op_name="jit(step)/ragged_all_to_all"}}'
    text = (
        f"ENTRY %m (a: bf16[{sent},128], b: bf16[{arriving},128]) -> bf16[{arriving},128] {{\n"
        f"  %a = bf16[{sent},128]{{1,0}} parameter(0)\n  %b = bf16[{arriving},128]{{1,0}} parameter(1)\n{numbers}"
        f"  ROOT %r = bf16[{arriving},128]{{1,0}} {exchange}\n}}"
    )
    (found,) = Reader(Module(text), SLICE, Network(SLICE)).read().collectives
    assert (found.op, found.axes, found.bytes, found.requested) == ("all-to-all", ("x",), 16 * 128 * 2, "all-to-all")


def test_shapes_know_their_memory() -> None:
    on_chip, in_hbm = shapes("(bf16[2,64]{1,0:T(8,128)(2,1)S(3)}, s8[4,4]{1,0:T(32,128)(4,1)})")
    assert (on_chip.num_bytes, on_chip.hbm_bytes) == (256, 0)
    assert in_hbm.num_bytes == 16
    assert in_hbm.hbm_bytes == 32 * 128  # a tile is moved whole


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("f32[655360,16]{1,0:T(8,128)}", 655360 * 128),  # rows of 16 in rows of 128
        ("f32[655360,16]{0,1:T(8,128)}", 655360 * 16),  # the other way about nothing is lost
        ("f16[8,1,2048]{2,1,0:T(2,128)(2,1)}", 8 * 2 * 2048),
        ("f16[8,1,2048]{2,0,1:T(8,128)(2,1)}", 8 * 2048),
        ("bf16[8200]{0:T(1024)(128)(2,1)}", 9 * 1024),
        ("s32[5]{0:T(8,128)}", 128),
        ("s32[]{:T(128)}", 1),
        ("f32[3,5]{1,0}", 15),
        ("f32[3,5]", 15),
    ],
)
def test_tiles_are_filled_up(text: str, elements: int) -> None:
    (shape,) = shapes(text)
    assert shape.stored_bytes == elements * (shape.num_bytes // max(1, math.prod(shape.dims)))
