"""What passes between sublayers kept whole (`Phase.whole`): the same results, fewer collectives, exact accounts; chosen by price."""

from __future__ import annotations

import dataclasses

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import layout_from_toml, layout_to_toml, make_layout
from partinf.model.load import load_model_config
from partinf.planner.choose import plan
from partinf.planner.report import search
from partinf.transformer.account import Account, trace_account
from partinf.workload import DType, Workload
from tests.execution import test_two_accounts as accounts
from tests.execution.assignments import BLOCKS, FAMILIES, Assignment, sampled_assignments
from tests.execution.harness import MODEL, TOLERANCE, largest_error, make_plan


def whole(layout: Layout) -> Layout:
    phases = {label: dataclasses.replace(layout.phase(label), whole=True, loop=None) for label in ("prefill", "decode")}
    return dataclasses.replace(layout, **phases)


@pytest.mark.parametrize("kind", accounts.BUCKETS)
@pytest.mark.parametrize("assignment", sampled_assignments(4, seed=21), ids=str)
def test_both_accounts_agree(assignment: Assignment, kind: str) -> None:
    given = accounts.plan_of(assignment)
    accounts.check(dataclasses.replace(given, layout=whole(given.layout)), accounts.BUCKETS[kind])


def test_both_accounts_agree_in_a_pipeline() -> None:
    mesh, layout = accounts.STAGED["two stages"]
    model = dataclasses.replace(accounts.MODEL, num_layers=4)
    accounts.check(accounts.make_plan(mesh, whole(layout), model=model), accounts.BUCKETS["mixed"])


SLOW = ("gpt", "parallel, two norms")  # test_norms.py has both kinds of blocks and of norms among its quick tests


@pytest.mark.parametrize("family", ["local and global", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_step_equals_the_reference(family: str) -> None:
    model = dataclasses.replace(MODEL, name=f"whole-{family}", **{**FAMILIES, **BLOCKS}[family])
    storage, attention = {"x": "embed", "y": "ffn", "z": "ffn"}, {"x": "batch", "y": "heads", "z": "heads"}
    assert largest_error(make_plan("2x2x2", whole(make_layout(storage, attention, prefill_gather="y")), model)) < TOLERANCE["f32"]


def test_a_tensor_parallel_layer_has_two_collectives() -> None:
    layout = make_layout({"x": "ffn"}, {"x": "heads"})
    split, once = (trace_account(accounts.make_plan("8", given), accounts.BUCKETS["decode"]) for given in (layout, whole(layout)))
    rows, layers = 16, 3
    norms, activations = rows * 4 * 8, rows * MODEL.embed_dim * 2

    def count(account: Account, op: str, num_bytes: int) -> int:
        return sum(count for one, count in account.collectives.items() if (one.op, one.num_bytes) == (op, num_bytes))

    assert count(once, "all-gather", norms) == 0  # of whole rows, as the last norm's are
    assert count(split, "all-gather", norms) == 2 * layers
    assert [count(split, op, activations) for op in OPS] == [2 * layers + 1, 2 * layers, 0]  # rows to the table of logits
    assert [count(once, op, activations) for op in OPS] == [1, 0, 2 * layers]  # embedded tokens are gathered once


OPS = ("all-gather", "reduce-scatter", "all-reduce")


def test_it_is_chosen_where_rows_are_few() -> None:
    model, slice_ = load_model_config("llama-3-70b"), parse_slice("v5e:4x4")
    kinds = {"weights": DType.INT8, "kv": DType.INT8}
    few = plan(model, slice_, Workload(batch=8, phase="decode", context_len=2048, **kinds))
    many = plan(model, slice_, Workload(batch=1, phase="prefill", input_len=8192, **kinds))
    assert few.layout.decode.whole
    assert not many.layout.prefill.whole
    (name, ledger), *_ = few.predicted
    assert name == "decode"
    assert ledger.seconds == pytest.approx(search(model, slice_, Workload(batch=8, phase="decode", context_len=2048, **kinds)).best.score)


def test_it_is_data_of_the_phase() -> None:
    layout = make_layout({"x": "ffn"}, {"x": "heads"}, decode_whole=True)
    again, _ = layout_from_toml(layout_to_toml(layout), "here")
    assert again == layout
    assert (again.prefill.whole, again.decode.whole) == (False, True)
    with pytest.raises(InvalidInput, match="decode: loops over 'x', but what passes between sublayers is whole"):
        make_layout({"x": "ffn"}, {"x": "heads"}, decode_whole=True, decode_loop={"axis": "x"})
