"""Looped collectives against their plain twins: by themselves over every ring, and in the whole step against the reference."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout, Loop, Ring
from partinf.layout.files import layout_from_toml, layout_to_toml, make_layout
from partinf.partition.collective_matmul import gather_multiply, multiply_scatter
from partinf.partition.collectives import Frame, Split
from partinf.partition.sharding import device_mesh
from partinf.plans import Bucket, Plan
from partinf.transformer.account import Account, trace_account
from partinf.workload import DType
from tests.execution.assignments import FAMILIES
from tests.execution.harness import MODEL, TOLERANCE, largest_error, make_plan

ROWS, COLUMNS, OUT = 6, 48, 5


@pytest.mark.parametrize("ring", Ring)
@pytest.mark.parametrize(("mesh", "axis"), [("8x1", "x"), ("4x2", "x"), ("4x2", "y"), ("2x4", "y")])
def test_both_forms_of_a_collective_matmul(mesh: str, axis: str, ring: Ring) -> None:
    """Columns over (x, y): gathered and multiplied; multiplied and scattered."""
    slice_ = parse_slice(f"cpu:{mesh}")
    layout = make_layout({"x": "ffn", "y": "replica"}, {"x": "none", "y": "none"})
    devices, sizes = device_mesh(Plan(MODEL, slice_, layout)), slice_.axis_sizes
    frame = Frame((), ("x", "y"), sizes)
    every, none = Split(cols=("x", "y")), Split()
    rng = np.random.default_rng(5)
    x, hidden = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((ROWS, COLUMNS), (8, ROWS, 3)))
    first, second = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((OUT, COLUMNS), (8, COLUMNS, 3)))

    marks = jnp.arange(1.0, ROWS + 1)  # of rows: a product is given which ones it has, whatever goes around

    def run(loop: Loop | None) -> tuple[jax.Array, jax.Array]:
        def local(x: jax.Array, hidden: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
            entering = lambda part, cut, rows: (part @ cut(first, 1, None).T * marks[rows, None],)  # noqa: E731
            (gathered,) = gather_multiply(x, frame, every, none, loop, entering)
            product = lambda cut, rows: hidden[0, rows] @ cut(second[0], 0, None).T  # noqa: E731
            scattered = multiply_scatter(product, frame, ROWS, Split(unreduced=("x", "y")), every, loop, jnp.float32)
            return gathered, scattered

        whole, split = P(), P(None, ("x", "y"))
        mapped = jax.shard_map(
            local, mesh=devices, in_specs=(split, P(("x", "y")), P(("x", "y"))), out_specs=(whole, split), check_vma=False
        )
        return jax.jit(mapped)(x, hidden, second)

    wanted = x @ first.T * marks[:, None], jnp.einsum("drf,dcf->rc", hidden, second)
    for plain, looped, want in zip(run(None), run(Loop(axis, ring)), wanted, strict=True):
        np.testing.assert_allclose(plain, want, atol=3e-5)
        np.testing.assert_allclose(looped, want, atol=3e-5)


def looped_layout(axis: str, ring: str, gather: str = "") -> Layout:
    loop = {"axis": axis, "ring": ring}
    attention = {"x": "batch", "y": "batch", "z": "heads"}
    return make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, attention, decode_loop=loop, prefill_loop=loop, prefill_gather=list(gather))


@pytest.mark.parametrize(("axis", "ring", "family"), [("y", "one-way", "palm"), ("z", "halves", "gpt"), ("z", "both-ways", "llama")])
def test_a_step_with_loops_equals_the_reference(axis: str, ring: str, family: str) -> None:
    model = dataclasses.replace(MODEL, name=f"looped-{family}", **FAMILIES.get(family, {}))
    assert largest_error(make_plan("2x2x2", looped_layout(axis, ring, "x"), model, prefill_from_tokens=16)) < TOLERANCE["f32"]


def test_the_sum_of_a_parallel_block_goes_around_in_bfloat16() -> None:
    model = dataclasses.replace(MODEL, name="looped-palm", **FAMILIES["palm"])
    plan = make_plan("2x2x2", looped_layout("y", "both-ways"), model, dtype=DType.BF16)
    assert largest_error(plan) < TOLERANCE["bf16"]


@pytest.mark.parametrize("ring", Ring)
def test_a_loop_over_a_long_axis(ring: Ring) -> None:
    layout = make_layout({"x": "ffn", "y": "embed"}, {"x": "heads", "y": "batch"}, decode_loop={"axis": "x", "ring": ring})
    assert largest_error(make_plan("4x2", layout)) < TOLERANCE["f32"]


@pytest.mark.parametrize("gathers", [True, False])
def test_int8_weights_with_loops(gathers: bool) -> None:
    loop = {"axis": "y", "gathers": gathers}
    layout = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, dict.fromkeys("xyz", "batch"), decode_loop=loop)
    assert largest_error(make_plan("2x2x2", layout, dtype=DType.INT8)) < TOLERANCE["int8"]


@pytest.mark.parametrize("ring", Ring)
def test_a_loop_sends_what_the_plain_collective_moves(ring: Ring) -> None:
    """Bytes by axes: a ring of n sends n - 1 parts, as a gather of n parts or a scatter into n does; FLOPs are the same."""

    def account(loop: dict[str, str] | None) -> Account:
        layout = make_layout({"x": "embed", "y": "ffn"}, {"x": "batch", "y": "batch"}, decode_loop=loop)
        return trace_account(make_plan("2x4", layout), Bucket(16, 8))

    def moved(account: Account) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter()
        for one, count in account.collectives.items():
            ways = int(np.prod([{"x": 2, "y": 4}[axis] for axis in one.axes]))
            parts = {"collective-permute": ways, "all-reduce": 2 * (ways - 1)}.get(one.op, ways - 1)
            found[one.axes] += one.num_bytes * parts * count // ways
        return found

    plain, looped = account(None), account({"axis": "y", "ring": ring})
    ops = Counter(
        {op: sum(count for one, count in looped.collectives.items() if one.op == op) for op in ("all-gather", "collective-permute")}
    )
    assert ops["collective-permute"] == (6 if ring is Ring.HALVES else 3) * 4 * MODEL.num_layers  # twice in and twice out of a layer
    assert moved(looped) == moved(plain)
    assert plain.dot_flops == looped.dot_flops


def test_a_loop_is_data() -> None:
    layout = looped_layout("z", "halves")
    again, _ = layout_from_toml(layout_to_toml(layout), "here")
    assert again == layout
    assert again.decode.loop == Loop("z", Ring.HALVES)
    scatters = make_layout({"x": "ffn"}, {"x": "batch"}, decode_loop={"axis": "x", "gathers": False})
    assert layout_from_toml(layout_to_toml(scatters), "here")[0] == scatters


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        ({"axis": "x"}, "decode: loops over 'x', which splits no d_ff in this phase; those that do: y, z"),
        ({"ring": "both-ways"}, "decode loop: `axis` is missing"),
        ({"axis": "z", "ring": "halfs"}, "decode loop: unknown role 'halfs'; did you mean 'halves'?"),
        ({"axis": "z", "way": "left"}, "decode loop: unknown key 'way'"),
        ({"axis": "z", "gathers": "no"}, "decode loop: `gathers` is true or false, not 'no'"),
    ],
)
def test_wrong_loops_are_refused(loop: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, dict.fromkeys("xyz", "batch"), decode_loop=loop)
    assert any(offence.startswith(words) for offence in caught.value.offences), caught.value.offences
