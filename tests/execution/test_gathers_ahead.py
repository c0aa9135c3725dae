"""Weights gathered ahead give the same results with the same collectives, only earlier."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

from partinf.buckets import split_of
from partinf.cost.memory import activation_bytes
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED
from partinf.cost.step import step_ledger
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout, Phase
from partinf.layout.files import layout_from_toml, layout_to_toml, make_layout
from partinf.model.config import Block
from partinf.model.load import load_model_config
from partinf.partition.sharding import abstract_mesh
from partinf.planner.choose import plan
from partinf.plans import Bucket
from partinf.transformer.account import trace_account
from partinf.transformer.batch import stacked
from partinf.transformer.params import abstract_params
from partinf.transformer.step import abstract_state, build_step
from partinf.workload import DType, Workload
from tests.execution.assignments import BLOCKS, FAMILIES
from tests.execution.harness import MODEL, TOLERANCE, largest_error, make_plan


def layout(gather: str, ahead: bool = True) -> Layout:
    storage = {"x": "embed", "y": "ffn", "z": "ffn"}
    attention = {"x": "batch", "y": "batch", "z": "heads"}
    gathers = {"decode_gather": gather, "prefill_gather": gather, "decode_ahead": ahead, "prefill_ahead": ahead}
    return make_layout(storage, attention, **gathers)


@pytest.mark.parametrize(("gather", "family"), [("xyz", "palm"), ("x", "gpt"), ("xz", "llama")])
def test_a_step_equals_the_reference(gather: str, family: str) -> None:
    model = dataclasses.replace(MODEL, name=f"ahead-{family}", **FAMILIES.get(family, {}))
    assert largest_error(make_plan("2x2x2", layout(gather), model)) < TOLERANCE["f32"]


def test_int8_weights_and_layers_that_are_unrolled() -> None:
    assert largest_error(make_plan("2x2x2", layout("xy"), dtype=DType.INT8)) < TOLERANCE["int8"]
    assert largest_error(make_plan("2x2x2", layout("xy")), unrolled=True) < TOLERANCE["f32"]


def test_layers_of_several_kinds_equal_the_reference() -> None:
    """A prefix, a period that is scanned, and a layer after it, each gathered by the one before."""
    model = dataclasses.replace(MODEL, name="ahead-kinds", **BLOCKS["norms after, three kinds"])
    assert largest_error(make_plan("2x2x2", layout("xz"), model)) < TOLERANCE["f32"]


@pytest.mark.parametrize(
    "block", [{"num_layers": 1}, {"num_layers": 3}, *map(BLOCKS.get, ("local and global", "norms after, three kinds"))]
)
def test_every_weight_is_gathered_once_per_layer(block: dict[str, Any]) -> None:
    model = dataclasses.replace(MODEL, **block)
    accounts = [trace_account(make_plan("2x2x2", layout("xyz", ahead), model), Bucket(16, 8)) for ahead in (True, False)]
    assert accounts[0] == accounts[1]


def test_the_carry_brings_the_next_layers_first_weights() -> None:
    model = dataclasses.replace(MODEL, name="ahead-deep", num_layers=4)
    plan, bucket = make_plan("2x2x2", layout("xyz"), model), Bucket(16, 8)
    mesh = abstract_mesh(plan)
    step = build_step(plan, mesh, bucket, unrolled=False, plain=True)
    traced = jax.make_jaxpr(step)(abstract_params(plan, mesh, False), abstract_state(plan, mesh, False), stacked(bucket, plan))
    (inner,) = (equation.params["jaxpr"] for equation in traced.jaxpr.eqns if equation.primitive.name == "shard_map")
    (scan,) = (equation for equation in inner.eqns if equation.primitive.name == "scan")
    carried = {tuple(variable.aval.shape) for variable in scan.outvars}
    assert {(model.num_heads, model.head_dim, model.embed_dim), (2, model.ffn_dim, model.embed_dim)} <= carried
    assert scan.params["length"] == model.num_layers - 1


def test_a_plan_gathers_ahead_where_that_helps_and_memory_allows() -> None:
    """Llama's serial block on eight v5e has use and room for it, not with a longer prompt; PaLM's parallel block has no use."""

    def prefill(name: str, slice_name: str, length: int, weights: DType) -> Phase:
        workload = Workload(batch=1, input_len=length, phase="prefill", weights=weights)
        return plan(load_model_config(name), parse_slice(slice_name), workload).layout.prefill

    llama, longer, palm = (
        prefill("llama-3-70b", "v5e:4x2", 8192, DType.INT8),
        prefill("llama-3-70b", "v5e:4x2", 98304, DType.INT8),
        prefill("palm-62b", "v4:2x4x4", 1 << 16, DType.BF16),
    )
    assert all(phase.gather for phase in (llama, longer, palm))
    assert [phase.ahead for phase in (llama, longer, palm)] == [True, False, False]


def test_what_is_gathered_ahead_is_priced_behind_the_layers_and_takes_memory() -> None:
    """A TPU runs a parallel block's gathers behind its products wherever they stand, without memory for more of them than there is. Layers
    run in a loop here: one by one their matrices are fetched early too, which is another overlap."""

    def priced(ahead: bool, slice_name: str, block: Block) -> tuple[float, int]:
        given = make_plan("2x2x2", layout("xyz", ahead), dataclasses.replace(MODEL, block=block))
        given = dataclasses.replace(given, slice=parse_slice(slice_name, "x:2,y:2,z:2"))
        split = split_of(given, Bucket(64, 8), Pricing(given.slice, program=dataclasses.replace(TILED, either_layers=False)))
        return sum(entry.overlapped * entry.count for entry in step_ledger(split).entries), activation_bytes(split)

    (alone, least), (hidden, more) = (priced(ahead, "v4:2x2x2", Block.SERIAL) for ahead in (False, True))
    assert hidden > alone == 0
    assert more > least
    assert priced(False, "v4:2x2x2", Block.PARALLEL)[0] == priced(True, "v4:2x2x2", Block.PARALLEL)[0] > 0
    assert priced(False, "h200:8", Block.PARALLEL)[0] == 0


def test_it_is_data_of_the_phase() -> None:
    given = dataclasses.replace(layout("x"), decode=dataclasses.replace(layout("x").decode, ahead=False))
    again, _ = layout_from_toml(layout_to_toml(given), "here")
    assert again == given
    assert (again.prefill.ahead, again.decode.ahead) == (True, False)
    with pytest.raises(InvalidInput, match="decode: gathers ahead, but gathers no weights"):
        layout("")
    with pytest.raises(InvalidInput, match="ahead = 'yes'; expected true or false"):
        layout_from_toml(layout_to_toml(layout("x")).replace("ahead = true", 'ahead = "yes"'), "here")
